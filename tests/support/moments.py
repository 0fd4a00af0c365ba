"""Moments of a deployed run, told by the lines in everybody's books; the best ones to crash at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from deployment import Consortium

COORDINATORS, OWN = "run/audit.jsonl", "sites/{site}/state/audit.jsonl"
LEDGER = "sites/{site}/state/ledgers/phantoms.jsonl"
SUM = '"sum_number":{sum},'
NUM_SCORED = 2  # sums after the last round
RIGHT_AFTER_S = 0.03

Line = tuple[str, ...]  # a file, and words that one line of it has; alone: the file is there
AT_COORDINATOR: tuple[Line, ...] = (
    (COORDINATORS, '"sent"', '"Invitation"', "{site}"),
    (COORDINATORS, '"received"', '"SiteKeys"', "{site}"),
    (COORDINATORS, '"received"', '"Agreement"', "{site}"),
    ("run/keys-1.json",),
    ("run/epoch-1.json",),
    (COORDINATORS, '"sent"', '"RoundTask"', "{site}", SUM),
    (COORDINATORS, '"received"', '"Upload"', "{site}", SUM),
    ("run/pending-sum.safetensors",),
    (COORDINATORS, '"sent"', '"Unmask"', "{site}", SUM),
    (COORDINATORS, '"received"', '"Shares"', "{site}", SUM),
    ("run/models/round-{round:04}.safetensors",),
    ("run/rounds.jsonl", '"round": {round},'),
    ("run/evaluations.jsonl", '"validate"'),
    ("run/final.safetensors",),
    ("run/summary.json",),
)
AT_SITE: tuple[Line, ...] = (
    (OWN, '"received"', '"Invitation"'),
    (OWN, '"sent"', '"SiteKeys"'),
    (OWN, '"sent"', '"Agreement"'),
    (OWN, '"received"', '"RoundTask"', SUM),
    (LEDGER, '"sum": {charged},'),
    (OWN, '"sent"', '"Upload"', SUM),
    (OWN, '"received"', '"Unmask"', SUM),
    (OWN, '"sent"', '"Shares"', SUM),
)


@dataclass(frozen=True)
class Moment:
    """Some time after a line appeared in a book."""

    book: str  # in the consortium's folder
    words: tuple[str, ...]
    after_s: float = 0.0

    def has_come(self, made: Consortium) -> bool:
        """Whether the line is there; the time after it is the caller's to wait."""
        path = made.folder / self.book
        if not self.words or not path.exists():
            return path.exists()
        lines = path.read_text().splitlines()
        return any(all(word in line for word in self.words) for line in lines)


FIRST_QUESTION = Moment("sites/site-1/state/audit.jsonl", ('"Greeting"',))


def right_after(line: Line, rng: Random, *, site: str, num_rounds: int) -> Moment:
    """The moment after a line of the tables above, in one of the rounds."""
    named = {
        "site": site,
        "sum": rng.randrange(num_rounds + NUM_SCORED),
        "charged": rng.randrange(num_rounds),
        "round": rng.randint(1, num_rounds),
    }
    book, *words = [part.format(**named) for part in line]
    return Moment(book, tuple(words), rng.choice((0.0, rng.uniform(0.0, RIGHT_AFTER_S))))


def last_line(audit_log: Path) -> str:
    """What a party did last, in a few words."""
    lines = audit_log.read_text().splitlines() if audit_log.exists() else []
    if not lines:
        return "nothing yet"
    try:
        line = json.loads(lines[-1])
    except json.JSONDecodeError:
        return "writing a line"
    number = f" of sum {line['sum_number']}" if "sum_number" in line else ""
    return f"{line['event']} {line.get('type', '')}{number}".strip()
