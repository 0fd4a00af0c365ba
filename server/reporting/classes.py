"""Test figures of single classes, from the summed counts: of images, pixels or boxes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from common.study import Classification, Study
from common.tasks import ClassificationTask, DetectionTask, SegmentationTask, task_of
from common.tasks.base import ratio
from common.tasks.classification import Counts
from common.tasks.intervals import of_auroc
from common.tasks.scores import auroc, calibration_error
from server.reporting.record import Facts


def figures_by_class(study: Study, counts: NDArray[np.int64]) -> list[Facts]:
    """Test figures of every class, from counts of shape (num_counts,).

    A class of images stands against the rest; a binary study has one, its positive class. A class
    of pixels is one entry each, the background first; so is a class of boxes.
    """
    task = task_of(study)
    if isinstance(task, SegmentationTask):
        return _by_class_of_pixels(task, counts)
    if isinstance(task, DetectionTask):
        return _by_class_of_boxes(task, counts)
    assert isinstance(task, ClassificationTask)  # noqa: S101 - the only other kind
    assert isinstance(study.task, Classification)  # noqa: S101
    return _by_class_of_images(study.task, task.view(counts))


def _by_class_of_pixels(task: SegmentationTask, counts: NDArray[np.int64]) -> list[Facts]:
    view = task.view(counts)
    pixels = np.stack([view.actual, view.predicted, view.right], axis=1).tolist()
    return [
        {
            "class": name,
            **figures,
            "dice_interval": interval,
            "pixels": {"true": actual, "by_model": predicted, "both": right},
        }
        for name, figures, interval, (actual, predicted, right) in zip(
            task.classes,
            task.figures_by_class(counts),
            task.dice_intervals(counts),
            pixels,
            strict=True,
        )
    ]


def _by_class_of_boxes(task: DetectionTask, counts: NDArray[np.int64]) -> list[Facts]:
    view, shown = task.view(counts), task.first_shown
    return [
        {
            "class": name,
            **figures,
            "boxes": {
                "true": num_true,
                "found": int(right[shown:].sum()),
                "wrong": int(wrong[shown:].sum()),
            },
        }
        for name, figures, num_true, (wrong, right) in zip(
            task.classes,
            task.figures_by_class(counts),
            view.boxes.tolist(),
            view.scores,
            strict=True,
        )
    ]


def _by_class_of_images(config: Classification, view: Counts) -> list[Facts]:
    names = config.classes[1:] if config.labels == "binary" else config.classes
    return [
        _class_figures(config, name, table, scores)
        for name, table, scores in zip(names, _tables(config, view), view.scores, strict=True)
    ]


def _tables(config: Classification, view: Counts) -> Iterator[NDArray[np.int64]]:
    """One 2 x 2 table per class, truth by prediction, each without the class first."""
    if config.labels != "multiclass":
        yield from view.confusion
        return
    whole = view.confusion[0]
    for k in range(len(whole)):
        right, missed, wrong = whole[k, k], whole[k].sum(), whole[:, k].sum()
        rest = whole.sum() - missed - wrong + right
        yield np.array([[rest, wrong - right], [missed - right, right]])


def _class_figures(
    config: Classification, name: str, table: NDArray[np.int64], scores: NDArray[np.int64]
) -> Facts:
    """Facts of one class from its 2 x 2 table and its two histograms of the score."""
    (true_negative, _), (_, true_positive) = table.tolist()
    without, having = table.sum(axis=1).tolist()
    others = {"binary": config.classes[0], "multilabel": f"without {name}"}
    other = others.get(config.labels)
    return {
        "class": name,
        "images": ({other: without} if other else {}) | {name: having},
        "auroc": auroc(*scores),
        "auroc_interval": of_auroc(*scores),
        "calibration_error": calibration_error(*scores),
        "precision": ratio(true_positive, int(table[:, 1].sum())),
        "recall": ratio(true_positive, having),
        "specificity": ratio(true_negative, without),
    }
