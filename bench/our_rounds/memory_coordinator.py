"""``fl-server`` whose memory is noted, its SuperLink's too, and whose model is made up.

``python -m our_rounds.memory_coordinator NUM_PARAMS PEAKS`` and then the arguments of
``fl-server``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Self

from our_rounds.coordinator import pretend
from our_rounds.peaks import Gauge

import server.cohort
import server.coordinator
import server.deployed
from server import cli
from server.run_dir import RunDir
from server.state import State
from server.superlink.grid import CoordinatorGrid
from server.superlink.launcher import SuperLink


def watch(gauge: Gauge) -> None:
    """Note the steps of a run that handle models."""
    gauge.watch(server.coordinator, "build_network")
    gauge.watch(server.cohort, "exchange_keys")
    gauge.watch(CoordinatorGrid, "push_messages")
    gauge.watch_each(CoordinatorGrid, "pull_messages")
    gauge.watch(server.coordinator, "secure_sum")
    gauge.watch(State, "step")
    for name in ("save_model", "save_pending", "save", "save_final", "seal"):
        gauge.watch(RunDir, name)


def watch_from_idle(path: Path) -> None:
    """Begin when all members have said that they take part, before anything is done with them."""
    start, wait = SuperLink.start, server.deployed.wait_for_members
    processes = {"fl-server": os.getpid()}

    def started(*args: Any) -> Self:
        superlink = start(*args)
        processes["SuperLink"] = superlink.pid
        return superlink

    def waited(*args: Any) -> None:
        wait(*args)
        gauge = Gauge(path, processes)
        gauge.idle()
        watch(gauge)

    SuperLink.start, server.deployed.wait_for_members = started, waited


if __name__ == "__main__":
    params, peaks, *arguments = sys.argv[1:]
    pretend(int(params))
    watch_from_idle(Path(peaks))
    sys.argv = ["fl-server", *arguments]
    cli.main()
