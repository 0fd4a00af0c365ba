"""A ledger's lines as events; the file is a hash-chained log (common/audit.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.accounting import Event
from common.audit import AuditLog
from common.errors import DataError

DEBIT = "debit"


@dataclass(frozen=True)
class Charge:
    """One debit."""

    run: str  # the run's name, a slash, and the study's digest
    sum_number: int
    event: Event
    time: str  # ISO 8601, UTC


def read_charges(path: Path) -> list[Charge]:
    """Every debit of a ledger's file, oldest first, the whole chain checked.

    Raises:
      DataError: A line is damaged: what was spent is then unknown.
    """
    log = AuditLog(path, lambda: datetime.now(UTC))
    try:
        return list(charges_in(log.entries()))
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"ledger {path.name} is damaged: what was spent is unknown; restore it from a backup, "
            f"or let the data owner close this data set ({error})"
        ) from None


def charges_in(lines: Iterable[Mapping[str, Any]]) -> Iterator[Charge]:
    """Of these lines."""
    for line in lines:
        if line["event"] != DEBIT:
            continue
        event = Event(
            float(line["noise_multiplier"]), float(line["sampling_probability"]), int(line["steps"])
        )
        yield Charge(str(line["run"]), int(line["sum"]), event, str(line["time"]))


def by_run(charges: Iterable[Charge]) -> dict[str, list[Charge]]:
    """Charges by run, in the order of each run's first."""
    runs: dict[str, list[Charge]] = {}
    for charge in charges:
        runs.setdefault(charge.run, []).append(charge)
    return runs
