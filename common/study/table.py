"""Clinical columns beside an image, or alone: how every site turns a cell into numbers.

Scales are the study's constants: a mean or a list of values taken from a site's own patients would
be a release of its own.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config import Frozen, PrintableText
from common.study.training import Positive

# Readers take spaces around a cell away: a name with some would never be found.
Trimmed = Field(min_length=1, max_length=64, pattern=r"^\S(.*\S)?$")
ColumnName = Annotated[PrintableText, Trimmed]
Value = Annotated[PrintableText, Trimmed]


class _Column(Frozen):
    name: ColumnName

    @property
    def width(self) -> int:
        """Numbers that a cell becomes."""
        return 1


class NumberColumn(_Column):
    """A measurement: (value - mean) / std."""

    kind: Literal["number"]
    mean: float = 0.0
    std: Positive = 1.0
    low: float | None = None  # values below or above are refused: another unit, or a typing error
    high: float | None = None

    @model_validator(mode="after")
    def _check_range(self) -> NumberColumn:
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError("low must be below high")
        return self


class CategoryColumn(_Column):
    """One of several values: a 1 in the place of the value, 0 in the others."""

    kind: Literal["category"]
    values: Annotated[tuple[Value, ...], Field(min_length=2, max_length=256)]

    @model_validator(mode="after")
    def _check_values(self) -> CategoryColumn:
        if len(set(self.values)) != len(self.values):
            raise ValueError("values repeats one")
        return self

    @property
    def width(self) -> int:
        """See ``_Column``."""
        return len(self.values)


class DateColumn(_Column):
    """A day: days since ``origin``, divided by ``days``."""

    kind: Literal["date"]
    origin: date
    days: Positive = 365.25


Column = Annotated[NumberColumn | CategoryColumn | DateColumn, Field(discriminator="kind")]


class Table(Frozen):
    """The columns that a network sees, in this order."""

    columns: Annotated[tuple[Column, ...], Field(min_length=1, max_length=1024)]
    missing: Literal["refuse", "indicator"] = "refuse"
    """``indicator``: an empty cell is 0, and beside every column a 1 says that it was empty."""

    @model_validator(mode="after")
    def _check_names(self) -> Table:
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("two columns have one name")
        return self

    @property
    def num_features(self) -> int:
        """Numbers that a row becomes."""
        beside = len(self.columns) if self.missing == "indicator" else 0
        return sum(column.width for column in self.columns) + beside
