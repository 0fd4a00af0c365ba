"""The drawn pictures of a report.

Every picture is an SVG whose text stays text: the page sets the typeface, a reader can search it.
Names of classes and sites stand in the page beside a picture, never inside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from common.drawing import AMBER, BLUE, INK, MUTED, STYLE, svg_of
from common.phantom import LESION, Phantom
from common.study import Classification, Study
from common.tasks import ClassificationTask, DetectionTask, task_of
from common.tasks.scores import calibration_curve, froc_curve, precision_curve, roc_curve
from server.reporting.glossary import title_of
from server.reporting.phantoms import Example
from server.reporting.record import Facts

Svg: TypeAlias = str

PHASES: Final = ("#1f5f8b", "#7fa8c4", "#c9a86a", "#a3adb6", "#5b7f63", "#8a6a94")
LARGEST_TABLE: Final = 12  # classes; a larger confusion matrix is drawn, not written
UNBOUNDED: Final = ("loss", "hd95")  # figures that may be above 1
MOST_EXTRA: Final = 8.0  # wrong findings per image that a curve shows
MOST_BARS: Final = 120  # rounds; with more, bars are thinner than a printed line


def draw_pictures(
    facts: Facts, study: Study, counts: NDArray[np.int64], examples: Sequence[Example]
) -> dict[str, list[Svg]]:
    """Every picture of a report by its place in the page.

    Args:
      facts: What ``report.json`` holds.
      study: Of the run.
      counts: Of the test split, shape (num_counts,).
      examples: Empty unless the data are phantoms.
    """
    by_round, returned = facts["validation_by_round"], facts["returned_round"]
    spent = {phase: known["by_round"] for phase, known in facts["seconds"]["phases"].items()}
    with mpl.rc_context(STYLE):
        return {
            **draw_statistics(facts),
            "rounds": [
                _panel(name, [figures[name] for figures in by_round], returned)
                for name in study.task.figures
            ],
            "seconds": [_bars(spent)] if len(by_round) <= MOST_BARS else [],
            "examples": [_film(example.phantom) for example in examples],
            **_classifications(facts, study, counts),
            **_detections(facts, study, counts),
        }


def draw_statistics(facts: Facts) -> dict[str, list[Svg]]:
    """Grey values of the training images, where the study asks for them; a picture per channel."""
    with mpl.rc_context(STYLE):
        channels = (facts["statistics"] or {}).get("grey", [])
        return {"grey": [_histogram(channel) for channel in channels]}


def _classifications(facts: Facts, study: Study, counts: NDArray[np.int64]) -> dict[str, list[Svg]]:
    """ROC curves, and the confusion matrix where it is too large for a table."""
    task = task_of(study)
    if not isinstance(task, ClassificationTask) or not isinstance(study.task, Classification):
        return {}
    view = task.view(counts)
    confusion = view.confusion[0]
    return {
        "roc": [
            _roc(scores, entry, study.task.labels)
            for scores, entry in zip(view.scores, facts["test"]["by_class"], strict=True)
        ],
        "calibration": [_calibration(scores) for scores in view.scores],
        "confusion": [_heat_map(confusion)] if len(confusion) > LARGEST_TABLE else [],
    }


def _detections(facts: Facts, study: Study, counts: NDArray[np.int64]) -> dict[str, list[Svg]]:
    """Precision over recall and the FROC curve of every class of boxes."""
    task = task_of(study)
    if not isinstance(task, DetectionTask):
        return {}
    view, num_images = task.view(counts), facts["test"]["num_examples"]
    drawn: dict[str, list[Svg]] = {"precision": [], "froc": []}
    for (wrong, right), entry in zip(view.scores, facts["test"]["by_class"], strict=True):
        found, num_true = entry["boxes"], entry["boxes"]["true"]
        recall, precision = precision_curve(wrong, right, max(1, num_true))
        extra, sensitivity = froc_curve(wrong, right, num_true, num_images)
        dot = entry["recall"], entry["precision"]
        drawn["precision"].append(
            _curve(recall, precision, "recall", "precision", dot=dot, known=num_true > 0)
        )
        dot = found["wrong"] / max(1, num_images), entry["recall"]
        drawn["froc"].append(
            _curve(
                np.clip(extra, None, MOST_EXTRA),
                sensitivity,
                "wrong findings per image",
                "recall (sensitivity)",
                dot=dot,
                known=num_true > 0,
                most=MOST_EXTRA,
            )
        )
    return drawn


# Drawing


def _curve(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    across: str,
    up: str,
    *,
    dot: tuple[float | None, float | None],
    known: bool,
    most: float = 1.0,
) -> Svg:
    """One curve of a class of boxes; the dot is the study's threshold."""
    figure, axes = _figure(2.35, 2.15)
    if known:
        axes.plot(x, y, color=BLUE)
        if None not in dot:
            axes.plot(*dot, "o", color=AMBER, markersize=5, clip_on=True)
    else:
        axes.text(most / 2, 0.5, "not defined", ha="center", va="center", color=MUTED)
    axes.set(xlim=(-0.02 * most, 1.02 * most), ylim=(-0.02, 1.02), xlabel=across, ylabel=up)
    return svg_of(figure, f"{up} over {across}")


