"""The door to disk for privacy spent: one append-only ledger per declared data set.

A debit is on disk before the data is touched: a crash may waste budget, it never overspends it. A
debit is keyed by (run, sum number): training the same sum again after a crash is charged once,
because nothing of the first attempt had left.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.config import Budget
from common.accounting import Event, epsilon_of
from common.errors import BudgetExhausted, DataError


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
        self._lines = self._read()

    def debit(self, run: str, sum_number: int, event: Event) -> None:
        """Charge one sum; on disk when this returns.

        Raises:
          BudgetExhausted: It does not fit; nothing is charged, and no data may be opened.
        """
        known = self._events().get((run, sum_number))
        if known is not None:
            if known != event:
                raise DataError(f"the ledger of {self._data_name} holds another event for this sum")
            return
        self.check([event], f"sum {sum_number}")
        self._append({"run": run, "sum": sum_number, **asdict(event)})

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

    def _events(self) -> dict[tuple[str, int], Event]:
        return {
            (line["run"], line["sum"]): Event(
                line["noise_multiplier"], line["sampling_probability"], line["steps"]
            )
            for line in self._lines
        }

    def _append(self, line: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._path.chmod(0o600)
        self._lines.append(line)

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        try:
            lines: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines()]
            whole = not content or content.endswith(b"\n")
            if whole and all({"run", "sum", "noise_multiplier"} <= set(line) for line in lines):
                return lines
        except ValueError:
            pass
        raise DataError(
            f"ledger {self._path.name} is damaged: what was spent is unknown; restore it from a "
            "backup, or let the data owner close this data set"
        )
