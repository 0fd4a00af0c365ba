"""Where the seconds of a stock round go: what its processes noted, put in order.

All times are on the monotonic clock, which the processes of one machine share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

# Of one exchange, in the order in which they happen at the site whose reply arrives last.
PHASES = (
    "coordinator pushes",
    "SuperNode sleeps, 3 s at a time",
    "SuperNode pulls",
    "SuperExec sleeps, 1 s at a time",
    "new process until its app runs",
    "the site's app",
    "reply into the SuperNode, which sleeps 0.5 s at a time",
    "SuperNode pushes",
    "coordinator sleeps, 3 s at a time",
    "coordinator pulls",
)
BETWEEN = "between the exchanges"
SAYS = ("Receiving: ", "Received successfully", "Sending: ", "Sent successfully")

Round = dict[str, float]  # seconds of every phase; together they are the whole round


@dataclass(frozen=True)
class SiteTimes:
    """What one site did when, an entry for each exchange."""

    app: Path  # its app writes here
    said: Mapping[str, list[float]] = field(default_factory=lambda: {words: [] for words in SAYS})

    def hear(self, line: str, now: float) -> None:
        """Keep when the SuperNode said one of the four things."""
        for words, times in self.said.items():
            if words in line:
                times.append(now)

    def of_exchange(self, number: int) -> list[float]:
        """From "Receiving" to "Sent"."""
        receiving, received, sending, sent = (times[number] for times in self.said.values())
        app = json.loads(self.app.read_text().splitlines()[number])
        inside = [app["process"], app["called"], app["answered"]]
        return [receiving, received, *inside, sending, sent]


def phases_of_rounds(
    rounds: Sequence[Mapping[str, Any]], sites: Sequence[SiteTimes]
) -> list[Round]:
    """The seconds of every round, by phase."""
    made, number = [], 0
    for one in rounds:
        total = dict.fromkeys(PHASES, 0.0)
        for exchange in one["exchanges"]:
            for phase, seconds in phases_of_exchange(exchange, sites, number).items():
                total[phase] += seconds
            number += 1
        made.append(total | {BETWEEN: one["ended"] - one["started"] - sum(total.values())})
    return made


def phases_of_exchange(
    exchange: Mapping[str, float], sites: Sequence[SiteTimes], number: int
) -> Round:
    """The way of the last reply; what overlaps counts for the earlier phase."""
    last = max((site.of_exchange(number) for site in sites), key=lambda times: times[-1])
    ended = exchange["ended"]
    marks = [exchange["begun"], exchange["pushed"], *last, exchange["pulling"], ended]
    in_order = [min(mark, ended) for mark in accumulate(marks, max)]
    seconds = [after - before for before, after in pairwise(in_order)]
    return dict(zip(PHASES, seconds, strict=True))
