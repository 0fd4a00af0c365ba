"""How a round grows with the number of sites and of parameters, and who computes in it.

Deployments as in ``rounds``, all of whose programs share this machine's cores: in hospitals, the
sites' part of the CPU seconds is the hospitals' own. There are no peers. ``python bench/scale.py``
prints the tables of docs/scale.md from what was measured last.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from our_rounds.cpu import PROGRAMS
from our_rounds.deployment import MOST_STARTED, our_rounds
from rounds import accounted, told, whole
from scipy.optimize import nnls

SITES, LIGHT = (3, 8, 16, 32, 50), 1_000
PARAMS, FEW = (1_000_000, 11_000_000, 45_000_000, 100_000_000), 3
BOTH = ((11_000_000, 8), (11_000_000, 16))  # tell what grows with sites from what does not
NUM_ROUNDS = {LIGHT: 6}
OF_HEAVY = 3


def rows() -> list[dict[str, Any]]:
    """A row for every point of both curves."""
    sizes = [(LIGHT, num_sites) for num_sites in SITES] + [(num, FEW) for num in PARAMS]
    return [measured(*size) for size in [*sizes, *BOTH]]


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


# What docs/scale.md says of it


def print_tables() -> None:
    """Both curves, and what the CPU seconds of the coordinator's two programs grow with."""
    results = json.loads((Path(__file__).parent / "results.json").read_text())
    points = [one for one in results if one["bench"] == "scale"]
    light = [one for one in points if one["settings"]["num_params"] == LIGHT]
    heavy = [one for one in points if one["settings"]["num_sites"] == FEW]
    print_table("sites", "num_sites", light)
    print_table("parameters", "num_params", heavy)
    print_table(
        "sites with 11 million parameters",
        "num_sites",
        [one for one in points if one["settings"]["num_params"] == BOTH[0][0]],
    )
    for program in PROGRAMS[:2]:
        per_site, per_megabyte, per_both = costs([one["settings"] for one in points], program)
        print(
            f"{program}: {per_site:.3f} s per site, {per_megabyte:.4f} s per MB of the model, and "
            f"{per_both:.4f} s per site and MB"
        )


def print_table(title: str, key: str, points: list[dict[str, Any]]) -> None:
    """One curve."""
    print(f"| {title} | s per round | coordinator, CPU s | SuperLink, CPU s | a site, CPU s |")
    print("|---" * 5 + "|")
    for point in sorted(points, key=lambda one: one["settings"][key]):
        settings = point["settings"]
        cpu = settings["cpu_s_per_round"]
        of_one = {**cpu, "sites": cpu["sites"] / settings["num_sites"]}
        columns = " | ".join(f"{of_one[name]:.2f}" for name in PROGRAMS)
        print(f"| {settings[key]:,} | {point['ours']:.2f} | {columns} |")
    print()


def costs(points: list[dict[str, Any]], program: str) -> tuple[float, ...]:
    """CPU seconds per round: for each site, each megabyte of the model, and one at one site."""
    sites = np.array([one["num_sites"] for one in points], float)
    megabytes = np.array([4e-6 * one["num_params"] for one in points])
    used = np.array([one["cpu_s_per_round"][program] for one in points])
    terms = np.stack([sites, megabytes, sites * megabytes], axis=1)
    # Errors count in proportion: the largest point would decide alone otherwise.
    found, _ = nnls(terms / used[:, None], np.ones_like(used))
    return tuple(map(float, found))


if __name__ == "__main__":
    print_tables()
