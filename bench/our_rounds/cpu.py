"""How much programs have computed, as the operating system counts it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from stock_flower.deployment import descendants

PROGRAMS = ("coordinator", "SuperLink", "sites")


class Sample(NamedTuple):
    """CPU seconds until a moment."""

    at: float  # on the monotonic clock
    coordinator: float
    superlink: float
    sites: float  # all of them together


def sampled(coordinator: int, sites: Sequence[int]) -> Sample:
    """From the ids of the processes; the SuperLink is the coordinator's child."""
    own, *children = descendants(coordinator)
    family = [pid for site in sites for pid in descendants(site)]
    used = (sum(map(cpu_s, pids)) for pids in ([own], children, family))
    return Sample(time.monotonic(), *used)


def cpu_s(pid: int) -> float:
    """Of all threads of a process, those that ended too; 0 when it has ended itself."""
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def cpu_between(samples: Sequence[Sample], since: float, until: float) -> dict[str, float]:
    """CPU seconds of every program in a stretch of time."""
    at, *columns = np.array(samples).T
    passed = (float(np.diff(np.interp([since, until], at, used))[0]) for used in columns)
    return dict(zip(PROGRAMS, passed, strict=True))
