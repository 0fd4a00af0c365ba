"""One image with what is known about it, before its pixels are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.clinical import Forms
from client.readers.volume import Header
from common.study import Classification, Detection, Study

Labels = Literal["binary", "multiclass", "multilabel", "masks", "boxes"]


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
      target: A class index, or one 0/1 entry per label; None where the target is a mask or boxes.
      load: Reads the pixels, shape (channels, *size), any number type.
      load_mask: Reads the mask, shape (*size): numbers of classes, ``OUTSIDE`` where it is not
        valid; None where the target is none.
      load_boxes: Reads boxes, shape (num_boxes, 5): left, upper, right and lower side in pixels of
        the file, and the class's number; None where the target is none.
      look: Reads the header without the pixels; None where such a file has none.
      columns: What a table says of the case, by column; a study may read some, and a simulation
        deal cases out by one.
      forms: How that table writes numbers and days.
    """

    name: str
    patient: str
    split: Split | None
    target: NDArray[np.int64] | None
    load: Callable[[], NDArray[Any]]
    load_mask: Callable[[], NDArray[np.uint8]] | None = None
    load_boxes: Callable[[], NDArray[np.float64]] | None = None
    look: Callable[[], Header] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    forms: Forms = field(default_factory=Forms)


@dataclass(frozen=True)
class Wanted:
    """What a study expects a data set to hold."""

    labels: Labels
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, ...]  # pixels
    colour: str = "luminance"  # which grey value of a colour file, where channels is 1
    window_of_file: bool = False  # grey values are those of the file's own window, 0 to 1
    images: bool = True  # without them a row of a table is all there is

    @classmethod
    def by(cls, study: Study) -> Wanted:
        """What this study expects."""
        labels: Labels = "boxes" if isinstance(study.task, Detection) else "masks"
        if isinstance(study.task, Classification):
            labels = study.task.labels
        config = study.input
        return cls(
            labels,
            study.task.classes,
            config.channels,
            config.size,
            config.colour,
            config.intensity == "file-window",
            images=bool(config.size),
        )


def class_target(index: int, wanted: Wanted) -> NDArray[np.int64]:
    """The target of an image that has exactly one class."""
    if wanted.labels == "multilabel":
        return np.array([place == index for place in range(len(wanted.classes))], np.int64)
    return np.asarray(index, np.int64)
