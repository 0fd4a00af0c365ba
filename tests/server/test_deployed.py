"""What the door is told of a study, and who counts as connected."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from common.config import load
from common.messages import Upload
from common.models.build import build_network
from common.study import Study
from common.tasks import task_of
from common.wire import pack
from server import deployed
from server.deployed import DeployedNetwork, largest_upload
from server.superlink.grid import Connected

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("name", ["demo-seeded.toml", "vessels.toml"])
def test_the_largest_honest_upload_passes_the_door_and_twice_that_does_not(name: str) -> None:
    study = load(STUDIES / name, Study)
    schema = build_network(study).schema
    num_sites = len(study.members)
    num_tail = 1 + len(schema.names) + task_of(study).num_counts
    upload = Upload(
        run="0" * 32,
        sum_number=1,
        header=bytes(1000),
        sealed=(bytes(32 * num_sites + 28),) * num_sites,
        share_commitments=(bytes(16 * num_sites),) * num_sites,
        body=np.zeros(4 * schema.num_params + 8 * num_tail, np.uint8),
        statement="x" * 4000,
    )
    records = pack(upload)
    size = len(records["message"].deflate()) + upload.body.nbytes
    assert size < largest_upload(study) < 2 * (size + (128 << 10) + 64_000 * num_sites)


class ScriptedGrid:
    """Who is connected, one look after the other; the last one stays."""

    def __init__(self, *looks: str) -> None:
        self._looks = [{name: Connected(ord(name), "now") for name in look} for look in looks]

    def connected(self) -> dict[str, Connected]:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]


def test_a_site_that_is_back_in_a_moment_was_never_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "POLL_S", 0.0)
    network = DeployedNetwork(ScriptedGrid("abc", "ac", "ac", "abc"), deadline_s=1)
    assert network.sites() == ["a", "b", "c"]
    assert network.sites() == ["a", "b", "c"]


def test_a_site_that_stays_away_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "POLL_S", 0.0)
    monkeypatch.setattr(deployed, "RETURN_S", 0.05)
    network = DeployedNetwork(ScriptedGrid("abc", "ac"), deadline_s=1)
    network.sites()
    started = time.monotonic()
    assert network.sites() == ["a", "c"]
    waited = time.monotonic() - started
    assert waited >= 0.05
    started = time.monotonic()
    assert network.sites() == ["a", "c"]
    assert time.monotonic() - started < waited
