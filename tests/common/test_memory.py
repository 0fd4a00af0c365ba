"""Arrays that leave memory for a while, and come back as they were."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from small_disk import small_disk

from common.memory import LEAST_BYTES, give_back, let_go, on_disk
from common.objects import put_together

NUM_BYTES = 64 << 20


def resident() -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def test_an_array_leaves_memory_and_comes_back_as_it_was(tmp_path: Path) -> None:
    sevens = bytes([7]) * (NUM_BYTES // 4)
    array = on_disk(tmp_path, NUM_BYTES, [memoryview(sevens)] * 4)
    assert (array == 7).all()
    numbers = array.view(np.uint32)[1:]  # whatever is made of it lies there, too
    before = resident()
    let_go(numbers)
    assert resident() < before - NUM_BYTES / 2
    assert (array == 7).all()
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("num_bytes", [0, 1, LEAST_BYTES - 1])
def test_a_small_array_is_in_memory(tmp_path: Path, num_bytes: int) -> None:
    array = on_disk(tmp_path / "not there", num_bytes, [memoryview(bytes(num_bytes))])
    assert array.shape == (num_bytes,)
    let_go(array)
    assert not array.any()


def test_where_the_disk_has_no_room_an_array_is_in_memory(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", LEAST_BYTES) as disk:
        disk.fill()
        array = on_disk(disk.folder, 2 * LEAST_BYTES, [memoryview(bytes([7]) * LEAST_BYTES)] * 2)
        let_go(array)
        assert (array == 7).all()


def test_other_arrays_stay_where_they_are() -> None:
    array = np.arange(1 << 20)
    let_go(array[5:])
    let_go(np.frombuffer(b"1234", np.uint8))
    give_back()
    assert (array == np.arange(1 << 20)).all()


def test_a_message_is_put_together_where_it_can_leave_memory(tmp_path: Path) -> None:
    numbers = np.random.default_rng(3).random(3_000_000, np.float32)
    record = RecordDict({"arrays": ArrayRecord({"a": Array("f", (1,), "raw", numbers.tobytes())})})
    contents = {key: each.deflate() for key, each in get_all_nested_objects(record).items()}
    made = put_together(record.object_id, contents, partial(on_disk, tmp_path))
    assert isinstance(made, RecordDict)
    found = np.frombuffer(made["arrays"]["a"].data, np.float32)
    let_go(found)
    assert np.array_equal(found, numbers)
