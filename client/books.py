"""A site's books, read and never written: what was charged, what it stated, whether they agree.

The journals are opened read-only, so all of this may run beside ``fl-client``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from client.config import Budget, Certificates, SiteConfig
from client.heads import check_heads
from client.hospital import STUDIES
from client.journal import JOURNAL
from client.ledger import Ledger, any_holds, charge_key
from client.site import AUDIT
from common.accounting import Event, epsilon_of
from common.audit import AuditLog, verify
from common.charges import LEDGERS, WITHOUT_PRIVACY, Charge, by_run
from common.errors import DataError, RemoteProtocolError
from common.identity import read_certificate, read_party
from common.manifest import Manifest
from common.statement import Statement
from common.study import Study

USUAL_DELTA = 1e-5  # where no [budget] names one
SHORT = 12  # digits of a digest


@dataclass(frozen=True)
class Kept:
    """What the journal of one study tells without its secrets."""

    manifest: Manifest
    phase: str
    sum_number: int | None  # of the last upload
    purpose: str
    is_unmasked: bool  # this site has helped to unmask it
    statement: Statement | None  # of the last upload in a private study, signed


def read_journal(folder: Path) -> Kept | None:
    """The journal of a study's folder; None before the first epoch.

    Raises:
      DataError: It cannot be read.
    """
    path = folder / JOURNAL
    if not path.exists():
        return None
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            rows = dict(database.execute("SELECT name, content FROM memory").fetchall())
        epoch = json.loads(rows["epoch"]) if "epoch" in rows else None
        last = json.loads(rows["sum"]) if "sum" in rows else {}
        return _kept(epoch, last) if epoch else None
    except (sqlite3.Error, ValueError, KeyError, RemoteProtocolError) as error:
        raise DataError(
            f"journal {path} cannot be read ({error}); start fl-client, which says what to do"
        ) from None


def _kept(epoch: dict[str, Any], last: dict[str, Any]) -> Kept:
    return Kept(
        manifest=Manifest.parse(epoch["manifest"]),
        phase=epoch["phase"],
        sum_number=last.get("sum_number"),
        purpose=last.get("purpose", ""),
        is_unmasked=bool(last) and not last["own_share"],
        statement=Statement.parse(last["statement"]) if last.get("statement") else None,
    )


def ledger_file(config: SiteConfig) -> Path:
    """Of the data set that the site file names."""
    return config.state_dir / LEDGERS / f"{config.data.name}.jsonl"


def charged_in_run_under_way(home: Path, study: Study, ledger: Ledger) -> int:
    """Sums that the run of a study was charged for; 0 before its first.

    Raises:
      DataError: The journal cannot be read.
    """
    kept = read_journal(home / STUDIES / study.digest())
    if kept is None:
        return 0
    return len(ledger.events_of(charge_key(kept.manifest.run, kept.manifest.study)))


def ledger_lines(config: SiteConfig) -> Iterator[str]:
    """Every run that was charged to a data set, epsilon after each, the total and what is left.

    Raises:
      DataError: A ledger is damaged.
    """
    check_statements(config)
    files = sorted((config.state_dir / LEDGERS).glob("*.jsonl"))
    if not files:
        yield f"no ledger in {config.state_dir / 'ledgers'}: nothing was ever charged"
    for path in files:
        budget = config.budget if path == ledger_file(config) else None
        delta = budget.delta if budget else USUAL_DELTA
        sofar: list[Event] = []
        for run, charges in by_run(Ledger(path, path.stem, None).charges()).items():
            sofar += [charge.event for charge in charges]
            yield (
                f"data set {path.stem}: run {run[:SHORT]}, {_describe(charges)}; epsilon "
                f"{epsilon_of(sofar, delta):.3g} after it"
            )
        yield spent_line(path, budget)


def spent_line(path: Path, budget: Budget | None) -> str:
    """What was ever charged to one data set, against its budget.

    Raises:
      DataError: The ledger is damaged.
    """
    delta = budget.delta if budget else USUAL_DELTA
    spent = Ledger(path, path.stem, budget).spent(delta)
    head = f"data set {path.stem}: epsilon {spent:.3g}"
    if budget is None:
        return f"{head} at delta {delta:g}; no [budget] in the site file bounds it"
    left = max(0.0, budget.epsilon - spent)
    return f"{head} of {budget.epsilon:g} at delta {delta:g}; {left:.3g} left"


def _describe(charges: list[Charge]) -> str:
    """Equal events in a row are one."""
    groups = [list(group) for _, group in groupby(charges, key=lambda charge: charge.event)]
    return ", then ".join(_describe_equal(group) for group in groups)


def _describe_equal(charges: list[Charge]) -> str:
    event, num = charges[0].event, len(charges)
    if event == WITHOUT_PRIVACY:
        return "a study without differential privacy"
    return (
        f"{num} sum{'' if num == 1 else 's'} of {event.steps} steps (noise multiplier "
        f"{event.noise_multiplier:.4g}, sampling probability {event.sampling_probability:.4g})"
    )


def audit_lines(config: SiteConfig) -> Iterator[str]:
    """Check every line of the audit log, and both books against what this site last stated.

    Raises:
      DataError: Damage, with the number of the first line that is wrong; or the audit log or a
        ledger no longer holds what was stated.
    """
    path = config.state_dir / AUDIT
    found = verify(path)
    yield f"audit log {path}: {found.num_lines} lines, none changed, removed or put in between"
    yield f"head {found.head}"
    if found.num_lines:
        yield f"times {found.first_time} to {found.last_time}"
    statements = list(last_statements(config.state_dir))
    for statement in statements:
        yield _check_stated(statement, config)
    if not statements:
        yield "no signed statement is kept here: lines cut off the end would not be noticed"


def last_statements(home: Path) -> Iterator[Statement]:
    """What this site stated last in each private study.

    Raises:
      DataError: A journal cannot be read.
    """
    for folder in sorted((home / STUDIES).glob("*")):
        kept = read_journal(folder)
        if kept and kept.statement:
            yield kept.statement


def check_statements(config: SiteConfig) -> None:
    """Refuse books that do not hold the heads that this site signed.

    Raises:
      DataError: Lines were cut off, or an older copy was put back.
    """
    for statement in last_statements(config.state_dir):
        _check_stated(statement, config)


def _check_stated(stated: Statement, config: SiteConfig) -> str:
    """Refuse books that do not hold the heads that this site signed."""
    which = f"statement on sum {stated.sum_number} of run {stated.run[:SHORT]}"
    home = config.state_dir
    _check_own(stated, which, config.certificates)
    audit = AuditLog(home / AUDIT, lambda: datetime.now(UTC))
    of = f"of this site's signed {which}"
    check_heads(audit.holds, stated.audit, partial(any_holds, home), stated.ledger, of)
    return f"{which}: audit log and ledger hold its heads"


def _check_own(stated: Statement, which: str, files: Certificates | None) -> None:
    if files is None:
        return
    try:
        stated.check_signed(read_party(read_certificate(files.cert))[2])
    except RemoteProtocolError:
        raise DataError(
            f"the {which} is not signed with this site's key: the journal was changed, or the "
            "site has a new key; compare with the coordinator's copy"
        ) from None
