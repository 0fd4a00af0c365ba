"""What ``fl-client check`` says of a slow link, beside what a round then took on it.

A deployment as in ``rounds``, one site of which is behind a line of 10 Mbit/s each way and 50 ms:
real TCP between two network namespaces. The site checks its link before it takes part. What a round
took is the time in which it fetched and sent the messages of that round. The limit of the transfer
is what the same bytes would take without TCP, TLS and HTTP, and without a round trip.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from our_rounds.deployment import Deployed, deployed
from our_rounds.notes import Event, read_notes
from our_rounds.phases import by_messages
from slow_line import End, move, slow_line
from stock_flower.deployment import Environment, Program

from common.config import load
from common.models.flat import Schema
from common.study import Study
from common.traffic import Traffic, traffic_of

RATE_MBIT, ROUND_TRIP_S = 10.0, 0.05
NUM_PARAMS, NUM_ROUNDS, NUM_SITES = 11_000_000, 2, 3
BITS = (32, 24, 16)
SLOW = "site-1"
PROMISED = 0.2  # of what happened
PATIENCE_S, READY_S = 900.0, 60.0
SAID = re.compile(r"takes ([\d.]+) s per round on it: ([\d.]+) s down, ([\d.]+) s up at")


@dataclass(frozen=True)
class Seconds:
    """Of one round's transfer."""

    down: float
    up: float

    @property
    def total(self) -> float:
        """Both ways."""
        return self.down + self.up


@dataclass(frozen=True)
class Measured:
    """One run on a slow line."""

    estimated: Seconds
    happened: list[Seconds]  # by round
    traffic: Traffic

    @property
    def error(self) -> float:
        """Of the estimate, as a part of what happened; below 0 where more happened."""
        return self.estimated.total / statistics.median(one.total for one in self.happened) - 1


def rows() -> list[dict[str, Any]]:
    """Two rows for each number of bits: how far off the estimate was, and what a round took."""
    made = []
    for bits in BITS:
        one = measured(NUM_PARAMS, bits, NUM_ROUNDS)
        took_s = statistics.median(each.total for each in one.happened)
        bytes_s = 8e-6 * (one.traffic.down + one.traffic.up) / RATE_MBIT
        print(f"{bits} bits: {one.estimated} said, {one.happened}", file=sys.stderr, flush=True)
        size = f"{NUM_PARAMS:,} parameters, {bits} bits, {RATE_MBIT:g} Mbit/s, 50 ms"
        error = ("error of check's estimate", "of 1", abs(one.error), {"promised": PROMISED})
        transfer = ("transfer of a round", "s", took_s, {"the bytes alone": bytes_s})
        for case, unit, ours, limit in (error, transfer):
            made.append(
                {
                    "case": f"{case}, {size}",
                    "unit": unit,
                    "ours": ours,
                    "peers": {},
                    "limit": limit,
                    "better": "lower",
                    "settings": {
                        "num_params": NUM_PARAMS,
                        "ring_bits": bits,
                        "rate_mbit": RATE_MBIT,
                        "round_trip_s": ROUND_TRIP_S,
                        "load": os.getloadavg()[0],
                        "estimated_s": vars(one.estimated),
                        "happened_s": [vars(each) for each in one.happened],
                    },
                }
            )
    return made


def measured(
    num_params: int,
    ring_bits: int,
    num_rounds: int,
    rate_mbit: float = RATE_MBIT,
    round_trip_s: float = ROUND_TRIP_S,
) -> Measured:
    """Deploy behind a slow line, check the link, run, and take everything down again.

    Raises:
      RuntimeError: The coordinator failed, or was too slow; or the check said nothing of the link.
      CalledProcessError: This machine permits no network namespaces.
    """
    changed = {"aggregation.ring_bits": ring_bits, "deadlines.upload_s": PATIENCE_S}
    with (
        deployed(num_params, num_rounds, NUM_SITES, **changed) as one,
        slow_line(rate_mbit, round_trip_s) as line,
    ):
        move(one.made, line.coordinator.address)
        study = load(one.made.study, Study)
        started: list[Program] = []
        estimates: list[Seconds] = []

        def start(
            command: Sequence[object], environment: Environment, hear: Callable[[str, float], None]
        ) -> Program:
            is_slow = one.notes_of(SLOW) in command
            if is_slow:  # the coordinator runs, and no site
                estimates.append(estimated(one, started[0], line.hospital, environment))
            end = line.hospital if is_slow else line.coordinator
            started.append(one.start(end.command(*command), environment, hear))
            return started[-1]

        far = replace(one, start=start, patience_s=PATIENCE_S)
        far.run("our_rounds.coordinator", "our_rounds.site")
        happened = transfers(read_notes(one.notes_of(SLOW)))
    schema = Schema(("vector",), ((num_params,),))
    return Measured(estimates[0], happened, traffic_of(study, schema))


def estimated(
    one: Deployed, coordinator: Program, hospital: End, environment: Environment
) -> Seconds:
    """What ``check`` says at the slow site, once the coordinator waits for sites."""
    end = time.monotonic() + READY_S
    while not any("waiting for" in line for line in coordinator.said) and time.monotonic() < end:
        time.sleep(0.1)
    site_file = one.made.site(SLOW)
    command = [sys.executable, "-m", "our_rounds.check", one.num_params]
    command += ["--site-config", site_file, "check"]
    done = subprocess.run(  # noqa: S603 - our own program
        hospital.command(*command), env=environment, capture_output=True, text=True, check=False
    )
    said = SAID.search(done.stdout)
    if said is None:
        raise RuntimeError(f"check said nothing of the link:\n{done.stdout}{done.stderr}")
    return Seconds(float(said[2]), float(said[3]))


def transfers(noted: Sequence[Event]) -> list[Seconds]:
    """Of every round that trained: the task and the update, then what unmasks their sum."""
    exchanges = list(by_messages(noted).values())
    return [
        Seconds(
            seconds(task["pull"]) + seconds(unmask["pull"]),
            seconds(task["push"]) + seconds(unmask["push"]),
        )
        for task, unmask in pairwise(exchanges)
        if "quantize" in task
    ]


def seconds(event: Event) -> float:
    """That a call took."""
    return event.ended - event.began


if __name__ == "__main__":
    params, bits, rate_mbit, round_trip_s = sys.argv[1:]
    print(measured(int(params), int(bits), 2, float(rate_mbit), float(round_trip_s)))
