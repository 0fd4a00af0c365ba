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
    def counted(self, figures):
        if {moment!r} == "counted":
            die()

federate(tiny_study(**{changes!r}), Path({folder!r}), watcher=Killer())
"""
PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "example_clip_norm": 0.5, "randomness": "seeded"}
CHANGES = {
    "momentum": {"server_optimizer": {"name": "fedavgm", "momentum": 0.5}},
    "seeded privacy, average": {
        "server_optimizer": {"name": "fedyogi", "ema": 0.7},
        "privacy": PRIVACY,
    },
    "statistics": {"statistics": {"intensity": [0, 255]}},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        title: str(federate(tiny_study(**changes), folder / title)["final_model_sha256"])
        for title, changes in CHANGES.items()
    }


@pytest.mark.parametrize(
    ("title", "moment"),
    [
        ("momentum", "after round 1"),
        ("momentum", "after round 3"),
        ("momentum", "upload 2"),
        ("momentum", "upload 7"),
        ("momentum", "upload 14"),
        ("momentum", "upload 18"),
        ("seeded privacy, average", "after round 1"),
        ("seeded privacy, average", "upload 7"),
        ("statistics", "upload 2"),
        ("statistics", "counted"),
        ("statistics", "upload 6"),
    ],
)
def test_killed_and_resumed_gives_the_same_model(
    moment: str, title: str, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    folder = tmp_path / "run"
    tests = str(Path(__file__).parent / "support")
    code = KILLED.format(tests=tests, moment=moment, changes=CHANGES[title], folder=str(folder))
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    summary = federate(tiny_study(**CHANGES[title]), folder, resume=True)
    assert summary["final_model_sha256"] == undisturbed[title]
    assert len(summary["survivors"]) == 3
