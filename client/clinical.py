"""Cells of a clinical table to the numbers a network takes. No message holds a cell's value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from client.config import ISO
from common.errors import DataError
from common.study import CategoryColumn, Column, DateColumn, NumberColumn, Table

EMPTY = {"", "na", "n/a", "nan", "nat", "none", "null", "?", "-", "."}  # in small letters


@dataclass(frozen=True)
class Forms:
    """How a site's table writes numbers and days."""

    decimal: str = "."
    date: str = ISO


def features_of(
    cells: Mapping[str, str], table: Table, forms: Forms, where: str
) -> NDArray[np.float32]:
    """The numbers of one row.

    Args:
      cells: By column.
      table: The study's columns.
      forms: Of the site's table.
      where: File and line, for messages.

    Returns:
      Shape (table.num_features,): the columns in the study's order, then what was empty.

    Raises:
      DataError: A column or a value is missing, or cannot be read; the message names the column.
    """
    values: list[float] = []
    missing: list[float] = []
    for column in table.columns:
        if column.name not in cells:
            raise DataError(
                f"{where}: no column {column.name!r}, which the study reads; add it to the table"
            )
        cell = cells[column.name].strip()
        is_empty = _is_empty(cell, column)
        if is_empty and table.missing == "refuse":
            raise DataError(
                f"{where}: column {column.name!r} is empty; complete it, take the row out, or ask "
                'the coordinator for table.missing = "indicator"'
            )
        missing.append(float(is_empty))
        values += [0.0] * column.width if is_empty else _numbers(cell, column, forms, where)
    if table.missing == "indicator":
        values += missing
    with np.errstate(over="ignore"):
        features = np.array(values, np.float32)
    if not np.isfinite(features).all():
        raise DataError(
            f"{where}: a number is too large once it is scaled; correct it, or ask the coordinator "
            "about mean, std, low and high of the study's columns"
        )
    return features


def count_empty(cells: Mapping[str, str], table: Table) -> list[str]:
    """Names of the study's columns that are empty in a row."""
    return [
        column.name
        for column in table.columns
        if _is_empty(cells.get(column.name, "").strip(), column)
    ]


def _is_empty(cell: str, column: Column) -> bool:
    """What a study lists as a value is one, even where others write it for nothing."""
    if isinstance(column, CategoryColumn) and cell in column.values:
        return False
    return cell.lower() in EMPTY


def _numbers(cell: str, column: Column, forms: Forms, where: str) -> list[float]:
    if isinstance(column, NumberColumn):
        return [_number(cell, column, forms, where)]
    if isinstance(column, DateColumn):
        return [_days(cell, column, forms, where)]
    return _place(cell, column, where)


def _number(cell: str, column: NumberColumn, forms: Forms, where: str) -> float:
    value = _parsed(cell, forms.decimal)
    if not math.isfinite(value):
        other = "," if forms.decimal == "." else "."
        raise DataError(
            f"{where}: column {column.name!r} holds no number; correct it, or set data.decimal = "
            f'"{other}" where the table writes numbers so'
        )
    low, high = column.low, column.high
    if (low is not None and value < low) or (high is not None and value > high):
        raise DataError(
            f"{where}: column {column.name!r} is outside the study's range, {low} to {high}; is it "
            "in another unit?"
        )
    return (value - column.mean) / column.std


def _parsed(cell: str, decimal: str) -> float:
    """The number in a cell; NaN if there is none."""
    if "_" in cell or (decimal != "." and "." in cell):
        return math.nan
    try:
        return float(cell.replace(decimal, "."))
    except ValueError:
        return math.nan


def _days(cell: str, column: DateColumn, forms: Forms, where: str) -> float:
    try:
        day = datetime.strptime(cell, forms.date).date()  # noqa: DTZ007 - a day has no zone
    except ValueError:
        raise DataError(
            f"{where}: column {column.name!r} holds no date of the form {forms.date}; give all "
            "rows one form, and set data.date_format to it"
        ) from None
    return (day - column.origin).days / column.days


def _place(cell: str, column: CategoryColumn, where: str) -> list[float]:
    if cell not in column.values:
        known = ", ".join(column.values)
        raise DataError(
            f"{where}: column {column.name!r} holds none of the study's values: {known}; correct it"
        )
    return [float(cell == value) for value in column.values]
