"""``fl-server``: the coordinator's command line."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from common.cli import ResumeOption, RunDirOption, SetOption, overrides_of, start
from common.config import load
from common.disk import disk_full, existing, free_bytes, has_room, is_full, megabytes
from common.logs import LogFormat, LogFormatOption, start_logging
from common.plan import SITE_SIZES
from common.study import Study
from server.config import CoordinatorConfig

STOPPED = 130  # the exit code of a program that Ctrl-C ended
# That a round writes, besides an upload of every site: the sum, the model, an optimizer of three.
ROUND_MODELS = 5
MOST_EPSILON = 50.0  # beyond it nobody is promised anything
BOOKS_BYTES = 4 << 20
RETRY_S = 3.0

StudyFile = Annotated[Path | None, typer.Option(help="The study's TOML file.")]

log = logging.getLogger("consilium.coordinator")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    study: StudyFile = None,
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
    if context.invoked_subcommand is not None:
        return
    planned = _read(study, set_)
    if dry_run:
        from server.plan import plan_lines

        for line in plan_lines(planned):
            print(line)
        return
    serve(planned, load(config, CoordinatorConfig), run_dir, resume=resume, log_format=log_format)


def serve(
    planned: Study,
    own: CoordinatorConfig,
    run_dir: Path | None = None,
    *,
    resume: bool = False,
    log_format: LogFormat = "text",
) -> None:
    """Wait for the members, run, end; Ctrl-C stops."""
    start_logging(log_format)
    # Started by hand or by a service manager: both signals end the run the same way.
    signal.signal(signal.SIGTERM, _interrupt)
    from server.deployed import coordinate, largest_upload
    from server.progress import print_summary

    folder = run_dir or Path("runs") / planned.name
    going_on = f"fl-server --resume --run-dir {folder} goes on"
    try:
        num_together = ROUND_MODELS + len(planned.members)
        wait_for_room(folder, num_together * largest_upload(planned) + BOOKS_BYTES)
        wait_for_room(own.state_dir, BOOKS_BYTES)
        summary = coordinate(planned, own, folder, resume=resume)
    except KeyboardInterrupt:
        print(f"stopped; {going_on}")
        raise typer.Exit(STOPPED) from None
    except OSError as error:
        if not is_full(error):
            raise
        # Waiting here would let the sites' deadlines pass; a run that is resumed begins them anew.
        raise disk_full(error, then=going_on, folder=folder) from None
    print_summary(summary, folder)


@app.command()
def plan(
    study: StudyFile = None,
    declared: Annotated[
        list[int], typer.Option(min=1, help="Declared patients of a site; may be repeated.")
    ] = list(SITE_SIZES),  # noqa: B006
    budget: Annotated[
        float,
        typer.Option(
            min=0,
            max=MOST_EPSILON,
            help="Also say which rounds, or which noise, cost this epsilon.",
        ),
    ] = 0.0,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Print what a study's rounds cost sites of several sizes; starts nothing, opens no data."""
    from server.plan import print_costs, solved_lines

    if not math.isfinite(budget):
        raise typer.BadParameter("a number up to 50 is needed", param_hint="--budget")
    planned = _read(study, set_)
    print_costs(planned, declared)
    if budget:
        for line in solved_lines(planned, declared, budget):
            print(line)


def _read(study: Path | None, assignments: list[str]) -> Study:
    if study is None:
        raise typer.BadParameter("missing; it names the study's TOML file", param_hint="--study")
    return load(study, Study, overrides_of(assignments))


def wait_for_room(folder: Path, num_bytes: int) -> None:
    """Until a folder's disk takes so much: a start without room would end where it began."""
    if free_bytes(folder) >= num_bytes:
        return
    told = False
    while not has_room(existing(folder), num_bytes):
        if not told:
            log.warning(
                "%s: the disk is full (%s free): waiting until %s are free; make room",
                folder,
                megabytes(free_bytes(folder)),
                megabytes(num_bytes),
            )
            told = True
        time.sleep(RETRY_S)
    if told:
        log.info("%s: there is room again", folder)


def _interrupt(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of ``fl-server``; what it writes is this user's alone."""
    os.umask(0o077)
    start(app)
