"""The folder of one hospital's privacy report: what lies in it, and whether it still says the same.

* ``privacy-report.html``, ``.json``: the report
* ``ledgers/<data set>.jsonl``: each ledger as it was, line by line
* ``statements.json``: the last statement of each study, signed
* ``SHA256SUMS``, ``.sig``: digests of all of them, signed with the hospital's key
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.accounting import AGREEMENT, Event, epsilon_of, second_opinion
from common.audit import AuditLog
from common.charges import LEDGERS, by_run, counted, read_charges
from common.errors import ConfigError, DataError, FederationError, RemoteProtocolError
from common.identity import Certified
from common.privacy_report.facts import JSON, Facts
from common.seal import SIGNATURE, SUMS, check_files, check_signature_of, read_sums
from common.statement import Statement

STATEMENTS = "statements.json"


@dataclass(frozen=True)
class Verified:
    """What was found intact."""

    signer: str
    key: str  # fingerprint; 64 hex digits
    num_files: int
    num_charges: int
    num_statements: int


def is_site_folder(folder: Path) -> bool:
    """Whether it is one hospital's report, and not a run folder."""
    listed = read_sums(folder) if (folder / SUMS).is_file() else {}
    return STATEMENTS in listed


def verify(folder: Path) -> Verified:
    """Check signature, files, chains and statements, and calculate every epsilon again.

    Raises:
      ConfigError: It is no such folder.
      FederationError: A file differs or is missing; the message names the first.
    """
    if not (folder / SUMS).is_file():
        raise ConfigError(f"{folder} holds no {SUMS}: it is not a report that fl-client wrote")
    signer = check_signature_of(folder)
    digests = read_sums(folder)
    check_files(folder, digests)
    for path in (folder / LEDGERS).iterdir():
        if str(path.relative_to(folder)) not in digests:
            raise FederationError(
                f"{LEDGERS}/{path.name} is not listed in {SUMS}: it was put there"
            )
    facts: Facts = json.loads((folder / JSON).read_text(encoding="utf-8"))
    if facts["signer"] != signer.fingerprint:
        raise FederationError(f"{JSON}: another key than {SIGNATURE} has signed")
    try:
        num_charges = sum(_check_ledger(folder, ledger) for ledger in facts["ledgers"])
        num_statements = _check_statements(folder, signer)
    except (DataError, RemoteProtocolError) as error:
        raise FederationError(str(error)) from None  # a verdict about a file: exit code 1
    return Verified(signer.name, signer.fingerprint, len(digests), num_charges, num_statements)


def _check_ledger(folder: Path, stated: Facts) -> int:
    """Every epsilon of one data set, by the other library than the report's."""
    name = f"{LEDGERS}/{stated['data_set']}.jsonl"
    charges = read_charges(folder / name)
    so_far: list[Event] = []
    delta = float(stated["delta"])
    if len(by_run(charges)) != len(stated["runs"]):
        raise FederationError(f"{name}: it has not as many runs as the report")
    for (run, own), row in zip(by_run(charges).items(), stated["runs"], strict=True):
        so_far += counted(own, stated["unit"])
        if row["run"] != run:
            raise FederationError(f"{name}: run {run[:12]} comes where the report has another")
        _check_epsilon(f"{name}: epsilon after run {run[:12]}", row["epsilon"], so_far, delta)
    _check_epsilon(f"{name}: epsilon in all", stated["epsilon"], so_far, delta)
    return len(charges)


def _check_epsilon(where: str, said: float | None, events: list[Event], delta: float) -> None:
    """By the other library where there is time, else by the report's own."""
    value, other = math.inf if said is None else said, second_opinion(events, delta)
    found = epsilon_of(events, delta) if other is None else other
    if not math.isclose(value, found, rel_tol=AGREEMENT, abs_tol=AGREEMENT):
        raise FederationError(f"{where} is {value:.4g}, its ledger gives {found:.4g}")


def _check_statements(folder: Path, signer: Certified) -> int:
    stated = json.loads((folder / STATEMENTS).read_text(encoding="utf-8"))
    for table in stated:
        one = Statement.parse(json.dumps(table))
        where = f"{STATEMENTS}, run {one.run[:12]}, sum {one.sum_number}"
        one.check_signed(signer.key)
        if not any(_holds(path, one.ledger) for path in (folder / LEDGERS).glob("*.jsonl")):
            raise FederationError(f"{where}: no ledger here holds the head that was stated")
    return len(stated)


def _holds(path: Path, head: str) -> bool:
    log = AuditLog(path, lambda: datetime.now(UTC))  # nothing is written
    return log.holds(head)
