"""A run that is killed and resumed ends with the same model, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from federation import federate, tiny_study

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from federation import Watcher, federate, tiny_study

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killer(Watcher):
    def finished_round(self, line):
        super().finished_round(line)
        if {moment!r} == f"after round {{line['round']}}":
            die()
    def uploaded(self, site, num_uploads, num_sites):
        super().uploaded(site, num_uploads, num_sites)
        if {moment!r} == f"upload {{len(self.uploads)}}":
            die()

federate(tiny_study(server_optimizer={optimizer!r}), Path({folder!r}), watcher=Killer())
"""
OPTIMIZER = {"name": "fedavgm", "momentum": 0.5}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return str(federate(tiny_study(server_optimizer=OPTIMIZER), folder)["final_model_sha256"])


@pytest.mark.parametrize(
    "moment",
    ["after round 1", "after round 3", "upload 2", "upload 7", "upload 14", "upload 18"],
    ids=str,
)
def test_killed_and_resumed_gives_the_same_model(
    moment: str, tmp_path: Path, undisturbed: str
) -> None:
    folder = tmp_path / "run"
    tests = str(Path(__file__).parent / "support")
    code = KILLED.format(tests=tests, moment=moment, optimizer=OPTIMIZER, folder=str(folder))
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    summary = federate(tiny_study(server_optimizer=OPTIMIZER), folder, resume=True)
    assert summary["final_model_sha256"] == undisturbed
    assert len(summary["survivors"]) == 3
