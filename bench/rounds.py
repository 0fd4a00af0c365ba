"""Seconds per round of a deployment: separate processes over TLS on loopback.

Ours beside stock Flower, which takes turns with it. A round of ours is ``fl-server``'s with its
``fl-client``s, who score the model and train it in one exchange and unmask the sum in a second one;
only model and training are made up. A round of stock Flower is two exchanges as well, a training
and an evaluation, as its strategies do them, with one flat array as the model; its sites add a
number and its sums are not masked. The limit is what was promised: a third of stock Flower.
The first round of every run is left out: processes and connections warm up in it.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from our_rounds.deployment import Run, our_rounds
from stock_flower.deployment import stock_rounds
from stock_flower.phases import Round

NUM_SITES = 3
TURNS = 2
CASES = {1_000: 4, 11_000_000: 4}  # number of parameters: rounds of a run
TIMES_FASTER = 3  # promised

STOCK = (
    "TLS, node authentication, database file, subprocess isolation, send_and_receive; "
    "no secure sum, no client certificate; the sites' app imports no torch"
)
OURS = (
    "mutual TLS, masked sums, signed messages, journals, audit logs and models on disk; "
    "Flower's database in memory; made-up training"
)


def rows() -> list[dict[str, Any]]:
    """A row for each number of parameters."""
    return [measured(num_params, num_rounds) for num_params, num_rounds in CASES.items()]


def measured(num_params: int, num_rounds: int) -> dict[str, Any]:
    """Runs of ours and of stock Flower in turn."""
    ours: list[Run] = []
    stock: list[Round] = []
    for _ in range(TURNS):
        ours.append(our_rounds(num_params, num_rounds, NUM_SITES))
        stock += stock_rounds(num_params, num_rounds, NUM_SITES)[1:]
    return row(num_params, ours, stock)


def row(num_params: int, runs: Sequence[Run], stock: Sequence[Round]) -> dict[str, Any]:
    """Medians of the steady rounds; where the seconds go stands in the settings."""
    ours = [one for run in runs for one in run.rounds[1:]]
    keys_s = statistics.mean(run.keys_s for run in runs)
    ours_s, stock_s = (statistics.median(map(whole, rounds)) for rounds in (ours, stock))
    case = f"a round, {num_params:,} parameters, {NUM_SITES} sites"
    print(f"{case}: {ours_s:.3f} s, stock Flower {stock_s:.3f} s", file=sys.stderr, flush=True)
    return {
        "case": case,
        "unit": "s",
        "ours": ours_s,
        "peers": {f"stock Flower {version('flwr')}": stock_s},
        "limit": {f"stock / {TIMES_FASTER}": stock_s / TIMES_FASTER},
        "better": "lower",
        "settings": {
            "num_params": num_params,
            "num_sites": NUM_SITES,
            "turns": TURNS,
            "load": os.getloadavg()[0],  # of all programs, in the last minute
            "ours": {"as": OURS, "keys_before_the_rounds_s": keys_s, **accounted(ours)},
            "stock": {"as": STOCK, **accounted(stock)},
        },
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
