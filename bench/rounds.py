"""Seconds per round of a deployment: separate processes over TLS on loopback.

Ours beside stock Flower and, where it is installed, NVFlare's simulator, which take turns. A round
of ours is ``fl-server``'s with its ``fl-client``s, who score the model and train it in one exchange
and unmask the sum in a second one; only model and training are made up. A round of stock Flower is
two exchanges as well, a training and an evaluation, as its strategies do them, with one flat array
as the model; its sites add a number and its sums are not masked. A round of NVFlare's is one
exchange, with one flat array too. The first round of every run is left out: processes and
connections warm up in it. With many sites there are no peers: stock Flower starts two processes for
each.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from nvflare_simulator.simulator import installed_version, simulator_rounds
from our_rounds.deployment import MOST_STARTED, Run, our_rounds
from stock_flower.deployment import stock_rounds
from stock_flower.phases import Round

TURNS = 2
TIMES_FASTER = 4  # than stock Flower, promised with 11M parameters

STOCK = (
    "TLS, node authentication, database file, subprocess isolation, send_and_receive; "
    "no secure sum, no client certificate; the sites' app imports no torch"
)
NVFLARE = "FedAvg over one array, an executor that adds a number; no TLS, no database, no masks"
OURS = (
    "mutual TLS, masked sums, signed messages, journals, audit logs and models on disk; "
    "Flower's database in memory; made-up training"
)


@dataclass(frozen=True)
class Case:
    """One size."""

    num_params: int
    num_sites: int
    num_rounds: int  # of a run
    promised_s: float | None = None
    aim_s: float | None = None


@dataclass
class Measured:
    """What was measured of one size."""

    ours: list[Run] = field(default_factory=list)
    stock: list[Round] = field(default_factory=list)
    nvflare: list[float] = field(default_factory=list)


CASES = (
    Case(1_000, 3, 6, promised_s=1.0, aim_s=0.5),
    Case(11_000_000, 3, 5, aim_s=3.0),  # promised is a part of stock Flower's
    Case(45_000_000, 3, 3),
    Case(1_000, 32, 4, promised_s=10.0, aim_s=5.0),
)
AGAINST_STOCK = 11_000_000


def rows() -> list[dict[str, Any]]:
    """A row for each size."""
    return [row(case, measured(case)) for case in CASES]


def measured(case: Case) -> Measured:
    """Runs of ours and of the peers in turn."""
    size = (case.num_params, case.num_rounds, case.num_sites)
    seen = Measured()
    for _ in range(TURNS):
        seen.ours.append(our_rounds(*size))
        if case.num_sites <= MOST_STARTED:
            seen.stock += stock_rounds(*size)[1:]
            if installed_version():
                seen.nvflare += simulator_rounds(*size)[1:]
    return seen


def row(case: Case, seen: Measured) -> dict[str, Any]:
    """Medians of the steady rounds; where the seconds go stands in the settings."""
    ours = [one for run in seen.ours for one in run.rounds[1:]]
    peers = {}
    if seen.stock:
        peers[f"stock Flower {version('flwr')}"] = statistics.median(map(whole, seen.stock))
    if seen.nvflare:
        peers[f"NVFlare {installed_version()} simulator"] = statistics.median(seen.nvflare)
    ours_s = statistics.median(map(whole, ours))
    name = f"a round, {case.num_params:,} parameters, {case.num_sites} sites"
    print(f"{name}: {ours_s:.3f} s, {peers}", file=sys.stderr, flush=True)
    return {
        "case": name,
        "unit": "s",
        "ours": ours_s,
        "peers": peers,
        "limit": limit_of(case, peers),
        "better": "lower",
        "settings": {
            "num_params": case.num_params,
            "num_sites": case.num_sites,
            "sites": "programs" if case.num_sites <= MOST_STARTED else "forks of one process",
            "turns": TURNS,
            "load": os.getloadavg()[0],  # of all programs, in the last minute
            "aim_s": case.aim_s,
            "ours": {"as": OURS, **told(seen.ours), **accounted(ours)},
            "stock": {"as": STOCK, **accounted(seen.stock)} if seen.stock else None,
            "nvflare": {"as": NVFLARE, "rounds_s": seen.nvflare} if seen.nvflare else None,
        },
    }


def limit_of(case: Case, peers: dict[str, float]) -> dict[str, float] | None:
    """What was promised of this size."""
    if case.promised_s:
        return {"promised": case.promised_s}
    if case.num_params == AGAINST_STOCK:
        return {f"stock / {TIMES_FASTER}": next(iter(peers.values())) / TIMES_FASTER}
    return None


def told(runs: Sequence[Run]) -> dict[str, Any]:
    """What is no part of a round, and how much the programs computed in one."""
    num_steady = sum(len(run.rounds) - 1 for run in runs)
    names = runs[0].cpu_s
    return {
        "keys_before_the_rounds_s": statistics.mean(run.keys_s for run in runs),
        "cpu_s_per_round": {n: sum(run.cpu_s[n] for run in runs) / num_steady for n in names},
    }


def accounted(rounds: Sequence[Round]) -> dict[str, Any]:
    """Every second by phase: means, which add up to the mean round."""
    seconds = [whole(one) for one in rounds]
    phases = {name: statistics.mean(one[name] for one in rounds) for name in rounds[0]}
    return {
        "steady_rounds": len(rounds),
        "mean_s": statistics.mean(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "mean_phases_s": phases,
    }


def whole(one: Round) -> float:
    """Seconds of a round."""
    return sum(one.values())