def _figure(
    width: float, height: float, *, left: float = 0.52, top: float = 0.06
) -> tuple[Figure, Any]:
    """An empty picture with one pair of axes; sizes and margins in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    place = (left, 0.4, width - left - 0.14, height - 0.4 - top)  # left, bottom, width, height
    return figure, figure.add_axes(tuple(np.divide(place, (width, height) * 2)))


def _panel(name: str, values: Sequence[float | None], returned: int) -> Svg:
    """One validation figure over the rounds; the returned round is marked."""
    title = title_of(name)
    title = title[0].upper() + title[1:]
    figure, axes = _figure(2.35, 1.65, left=0.4, top=0.2)
    rounds = np.arange(1, len(values) + 1)
    known = np.array([np.nan if value is None else value for value in values], float)
    axes.axvline(returned, color=AMBER, linewidth=0.8, linestyle=(0, (3, 2)))
    axes.plot(rounds, known, color=BLUE, marker="o" * (len(values) < 30), markersize=2.6)  # noqa: PLR2004
    axes.plot(rounds[returned - 1], known[returned - 1], "o", color=AMBER, markersize=5)
    shown = "not defined" if np.isnan(known[returned - 1]) else f"{known[returned - 1]:.4f}"
    axes.set_title(title)
    axes.set_title(shown, loc="right", color=AMBER)
    axes.set_xlim(0.5, max(len(values), 2) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    largest = np.nanmax(known, initial=0.0) if name in UNBOUNDED else 1.0
    axes.set_ylim(-0.04 * largest, (1.04 * largest) or 1)
    axes.set_xlabel("round")
    return svg_of(figure, f"{title} on validation by round; {shown} in round {returned}")


def _roc(scores: NDArray[np.int64], entry: Facts, labels: str) -> Svg:
    """The ROC curve of one class; the dot is the decision at probability one half."""
    side = 2.8 if labels == "binary" else 2.35
    figure, axes = _figure(side, side - 0.2)
    if entry["auroc"] is None:
        axes.text(0.5, 0.5, "not defined", ha="center", va="center", color=MUTED)
    else:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, linestyle=(0, (3, 2)))
        axes.plot(*roc_curve(*scores), color=BLUE)
        if labels != "multiclass":  # there the largest probability decides, not a threshold
            axes.plot(1 - entry["specificity"], entry["recall"], "o", color=AMBER, markersize=5)
        axes.text(0.98, 0.05, f"AUROC {entry['auroc']:.4f}", ha="right", color=INK)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=ticks, yticks=ticks)
    axes.set(xlabel="1 \N{MINUS SIGN} specificity", ylabel="recall (sensitivity)")
    return svg_of(figure, "ROC curve")


def _calibration(scores: NDArray[np.int64]) -> Svg:
    """How often it was true over what the model said; dots as large as they hold many images."""
    figure, axes = _figure(2.35, 2.15)
    said, true, num = calibration_curve(*scores)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, linestyle=(0, (3, 2)))
    if num.size:
        axes.plot(said, true, color=BLUE, linewidth=0.8)
        axes.scatter(said, true, s=6 + 60 * num / num.max(), color=BLUE, zorder=3)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xticks=ticks, yticks=ticks)
    axes.set(xlabel="probability by the model", ylabel="share that was true")
    return svg_of(figure, "Calibration curve")


def _histogram(channel: Facts) -> Svg:
    """Share of the grey values of one channel in every bin."""
    figure, axes = _figure(4.2, 1.6)
    (low, high), counts = channel["range"], np.array(channel["counts"], float)
    edges = np.linspace(low, high, len(counts) + 1)
    shares = counts / max(1.0, counts.sum())
    axes.stairs(100 * shares, edges, fill=True, color=BLUE)
    for percentile in ("5", "95"):
        if (at := channel["percentiles"][percentile]) is not None:
            axes.axvline(at, color=AMBER, linewidth=0.8, linestyle=(0, (3, 2)))
    axes.set(xlim=(low, high), xlabel="grey value of the files", ylabel="% of values")
    return svg_of(figure, "Grey values of all training images")


def _heat_map(confusion: NDArray[np.int64]) -> Svg:
    """Row shares of a confusion matrix too large for a table; classes by number, from 1."""
    figure, axes = _figure(4.6, 4.0)
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    num_classes = len(confusion)
    edges = np.arange(num_classes + 1) + 0.5
    image = axes.pcolormesh(edges, edges, shares, cmap="Blues", vmin=0, vmax=1)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set(aspect="equal", xlabel="class by the model", ylabel="true class")
    figure.colorbar(image, shrink=0.8, label="share of the row")
    return svg_of(figure, "Confusion matrix as shares of each row")


def _bars(spent: dict[str, list[float]]) -> Svg:
    """Seconds of every round, one colour per phase in the order of ``PHASES``."""
    figure, axes = _figure(4.2, 1.4)
    bottom = np.zeros(len(next(iter(spent.values()))))
    rounds = np.arange(1, len(bottom) + 1)
    for color, seconds in zip(itertools.cycle(PHASES), spent.values(), strict=False):
        axes.bar(rounds, seconds, 0.7, bottom, color=color)
        bottom += seconds
    ticks = MaxNLocator(12, integer=True).tick_values(1, len(bottom))
    axes.set_xticks([tick for tick in ticks if 1 <= tick <= len(bottom)])
    axes.set_xlim(0.4, max(len(bottom), 8) + 0.6)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="round", ylabel="seconds")
    return svg_of(figure, "Seconds per round by phase")


def _film(phantom: Phantom) -> Svg:
    """One phantom with its lesions outlined."""
    figure = Figure(figsize=(1.5, 1.5))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(phantom.image, cmap="gray", vmin=0, vmax=1, interpolation="none")
    lesion = phantom.mask == LESION
    if lesion.any():
        axes.contour(lesion, levels=[0.5], colors=["#ffb000"], linewidths=1.1)
    return svg_of(figure, "Phantom with a lesion" if lesion.any() else "Phantom without a lesion")
