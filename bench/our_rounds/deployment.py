"""Our own deployment on loopback, and where the seconds of its rounds go.

``fl-server`` and an ``fl-client`` for each site with everything that they do in a hospital: TLS
with certificates of both sides, approvals, journals and audit logs on disk. The model is a vector
and nobody trains. ``python -m our_rounds.deployment NUM_PARAMS NUM_ROUNDS`` in ``bench/`` measures
it alone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from our_rounds.notes import Event, read_notes
from our_rounds.phases import Round, phases_of_rounds
from stock_flower.deployment import Environment, Program, Start, processes

from server.superlink.launcher import ENVIRONMENT

BENCH = Path(__file__).resolve().parent.parent
sys.path.append(str(BENCH.parent / "tests" / "support"))
from deployment import Consortium, found  # noqa: E402 - it stands among the tests

STUDY = BENCH.parent / "studies" / "phantoms.toml"  # of it, only what is not made up counts
DATA = {"name": "none", "format": "phantom", "declared_patients": 100}
START_S, ROUND_S = 120.0, 60.0  # how long we wait


@dataclass(frozen=True)
class Run:
    """What a run took."""

    rounds: list[Round]
    keys_s: float  # the exchange of keys before the first round


def our_rounds(num_params: int, num_rounds: int, num_sites: int) -> Run:
    """Deploy, run, and take everything down again.

    Raises:
      RuntimeError: The coordinator failed, or was too slow; the message ends with what it said.
    """
    names = [f"site-{number}" for number in range(1, num_sites + 1)]
    patience_s = START_S + ROUND_S * num_rounds
    changed = {"num_rounds": num_rounds, "deadlines.answer_s": ROUND_S}
    # On the disk that a hospital has, not in memory: every step waits until it is written.
    with tempfile.TemporaryDirectory(prefix="consilium-ours-") as folder, processes() as start:
        made = found(Path(folder), STUDY, names, data=DATA, overrides=changed)
        coordinator = start_coordinator(start, made, num_params)
        for number, name in enumerate(names, 1):
            start_site(start, made, name, num_params, number)
        wait_for_end(coordinator, made, patience_s)
        noted = read_notes(notes_of(made, "coordinator"))
        sites = [read_notes(notes_of(made, name)) for name in names]
    return Run(phases_of_rounds(noted, sites), seconds_of_keys(noted))


def start_coordinator(start: Start, made: Consortium, num_params: int) -> Program:
    """``fl-server``, but for the model."""
    command = [sys.executable, "-m", "our_rounds.coordinator"]
    command += [notes_of(made, "coordinator"), num_params, "--study", made.study]
    command += ["--config", made.folder / "coordinator.toml", "--run-dir", made.run_dir]
    return start(command, environment_of(made), lambda *_: None)


def start_site(start: Start, made: Consortium, name: str, num_params: int, number: int) -> None:
    """``fl-client``, but for model and training."""
    command = [sys.executable, "-m", "our_rounds.site", notes_of(made, name), num_params, number]
    command += ["--site-config", made.site(name)]
    start(command, environment_of(made), lambda *_: None)


def environment_of(made: Consortium) -> Environment:
    """The variables that all programs get."""
    home = {"FLWR_HOME": str(made.folder / "flwr")}
    return {**os.environ, **ENVIRONMENT, **home, "PYTHONPATH": str(BENCH)}


def notes_of(made: Consortium, name: str) -> Path:
    """Where a program notes its times."""
    return made.folder / f"{name}.jsonl"


def wait_for_end(coordinator: Program, made: Consortium, patience_s: float) -> None:
    """Return when the run has ended well."""
    end = time.monotonic() + patience_s
    while coordinator.is_running and time.monotonic() < end:
        time.sleep(0.2)
    if coordinator.is_running or not (made.run_dir / "summary.json").exists():
        raise RuntimeError(f"our own run did not end:\n{''.join(coordinator.said[-40:])}")


def seconds_of_keys(noted: list[Event]) -> float:
    """From the invitation to the last agreement."""
    return sum(event.ended - event.began for event in noted if event.what == "exchange_keys")


if __name__ == "__main__":
    run = our_rounds(int(sys.argv[1]), int(sys.argv[2]), num_sites=3)
    print(f"keys: {run.keys_s:.3f} s")
    for one_round in run.rounds:
        print(json.dumps({"round": sum(one_round.values()), **one_round}, indent=1))
