"""Our own deployment on loopback, and where the seconds of its rounds go.

``fl-server`` and an ``fl-client`` for each site with everything that they do in a hospital: TLS
with certificates of both sides, approvals, journals and audit logs on disk. The model is a vector
and nobody trains. ``python -m our_rounds.deployment NUM_PARAMS NUM_ROUNDS NUM_SITES`` in ``bench/``
measures it alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from our_rounds.cpu import Sample, cpu_between, sampled
from our_rounds.notes import Event, read_notes
from our_rounds.phases import Round, bounds_of_rounds, phases_of_rounds
from stock_flower.deployment import Program, Start, processes

BENCH = Path(__file__).resolve().parent.parent
sys.path += [str(BENCH.parent), str(BENCH.parent / "tests" / "support")]
from deployment import Consortium, found  # noqa: E402 - it stands among the tests

from common.study.study import Deadlines  # noqa: E402
from server.superlink.launcher import ENVIRONMENT  # noqa: E402

STUDY = BENCH.parent / "studies" / "phantoms.toml"  # of it, only what is not made up counts
DATA = {"name": "none", "format": "phantom", "declared_patients": 100}
START_S, ROUND_S, PER_ENTRY_S = 120.0, 120.0, 1e-6  # how long we wait; the last: of each upload
SAMPLE_S = 0.25
MOST_SITES = 255  # of a study
MOST_STARTED = 4  # sites that are programs of their own; so many import torch in a minute


@dataclass(frozen=True)
class Run:
    """What a run took."""

    rounds: list[Round]
    keys_s: float  # the exchange of keys before the first round
    cpu_s: dict[str, float]  # of all steady rounds together, by program


def our_rounds(num_params: int, num_rounds: int, num_sites: int) -> Run:
    """Deploy, run, and take everything down again.

    Raises:
      RuntimeError: The coordinator failed, or was too slow; the message ends with what it said.
    """
    with deployed(num_params, num_rounds, num_sites) as one:
        samples = one.run("our_rounds.coordinator", "our_rounds.site")
        noted = read_notes(one.notes_of("coordinator"))
        sites = [read_notes(one.notes_of(name)) for name in one.made.names]
    _, second, *_, last = bounds_of_rounds(noted)
    rounds = phases_of_rounds(noted, sites)
    return Run(rounds, seconds_of_keys(noted), cpu_between(samples, second, last))


@dataclass(frozen=True)
class Deployed:
    """A consortium whose models have any size."""

    start: Start
    made: Consortium
    num_params: int
    patience_s: float  # with a whole run

    def run(
        self,
        coordinator: str,
        site: str,
        num_started: int = MOST_STARTED,
        together: int = MOST_SITES,
    ) -> list[Sample]:
        """Run the study with these modules in the place of ``fl-server`` and ``fl-client``.

        Args:
          coordinator: Its module.
          site: The module of the first ``num_started`` sites.
          num_started: The others are forks of one process.
          together: Forks that may make an answer at the same time.

        Returns:
          What the programs had computed, every moment.

        Raises:
          RuntimeError: The coordinator failed, or was too slow.
        """
        program = self._started(
            coordinator,
            self.num_params,
            self.notes_of("coordinator"),
            *("--study", self.made.study),
            *("--config", self.made.folder / "coordinator.toml"),
            *("--run-dir", self.made.run_dir),
        )
        sites = [
            self._started(
                site,
                self.num_params,
                self.notes_of(name),
                *("--site-config", self.made.site(name)),
            )
            for name in self.made.names[:num_started]
        ]
        if others := self.made.names[num_started:]:
            sites.append(
                self._started(
                    "our_rounds.forked", self.num_params, together, self.made.folder, *others
                )
            )
        return self._sampled_to_end(program, sites)

    def notes_of(self, name: str) -> Path:
        """Where a program writes what is measured in it."""
        return self.made.folder / f"{name}.jsonl"

    def _started(self, module: str, *arguments: object) -> Program:
        command = [sys.executable, "-m", module, *arguments]
        home = {"FLWR_HOME": str(self.made.folder / "flwr")}
        # What is measured is the program that these files belong to.
        path = {"PYTHONPATH": f"{BENCH}{os.pathsep}{BENCH.parent}"}
        return self.start(command, {**os.environ, **ENVIRONMENT, **home, **path}, unheard)

    def _sampled_to_end(self, coordinator: Program, sites: Sequence[Program]) -> list[Sample]:
        """Return when the run has ended well."""
        end = time.monotonic() + self.patience_s
        samples = []
        while coordinator.is_running and time.monotonic() < end:
            samples.append(sampled(coordinator.pid, [site.pid for site in sites]))
            time.sleep(SAMPLE_S)
        if coordinator.is_running or not (self.made.run_dir / "summary.json").exists():
            said = (line for one in (coordinator, *sites) for line in one.said[-20:])
            raise RuntimeError(f"our own run did not end:\n{''.join(said)}")
        return samples


@contextlib.contextmanager
def deployed(
    num_params: int, num_rounds: int, num_sites: int, **overrides: object
) -> Iterator[Deployed]:
    """Files of a consortium, and what starts its programs; all are ended in the end.

    Args:
      num_params: Of the model.
      num_rounds: Of the study.
      num_sites: Its members.
      overrides: Other values of the study, by dotted path.
    """
    names = [f"site-{number}" for number in range(1, num_sites + 1)]
    phase_s = ROUND_S + PER_ENTRY_S * num_params * num_sites
    deadlines = {f"deadlines.{name}": phase_s for name in Deadlines.model_fields}
    changed = {"num_rounds": num_rounds, **deadlines, **overrides}
    # On the disk that a hospital has, not in memory: every step waits until it is written.
    with tempfile.TemporaryDirectory(prefix="consilium-ours-") as folder, processes() as start:
        made = found(Path(folder), STUDY, names, data=DATA, overrides=changed)
        yield Deployed(start, made, num_params, START_S + phase_s * num_rounds)


def unheard(_: str, __: float) -> None:
    """What a program says is kept by whoever started it."""


def seconds_of_keys(noted: list[Event]) -> float:
    """From the invitation to the last agreement."""
    return sum(event.ended - event.began for event in noted if event.what == "exchange_keys")


if __name__ == "__main__":
    run = our_rounds(*map(int, sys.argv[1:]))
    print(f"keys: {run.keys_s:.3f} s; CPU of the steady rounds: {run.cpu_s}")
    for one_round in run.rounds:
        print(json.dumps({"round": sum(one_round.values()), **one_round}, indent=1))
