"""Federated statistics: counts of what the sites' examples are like, and figures from their sum.

Everything is a count, so that the sum over sites is exact and no site's own distribution has to
leave it. Lengths are counted in classes of equal ratio: a median read from them is right to within
half a class, 1.1 %.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.study import Segmentation, Study
from common.tasks.base import Figures, ratio

SPLITS: Final = ("train", "val", "test")
PER_DOUBLING: Final = 32  # classes of lengths
MILLIMETRES: Final = (2.0**-6, 2.0**7)  # shortest and longest spacing that has a class of its own
PIXELS: Final = (1.0, 2.0**14)  # of a side
PERCENTILES: Final = (0.5, 5, 25, 50, 75, 95, 99.5)
DARKEST, BRIGHTEST = 0.5, 99.5  # percentiles between which a window may lie
DIGITS: Final = 3  # of a suggestion
FEWEST_BINS: Final = 4  # that a window covers

Counts = NDArray[np.int64]


class StatisticsTask:
    """Where each count stands in the vector that sites sum.

    Everything but the first two views is of the training split alone.
    """

    def __init__(self, study: Study) -> None:
        """Lay the vector out; a study without ``[statistics]`` has none.

        Raises:
          ValueError: The study asks for no statistics.
        """
        if study.statistics is None:
            raise ValueError(f"study {study.name} asks for no statistics")
        self.study = study
        self.config = study.statistics
        # Where an empty cell is refused, there is none to count.
        may_be_empty = study.table is not None and study.table.missing == "indicator"
        self.columns = [c.name for c in study.table.columns] if study.table and may_be_empty else []
        num_classes, num_axes = len(study.task.classes), len(study.input.size)
        low, high = self.config.intensity or (0.0, 1.0)  # without images no value is counted
        self._edges = np.linspace(low, high, self.config.num_bins + 1)
        self._middles = (self._edges[1:] + self._edges[:-1]) / 2
        self._shapes: dict[str, tuple[int, ...]] = {
            "images": (len(SPLITS),),
            "patients": (len(SPLITS),),
            "support": (num_classes,),  # images that have a class
            "amount": (num_classes,),  # pixels of a class, or boxes
            # Below the lowest value, the bins, above the highest.
            "grey": (study.input.channels if num_axes else 0, self.config.num_bins + 2),
            "spacing": (num_axes, num_classes_of(MILLIMETRES)),
            "no_spacing": (1,),
            "side": (num_axes, num_classes_of(PIXELS)),
            "empty": (len(self.columns),),
        }
        self.num_counts = sum(int(np.prod(shape)) for shape in self._shapes.values())

    def views(self, vector: Counts) -> dict[str, Counts]:
        """Named views of a count vector of shape (num_counts,)."""
        ends = list(itertools.accumulate(int(np.prod(s)) for s in self._shapes.values()))
        parts = np.split(vector, ends[:-1])
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in named}

    def grey_counts(self, values: NDArray[Any]) -> Counts:
        """Grey values of one channel, of any shape, as counts of shape (num_bins + 2,)."""
        low, high = self._edges[[0, -1]].tolist()
        inside, _ = np.histogram(values, self.config.num_bins, (low, high))
        below, above = np.count_nonzero(values < low), np.count_nonzero(values > high)
        return np.concatenate([[below], inside, [above]]).astype(np.int64)

    def figures(self, counts: Counts) -> Figures:
        """Figures from summed counts, ready for JSON; what is undefined is None."""
        parts = self.views(counts)
        images = dict(zip(SPLITS, parts["images"].tolist(), strict=True))
        figures: Figures = {
            "images": images,
            "patients": dict(zip(SPLITS, parts["patients"].tolist(), strict=True)),
            "classes": self._classes(parts, images["train"]),
        }
        if self.study.input.size:
            figures |= {
                "grey": [self._grey(channel) for channel in parts["grey"]],
                "side": [_whole(_lengths(axis, PIXELS)) for axis in parts["side"]],
                "spacing": [_lengths(axis, MILLIMETRES) for axis in parts["spacing"]],
                "no_spacing": int(parts["no_spacing"][0]),
            }
            figures["suggested"] = self._suggested(parts["grey"].sum(axis=0), figures["spacing"])
        if self.columns:
            figures["empty_cells"] = dict(zip(self.columns, parts["empty"].tolist(), strict=True))
        return figures

    def _classes(self, parts: dict[str, Counts], num_images: int) -> list[Figures]:
        """For each class: images that have it, and its pixels or boxes where it has some."""
        task, total = self.study.task, int(parts["amount"].sum())
        found: list[Figures] = []
        for name, images, amount in zip(
            task.classes, parts["support"].tolist(), parts["amount"].tolist(), strict=True
        ):
            entry = {"class": name, "images": images, "share_of_images": ratio(images, num_images)}
            if task.kind != "classification":
                what = "pixels" if isinstance(task, Segmentation) else "boxes"
                entry |= {what: amount, f"share_of_{what}": ratio(amount, total)}
            found.append(entry)
        return found

    def _grey(self, counts: Counts) -> Figures:
        """Of one channel: how much lies outside, percentiles of all, mean and deviation inside."""
        total = int(counts.sum())
        mean, std = _moments(counts[1:-1], self._middles)
        return {
            "range": self._edges[[0, -1]].tolist(),
            "counts": counts[1:-1].tolist(),  # by bin, from the lowest value to the highest
            "below": ratio(int(counts[0]), total),
            "above": ratio(int(counts[-1]), total),
            "mean": mean,
            "std": std,
            "percentiles": {f"{p:g}": _percentile(counts, self._edges, p) for p in PERCENTILES},
        }

    def _suggested(self, counts: Counts, spacing: list[Figures]) -> Figures:
        """What ``[input]`` of a study could say, from the grey values of all channels.

        Without a window where more than half a per cent of them lies outside the bins, or where
        it would be hardly wider than a bin: then nobody knows enough to choose one.
        """
        found: Figures = {}
        low, high = (_percentile(counts, self._edges, p) for p in (DARKEST, BRIGHTEST))
        width = self._edges[1] - self._edges[0]
        is_raw = self.study.input.intensity != "file-window"
        if low is not None and high is not None and high - low >= FEWEST_BINS * width:
            step = 10.0 ** math.floor(math.log10((high - low) / 100))  # outwards, to 1 % at most
            low, high = step * math.floor(low / step), step * math.ceil(high / step)
            # Few values lie outside the bins: they count with the outermost ones.
            inside = counts[1:-1].copy()
            inside[0] += counts[0]
            inside[-1] += counts[-1]
            values = self._middles
            if is_raw:
                values = np.clip((values - low) / (high - low), 0, 1)
                found |= {"intensity": "window", "window": [float(f"{v:.9g}") for v in (low, high)]}
            mean, std = _moments(inside, values)
            if mean is not None and std:
                found |= {"mean": _rounded(mean), "std": _rounded(std)}
        middle = [axis["50"] for axis in spacing]
        if middle and None not in middle:
            found["spacing"] = [_rounded(side) for side in middle]
        return found


def _moments(counts: Counts, values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of values that occur so often; None of nothing."""
    num = int(counts.sum())
    if not num:
        return None, None
    mean = float(counts @ values) / num
    return mean, math.sqrt(float(counts @ (values - mean) ** 2) / num)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def num_classes_of(lengths: tuple[float, float]) -> int:
    """Classes between the shortest and the longest; the outer ones take what lies beyond."""
    low, high = lengths
    return 1 + round(PER_DOUBLING * math.log2(high / low))


