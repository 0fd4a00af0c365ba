"""How much memory a program takes, step by step, noted from outside.

Linux keeps a process's peak (``VmHWM``) and forgets it where it is told to: so every step has a
peak of its own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

IDLE = "idle"
RESIDENT, PEAK = "VmRSS", "VmHWM"


class Gauge:
    """A file with a line for every step of some processes: process, step, bytes."""

    def __init__(self, path: Path, processes: Mapping[str, int]) -> None:
        self._file = path.open("a", buffering=1)
        self._processes = dict(processes)

    def idle(self) -> None:
        """What the processes take now is what they took before; peaks begin here."""
        self._write(IDLE, RESIDENT)

    def reached(self, step: str) -> None:
        """The most since the step before."""
        self._write(step, PEAK)

    def _write(self, step: str, what: str) -> None:
        for name, pid in self._processes.items():
            self._file.write(json.dumps([name, step, memory_of(pid, what)]) + "\n")
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is what it takes now

    def watch(self, owner: Any, name: str) -> None:
        """Note every call of a function from now on, and what came before it."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.reached(f"before {name}")
            try:
                return call(*args, **kwargs)
            finally:
                self.reached(name)

        setattr(owner, name, watched)

    def watch_each(self, owner: Any, name: str) -> None:
        """The same for every result of a generator."""
        generator = getattr(owner, name)

        @functools.wraps(generator)
        def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
            results = generator(*args, **kwargs)
            while True:
                self.reached(f"before {name}")
                come = list(islice(results, 1))
                self.reached(name)
                if not come:
                    return
                yield come.pop()  # and is kept no longer than it would be without us

        setattr(owner, name, watched)


def memory_of(pid: int, what: str) -> int:
    """Bytes, from a line of /proc/PID/status."""
    found = re.search(
        rf"^{what}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    assert found is not None  # noqa: S101 - every process has them
    return 1024 * int(found[1])


def read_peaks(path: Path) -> dict[str, dict[str, int]]:
    """Bytes by process and step, of each step the most; what came before ``idle`` is left out."""
    read: dict[str, dict[str, int]] = {}
    for line in path.read_text().splitlines():
        name, step, num_bytes = json.loads(line)
        if step == IDLE:
            read[name] = {IDLE: num_bytes}
        elif name in read:
            read[name][step] = max(num_bytes, read[name].get(step, 0))
    return read
