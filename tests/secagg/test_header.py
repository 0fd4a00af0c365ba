"""What a header binds, and what is refused as none."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RemoteProtocolError
from common.identity import Identity
from common.secagg.encoding import decode, encode
from common.secagg.header import (
    Header,
    commit,
    commit_row,
    commit_share,
    digest_of_rows,
    row_digest,
    slot_of,
)

of_32_bytes = st.binary(min_size=32, max_size=32)
headers = st.builds(
    Header,
    run=of_32_bytes,
    sum_number=st.integers(0, 2**63 - 1),
    task=of_32_bytes,
    site=st.integers(0, 2**63 - 1),
    body=of_32_bytes,
    statement=of_32_bytes,
    commitments=st.lists(of_32_bytes, max_size=4).map(b"".join),
    rows=of_32_bytes,
    signature=st.binary(max_size=72),
)
HEADER = Header(b"r" * 32, 7, b"t" * 32, 2, b"b" * 32, b"s" * 32, b"c" * 96, b"R" * 32, b"sig")


def parts_with(**changed: Any) -> bytes:
    """The header on the wire, with other entries by place, or some taken out."""
    parts = decode(HEADER.encode())
    for place, entry in changed.items():
        parts[int(place[1:])] = entry
    return encode(*[part for part in parts if part is not None])


@given(headers)
def test_a_header_is_read_back_as_it_was_written(header: Header) -> None:
    assert Header.decode(header.encode()) == header
    assert header.num_slots == len(header.commitments) // 32


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(HEADER.encode()[:-1], id="one byte short"),
        pytest.param(HEADER.encode() + b"\0", id="one byte long"),
        pytest.param(HEADER.encode() + encode(b""), id="one entry more"),
        pytest.param(parts_with(_9=None), id="no signature"),
        pytest.param(parts_with(_0=None), id="no label"),
        pytest.param(parts_with(_0=b"msum2/header"), id="the label of another version"),
        pytest.param(parts_with(_0=b"msum1/Header"), id="the label of something else"),
        pytest.param(parts_with(_1=b"r" * 31), id="a short run"),
        pytest.param(parts_with(_2=b"\x07"), id="a sum in one byte"),
        pytest.param(parts_with(_2=b"\x80" + bytes(7)), id="a sum beyond all sums"),
        pytest.param(parts_with(_3=b""), id="no task"),
        pytest.param(parts_with(_4=b"\xff" * 8), id="a site beyond all sites"),
        pytest.param(parts_with(_5=b"b" * 33), id="a long digest of the body"),
        pytest.param(parts_with(_6=b"s" * 16), id="a short digest of the statement"),
        pytest.param(parts_with(_7=b"c" * 95), id="a piece of a commitment"),
        pytest.param(parts_with(_8=b"R" * 64), id="two digests of rows"),
        pytest.param(encode(HEADER.encode()), id="a header in a list"),
    ],
)
def test_what_is_no_header_is_refused(content: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Header.decode(content)


@given(
    st.one_of(st.binary(max_size=400), st.lists(st.binary(max_size=40)).map(lambda p: encode(*p)))
)
def test_random_bytes_are_never_a_header(content: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Header.decode(content)


@given(st.integers(0, len(HEADER.encode()) - 1), st.integers(1, 255))
def test_an_altered_header_is_refused_or_reads_differently(place: int, by: int) -> None:
    content = bytearray(HEADER.encode())
    content[place] ^= by
    try:
        read = Header.decode(bytes(content))
    except RemoteProtocolError:
        return
    assert read != HEADER
    assert read.encode() == bytes(content)


def test_the_signature_holds_for_the_header_as_signed(members: Sequence[Identity]) -> None:
    signed = dataclasses.replace(HEADER, signature=b"").signed(members[2])
    key = members[2].key.public_key()
    signed.check_signature(key, "site-2")
    Header.decode(signed.encode()).check_signature(key, "site-2")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", b"x" * 32),
        ("sum_number", 8),
        ("task", b"x" * 32),
        ("site", 1),
        ("body", b"x" * 32),
        ("statement", b"x" * 32),
        ("commitments", b"c" * 64),
        ("rows", b"x" * 32),
        ("signature", b""),
        ("signature", b"\x30\x06\x02\x01\x01\x02\x01\x01"),
    ],
)
def test_nothing_in_a_signed_header_can_be_changed(
    members: Sequence[Identity], field: str, value: object
) -> None:
    forged = dataclasses.replace(HEADER.signed(members[2]), **{field: value})
    with pytest.raises(RemoteProtocolError, match="site-2 did not sign") as error:
        forged.check_signature(members[2].key.public_key(), "site-2")
    assert error.value.rule == "R11"


def test_nobody_signs_for_somebody_else(members: Sequence[Identity]) -> None:
    with pytest.raises(RemoteProtocolError, match="did not sign"):
        HEADER.signed(members[1]).check_signature(members[2].key.public_key(), "site-2")


def test_the_commitments_of_a_header_are_found_by_slot() -> None:
    header = dataclasses.replace(HEADER, commitments=b"a" * 32 + b"b" * 32)
    assert [header.commitment(slot) for slot in range(2)] == [b"a" * 32, b"b" * 32]
    assert header.num_slots == 2


@given(of_32_bytes, st.integers(0, 300), st.integers(0, 254), st.integers(0, 254), of_32_bytes)
def test_both_sites_of_a_pair_commit_to_the_same(
    run: bytes, number: int, one: int, other: int, secret: bytes
) -> None:
    assert commit(run, number, one, other, secret) == commit(run, number, other, one, secret)


def test_commitments_depend_on_everything_they_are_about() -> None:
    run, secret = b"r" * 32, b"s" * 32
    made = [
        commit(run, 1, 0, 2, secret),
        commit(b"x" * 32, 1, 0, 2, secret),
        commit(run, 2, 0, 2, secret),
        commit(run, 1, 1, 2, secret),
        commit(run, 1, 0, 3, secret),
        commit(run, 1, 0, 2, b"x" * 32),
    ]
    assert len(set(made)) == len(made)
    given_to = [
        commit_share(run, 1, 0, 2, 3, secret),
        commit_share(b"x" * 32, 1, 0, 2, 3, secret),
        commit_share(run, 2, 0, 2, 3, secret),
        commit_share(run, 1, 2, 0, 3, secret),
        commit_share(run, 1, 0, 1, 3, secret),
        commit_share(run, 1, 0, 2, 1, secret),
        commit_share(run, 1, 0, 2, 3, b"x" * 32),
    ]
    assert len(set(given_to)) == len(given_to)
    assert {len(one) for one in given_to} == {16}


@given(st.lists(of_32_bytes, max_size=6))
def test_a_row_holds_one_commitment_for_every_slot_of_a_share(slots: list[bytes]) -> None:
    share = b"".join(slots)
    row = commit_row(b"r" * 32, 4, 1, 2, share)
    assert [slot_of(share, slot) for slot in range(len(slots))] == slots
    assert [row[16 * slot :][:16] for slot in range(len(slots))] == [
        commit_share(b"r" * 32, 4, 1, 2, slot, value) for slot, value in enumerate(slots)
    ]
    assert len(row) == 16 * len(slots)


def test_a_row_digest_keeps_commitments_and_sealed_share_apart() -> None:
    assert row_digest(b"ab", b"c") != row_digest(b"a", b"bc")
    assert row_digest(b"ab", b"c") == hashlib.sha256(encode(b"ab", b"c")).digest()


def test_the_digest_of_all_rows_follows_from_the_row_digests_in_their_order() -> None:
    rows = [bytes([k]) * 32 for k in range(4)]
    assert digest_of_rows(rows) == hashlib.sha256(b"".join(rows)).digest()
    assert digest_of_rows(rows) != digest_of_rows(rows[::-1])
