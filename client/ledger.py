"""The door to disk for privacy spent: one append-only ledger per declared data set.

A debit is on disk before the data is touched: a crash may waste budget, it never overspends it. A
debit is keyed by (run, sum number): training the same sum again after a crash is charged once,
because nothing of the first attempt had left.

The file is a hash-chained log (common/audit.py) with two kinds of lines: ``debit``, and ``data``,
which says what was then read of the data set, as a digest. Nothing in it is about one patient.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from client.config import Budget
from client.contents import Contents, Patients
from common.accounting import Event, epsilon_of
from common.audit import AuditLog
from common.charges import DEBIT, LEDGERS, Charge, counted, read_charges
from common.disk import is_full
from common.errors import BudgetExhausted, DataError


def charge_key(run: str, study: str) -> str:
    """What a debit is keyed by, beside the sum's number.

    The coordinator chooses the run's name: without the study's digest, one charge would pay for a
    run of that name in every approved study.
    """
    return f"{run}/{study}"


class Ledger:
    """Everything ever charged to one data set, over all studies and runs."""

    def __init__(
        self,
        path: Path,
        data_name: str,
        budget: Budget | None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Open a ledger; its first line makes the file.

        Raises:
          DataError: A line is damaged; what was spent is then unknown, and the site must stop.
        """
        self._path = path
        self._data_name = data_name
        self._budget = budget
        self._log = AuditLog(path, now)
        self.charges()

    def debit(
        self,
        run: str,
        sum_number: int,
        event: Event,
        *,
        num_rounds: int,
        unit: str = "patient",
        randomness: str = "os",
    ) -> None:
        """Charge one sum; on disk when this returns.

        Args:
          run: The run and its study; see ``charge_key``.
          sum_number: Charged once, however often it is asked for.
          event: What it costs.
          num_rounds: Sums that the study's epsilon pays for; a void one counts too.
          unit: Whom the event's epsilon protects: ``patient`` or ``image``; or ``none``.
          randomness: ``os`` or ``seeded``.

        Raises:
          BudgetExhausted: It does not fit; nothing is charged, and no data may be opened.
          DataError: The run was charged with other numbers before: what it states would be wrong.
          OSError: The disk is full; nothing is charged.
        """
        with self._alone():
            charges = self.charges()
            known = {one.sum_number: one.event for one in charges if one.run == run}
            if any(one != event for one in known.values()):
                raise DataError(
                    f"the ledger of {self._data_name} holds other numbers for this run (noise, "
                    "sampling probability or steps): data.declared_patients was changed while it "
                    "was under way; put the old number back until the run has ended"
                )
            if sum_number in known:
                return
            if len(known) >= num_rounds:
                raise BudgetExhausted(
                    f"sum {sum_number}: this run was charged for {num_rounds} sums on data set "
                    f"{self._data_name}, as many as its epsilon pays for; start a new run"
                )
            self._check(charges, [event], f"sum {sum_number}")
            facts = {**asdict(event), "unit": unit, "randomness": randomness}
            self._append(DEBIT, run=run, sum=sum_number, **facts)

    def opened(self, contents: Contents) -> None:
        """Record what was read of the data set, before it is used.

        Raises:
          DataError: Another data set of this site holds one of its patients: two budgets would
            pay for one person.
          OSError: The disk is full.
        """
        with self._alone():
            Patients(self._path.parent).claim(self._data_name, contents.units)
            before = [line["digest"] for line in self._log.entries() if line["event"] == "data"]
            if before[-1:] != [contents.digest]:
                self._append("data", digest=contents.digest, images=contents.num_images)

    def check(self, planned: list[Event], what: str) -> None:
        """Refuse what the budget does not cover; nothing is charged.

        Raises:
          BudgetExhausted: With the epsilon needed, the budget, and the next move.
        """
        self._check(self.charges(), planned, what)

    def _check(self, charges: list[Charge], planned: list[Event], what: str) -> None:
        if self._budget is None:
            return
        budget, delta = self._budget.epsilon, self._budget.delta
        after = self._epsilon(charges, delta, planned)
        if after > budget:
            raise BudgetExhausted(
                f"{what} on data set {self._data_name} would bring epsilon to {after:.3g} at delta "
                f"{delta:g}; {self._epsilon(charges, delta):.3g} of {budget:g} is spent; ask the "
                "data owner before raising the budget"
            )

    def spent(self, delta: float, planned: Sequence[Event] = ()) -> float:
        """Epsilon at ``delta`` of everything ever charged to this data set, and of what is planned.

        Infinite once it was used in a study without differential privacy; of a budget for patients
        also once it was used in one that protects single images.
        """
        return self._epsilon(self.charges(), delta, planned)

    def _epsilon(self, charges: list[Charge], delta: float, planned: Sequence[Event] = ()) -> float:
        unit = self._budget.unit if self._budget else ""  # without one, as the charges say
        return epsilon_of([*counted(charges, unit), *planned], delta)

    def events_of(self, run: str) -> list[Event]:
        """What one run was charged."""
        return [one.event for one in self.charges() if one.run == run]

    def charges(self) -> list[Charge]:
        """Every debit, oldest first, read from disk: another process may have written.

        Raises:
          DataError: A line is damaged.
        """
        return read_charges(self._path)

    def head(self) -> str:
        """The hash of the last line: what stands for this ledger in a statement; 64 hex digits."""
        return self._log.head()

    def holds(self, head: str) -> bool:
        """Whether this was ever the head: not so after a cut or a return to an older copy."""
        return self._log.holds(head)

    def _append(self, event: str, **facts: str | float) -> None:
        """Write one line whole or not at all: half of one would close this data set."""
        try:
            self._log.append(event, **facts)
        except OSError as error:
            if is_full(error):
                raise  # it is tried again as soon as there is room
            raise DataError(
                f"the ledger of {self._data_name} cannot be written ({error.strerror}): nothing "
                "was charged and no image opened; repair the disk"
            ) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Several processes of one site may hold this ledger: check and charge are one step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def any_holds(home: Path, head: str) -> bool:
    """Whether a ledger of this state folder ever had this head."""
    paths = sorted((home / LEDGERS).glob("*.jsonl"))
    return any(Ledger(path, path.stem, None).holds(head) for path in paths)
