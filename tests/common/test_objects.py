"""How large a peer's objects would become, before they are put together."""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
)

from common.objects import num_bytes_together

VALUES = np.arange(100_000, dtype=np.float32)


def contents_of(record: RecordDict) -> dict[str, bytes]:
    return {key: found.deflate() for key, found in get_all_nested_objects(record).items()}


def test_honest_arrays_are_as_large_as_they_are() -> None:
    arrays = {"a": Array(VALUES), "b": Array(VALUES[:7])}
    contents = contents_of(RecordDict({"arrays": ArrayRecord(arrays)}))
    raw = sum(len(array.data) for array in arrays.values())
    assert raw <= num_bytes_together(contents) <= raw + 1000


def test_a_piece_that_is_named_a_thousand_times_counts_a_thousand_times() -> None:
    contents = contents_of(RecordDict({"arrays": ArrayRecord({"a": Array(VALUES)})}))
    honest = num_bytes_together(contents)
    (key,) = (key for key, content in contents.items() if content.startswith(b"Array "))
    head, _, _ = contents[key].partition(b"\x00")
    body = json.loads(get_object_body(contents[key], Array))
    body["arraychunk_ids"] *= 1000
    contents[key] = head + b"\x00" + json.dumps(body).encode()
    assert num_bytes_together(contents) >= 999 * honest
