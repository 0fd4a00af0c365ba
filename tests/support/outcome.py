"""What a deployed run came to, by everybody's books: to compare with another run of the study.

``Outcome`` is what an undisturbed run and one with crashes have in common; ``faults_of`` is what no
run may have, whatever happened to it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from deployment import Consortium

from client.ledger import Ledger
from client.site import AUDIT
from common.audit import verify as verify_log
from common.charges import LEDGERS
from common.errors import FederationError
from server import run_dir
from server.report import verify as verify_run

ANSWERS = ("Upload", "Vote", "Shares")  # a site gives each once for a sum


@dataclass(frozen=True)
class Charged:
    """What a ledger holds."""

    num_lines: int
    sums: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class Summed:
    """A sum that was unmasked."""

    number: int
    purpose: str
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What must not depend on a crash."""

    model: str  # SHA-256; empty where nobody can repeat the noise
    sums: tuple[Summed, ...]
    privacy: dict[str, Any]  # by site: what it states of epsilon, and what that follows from
    ledgers: dict[str, Charged]

    @classmethod
    def of(cls, made: Consortium) -> Self:
        """Read it from the run folder and the ledgers of a finished run."""
        summary = json.loads((made.run_dir / run_dir.SUMMARY).read_text())
        is_seeded = all(one["randomness"] == "seeded" for one in summary["privacy"].values())
        lines = json_lines(made.run_dir / run_dir.ROUNDS)
        lines += json_lines(made.run_dir / run_dir.EVALUATIONS)
        return cls(
            model=summary["final_model_sha256"] if is_seeded else "",
            sums=tuple(Summed(n["sum"], n["purpose"], tuple(n["survivors"])) for n in lines),
            privacy=summary["privacy"],
            ledgers={name: charged(made.state(name)) for name in made.names},
        )

    def is_complete(self, names: Sequence[str]) -> bool:
        """Whether every sum came about, and every site was in it."""
        return [one.number for one in self.sums] == list(range(len(self.sums))) and all(
            set(one.survivors) == set(names) for one in self.sums
        )

    def differences(self, reference: Self) -> Iterator[str]:
        """What is not as in the reference."""
        for part in (field.name for field in fields(self)):
            found, expected = getattr(self, part), getattr(reference, part)
            if found != expected:
                yield f"{part}: {found}, in the reference {expected}"


def charged(state_dir: Path) -> Charged:
    """What all of a site's data sets were charged."""
    ledgers = (Ledger(path, path.stem, None) for path in (state_dir / LEDGERS).glob("*.jsonl"))
    charges = [one for ledger in ledgers for one in ledger.charges()]
    sums = tuple(sorted({one.sum_number for one in charges}))
    return Charged(len(charges), sums, sum(one.event.steps for one in charges))


def faults_of(made: Consortium) -> Iterator[str]:
    """What no run may have: a sum charged twice, two answers to one question, damaged books."""
    for name in made.names:
        held = charged(made.state(name))
        if held.num_lines != len(held.sums):
            yield f"{name}: {held.num_lines} lines of its ledger charge {len(held.sums)} sums"
    for (name, kind, number), digests in said_by_sites(made).items():
        if len(digests) > 1:
            yield f"{name}: {len(digests)} different answers {kind} for sum {number}"
    for path in sorted(made.folder.rglob("*.log")):
        if "Traceback" in path.read_text():
            yield f"{path.name} has a traceback"
    try:
        verify_run(made.run_dir)
        for name in made.names:
            verify_log(made.state(name) / AUDIT)
    except FederationError as error:
        yield str(error)


def said_by_sites(made: Consortium) -> dict[tuple[str, str, int], set[str]]:
    """Digests by site, kind of answer and sum: as it was sent, and as it arrived."""
    said = defaultdict[tuple[str, str, int], set[str]](set)
    for name in made.names:
        for line in answers(made.state(name) / AUDIT, "sent"):
            said[name, line["type"], line["sum_number"]].add(line["digest"])
    for line in answers(made.run_dir / run_dir.AUDIT, "received"):
        said[line["peer"], line["type"], line["sum_number"]].add(line["digest"])
    return said


def answers(audit_log: Path, event: str) -> Iterator[dict[str, Any]]:
    """Lines about answers to the questions of a sum."""
    for line in json_lines(audit_log):
        if line["event"] == event and line.get("type") in ANSWERS:
            yield line


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a book."""
    return [json.loads(line) for line in path.read_text().splitlines()]
