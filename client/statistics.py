"""This site's part of the federated statistics: what its images are like, as counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.clinical import count_empty
from client.config import Data
from client.contents import Contents, Intake
from client.dataset import Sample, read_samples
from client.readers.case import Split
from client.splits import Deal, dealt_cases
from common.errors import DataError
from common.study import Classification, Detection, Study
from common.tasks.boxes import NO_BOX
from common.tasks.statistics import MILLIMETRES, PIXELS, SPLITS, StatisticsTask, class_of

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Counted:
    """Private. Counts of a site's images, and digests of what was read for them."""

    counts: Counts  # (num_counts,)
    contents: Contents


def count_images(data: Data, study: Study, dealt: Deal | None = None) -> Counted:
    """Read every image once, one at a time; none is kept.

    Args:
      data: The ``[data]`` table of the site.
      study: What it asks to count.
      dealt: In a simulation, this site's part of a data set that several share.

    Raises:
      DataError: An image or label cannot be used.
    """
    task, intake = StatisticsTask(study), Intake(data.names_patients)
    counts = np.zeros(task.num_counts, np.int64)
    parts = task.views(counts)
    skipped: list[str] | None = [] if data.on_broken == "skip" else None
    for split, cases in dealt_cases(data, study, dealt).items():
        patients, place = set(), SPLITS.index(split.value)
        for sample in read_samples(cases, study, intake, skipped):
            patients.add(sample.case.patient)
            parts["images"][place] += 1
            if split is Split.TRAIN:
                _note(sample, task, parts)
        parts["patients"][place] = len(patients)
    return Counted(counts, intake.contents())


def _note(sample: Sample, task: StatisticsTask, parts: dict[str, Counts]) -> None:
    """Add one training image."""
    amount = amount_by_class(sample.target, task.study)
    parts["support"] += amount > 0
    if not isinstance(task.study.task, Classification):
        parts["amount"] += amount
    if task.columns and task.study.table is not None:
        empty = count_empty(sample.case.columns, task.study.table)
        parts["empty"] += np.array([name in empty for name in task.columns], np.int64)
    if not task.study.input.size:
        return
    parts["grey"] += np.stack([task.grey_counts(channel) for channel in sample.pixels])
    _add_lengths(parts["side"], sample.pixels.shape[1:], PIXELS)
    spacing = _spacing(sample)
    if spacing is None or len(spacing) != len(parts["spacing"]):
        parts["no_spacing"] += 1
    else:
        _add_lengths(parts["spacing"], spacing, MILLIMETRES)


def _spacing(sample: Sample) -> tuple[float, ...] | None:
    """What the file says; None where that is nothing, or cannot be."""
    try:
        header = sample.case.look() if sample.case.look else None
    except DataError:  # its pixels were read: nothing else is wrong with it
        return None
    if header is None or header.spacing is None:
        return None
    sound = all(math.isfinite(side) and side > 0 for side in header.spacing)
    return header.spacing if sound else None


def _add_lengths(axes: Counts, lengths: Sequence[float], which: tuple[float, float]) -> None:
    for axis, length in zip(axes, lengths, strict=True):
        axis[class_of(length, which)] += 1


def amount_by_class(target: NDArray[Any], study: Study) -> Counts:
    """Labels, pixels or boxes of each class in one image, shape (num_classes,)."""
    num = len(study.task.classes)
    if isinstance(study.task, Classification):
        multilabel = study.task.labels == "multilabel"
        numbers = np.flatnonzero(target) if multilabel else target.reshape(-1)
    elif isinstance(study.task, Detection):
        numbers = target[target[:, -1] != NO_BOX, -1]
    else:
        numbers = target[target < num]  # without pixels that are not valid
    return np.bincount(numbers.astype(np.int64), minlength=num)
