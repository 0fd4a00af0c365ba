"""The page of a report: one HTML file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import tomli_w
from markupsafe import Markup

from common.privacy_report.page import TEMPLATES as STYLE
from common.study import Study
from common.tasks.scores import NUM_BINS
from server.reporting.facts import MIN_IMAGES, MIN_SUPPORT
from server.reporting.figures import PHASES, Svg
from server.reporting.glossary import explained, title_of
from server.reporting.overlays import Overlay, legend
from server.reporting.record import Facts
from server.reporting.study import grouped, studied


def render(
    facts: Facts,
    study: Study,
    pictures: Mapping[str, Sequence[Svg]],
    overlays: Sequence[Overlay],
) -> str:
    """Lay the facts and pictures out on the page.

    Args:
      facts: What ``report.json`` holds.
      study: Of the run.
      pictures: By their place in the page, from ``server.reporting.figures``.
      overlays: Test images with their masks; empty unless sites were simulated.
    """
    drawn = {name: [Markup(svg) for svg in svgs] for name, svgs in pictures.items()}  # noqa: S704
    settings = {key: value for key, value in facts["settings"].items() if key != "members"}
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            facts=facts,
            study=study,
            studied=studied(study, facts["num_params"], facts["num_rounds"]),
            explained=explained(study, facts["test"]) if facts["test"] else [],
            study_toml=tomli_w.dumps(settings),
            pictures=drawn,
            overlays=overlays,
            legend=legend(overlays),
            phase_colours=PHASES,
            min_support=MIN_SUPPORT,
            min_images=MIN_IMAGES,
            num_bins=NUM_BINS,
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent / "templates", STYLE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": _bytes,
        "figure": _figure,
        "grouped": grouped,
        "percent": _percent,
        "short": _short,
        "toml": json.dumps,
        "seconds": _duration,
        "title_of": title_of,
    }
    return environment


def _figure(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "not defined" if share is None else f"{100 * share:.1f} %"


def _short(value: float | None) -> str:
    """Three digits; None stands for what lies outside the bins."""
    return "outside the bins" if value is None else f"{value:.3g}"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:  # noqa: PLR2004
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 0.1:  # noqa: PLR2004
        return f"{1000 * seconds:.1f} ms"
    if seconds < 600:  # noqa: PLR2004 - ten minutes
        return f"{seconds:.2f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 600 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004
