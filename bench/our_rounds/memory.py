"""What every program of a deployment takes at most, in models of 4 bytes per parameter.

``python -m our_rounds.memory NUM_PARAMS NUM_SITES`` in ``bench/`` prints it. Counted is the peak of
a process beyond that of the same process of a small deployment, whose models have 1,000 parameters:
Python, torch, images and everything that is imported are in both. Sites train one step with the
study's optimizer, AdamW; what is made up is the gradient. In a deployment of many sites only some
are such programs: the others are forks of one, which do not train.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Self

from our_rounds.deployment import deployed
from our_rounds.peaks import IDLE, read_peaks

NUM_ROUNDS = 2
# There is no memory for more of 45M parameters:
WHOLE_SITES = 3  # that train and are measured
TOGETHER = 4  # of the others that may make their answers at the same time; all may send them
ONE_STEP = {"training.local_epochs": 1, "training.batch_size": 1024}  # more take no more
SMALL_PARAMS, SMALL_SITES = 1_000, 3
COORDINATOR, SUPERLINK, SITE = "fl-server", "SuperLink", "fl-client"
MEGA = 1e6


@dataclass(frozen=True)
class Taken:
    """By one process, in bytes."""

    idle: int  # when all members were connected and no model was made yet
    steps: dict[str, int]  # the most in each, in the order in which they came first

    @classmethod
    def of(cls, peaks: dict[str, int]) -> Self:
        """From what was noted of a process."""
        return cls(peaks[IDLE], {step: most for step, most in peaks.items() if step != IDLE})

    @property
    def peak(self) -> int:
        """In all."""
        return max(self.steps.values())


def memory_of_run(num_params: int, num_sites: int) -> dict[str, Taken]:
    """Peaks of fl-server, its SuperLink, and the fl-client that took the most."""
    with deployed(num_params, NUM_ROUNDS, num_sites, **ONE_STEP) as one:
        programs = ("our_rounds.memory_coordinator", "our_rounds.memory_site")
        one.run(*programs, WHOLE_SITES, TOGETHER)
        noted = read_peaks(one.notes_of("coordinator"))
        whole = one.made.names[:WHOLE_SITES]
        sites = [Taken.of(read_peaks(one.notes_of(name))[name]) for name in whole]
    here = {name: Taken.of(peaks) for name, peaks in noted.items()}
    return here | {SITE: max(sites, key=lambda site: site.peak)}


def print_table(num_params: int, taken: dict[str, Taken], small: dict[str, Taken]) -> None:
    """All processes and their steps; megabytes, and models beyond the small deployment's peak."""
    for name, one in taken.items():
        base = small[name].peak
        rows = {name: one.peak, **{f"  {step}": most for step, most in one.steps.items()}}
        print(f"idle {one.idle / MEGA:.0f} MB, peak with a small model {base / MEGA:.0f} MB")
        for label, num_bytes in rows.items():
            models = (num_bytes - base) / (4 * num_params)
            print(f"{label:<32} {num_bytes / MEGA:8.0f} MB {models:8.2f} models")


if __name__ == "__main__":
    params, sites = map(int, sys.argv[1:])
    small = memory_of_run(SMALL_PARAMS, SMALL_SITES)
    print_table(params, memory_of_run(params, sites), small)
