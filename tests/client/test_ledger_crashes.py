"""Whatever breaks in the middle of a debit: spent is never less than what could have left.

A debit that returned may have been trained on and released. So after every crash either the ledger
holds it, or the ledger refuses to open and the site stops.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from client.contents import Contents
from client.ledger import Ledger
from common import audit, disk
from common.accounting import Event
from common.errors import DataError

NUM_KILLS = 120


class PowerCut(BaseException):
    """Nothing after it is done: not even what programs do when they fail."""


class Machine:
    """A disk that is cut off at its ``cut``-th operation.

    What was written and not flushed is there to any length, as a file system may leave it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut: int, kept: float) -> None:
        self.done, self._cut, self._kept = 0, cut, kept
        self._is_off = False
        self._real = disk._write_all, os.fsync
        monkeypatch.setattr(disk, "_write_all", self._write)
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(disk, "sync_folder", self._sync_folder)
        monkeypatch.setattr(Path, "rename", self._renaming())
        monkeypatch.setattr(audit, "sync_folder", self._sync_folder)
        # After the cut nothing can be taken back: ``append`` would cut the file in its except.
        self._truncate_off(monkeypatch)

    def _truncate_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = disk.append

        def append(file: Any, content: bytes, *, instead_of: bytes = b"") -> None:
            real(_Cuttable(file, self), content, instead_of=instead_of)

        monkeypatch.setattr(audit, "append", append)

    @property
    def is_off(self) -> bool:
        return self._is_off

    def _step(self) -> bool:
        """Whether the power goes now."""
        self.done += 1
        self._is_off = self._is_off or self.done == self._cut
        return self._is_off

    def _write(self, file: Any, content: bytes) -> None:
        if self._step():
            self._real[0](file, content[: round(self._kept * len(content))])
            raise PowerCut
        self._real[0](file, content)

    def _fsync(self, _: int) -> None:
        if self._step():
            raise PowerCut

    def _renaming(self) -> Callable[[Path, Path], None]:
        def rename(path: Path, target: Path) -> None:
            if self._step():
                raise PowerCut
            path.replace(target)

        return rename

    def _sync_folder(self, _: Path) -> None:
        if self._step():
            raise PowerCut


class _Cuttable:
    """A file that can no longer be shortened when the power is off."""

    def __init__(self, file: Any, machine: Machine) -> None:
        self._file, self._machine = file, machine

    def truncate(self, size: int) -> None:
        if not self._machine.is_off:
            self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def events(num: int) -> list[Event]:
    return [Event(1.0 + k / 8, 0.05, 20 + k) for k in range(num)]


def spend(path: Path, told: Callable[[int], None]) -> None:
    """Two debits, what was read, and two more; says of each that it returned."""
    ledger = Ledger(path, "xrays", None)
    for number, event in enumerate(events(4)):
        ledger.debit(f"run {number}", number, event, num_rounds=9)
        told(number)
        if number == 1:
            ledger.opened(Contents("c" * 64, 3, frozenset({b"one", b"two"})))


def check_nothing_is_forgotten(path: Path, returned: int) -> str:
    """What became of the ledger: whole, more than was released, or closed."""
    try:
        ledger = Ledger(path, "xrays", None)
    except DataError:
        return "closed"
    held = [one.event for one in ledger.charges()]
    assert held[:returned] == events(4)[:returned]
    assert len(held) <= returned + 1
    # The program starts again and asks for the same sums: each is charged once.
    spend(path, lambda _: None)
    assert [one.event for one in Ledger(path, "xrays", None).charges()] == events(4)
    return "whole" if len(held) == returned else "more"


def test_a_power_cut_at_every_write_and_flush_forgets_no_debit(
    tmp_path: Path,
) -> None:
    outcomes: dict[str, int] = {}
    num_points = 0
    # Of a line that was not flushed, a file system may keep any part.
    for kept in [k / 40 for k in range(41)]:
        cut = 0
        while True:
            cut += 1
            path = tmp_path / f"{kept}-{cut}" / "xrays.jsonl"
            returned: list[int] = []
            with pytest.MonkeyPatch.context() as patch:
                machine = Machine(patch, cut, kept)
                with suppress(PowerCut):
                    spend(path, returned.append)
            if not machine.is_off:
                break
            num_points += 1
            found = check_nothing_is_forgotten(path, len(returned))
            outcomes[found] = outcomes.get(found, 0) + 1
    assert num_points >= 500
    assert set(outcomes) == {"whole", "more", "closed"}


def killed_after(seconds: float, path: Path) -> int:
    """Let another process spend, and kill -9 it; how many of its debits had returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            spend(path, lambda _: os.write(writer, b"."))
        finally:
            os._exit(0)
    os.close(writer)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as said:
        return len(said.read())


def test_a_process_that_is_killed_forgets_no_debit(tmp_path: Path) -> None:
    rng = random.Random(7)  # noqa: S311 - moments of kills
    num_midway = 0
    for number in range(NUM_KILLS):
        path = tmp_path / str(number) / "xrays.jsonl"
        returned = killed_after(rng.uniform(0, 0.02), path)
        num_midway += 0 < returned < 4
        assert check_nothing_is_forgotten(path, returned) in ("whole", "more")
    assert num_midway  # else the kills came too early or too late to show anything
