"""Key agreement against published vectors; one key per pair, sum, task and use."""

import itertools
from collections.abc import Callable
from functools import partial
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RemoteProtocolError
from common.secagg.encoding import derive
from common.secagg.keys import (
    CIPHERTEXT_BYTES,
    KEM_KEY_BYTES,
    EpochKeys,
    advance,
    decapsulate,
    encapsulate,
    exchange,
    first_chain_key,
    mask_key,
    run_id,
    share_key,
)

Published = Callable[[str], list[dict[str, str]]]

RUN, TASK = bytes(range(32)), bytes(range(32, 64))
CHAIN = b"c" * 32
keys_of_32_bytes = st.binary(min_size=32, max_size=32)

# Every u that an x25519 of clamped scalars maps to zero; the last four are not canonical.
# RFC 7748, section 6.1, and Bernstein's list at https://cr.yp.to/ecdh.html#validate.
PRIME = 2**255 - 19
LOW_ORDER = {
    "zero": 0,
    "one": 1,
    "a point of order 8": int.from_bytes(
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), "little"
    ),
    "another point of order 8": int.from_bytes(
        bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"), "little"
    ),
    "minus one": PRIME - 1,
    "the prime": PRIME,
    "the prime plus one": PRIME + 1,
    "zero with the top bit set": 2**255,
    "one with the top bit set": 2**255 + 1,
}


def test_diffie_hellman_gives_the_values_of_rfc_7748(published: Published) -> None:
    records = published("asymmetric/X25519/rfc7748.txt")
    assert len(records) == 3
    for record in records:
        scalar, point = bytes.fromhex(record["input_scalar"]), bytes.fromhex(record["input_u"])
        assert exchange(scalar, point).hex() == record["output_u"]


def test_a_thousand_diffie_hellmans_give_the_value_of_rfc_7748() -> None:
    scalar = point = (9).to_bytes(32, "little")
    for _ in range(1000):
        scalar, point = exchange(scalar, point), scalar
    # RFC 7748, section 5.2.
    expected = "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"
    assert scalar.hex() == expected


def test_the_public_key_is_the_base_point_times_the_private_one(published: Published) -> None:
    (record,) = (
        one for one in published("asymmetric/X25519/rfc7748.txt") if one["input_u"][:2] == "09"
    )
    keys = EpochKeys(bytes.fromhex(record["input_scalar"]), bytes(64), b"")
    assert keys.public_key.hex() == record["output_u"]


@given(keys_of_32_bytes, keys_of_32_bytes)
def test_both_sites_of_a_pair_agree(one: bytes, other: bytes) -> None:
    public = [EpochKeys(key, b"", b"").public_key for key in (one, other)]
    assert exchange(one, public[1]) == exchange(other, public[0])


@pytest.mark.parametrize("point", LOW_ORDER.values(), ids=LOW_ORDER)
def test_a_point_of_low_order_is_refused(point: int) -> None:
    with pytest.raises(RemoteProtocolError, match="low order") as error:
        exchange(b"\x55" * 32, point.to_bytes(32, "little"))
    assert error.value.rule == "R3"


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_public_key_of_the_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(RemoteProtocolError) as error:
        exchange(b"\x55" * 32, b"\x09" * length)
    assert error.value.rule == "R3"


def test_encapsulation_keys_follow_from_their_seeds_like_published(published: Published) -> None:
    for record in published("asymmetric/MLKEM/kat_MLKEM_768.rsp"):
        keys = EpochKeys(b"", bytes.fromhex(record["d"] + record["z"]), b"")
        assert keys.kem_key.hex() == record["pk"]


def test_published_ciphertexts_are_opened_and_altered_ones_give_the_published_other_secret(
    published: Published,
) -> None:
    records = published("asymmetric/MLKEM/kat_MLKEM_768.rsp")
    assert len(records) >= 100
    for record in records:
        opened = partial(decapsulate, bytes.fromhex(record["d"] + record["z"]))
        assert opened(bytes.fromhex(record["ct"])).hex() == record["ss"]
        assert opened(bytes.fromhex(record["ct_n"])).hex() == record["ss_n"]


def test_only_the_owner_of_the_key_finds_the_encapsulated_secret() -> None:
    owner, other = EpochKeys.generate(), EpochKeys.generate()
    secret, ciphertext = encapsulate(owner.kem_key)
    assert (len(secret), len(ciphertext)) == (32, CIPHERTEXT_BYTES)
    assert decapsulate(owner.kem, ciphertext) == secret
    assert decapsulate(other.kem, ciphertext) != secret
    assert encapsulate(owner.kem_key) != (secret, ciphertext)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(bytes(KEM_KEY_BYTES - 1), id="one byte short"),
        pytest.param(bytes(KEM_KEY_BYTES + 1), id="one byte long"),
        pytest.param(bytes(800), id="a key of ML-KEM-512"),
        pytest.param(b"\xff" * KEM_KEY_BYTES, id="coefficients not below the modulus"),
    ],
)
def test_what_is_no_encapsulation_key_is_refused(key: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="no ML-KEM-768 key") as error:
        encapsulate(key)
    assert error.value.rule == "R3"


