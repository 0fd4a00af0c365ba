"""How every command of this project starts and ends: errors become one message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from common.config import parse_assignment
from common.disk import disk_full, is_full
from common.errors import FederationError

StudyOption = Annotated[Path, typer.Option(help="Study file (TOML).")]
SitesOption = Annotated[int, typer.Option(help="Number of sites, 3 to 255.")]
DataOption = Annotated[str, typer.Option(help="Replaces data.root of the study's .site.toml.")]
PartitionOption = Annotated[
    str, typer.Option(help="iid (default), dirichlet:ALPHA or column:NAME.")
]
SetOption = Annotated[list[str], typer.Option("--set", help="key=value; replaces a value.")]
RunDirOption = Annotated[Path | None, typer.Option(help="Default: runs/<study name>.")]
SeedOption = Annotated[int | None, typer.Option(help="Replaces the study's seed.")]
DeviceOption = Annotated[
    Literal["cpu", "cuda", "auto"],
    typer.Option(help="Where simulated sites train; bits repeat on one kind of device only."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir.")]


def start(command: Callable[..., Any] | typer.Typer) -> None:
    """Run a command line and exit.

    A ``FederationError`` is printed to stderr without a traceback, and its exit code returned; so
    is a full disk, wherever it was met.
    """
    app = command
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(command)
    try:
        _call(app)
    except FederationError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _call(app: typer.Typer) -> None:
    try:
        app()
    except OSError as error:
        if not is_full(error):
            raise
        raise disk_full(error, then="try again") from None


def overrides_of(assignments: list[str], seed: int | None = None) -> dict[str, Any]:
    """Values by dotted key from ``--set key=value`` and ``--seed``."""
    overrides = dict(map(parse_assignment, assignments))
    if seed is not None:
        overrides["seed"] = seed
    return overrides


def figures_line(figures: Mapping[str, Any]) -> str:
    """The scalar figures of a model, side by side."""
    return "  ".join(f"{k} {v:.4f}" for k, v in figures.items() if isinstance(v, float))
