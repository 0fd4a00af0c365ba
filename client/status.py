"""How this hospital stands, for the people who look after it; nothing is written."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

from client.approvals import Approvals
from client.books import SHORT, read_journal, spent_line
from client.certificate_check import check_certificate
from client.config import SiteConfig
from client.finding import one_line
from client.hospital import CURRENT, LOCK, STUDIES
from client.site import AUDIT
from common.audit import AuditLog
from common.charges import LEDGERS
from common.config import load
from common.errors import FederationError
from common.study import Study


def status(config: SiteConfig, site_file: Path, now: datetime) -> Iterator[str]:
    """One line each: the process, the certificate, studies, the current run, ledger, audit log."""
    parts: list[Callable[[], Iterator[str]]] = [
        lambda: _process(config),
        lambda: _certificate(config, now),
        lambda: _approved(config.state_dir),
        lambda: _proposed(config.state_dir, site_file),
        lambda: _current(config.state_dir),
        lambda: _spent(config),
        lambda: _audit(config.state_dir, now),
    ]
    for part in parts:
        yield from map(one_line, _or_reason(part))


def is_running(home: Path) -> bool:
    """Whether an ``fl-client`` takes part with this state folder."""
    try:
        with (home / LOCK).open("rb") as file:
            # Held for microseconds: a client that starts in them fails, and may start again.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _or_reason(part: Callable[[], Iterator[str]]) -> Iterator[str]:
    """One damaged book must not hide the others."""
    try:
        yield from part()
    except FederationError as error:
        yield f"DAMAGED: {error}"


def _process(config: SiteConfig) -> Iterator[str]:
    running = "runs" if is_running(config.state_dir) else "does not run"
    yield f"site {config.name}: fl-client {running}; coordinator {config.coordinator or 'not set'}"


def _certificate(config: SiteConfig, now: datetime) -> Iterator[str]:
    if config.certificates is None:
        yield "certificate: none in the site file"
        return
    for found in check_certificate(config, config.certificates, now):
        yield found.text if found.level == "ok" else f"{found.level}: {found.text}"


def _approved(home: Path) -> Iterator[str]:
    approvals = Approvals(home)
    lines = approvals.lines()
    if not lines:
        yield "approved: no study"
    for line in lines:
        said = (
            f"approved: {line['study']}, digest {line['digest']}, by {line['by']}, {line['time']}"
        )
        yield from _or_reason(partial(_still, approvals, line["digest"], said))


def _still(approvals: Approvals, digest: str, said: str) -> Iterator[str]:
    """An approval ends when its file is removed."""
    yield said if approvals.study(digest) else f"{said}; withdrawn: its file was removed"


def _proposed(home: Path, site_file: Path) -> Iterator[str]:
    approvals, found = Approvals(home), sorted((home / "proposed").glob("*.toml"))
    waiting = [path for path in found if not (home / "approved" / path.name).exists()]
    if not waiting:
        yield "proposed: no study that waits for approval"
    for path in waiting:
        study = approvals.proposed(path.stem)
        name = study.name if study else "removed just now"
        yield (
            f"proposed: {name}, digest {path.stem}; read it, then: fl-client --site-config "
            f"{site_file} approve {path}"
        )


def _current(home: Path) -> Iterator[str]:
    path = home / CURRENT
    if not path.exists():
        yield "current study: none; no coordinator has invited this site yet"
        return
    digest = path.read_text()
    kept, study = read_journal(home / STUDIES / digest), _study_of(home, digest)
    name = f"current study: {study.name if study else 'not approved'}, digest {digest[:SHORT]}..."
    if kept is None:
        yield f"{name}; no epoch yet"
        return
    yield f"{name}, run {kept.manifest.run[:SHORT]}, epoch {kept.manifest.epoch}, {kept.phase}"
    if kept.sum_number is None:
        yield "last sum answered: none in this run"
    else:
        rest = "unmasked" if kept.is_unmasked else "not unmasked with this site's help yet"
        yield f"last sum answered: {kept.sum_number} ({kept.purpose}), {rest}"


def _study_of(home: Path, digest: str) -> Study | None:
    path = home / "approved" / f"{digest}.toml"
    return load(path, Study) if path.exists() else None


def _spent(config: SiteConfig) -> Iterator[str]:
    files = sorted((config.state_dir / LEDGERS).glob("*.jsonl"))
    if not files:
        yield "ledger: nothing was ever charged"
    for path in files:
        own = path.stem == config.data.name
        yield f"ledger: {spent_line(path, config.budget if own else None)}"


def _audit(home: Path, now: datetime) -> Iterator[str]:
    yield f"audit log: head {AuditLog(home / AUDIT, lambda: now).head()}"
