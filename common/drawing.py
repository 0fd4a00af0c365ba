"""How a report draws: an SVG whose text stays text, so that a page sets the typeface."""

from __future__ import annotations

import io
import re
from typing import Final

from matplotlib.figure import Figure

INK, MUTED, RULE, BLUE, AMBER = "#1c2733", "#5a6875", "#d3dae1", "#1f5f8b", "#b4640a"

STYLE: Final = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # equal pictures get equal ids, so equal runs get equal reports
}


def svg_of(figure: Figure, label: str) -> str:
    """The picture as an element of a page; ``label`` is read aloud in its place."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Metadata names outside addresses; the style would reach the whole page, and so do its rules
    # in the page's own style sheet. Ids of groups repeat from picture to picture.
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
