"""What the door is told of a study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.config import load
from common.messages import Upload
from common.models.build import build_network
from common.study import Study
from common.tasks import task_of
from common.wire import pack
from server.deployed import largest_upload

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
