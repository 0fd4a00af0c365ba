"""How a round grows with the number of sites and of parameters, and who computes in it.

Deployments as in ``rounds``, all of whose programs share this machine's cores: in hospitals, the
sites' part of the CPU seconds is the hospitals' own. There are no peers.
"""

from __future__ import annotations

import os
import statistics
import sys
from typing import Any

from our_rounds.deployment import MOST_STARTED, our_rounds
from rounds import accounted, told, whole

SITES, LIGHT = (3, 8, 16, 32, 50), 1_000
PARAMS, FEW = (1_000_000, 11_000_000, 45_000_000, 100_000_000), 3
NUM_ROUNDS = {LIGHT: 6}
OF_HEAVY = 3


def rows() -> list[dict[str, Any]]:
    """A row for every point of both curves."""
    sizes = [(LIGHT, num_sites) for num_sites in SITES] + [(num, FEW) for num in PARAMS]
    return [measured(*size) for size in sizes]


def measured(num_params: int, num_sites: int) -> dict[str, Any]:
    """The median of the steady rounds of one run."""
    run = our_rounds(num_params, NUM_ROUNDS.get(num_params, OF_HEAVY), num_sites)
    steady = run.rounds[1:]
    ours = statistics.median(map(whole, steady))
    case = f"a round, {num_params:,} parameters, {num_sites} sites"
    print(f"{case}: {ours:.3f} s, CPU {told([run])}", file=sys.stderr, flush=True)
    return {
        "case": case,
        "unit": "s",
        "ours": ours,
        "peers": {},
        "limit": None,
        "better": "lower",
        "settings": {
            "num_params": num_params,
            "num_sites": num_sites,
            "sites": "programs" if num_sites <= MOST_STARTED else "forks of one process",
            "load": os.getloadavg()[0],
            **told([run]),
            **accounted(steady),
        },
    }
