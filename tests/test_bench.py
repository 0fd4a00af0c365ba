"""The benchmarks look into our programs from outside: what they look for must be there."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"

WATCHES = """
import inspect, sys
from pathlib import Path

from our_rounds import coordinator, memory_coordinator, memory_site, site
from our_rounds.notes import Notebook
from our_rounds.peaks import Gauge
from server.superlink.grid import CoordinatorGrid

assert inspect.isgeneratorfunction(CoordinatorGrid.pull_messages)
notes = Path(sys.argv[1])
for program in coordinator, site:
    program.watch(Notebook(notes))
    program.pretend(1000)
for program in memory_coordinator, memory_site:
    program.watch(Gauge(notes, {}))
site.pretend_training(1000, 1)
"""


def test_every_function_that_a_benchmark_watches_is_there(tmp_path):
    path = {"PYTHONPATH": f"{BENCH}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", WATCHES, str(tmp_path / "notes.jsonl")]
    environment = {**os.environ, **path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.usefixtures("bench")
def test_a_relay_counts_what_goes_either_way():
    from our_rounds.relay import relayed

    with (
        socket.create_server(("127.0.0.1", 0)) as coordinator,
        relayed(coordinator.getsockname()[1]) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as site,
        coordinator.accept()[0] as met,
    ):
        site.sendall(b"x" * 70_000)
        assert len(met.recv(70_000, socket.MSG_WAITALL)) == 70_000
        met.sendall(b"y" * 300)
        assert len(site.recv(300, socket.MSG_WAITALL)) == 300
    always = (0.0, float("inf"))
    assert relay.num_bytes(*always, is_up=True) == 70_000
    assert relay.num_bytes(*always, is_up=False) == 300


@pytest.mark.usefixtures("bench")
def test_phases_make_up_the_round_though_an_exchange_asks_twice():
    from our_rounds.notes import Event
    from our_rounds.phases import phases_of_rounds

    def steps(*told):
        return [Event(what, began, ended, list(ids)) for what, began, ended, *ids in told]

    coordinator = steps(
        ("training_task", 0.0, 0.1),
        ("push_messages", 0.2, 0.3),
        ("push_messages", 0.9, 1.0),  # a site that was away
        ("pull_messages", 1.1, 1.2),
        ("pull_messages", 2.0, 2.2, "a"),
        ("save_pending", 2.4, 2.5),
        ("push_messages", 2.6, 2.7),
        ("pull_messages", 3.2, 3.3, "b"),
        ("secure_sum", 0.15, 3.5),
        ("save", 3.7, 3.9),
        ("training_task", 4.0, 4.1),
    )
    site = steps(
        ("pull", 0.35, 0.4, "a"),
        ("quantize", 0.5, 0.6),
        ("record_upload", 0.8, 1.4),
        ("push", 1.5, 1.9, "a"),
        ("pull", 2.75, 2.8, "b"),
        ("record_answer", 2.9, 3.0),
        ("push", 3.05, 3.1, "b"),
    )
    (phases,) = phases_of_rounds(coordinator, [site])
    assert sum(phases.values()) == pytest.approx(4.0)
    assert phases["task: coordinator pushes"] == pytest.approx(0.1)
    assert phases["task: site's journal"] == pytest.approx(0.6)
    assert phases["task: site pushes"] == pytest.approx(0.4)
    assert phases["unmask: coordinator pulls"] == pytest.approx(0.1)
