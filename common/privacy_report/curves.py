"""The drawn pictures of a privacy report: SVG whose text stays text, and images as PNG."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from common.drawing import AMBER, BLUE, STYLE, svg_of
from common.errors import DataError

COLOURS: Final = (BLUE, "#5b7f63", "#8a6a94", AMBER, "#2f8f8b", "#7a4a3a")
KINDS: Final = ("original", "plain", "noised", "masked")  # columns of the recovered images


Curves: TypeAlias = Mapping[str, Sequence[Sequence[float]]]  # by name: points, across and up


def spending(curves: Curves, xlabel: str, *, limit: float | None = None) -> str:
    """Epsilon as it grows, a line for each name; ``limit`` is drawn across."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.3))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.085, 0.19, 0.70 if len(curves) > 1 else 0.87, 0.76))
        for number, (name, points) in enumerate(curves.items()):
            across, up = zip(*points, strict=True) if points else ((), ())
            colour = COLOURS[number % len(COLOURS)]
            style = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
            axes.step(across, up, where="post", color=colour, linestyle=style, label=name)
            axes.plot(across, up, "o", color=colour, markersize=2.6)
        if limit is not None:
            axes.axhline(limit, color=AMBER, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.set(xlabel=xlabel, ylabel="epsilon")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        if len(curves) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=7.5)
        return svg_of(figure, f"epsilon by {xlabel}")


def recovered(pixels: Path) -> list[dict[str, str]]:
    """A row for each image: what was trained on, and what came back, as data URIs of PNGs."""
    try:
        with np.load(pixels, allow_pickle=False) as arrays:
            stacks = {kind: arrays[kind] for kind in KINDS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{pixels}: not what scripts/audit-privacy writes ({error})") from None
    return [
        {kind: _png(stacks[kind][row], stacks["original"][row]) for kind in KINDS}
        for row in range(len(stacks["original"]))
    ]


def _png(image: NDArray[np.float32], original: NDArray[np.float32]) -> str:
    """The first channel, and of a volume the middle slice, in the grey values of the original."""
    low, high = float(original.min()), float(original.max())
    shown = image[0]
    while shown.ndim > 2:  # noqa: PLR2004 - a picture has two dimensions
        shown = shown[len(shown) // 2]
    figure = Figure(figsize=(1.2, 1.2), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(shown, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
