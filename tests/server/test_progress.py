"""What a person at the coordinator sees of answers that take long to come."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from server.progress import ConsoleObserver, Transfers


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_quick_transfer_is_not_spoken_of_and_a_slow_one_with_its_rate() -> None:
    clock = Clock()
    transfers = Transfers(clock)
    said = []
    for second in range(8):
        clock.seconds = 100.0 + second
        said.append(transfers.told({"st-olav": 2_000_000 * second, "lindenhof": 5_000_000}))
    assert said[:5] == [""] * 5
    assert said[5] == "receiving st-olav 10 MB, lindenhof 5 MB; 2.00 MB/s"
    assert said[7] == "receiving st-olav 14 MB, lindenhof 5 MB; 2.00 MB/s"
    assert transfers.told({}) == ""
    clock.seconds += 1
    assert transfers.told({"st-olav": 1}) == ""  # another transfer begins


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, output = Clock(), io.StringIO()
    observer = ConsoleObserver(Console(file=output, width=200))
    monkeypatch.setattr(observer, "_transfers", Transfers(clock))
    for second in range(31):
        clock.seconds = 100.0 + second
        observer.receiving({"st-olav": 1_000_000 * second})
    lines = output.getvalue().splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "receiving st-olav 5 MB",
        "receiving st-olav 15 MB",
        "receiving st-olav 25 MB",
    ]
