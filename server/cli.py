"""``fl-server``: the coordinator's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import SetOption, overrides_of, start
from common.config import load
from common.errors import ConfigError
from common.study import Study


def serve(
    study: Annotated[Path, typer.Option(help="The study's TOML file.")],
    set_: SetOption = [],  # noqa: B006
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print digest and plan; start nothing.")
    ] = False,
) -> None:
    """Coordinate a study."""
    planned = load(study, Study, overrides_of(set_))
    if not dry_run:
        raise ConfigError(
            "coordinating over a network is not built yet; this version simulates: "
            "scripts/simulate, or fl-server --dry-run"
        )
    from server.plan import plan_lines

    for line in plan_lines(planned):
        print(line)


def main() -> None:
    """Entry point of ``fl-server``."""
    start(serve)
