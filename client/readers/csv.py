"""Read a table that names images with their labels or masks.

One row is one image: a picture, a NIfTI or DICOM file, or the folder of a DICOM series. Paths are
relative to ``data.root``. In a study without images a row is what the cells say of a patient. A
class is given by its name; several labels by one column each, which holds 0 or 1, or by one column
with the names separated by ``|``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial

import numpy as np
from numpy.typing import NDArray

from client.clinical import Forms
from client.config import CsvData
from client.readers.case import Case, Split, Wanted, class_target
from client.readers.files import Source, load_classes, source_at
from common.errors import DataError

Row = Mapping[str, str]

SPLITS = {
    **dict.fromkeys(("train", "training"), Split.TRAIN),
    **dict.fromkeys(("val", "valid", "validation"), Split.VALIDATION),
    "test": Split.TEST,
}


def read_csv(data: CsvData, wanted: Wanted) -> list[Case]:
    """Cases of every row.

    Raises:
      DataError: The table is missing or empty, lacks a column, or a row's class or split is not
        known; the message names file, line and column, never a cell.
    """
    rows = read_rows(data, images=wanted.images)
    return [_case(data, wanted, row, line) for line, row in rows]


def read_rows(data: CsvData, *, images: bool = True) -> list[tuple[int, dict[str, str]]]:
    """Each row's line and cells by column, with every column that the configuration names.

    Without ``images`` no column needs to name any.

    Raises:
      DataError: The table cannot be read, is empty or lacks a column.
    """
    path = data.root / data.table
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Hospitals in much of Europe write tables with semicolons.
            header = file.readline()
            separator = _separator(header, file.readline())
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
            present = reader.fieldnames
            rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start + 1} is not UTF-8 (a table saved by an older Excel?); save "
            'it as "CSV UTF-8"'
        ) from None
    except (OSError, csv.Error) as error:
        fix = "set data.root and data.table"
        raise DataError(f"{path}: not a readable table ({error}); {fix}") from None
    asked = (data.image if images else None, data.target, data.patient, data.split, data.valid)
    for column in filter(None, asked):
        if column not in present:
            raise DataError(f"{path.name}: no column {column!r}{_meant(column, present)}")
    if twice := [column for column in present if present.count(column) > 1]:
        raise DataError(f"{path.name}: two columns are named {twice[0]!r}")
    for line, row in rows:
        if len(row) != len(present) or None in row.values():
            raise DataError(f"{path.name}, line {line}: not {len(present)} cells as in the header")
    if not rows:
        raise DataError(f"{path.name}: no row; a line per image is expected")
    return [(line, {column: cell.strip() for column, cell in row.items()}) for line, row in rows]


def _separator(header: str, row: str) -> str:
    """That by which the first row has as many cells as the header, and the header the most."""

    def fit(separator: str) -> tuple[bool, int]:
        lines = csv.reader([header, row], delimiter=separator)
        widths = [len(cells) for cells in lines]
        return len(set(widths)) == 1 and widths[0] > 1, widths[0] if widths else 0

    return max(",;\t", key=fit)


def _meant(column: str, present: Sequence[str]) -> str:
    """What to do; of a table without a header the first line names patients, so none is shown."""
    close = get_close_matches(column, present, 1)
    meant = f"; is it {close[0]!r}?" if close else ""
    return f" in its first line, which has {len(present)} cells{meant}"


def _case(data: CsvData, wanted: Wanted, row: Row, line: int) -> Case:
    where = f"{data.table}, line {line}"
    forms = Forms(data.decimal, data.date_format)
    if not wanted.images:
        return Case(
            name=where,
            patient=_filled(row, data.patient, where) if data.patient else where,
            split=_split(row, data, where),
            target=_target(data, wanted, row, where),
            load=partial(np.empty, 0, np.float32),
            columns=row,
            forms=forms,
        )
    source = source_at(data.root / _filled(row, data.image, where), wanted)
    masks = wanted.labels == "masks"
    target = None if masks else _target(data, wanted, row, where)
    return Case(
        name=where,
        patient=_filled(row, data.patient, where) if data.patient else source.patient or where,
        split=_split(row, data, where),
        target=target,
        load=source.load,
        load_mask=_mask_loader(data, wanted, row, where, source) if masks else None,
        look=source.look,
        columns=row,
        forms=forms,
    )


def _mask_loader(
    data: CsvData, wanted: Wanted, row: Row, where: str, source: Source
) -> partial[NDArray[np.uint8]]:
    if data.target is None:
        raise DataError(f"{data.table}: data.target must name the column with the masks")
    mask = data.root / _filled(row, data.target, where)
    valid = data.root / _filled(row, data.valid, where) if data.valid else None
    return partial(load_classes, mask, valid, source, wanted)


def _target(data: CsvData, wanted: Wanted, row: Row, where: str) -> NDArray[np.int64]:
    if data.target is None:
        return _columns_target(wanted, row, where)
    value = row.get(data.target, "")
    if wanted.labels != "multilabel":
        return class_target(_index(value, data.target, wanted.classes, where), wanted)
    names = [name.strip() for name in value.split("|") if name.strip()]
    target = np.zeros(len(wanted.classes), np.int64)
    for name in names:
        target[_index(name, data.target, wanted.classes, where)] = 1
    return target


def _columns_target(wanted: Wanted, row: Row, where: str) -> NDArray[np.int64]:
    """One column per class, named after it."""
    if wanted.labels != "multilabel":
        raise DataError(f"{where}: data.target must name the column with the class")
    values = [row.get(name, "") for name in wanted.classes]
    if unknown := [n for n, v in zip(wanted.classes, values, strict=True) if v not in ("0", "1")]:
        raise DataError(f"{where}: column {unknown[0]!r} must be there and hold 0 or 1")
    return np.array([value == "1" for value in values], np.int64)


def _index(value: str, column: str, classes: Sequence[str], where: str) -> int:
    if value not in classes:
        known = ", ".join(classes)
        raise DataError(f"{where}: column {column!r} holds no class of the study: {known}")
    return classes.index(value)


def _split(row: Row, data: CsvData, where: str) -> Split | None:
    if data.split is None:
        return None
    value = _filled(row, data.split, where).lower()
    if value not in SPLITS:
        raise DataError(f"{where}: column {data.split!r} is none of train, val, test")
    return SPLITS[value]


def _filled(row: Row, column: str, where: str) -> str:
    value = row.get(column, "")
    if not value:
        raise DataError(f"{where}: column {column!r} is empty")
    return value
