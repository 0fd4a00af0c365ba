"""The door to disk for privacy spent: one append-only ledger per declared data set.

A debit is on disk before the data is touched: a crash may waste budget, it never overspends it. A
debit is keyed by (run, sum number): training the same sum again after a crash is charged once,
because nothing of the first attempt had left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import asdict
from io import FileIO
from pathlib import Path

from client.config import Budget
from common.accounting import Event, epsilon_of
from common.audit import GENESIS
from common.disk import append, is_full, sync_folder
from common.errors import BudgetExhausted, DataError

LEDGERS = "ledgers"  # folder in a site's state folder


def charge_key(run: str, study: str) -> str:
    """What a debit is keyed by, beside the sum's number.

    The coordinator chooses the run's name: without the study's digest, one charge would pay for a
    run of that name in every approved study.
    """
    return f"{run}/{study}"


class Ledger:
    """Everything ever charged to one data set, over all studies and runs."""

    def __init__(self, path: Path, data_name: str, budget: Budget | None) -> None:
        """Open a ledger, or start one.

        Raises:
          DataError: A line is damaged; what was spent is then unknown, and the site must stop.
        """
        self._path = path
        self._data_name = data_name
        self._budget = budget
        path.parent.mkdir(parents=True, exist_ok=True)
        self._events()

    def debit(self, run: str, sum_number: int, event: Event, *, num_rounds: int) -> None:
        """Charge one sum; on disk when this returns.

        Args:
          run: The run and its study; see ``charge_key``.
          sum_number: Charged once, however often it is asked for.
          event: What it costs.
          num_rounds: Sums that the study's epsilon pays for; a void one counts too.

        Raises:
          BudgetExhausted: It does not fit; nothing is charged, and no data may be opened.
          OSError: The disk is full; the same.
        """
        with self._path.open("ab", buffering=0) as file:
            # Several processes of one site may hold this ledger: check and charge are one step.
            fcntl.flock(file, fcntl.LOCK_EX)
            known = self._events().get((run, sum_number))
            if known == event:
                return
            if known is not None:
                raise DataError(f"the ledger of {self._data_name} holds another event for this sum")
            if len(self.events_of(run)) >= num_rounds:
                raise BudgetExhausted(
                    f"sum {sum_number}: this run was charged for {num_rounds} sums on data set "
                    f"{self._data_name}, as many as its epsilon pays for; start a new run"
                )
            self.check([event], f"sum {sum_number}")
            line = {"run": run, "sum": sum_number, **asdict(event)}
            os.fchmod(file.fileno(), 0o600)
            self._append(file, json.dumps(line).encode() + b"\n")

    def _append(self, file: FileIO, line: bytes) -> None:
        """Write one line whole or not at all: half of one would close this data set."""
        try:
            append(file, line)
            if file.tell() == len(line):
                sync_folder(self._path.parent)  # the name of a new ledger survives a power cut
        except OSError as error:
            if is_full(error):
                raise  # the debit is tried again as soon as there is room
            raise DataError(
                f"the ledger of {self._data_name} cannot be written ({error.strerror}): nothing "
                "was charged and no image opened; repair the disk"
            ) from None

    def check(self, planned: list[Event], what: str) -> None:
        """Refuse what the budget does not cover; nothing is charged.

        Raises:
          BudgetExhausted: With the epsilon needed, the budget, and the next move.
        """
        if self._budget is None:
            return
        budget, delta = self._budget.epsilon, self._budget.delta
        before = self.spent(delta)
        after = epsilon_of([*self._events().values(), *planned], delta)
        if after > budget:
            raise BudgetExhausted(
                f"{what} on data set {self._data_name} would bring epsilon to {after:.3g} at delta "
                f"{delta:g}; {before:.3g} of {budget:g} is spent; ask the data owner before "
                "raising the budget"
            )

    def spent(self, delta: float) -> float:
        """Epsilon at ``delta`` of everything ever charged to this data set."""
        return epsilon_of(self._events().values(), delta)

    def events_of(self, run: str) -> list[Event]:
        """What one run was charged."""
        return [event for (name, _), event in self._events().items() if name == run]

    def head(self) -> str:
        """SHA-256 over every line: what stands for this ledger in a statement; 64 hex digits."""
        content = self._content()
        return hashlib.sha256(content).hexdigest() if content else GENESIS

    def holds(self, head: str) -> bool:
        """Whether this was ever the head: not so after a cut or a return to an older copy."""
        digest = hashlib.sha256()
        heads = {GENESIS}
        for line in self._content().splitlines(keepends=True):
            digest.update(line)
            heads.add(digest.hexdigest())
        return head in heads

    def _content(self) -> bytes:
        return self._path.read_bytes() if self._path.exists() else b""

    def _events(self) -> dict[tuple[str, int], Event]:
        """Every charge by (run, sum number), read from disk: another process may have written."""
        content = self._content()
        if content and not content.endswith(b"\n"):
            raise self._damaged()
        try:
            return dict(_parse(line) for line in content.splitlines())
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None

    def _damaged(self) -> DataError:
        return DataError(
            f"ledger {self._path.name} is damaged: what was spent is unknown; restore it from a "
            "backup, or let the data owner close this data set"
        )


def _parse(line: bytes) -> tuple[tuple[str, int], Event]:
    entry = json.loads(line)
    event = Event(
        float(entry["noise_multiplier"]), float(entry["sampling_probability"]), int(entry["steps"])
    )
    return (str(entry["run"]), int(entry["sum"])), event