@pytest.mark.parametrize("length", [0, CIPHERTEXT_BYTES - 1, CIPHERTEXT_BYTES + 1, 768])
def test_a_ciphertext_of_the_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match="none of ML-KEM-768") as error:
        decapsulate(bytes(64), bytes(length))
    assert error.value.rule == "R3"


def test_fresh_keys_share_nothing() -> None:
    one, other = EpochKeys.generate(), EpochKeys.generate()
    assert [len(one.dh), len(one.kem), len(one.nonce)] == [32, 64, 16]
    assert not {one.dh, one.kem, one.nonce} & {other.dh, other.kem, other.nonce}
    assert one.kem[:32] != one.kem[32:]


def test_the_run_is_named_by_the_manifest_and_by_every_key_and_nonce_in_its_place() -> None:
    lists = [[b"E0", b"E1", b"E2"], [b"k0", b"k1", b"k2"], [b"n0", b"n1", b"n2"]]
    names = [run_id(b"manifest", *lists), run_id(b"another", *lists)]
    for which, site in itertools.product(range(3), range(3)):
        changed = [list(entries) for entries in lists]
        changed[which][site] += b"'"
        names.append(run_id(b"manifest", *changed))
    names.append(run_id(b"manifest", *[list(reversed(entries)) for entries in lists]))
    names.append(run_id(b"manifest", lists[1], lists[0], lists[2]))
    names.append(run_id(b"manifest", *[entries[:2] for entries in lists]))
    assert len(set(names)) == len(names)


def test_a_run_is_not_named_after_incomplete_lists() -> None:
    with pytest.raises(ValueError, match="shorter"):
        run_id(b"manifest", [b"E0", b"E1"], [b"k0"], [b"n0", b"n1"])


@given(keys_of_32_bytes, keys_of_32_bytes, st.integers(0, 254), st.integers(0, 254))
def test_the_first_chain_key_is_hkdf_over_both_secrets_with_the_run_as_salt(
    dh: bytes, kem: bytes, one: int, other: int
) -> None:
    extracted = HKDF.extract(SHA256(), RUN, dh + kem)
    expected = derive(extracted, "pair", min(one, other), max(one, other))
    assert first_chain_key(RUN, dh, kem, one, other) == expected
    assert first_chain_key(RUN, dh, kem, other, one) == expected


def test_the_published_extraction_of_hkdf_is_what_a_chain_begins_with(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted: list[bytes] = []

    def keep(key: bytes, *_: object) -> bytes:
        extracted.append(key)
        return key

    monkeypatch.setattr("common.secagg.keys.derive", keep)
    records = published("KDF/rfc-5869-HKDF-SHA256.txt")
    for record in records:
        secret = bytes.fromhex(record["ikm"])
        first_chain_key(bytes.fromhex(record["salt"]), secret[:7], secret[7:], 0, 1)
    assert [key.hex() for key in extracted] == [record["prk"] for record in records]


@given(keys_of_32_bytes, st.lists(st.integers(0, 40), min_size=3, max_size=3).map(sorted))
def test_a_chain_comes_to_the_same_key_in_one_go_or_in_two(key: bytes, sums: list[int]) -> None:
    first, between, last = sums
    halfway = advance(key, at=first, to=between)
    assert advance(halfway, at=between, to=last) == advance(key, at=first, to=last)


def test_a_chain_never_comes_to_the_same_key_twice() -> None:
    assert len({advance(CHAIN, at=0, to=to) for to in range(100)}) == 100
    # The number of the step is part of it: equal keys at different sums go different ways.
    assert advance(CHAIN, at=0, to=1) != advance(CHAIN, at=1, to=2)


def test_no_two_uses_of_a_chain_share_a_key() -> None:
    chains = [CHAIN, advance(CHAIN, at=0, to=1)]
    tasks = [TASK, sha256(TASK).digest()]
    made = [advance(CHAIN, at=0, to=1), advance(CHAIN, at=0, to=2)]
    for chain, number, task in itertools.product(chains, (0, 1), tasks):
        pairs = [(0, 1), (0, 2), (1, 2)]
        made += [mask_key(chain, number, task, *pair) for pair in pairs]
        made += [share_key(chain, number, task, *pair) for pair in pairs]
        made += [share_key(chain, number, task, *reversed(pair)) for pair in pairs]
    assert all(len(key) == 32 for key in made)
    assert len(set(made)) == len(made)


def test_a_pair_has_one_mask_key_and_a_share_key_for_each_direction() -> None:
    assert mask_key(CHAIN, 3, TASK, 1, 4) == mask_key(CHAIN, 3, TASK, 4, 1)
    assert share_key(CHAIN, 3, TASK, 1, 4) != share_key(CHAIN, 3, TASK, 4, 1)
