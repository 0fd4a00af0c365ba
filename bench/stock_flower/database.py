"""What Flower's database costs its SuperLink, and whether two SuperLinks can share one.

``python -m stock_flower.database NUM_PARAMS NUM_ROUNDS`` in ``bench/`` runs stock Flower with its
database in memory, in a file, and with two SuperLinks over one file, and prints the CPU seconds of
each SuperLink per round. A round is two exchanges with three sites.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from our_rounds.cpu import cpu_s
from stock_flower.deployment import (
    ROUND_S,
    START_S,
    Program,
    free_ports,
    processes,
    run_app,
    settle,
    start_site,
    start_superlink,
)

NUM_SITES = 3
SAMPLE_S = 0.25
FILE, MEMORY = "superlink.db", ""


def cpu_of_superlinks(
    num_params: int, num_rounds: int, num_superlinks: int, database: str
) -> list[float]:
    """CPU seconds per steady round of each; sites connect to them in turn."""
    with tempfile.TemporaryDirectory(prefix="consilium-stock-") as name, processes() as start:
        folder = Path(name)
        ports = free_ports(num_superlinks + NUM_SITES)
        doors, own_ports = ports[:num_superlinks], ports[num_superlinks:]
        environment = settle(folder, doors[0])
        superlinks = [start_superlink(start, folder, door, environment, database) for door in doors]
        for number, own_port in enumerate(own_ports, 1):
            door = doors[number % num_superlinks]
            start_site(start, folder, number, (door, own_port), environment)
        config = {"num-params": num_params, "num-rounds": num_rounds, "num-sites": NUM_SITES}
        sampling = Sampling(superlinks)
        rounds = run_app(superlinks, folder, config, environment, START_S + ROUND_S * num_rounds)
        used = sampling.between(rounds[1]["started"], rounds[-1]["ended"])
        return [seconds / (num_rounds - 1) for seconds in used]


class Sampling:
    """Looks now and then at what programs have computed."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._pids = [program.pid for program in programs]
        self._seen: list[list[float]] = []
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._seen.append([time.monotonic(), *map(cpu_s, self._pids)])
            time.sleep(SAMPLE_S)

    def between(self, since: float, until: float) -> list[float]:
        """CPU seconds of each program."""
        at, *columns = np.array(self._seen).T
        return [float(np.diff(np.interp([since, until], at, used))[0]) for used in columns]


if __name__ == "__main__":
    params, rounds = map(int, sys.argv[1:])
    for label, number, where in (
        ("one SuperLink, database in memory", 1, MEMORY),
        ("one SuperLink, database in a file", 1, FILE),
        ("two SuperLinks over one file", 2, FILE),
    ):
        used = cpu_of_superlinks(params, rounds, number, where)
        print(
            f"{label}: {' and '.join(f'{each:.2f}' for each in used)} CPU s per round", flush=True
        )
