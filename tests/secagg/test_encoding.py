"""Lists become bytes in one way only, and labels keep uses apart."""

import itertools
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RemoteProtocolError
from common.secagg.encoding import Part, decode, derive, digest, encode

Tree = bytes | list["Tree"]

contents = st.binary(max_size=12)
lists = st.lists(contents, max_size=6)
trees = st.lists(st.recursive(contents, lambda inner: st.lists(inner, max_size=4), max_leaves=12))
# Few values, so that unequal lists with equal concatenations are common.
similar = st.lists(st.sampled_from([b"", b"\0", b"\0\0", b"\0\0\0\x01", b"\0\0\0\0"]), max_size=4)


def read_back(content: bytes, shape: list[Tree]) -> list[Tree]:
    """What the reader of a list finds who knows where lists stand inside it."""
    parts = decode(content)
    assert len(parts) == len(shape)
    return [
        read_back(part, inner) if isinstance(inner, list) else part
        for part, inner in zip(parts, shape, strict=True)
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param((), "", id="nothing"),
        pytest.param((b"",), "00000000", id="empty bytes"),
        pytest.param((b"\x07",), "0000000107", id="one byte"),
        pytest.param(("é",), "00000002c3a9", id="text is UTF-8"),
        pytest.param((258,), "000000080000000000000102", id="a number is 64 bits, big-endian"),
        pytest.param((2**64 - 1,), "00000008" + "ff" * 8, id="the largest number"),
        pytest.param(([],), "00000000", id="an empty list"),
        pytest.param(([b"a", []],), "000000090000000161" + "00000000", id="a list in a list"),
        pytest.param(((b"a", b"b"),), "0000000a00000001610000000162", id="a tuple is a list"),
    ],
)
def test_parts_are_written_with_their_length(parts: tuple[Part, ...], expected: str) -> None:
    assert encode(*parts).hex() == expected


@given(lists)
def test_reading_inverts_writing(parts: list[bytes]) -> None:
    assert decode(encode(*parts)) == parts


@given(trees)
def test_nested_lists_are_read_back_level_by_level(tree: list[Tree]) -> None:
    assert read_back(encode(*tree), tree) == tree


@given(similar, similar)
def test_different_lists_never_give_the_same_bytes(one: list[bytes], other: list[bytes]) -> None:
    assert (encode(*one) == encode(*other)) == (one == other)


@given(st.lists(similar, max_size=3), st.lists(similar, max_size=3))
def test_different_lists_of_lists_never_give_the_same_bytes(
    one: list[list[bytes]], other: list[list[bytes]]
) -> None:
    assert (encode(*one) == encode(*other)) == (one == other)


@given(lists, st.data())
def test_a_list_that_was_cut_is_refused_unless_whole_entries_are_left(
    parts: list[bytes], data: st.DataObject
) -> None:
    content = encode(*parts)
    ends = {len(encode(*parts[:count])): count for count in range(len(parts) + 1)}
    kept = data.draw(st.integers(0, len(content)))
    if kept in ends:
        assert decode(content[:kept]) == parts[: ends[kept]]
    else:
        with pytest.raises(RemoteProtocolError):
            decode(content[:kept])


@given(st.binary(max_size=40))
def test_whatever_is_read_was_written_that_way(content: bytes) -> None:
    try:
        parts = decode(content)
    except RemoteProtocolError:
        return
    assert encode(*parts) == content


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("00", id="a piece of a length"),
        pytest.param("000000", id="three bytes of a length"),
        pytest.param("00000001", id="a length and no entry"),
        pytest.param("0000000261", id="an entry one byte short"),
        pytest.param("000000016100", id="one byte behind the last entry"),
        pytest.param("ffffffff61", id="the largest length"),
        pytest.param("0100000061", id="a length in the other byte order"),
    ],
)
def test_a_malformed_list_is_refused(content: str) -> None:
    with pytest.raises(RemoteProtocolError, match="ends in the middle"):
        decode(bytes.fromhex(content))


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_number_beyond_64_bits_is_never_written_as_another(number: int) -> None:
    with pytest.raises(OverflowError):
        encode(number)


def test_labels_parts_and_keys_all_separate_digests_and_keys() -> None:
    parts: list[tuple[str, list[Part]]] = [
        ("pair", [b"a"]), ("mask", [b"a"]), ("pair", [b"b"]), ("pair", [b"a", b""]),
        ("pair", []), ("paira", []), ("", [b"pair", b"a"]), ("pair", [[b"a"]]),
    ]  # fmt: skip
    made = [digest(label, *rest) for label, rest in parts]
    made += [derive(key, label, *rest) for key in (b"k" * 32, b"l" * 32) for label, rest in parts]
    assert all(len(one) == 32 for one in made)
    assert all(one != other for one, other in itertools.combinations(made, 2))


@given(st.binary(min_size=32, max_size=32), st.text(max_size=8), lists)
def test_a_derived_key_is_one_block_of_hkdf_expand(
    key: bytes, label: str, parts: list[bytes]
) -> None:
    info = encode("msum1/" + label, *parts)
    assert derive(key, label, *parts) == HKDFExpand(SHA256(), 32, info).derive(key)


def test_the_first_blocks_of_rfc_5869_are_derived(
    published: Callable[[str], list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = published("KDF/rfc-5869-HKDF-SHA256.txt")
    assert len(records) == 3
    for record in records:
        info = bytes.fromhex(record["info"])
        monkeypatch.setattr("common.secagg.encoding.encode", lambda *_, info=info: info)
        assert derive(bytes.fromhex(record["prk"]), "").hex() == record["okm"][:64]
