"""Flower's objects, put together: how large they become, and what memory it takes."""

import gc
import json
import re
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from common.objects import num_bytes_together, put_together

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


def packed(*sizes: int) -> tuple[str, dict[str, bytes]]:
    """A record of arrays without two equal pieces, as its id and its objects."""
    rng = np.random.default_rng(7)
    arrays = {f"array {size}": Array(rng.random(size, np.float32)) for size in sizes}
    record = RecordDict({"arrays": ArrayRecord(arrays), "message": ConfigRecord({"kind": "none"})})
    return record.object_id, contents_of(record)


@pytest.mark.parametrize("sizes", [(), (0,), (7,), (3_000_000,), (1_500_000, 20, 2_700_000)])
def test_objects_make_what_flower_makes_of_them(sizes: tuple[int, ...]) -> None:
    whole, contents = packed(*sizes)
    expected = inflate_object_from_contents(whole, dict(contents))
    made = put_together(whole, contents)
    assert isinstance(made, RecordDict)
    assert isinstance(expected, RecordDict)
    assert made["message"] == expected["message"]
    assert list(made["arrays"]) == list(expected["arrays"])
    for name, array in made["arrays"].items():
        assert bytes(array.data) == expected["arrays"][name].data
        assert (array.dtype, array.shape) == (
            expected["arrays"][name].dtype,
            expected["arrays"][name].shape,
        )
    assert made.object_id == whole


def test_a_piece_that_stands_in_several_places_comes_to_all_of_them() -> None:
    zeros = Array(np.zeros(4_000_000, np.float32))  # four pieces, of which three are the same
    record = RecordDict({"arrays": ArrayRecord({"a": zeros, "b": Array(np.zeros(3, np.uint8))})})
    whole, contents = record.object_id, contents_of(record)
    assert len([c for c in contents.values() if c.startswith(b"ArrayChunk ")]) < 5
    made = put_together(whole, contents)
    assert isinstance(made, RecordDict)
    assert bytes(made["arrays"]["a"].data) == zeros.data


def test_an_array_is_in_memory_once_when_it_is_put_together() -> None:
    whole, contents = packed(16_000_000)
    gc.collect()
    tracemalloc.start()
    try:
        made = put_together(whole, contents)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1.1 * 64e6  # its pieces were there before, and go as they are copied
    assert isinstance(made, RecordDict)
    assert not [key for key, content in contents.items() if len(content) > 1000]


def spoilt(kind: bytes, change: Callable[[bytes], bytes]) -> tuple[str, dict[str, bytes]]:
    whole, contents = packed(10, 20)
    key = next(key for key, content in contents.items() if content.startswith(kind + b" "))
    contents[key] = change(contents[key])
    return whole, contents


CHUNK = re.compile(rb"[0-9a-f]{64}")
SPOILT: dict[str, Callable[[], tuple[str, dict[str, bytes]]]] = {
    "a piece is missing": lambda: spoilt(b"Array", lambda c: CHUNK.sub(b"0" * 64, c, 1)),
    "an array is missing": lambda: spoilt(b"ArrayRecord", lambda c: CHUNK.sub(b"0" * 64, c)),
    "a piece that is no piece": lambda: spoilt(
        b"ArrayChunk", lambda c: c.replace(b"ArrayChunk", b"MetricRecord", 1)
    ),
    "an array that is no array": lambda: spoilt(
        b"Array", lambda c: c.replace(b"Array", b"ArrayChunk", 1)
    ),
    "a place that no piece has": lambda: spoilt(b"Array", lambda c: c.replace(b"[0]", b"[1]")),
    "a piece that no place has": lambda: spoilt(b"Array", lambda c: c.replace(b"[0]", b"[]")),
    "a place that is text": lambda: spoilt(b"Array", lambda c: c.replace(b"[0]", b'["0"]')),
    "no table": lambda: spoilt(b"Array", lambda c: c.replace(b"{", b"[")),
    "no shape": lambda: spoilt(b"Array", lambda c: c.replace(b"shape", b"shade")),
    "a type that is a number": lambda: spoilt(
        b"Array", lambda c: c.replace(b'"numpy.ndarray"', b"7")
    ),
    "no head": lambda: spoilt(b"Array", lambda c: c.replace(b"\x00", b"")),
}


@pytest.mark.parametrize("title", SPOILT)
def test_what_flower_cannot_put_together_we_cannot_either(title: str) -> None:
    whole, contents = SPOILT[title]()
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is: it is no message
        inflate_object_from_contents(whole, dict(contents))
    with pytest.raises(Exception):  # noqa: B017, PT011
        put_together(whole, contents)
