"""A ledger's lines as events; the file is a hash-chained log (common/audit.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.accounting import Event
from common.audit import AuditLog
from common.errors import DataError

LEDGERS = "ledgers"  # folder in a site's state folder, and in its report
DEBIT = "debit"
WITHOUT_PRIVACY = Event(noise_multiplier=0.0, sampling_probability=1.0, steps=1)  # no bound


@dataclass(frozen=True)
class Charge:
    """One debit."""

    run: str  # the run's name, a slash, and the study's digest
    sum_number: int
    event: Event
    unit: str  # whom it protects: patient or image; a study without privacy says none
    randomness: str  # os or seeded
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
        found = re.search(r"line \d+", str(error))
        raise DataError(
            f"ledger {path.name} is damaged{' in ' + found[0] if found else ''}: what was spent is "
            "unknown; restore it from a backup, or let the data owner close this data set"
        ) from None


def charges_in(lines: Iterable[Mapping[str, Any]]) -> Iterator[Charge]:
    """Of these lines."""
    for line in lines:
        if line["event"] != DEBIT:
            continue
        event = Event(
            float(line["noise_multiplier"]), float(line["sampling_probability"]), int(line["steps"])
        )
        yield Charge(
            run=str(line["run"]),
            sum_number=int(line["sum"]),
            event=event,
            unit=str(line["unit"]),
            randomness=str(line["randomness"]),
            time=str(line["time"]),
        )


def counted(charges: Iterable[Charge], unit: str) -> list[Event]:
    """What charges cost one patient, or one image.

    What was spent on a promise to single images bounds nothing for a patient who has several.
    """
    return [
        WITHOUT_PRIVACY if (unit, one.unit) == ("patient", "image") else one.event
        for one in charges
    ]


def by_run(charges: Iterable[Charge]) -> dict[str, list[Charge]]:
    """Charges by run, in the order of each run's first."""
    runs: dict[str, list[Charge]] = {}
    for charge in charges:
        runs.setdefault(charge.run, []).append(charge)
    return runs
