"""``fl-report``: what a finished run learned, on paper, and whether its files still say the same.

``fl-report RUN_DIR`` writes the report. A first word that is a subcommand's name is the subcommand;
a run folder of that name is given as ``./verify``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from common.cli import start
from common.errors import ConfigError

DEFAULT = "write"

RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run.")]


class _RunDirFirst(TyperGroup):
    """Commands whose name may be left out: then it is ``write``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read ``fl-report RUN_DIR`` as ``fl-report write RUN_DIR``."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunDirFirst,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    subcommand_metavar="RUN_DIR | COMMAND [ARGS]...",
)


@app.callback()
def report() -> None:
    """Report on a finished run: fl-report RUN_DIR writes report.html and report.json into it."""


@app.command(DEFAULT, hidden=True)
def write(run_dir: RunFolder) -> None:
    """Write report.html and report.json (the default: the word may be left out)."""
    from server.report import write_report  # torch takes seconds: help is there at once

    typer.echo(write_report(run_dir))


@app.command()
def verify(run_dir: RunFolder) -> None:
    """Check files, signatures, audit log, figures and epsilon again; exit 1 names the file.

    Also the folder of a hospital's own privacy report.
    """
    from common.privacy_report import site_folder
    from server.report import verify as verify_run

    if site_folder.is_site_folder(run_dir):
        own = site_folder.verify(run_dir)
        typer.echo(
            f"verified: {own.num_files} files, {own.num_charges} charges, {own.num_statements} "
            f"signed statements; epsilon recomputed; signed by {own.signer}, key {own.key}"
        )
        return

    found = verify_run(run_dir)
    typer.echo(
        f"verified: {found.num_files} files, {found.num_statements} signed statements, "
        f"{found.num_lines} lines of the audit log; figures and epsilon recomputed"
    )


@app.command()
def epsilon(
    noise_multiplier: Annotated[float, typer.Option(min=0, help="Noise / clip norm.")],
    sampling_probability: Annotated[float, typer.Option(min=0, max=1, help="Per step.")],
    steps: Annotated[int, typer.Option(min=0, help="Steps in all.")],
    delta: Annotated[float, typer.Option(min=0, max=1, help="Chance of failure.")],
) -> None:
    """Print the epsilon of a Poisson-sampled Gaussian mechanism as one line of JSON."""
    if not 0 < delta < 1:
        raise ConfigError(f"--delta {delta:g}: expected a number between 0 and 1")
    from common.accounting import Event, epsilon_of

    event = Event(noise_multiplier, sampling_probability, steps)
    value = epsilon_of([event], delta) if sampling_probability else 0.0
    line = {
        "epsilon": value if math.isfinite(value) else None,
        "delta": delta,
        "noise_multiplier": noise_multiplier,
        "sampling_probability": sampling_probability,
        "steps": steps,
        "accountant": "prv",
    }
    typer.echo(json.dumps(line))


def main() -> None:
    """Entry point of ``fl-report``."""
    start(app)
