"""The data card: what a site's data set is, as its preflight saw it; it stays at the site.

Source: Pushkarna et al. (2022), Data Cards: Purposeful and Transparent Dataset Documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from client.config import SiteConfig
from client.finding import Finding, one_line
from common.disk import replace_file
from common.study import Study

NAME = "data-card.md"
MARKS = {"ok": "", "warning": "**To know:** ", "FAULT": "**To do:** "}


def write_card(
    config: SiteConfig, study: Study | None, findings: Sequence[Finding], now: datetime
) -> Path:
    """Write what the check of the data found; an older card is replaced.

    Args:
      config: Names the site, its data set and the folder of its state.
      study: What the data were held against, if anything.
      findings: Lines of the check; they count, and name files and rules, never a patient's value.
      now: The time of the check.
    """
    data = config.data
    against = f"study {study.name}, {study.digest()[:16]}" if study else "no study"
    declared = data.declared_patients
    lines = [
        f"# Data card: {data.name} at {config.name}",
        "",
        f"Written by `fl-client check` on {now:%Y-%m-%d %H:%M} UTC; held against {against}. This",
        "file stays at the site: nobody else is sent it.",
        "",
        f"* Format: {data.format}",
        f"* Declared training patients: {declared if declared is not None else 'not set'}",
        f"* Who is one patient: {_unit(config)}",
        f"* Splits: {_splits(config)}",
        f"* Broken images: {'the site stops' if data.on_broken == 'stop' else 'skipped'}",
        "",
        "## What was found",
        "",
        *(f"* {MARKS[finding.level]}{one_line(finding.text)}" for finding in findings),
        "",
    ]
    path = config.state_dir / NAME
    replace_file(path, "\n".join(lines).encode())
    return path


def _unit(config: SiteConfig) -> str:
    if config.data.names_patients:
        return "the data say which images are of one patient"
    return "the data do not say; every image counts as a patient of its own"


def _splits(config: SiteConfig) -> str:
    shares = config.data.splits
    return (
        "the data's own where they have some; else by a hash of the patient, "
        f"{shares.validation:.0%} for validation and {shares.test:.0%} for the test"
    )