def class_of(length: float, lengths: tuple[float, float]) -> int:
    """The class of one length; powers of two lie in the middle of theirs."""
    number = round(PER_DOUBLING * math.log2(length / lengths[0]))
    return min(max(number, 0), num_classes_of(lengths) - 1)


def _lengths(counts: Counts, lengths: tuple[float, float]) -> Figures:
    """Percentiles of lengths, each the middle of its class; None where no file tells."""
    total, before = int(counts.sum()), np.cumsum(counts)
    found: dict[str, float | None] = dict.fromkeys(("5", "50", "95"))
    for percentile in found if total else ():
        number = int(np.searchsorted(before, total * float(percentile) / 100))
        found[percentile] = float(lengths[0] * 2 ** (number / PER_DOUBLING))
    return found


def _whole(lengths: Figures) -> Figures:
    return {key: None if length is None else round(length) for key, length in lengths.items()}


def _percentile(counts: Counts, edges: NDArray[np.float64], percentile: float) -> float | None:
    """By a straight line within its bin; None where it lies outside the bins."""
    below, total = float(counts[0]), float(counts.sum())
    wanted = total * percentile / 100
    reached = below + np.concatenate([[0.0], np.cumsum(counts[1:-1])])
    if not total or wanted < below or wanted > reached[-1]:
        return None
    return float(np.interp(wanted, reached, edges))
