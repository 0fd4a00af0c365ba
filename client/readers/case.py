"""One image with what is known about it, before its pixels are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.study import Study


class Split(StrEnum):
    """The part of a data set a case belongs to."""

    TRAIN = "train"
    VALIDATION = "val"
    TEST = "test"


@dataclass(frozen=True)
class Case:
    """Private. One image of one patient.

    Attributes:
      name: File, or place in the file, for error messages.
      patient: The patient's id; images of one patient share a split and one clip.
      split: The data set's own split, or None where it has none.
      target: A class index, or one 0/1 entry per label.
      load: Reads the pixels, shape (channels, height, width), any number type.
    """

    name: str
    patient: str
    split: Split | None
    target: NDArray[np.int64]
    load: Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class Wanted:
    """What a study expects a data set to hold."""

    labels: str  # binary, multiclass or multilabel
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, ...]  # pixels

    @classmethod
    def by(cls, study: Study) -> Wanted:
        """What this study expects."""
        return cls(study.task.labels, study.task.classes, study.input.channels, study.input.size)


def class_target(index: int, wanted: Wanted) -> NDArray[np.int64]:
    """The target of an image that has exactly one class."""
    if wanted.labels == "multilabel":
        return np.array([place == index for place in range(len(wanted.classes))], np.int64)
    return np.asarray(index, np.int64)
