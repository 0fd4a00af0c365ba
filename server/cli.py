"""``fl-server``: the coordinator's command line."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from common.cli import ResumeOption, RunDirOption, SetOption, overrides_of, start
from common.config import load
from common.logs import LogFormatOption, start_logging
from common.study import Study
from server.config import CoordinatorConfig

STOPPED = 130  # the exit code of a program that Ctrl-C ended


def serve(
    study: Annotated[Path, typer.Option(help="The study's TOML file.")],
    config: Annotated[Path, typer.Option(help="The coordinator's own TOML file.")] = Path(
        "coordinator.toml"
    ),
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    set_: SetOption = [],  # noqa: B006
    log_format: LogFormatOption = "text",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print digest and plan; start nothing.")
    ] = False,
) -> None:
    """Coordinate a study."""
    planned = load(study, Study, overrides_of(set_))
    if dry_run:
        from server.plan import plan_lines

        for line in plan_lines(planned):
            print(line)
        return
    own = load(config, CoordinatorConfig)
    start_logging(log_format)
    # Started by hand or by a service manager: both signals end the run the same way.
    signal.signal(signal.SIGTERM, _interrupt)
    from server.deployed import coordinate
    from server.progress import print_summary

    folder = run_dir or Path("runs") / planned.name
    try:
        summary = coordinate(planned, own, folder, resume=resume)
    except KeyboardInterrupt:
        print(f"stopped; fl-server --resume --run-dir {folder} goes on")
        raise typer.Exit(STOPPED) from None
    print_summary(summary, folder)


def _interrupt(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of ``fl-server``; what it writes is this user's alone."""
    os.umask(0o077)
    start(serve)
