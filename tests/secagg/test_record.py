"""Messages as plain JSON values: nothing is lost but arrays, and of those the digest is kept."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import (
    KINDS,
    Agreement,
    Greeting,
    Introduction,
    Invitation,
    Message,
    Purpose,
    Reason,
    Refusal,
    Roster,
    RoundTask,
    Shares,
    SiteKeys,
    Survivors,
    Unmask,
    Upload,
    Vote,
)
from common.record import as_table, from_table

texts = st.text(max_size=6)
contents = st.binary(max_size=6)
numbers = st.integers(-(2**63), 2**63 - 1)
many = st.lists(contents, max_size=3).map(tuple)
counts = st.lists(numbers, max_size=3).map(tuple)

WITHOUT_ARRAYS: dict[type, st.SearchStrategy[Any]] = {
    Greeting: st.just(Greeting()),
    Introduction: st.builds(Introduction, numbers),
    Invitation: st.builds(Invitation, texts, contents, contents, contents),
    SiteKeys: st.builds(SiteKeys, texts, numbers, contents, contents, contents, contents, contents),
    Roster: st.builds(Roster, texts, many, many, many, many, many, contents, contents),
    Agreement: st.builds(Agreement, texts, numbers, many, many, contents),
    Survivors: st.builds(Survivors, texts, numbers, counts, many, contents),
    Vote: st.builds(Vote, texts, numbers, numbers, contents, contents),
    Unmask: st.builds(
        Unmask, texts, numbers, counts, many, counts, many, many, many, many, contents
    ),
    Shares: st.builds(Shares, texts, numbers, numbers, contents, many, counts, contents),
    Refusal: st.builds(Refusal, texts, st.sampled_from(Reason)),
}
MODEL = np.arange(4, dtype=np.float32)
WITH_ARRAYS = [
    RoundTask("ab", 1, 2, Purpose.TRAIN, (-3, 4), "cd", (b"ct",), (b"sig",), b"crl", MODEL, b"s"),
    Upload("ab", 1, b"header", (b"", b"sealed"), (b"c", b"d"), MODEL.view(np.uint8), "statement"),
]


def test_every_kind_of_message_is_tried_here() -> None:
    assert {*WITHOUT_ARRAYS, *map(type, WITH_ARRAYS)} == set(KINDS.values())


@pytest.mark.parametrize("kind", WITHOUT_ARRAYS)
@given(st.data())
def test_a_message_without_arrays_is_read_back_from_json(kind: type, data: st.DataObject) -> None:
    message: Message = data.draw(WITHOUT_ARRAYS[kind])
    table = json.loads(json.dumps(as_table(message)))
    assert table["kind"] == kind.__name__
    assert from_table(table, kind) == message


@pytest.mark.parametrize("message", WITH_ARRAYS, ids=lambda message: type(message).__name__)
def test_of_an_array_its_size_and_digest_are_kept(message: Message) -> None:
    table = json.loads(json.dumps(as_table(message)))
    field = "model" if isinstance(message, RoundTask) else "body"
    digest = hashlib.sha256(MODEL.tobytes()).hexdigest()
    assert table[field] == {"bytes": 16, "sha256": digest}
    assert table["run"] == "ab"


def test_bytes_are_hex_and_tuples_are_lists() -> None:
    vote = Survivors("ab", 1, (0, 2), (b"\x01", b"\xff"), b"\x30")
    assert as_table(vote) == {
        "kind": "Survivors",
        "run": "ab",
        "sum_number": 1,
        "survivors": [0, 2],
        "headers": ["01", "ff"],
        "signature": "30",
    }
