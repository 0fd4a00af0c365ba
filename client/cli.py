"""``fl-client``: a hospital's command line."""

from __future__ import annotations

import getpass
import logging
import os
import signal
import threading
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from client.config import SiteConfig, check_key_mode, deployed
from common.cli import figures_line, start
from common.config import load
from common.errors import ConfigError
from common.logs import LogFormat, LogFormatOption, start_logging
from common.study import Study

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
audit_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
app.add_typer(audit_app, name="audit", help="The log of everything received, decided and sent.")


@app.callback(invoke_without_command=True)
def site(
    context: typer.Context,
    site_config: Annotated[Path, typer.Option(help="The site's TOML file.")],
    log_format: LogFormatOption = "text",
) -> None:
    """Run a hospital's side of a study. Without a command: take part."""
    context.obj = load(site_config, SiteConfig)
    if context.invoked_subcommand is None:
        take_part(context.obj, log_format)


def take_part(config: SiteConfig, log_format: LogFormat) -> None:
    """Stay connected and answer, until a signal says stop."""
    check_key_mode(deployed(config).key)  # before torch is imported: that takes seconds
    from client.app import reply_with_room
    from client.hospital import Hospital
    from client.place import Place
    from client.room import Room, Stopped
    from client.runtime import serve

    start_logging(log_format)
    log = logging.getLogger("consilium.site")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    room = Room(config.state_dir, stopped)
    try:
        hospital = room.wait_through(partial(Hospital, config))
        tell = partial(hospital.audit.append, site=config.name)
        room.wait_through(partial(tell, "started"))
        log.info("%s takes part; %d studies approved", config.name, len(hospital.approvals.lines()))
        answer = partial(reply_with_room, answered=hospital.answer, room=room)
        serve(Place.of(config), answer, stopped, hospital.pause_s)
        room.wait_through(partial(tell, "stopped"))
    except Stopped:
        log.warning("stopped while the disk is full: the audit log has no line of it")
        return
    log.info("stopped")


@app.command()
def check(
    context: typer.Context,
    study: Annotated[
        Path | None, typer.Option(help="Study file; without it, the newest approved one.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Leave the coordinator out.")] = False,
    deidentified: Annotated[
        Path | None, typer.Option(help="New folder for a copy of the data without identifiers.")
    ] = None,
) -> None:
    """Check all that taking part needs; a line each, exit code of the first FAULT."""
    from client.check import check as findings

    exit_code = 0
    for finding in findings(context.obj, study, offline=offline, deidentified=deidentified):
        print(finding, flush=True)
        exit_code = exit_code or finding.exit_code
    raise typer.Exit(exit_code)


@app.command()
def status(context: typer.Context) -> None:
    """Say how this site stands: process, certificate, studies, run, ledger, audit log."""
    from client.status import status as lines

    assert context.parent is not None  # noqa: S101 - the callback that reads the site file
    site_file = context.parent.params["site_config"]
    for line in lines(context.obj, site_file, datetime.now(UTC)):
        print(line, flush=True)


@app.command()
def ledger(
    context: typer.Context,
    study: Annotated[
        Path | None, typer.Option(help="A planned study; without it, every approved one.")
    ] = None,
) -> None:
    """Say what every run cost each data set, what is left, and what planned studies would cost."""
    from client.books import ledger_lines
    from client.study_check import planned_lines

    for line in chain(ledger_lines(context.obj), planned_lines(context.obj, study)):
        print(line, flush=True)


@app.command()
def report(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(help="Folder; without it, privacy-report in the state folder.")
    ] = None,
) -> None:
    """Write and sign this hospital's own privacy report, and its own figures; both stay here."""
    from client.own_figures import write_own_figures
    from client.privacy_report import FOLDER, write_site_report

    config: SiteConfig = context.obj
    folder = out or config.state_dir / FOLDER
    if (figures := write_own_figures(config.state_dir)) is not None:
        print(figures)
    print(write_site_report(config, folder, lambda: datetime.now(UTC)))


@app.command()
def finetune(
    context: typer.Context,
    study_file: Annotated[Path, typer.Argument(help="The TOML file of a study that ran here.")],
    epochs: Annotated[int, typer.Option(min=1, help="At most; the best by validation counts.")] = 5,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="A tenth of the study's, if left out.")
    ] = None,
) -> None:
    """Train the model that a run returned further on this hospital's own images; it stays here."""
    from client.finetune import Tuned
    from client.finetune import finetune as tuned
    from client.hospital import STUDIES

    config: SiteConfig = context.obj
    study = load(study_file, Study)
    folder = config.state_dir / STUDIES / study.digest()
    rate = learning_rate or study.training.learning_rate / 10
    for step in tuned(config, study, folder, epochs=epochs, rate=rate):
        if isinstance(step, Tuned):
            print(f"common model, own test images: {figures_line(step.before)}")
            print(f"after {step.epochs} epochs:        {figures_line(step.after)}")
            print(f"{step.path}: trained without differential privacy; keep it in the hospital")
        else:
            print(f"epoch {step[0]}  validation: {figures_line(step[1])}", flush=True)


@audit_app.command()
def verify(context: typer.Context) -> None:
    """Check every line of the audit log; exit 3 names the first that is wrong."""
    from client.books import audit_lines

    for line in audit_lines(context.obj):
        print(line, flush=True)


@app.command()
def approve(
    context: typer.Context,
    study_file: Annotated[Path, typer.Argument(help="The study's TOML file.")],
    by: Annotated[str, typer.Option(help="Who approves; asked for if left out.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: it was read before.")] = False,
) -> None:
    """Show what a study asks for, in plain words, and record that it was approved here."""
    from client.approvals import Approvals
    from client.plain_words import describe
    from client.site import AUDIT
    from common.audit import AuditLog

    config: SiteConfig = context.obj
    study = load(study_file, Study)
    for line in describe(study, config):
        print(line)
    name = by or typer.prompt("Approved by", default=getpass.getuser())
    if not yes and not typer.confirm(f"Approve study {study.name} for {config.name}?"):
        raise ConfigError("not approved; nothing was written")
    Approvals(config.state_dir).approve(study, by=name, now=datetime.now(UTC))
    # Who approved is the hospital's own; heads of this log leave it, names never do.
    log = AuditLog(config.state_dir / AUDIT, lambda: datetime.now(UTC))
    log.append("approved", study=study.name, digest=study.digest())
    print(f"approved: {study.name}, digest {study.digest()}, by {name}")


def main() -> None:
    """Entry point of ``fl-client``; what it writes is this user's alone."""
    os.umask(0o077)
    start(app)
