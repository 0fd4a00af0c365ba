"""The run that crash tests disturb: light and private, four hospitals, secure sums over TLS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployment import Consortium, found
from moments import Moment

STUDY = Path(__file__).parents[2] / "studies" / "demo-seeded.toml"
NUM_ROUNDS = 6
LIGHT = {
    "name": "crash-test",
    "num_rounds": NUM_ROUNDS,
    "model.width": 4,
    "privacy.epsilon": None,  # to find the noise for one takes every process some seconds
    "privacy.noise_multiplier": 1.0,
}
DATA = {
    "name": "phantoms",
    "format": "phantom",
    "num_patients": 60,
    "images_per_patient": 1,
    "declared_patients": 48,
}
SITES = ("site-1", "site-2", "site-3", "site-4")
RUN_S = 400.0  # a run that takes longer hangs
LOG_CHARS = 1500
LEAVE_S = 10.0  # for a SuperLink whose coordinator has ended
POLL_S = 0.002


def founded(folder: Path, changes: dict[str, Any] | None = None) -> Consortium:
    """New keys, approvals and files; ``changes`` by dotted key of the study."""
    return found(folder, STUDY, SITES, data=DATA, overrides={**LIGHT, **(changes or {})})


def start_all(made: Consortium) -> None:
    """The sites and the coordinator."""
    for name in made.names:
        made.start_site(name)
    made.start_coordinator()


def start_again(made: Consortium, name: str) -> None:
    """As the service manager of a site or of the coordinator does."""
    if name != "coordinator":
        made.start_site(name)
        return
    # The rule of deploy/consilium-coordinator.service: a run that has begun is resumed.
    has_begun = any(made.run_dir.glob("epoch-*.json"))
    made.start_coordinator(*(["--resume"] if has_begun else []))


def wait_until(made: Consortium, moment: Moment) -> bool:
    """Until a moment has come; False where the run is over before.

    Raises:
      AssertionError: The run hangs, with what everybody logged last.
    """
    coordinator, end = made.running["coordinator"], time.monotonic() + RUN_S
    while not moment.has_come(made):
        if coordinator.poll() is not None:
            return False
        if time.monotonic() > end:
            said = "".join(f"\n--- {name}\n{made.log(name)[-LOG_CHARS:]}" for name in made.running)
            raise AssertionError(f"{moment} never came{said}")
        time.sleep(POLL_S)
    time.sleep(moment.after_s)
    return coordinator.poll() is None


def faults_until_the_end(made: Consortium) -> Iterator[str]:
    """Wait for the coordinator; no site may end before it, and no SuperLink stay behind."""
    coordinator, end = made.running["coordinator"], time.monotonic() + RUN_S
    while coordinator.poll() is None and time.monotonic() < end:
        time.sleep(POLL_S)
    if coordinator.poll() is None:
        yield f"no end after {RUN_S:g} s"
        return
    if coordinator.returncode:
        last = made.log("coordinator").strip().splitlines()[-1]
        yield f"the coordinator ended with {coordinator.returncode}: {last}"
    for name in made.names:
        if made.running[name].poll() is not None:
            yield f"{name} ended by itself with {made.running[name].returncode}"
    end = time.monotonic() + LEAVE_S
    while made.left_over():
        if time.monotonic() > end:
            yield f"a SuperLink stayed behind for {LEAVE_S:g} s"
            return
        time.sleep(POLL_S)
