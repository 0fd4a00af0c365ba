"""The page of a privacy report: one HTML file that loads nothing, and prints well."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from common.privacy_report.curves import Curves, recovered, spending
from common.privacy_report.facts import PIXELS, Facts
from common.privacy_report.texts import Texts

TEMPLATES = Path(__file__).parent / "templates"


def render(facts: Facts, texts: Texts, folder: Path) -> str:
    """Lay the facts out on the page.

    Args:
      facts: What ``privacy-report.json`` holds.
      texts: The language.
      folder: Where ``attacks.npz`` lies, if any.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["grouped"] = lambda number: f"{number:,}".replace(",", "\u202f")
    curves = facts["curves"]
    pictures = {
        "rounds": _drawn(curves["rounds"], texts("rounds.round"), None),
        "life": _drawn({"": curves["life"]}, texts("rounds.charges"), curves["budget"])
        if curves["life"]
        else None,
    }
    pixels = folder / PIXELS
    shown = recovered(pixels) if facts["attacks"] and pixels.exists() else []
    template = environment.get_template("privacy.html.jinja")
    return template.render(facts=facts, say=texts, pictures=pictures, recovered=shown)


def _drawn(curves: Curves, xlabel: str, limit: float | None) -> Markup | None:
    if not curves:
        return None
    return Markup(spending(curves, xlabel, limit=limit))  # noqa: S704 - names in it are escaped


def _number(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None else f"{value:.{digits}f}"
