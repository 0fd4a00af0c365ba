"""``fl-report``: what a finished run learned, on paper, and whether its files still say the same.

``fl-report RUN_DIR`` writes the report. A first word that is a subcommand's name is the subcommand;
a run folder of that name is given as ``./verify``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from common.cli import start

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
    """Check every file against SHA256SUMS and recompute the figures; exit 1 names the file."""
    from server.report import verify as verify_run

    typer.echo(f"verified: {verify_run(run_dir)} files, figures recomputed")


def main() -> None:
    """Entry point of ``fl-report``."""
    start(app)
