"""Enough shares give the secret back, fewer say nothing, and a seal opens for one site only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RemoteProtocolError
from common.secagg import sharing
from common.secagg.sharing import recover, seal, split, unseal

KEY, CONTEXT = bytes(range(32)), b"run, sum, task, sender, receiver"


@st.composite
def splits(draw: st.DrawFn) -> tuple[bytes, int, int, bytes]:
    """A secret, a threshold, a number of sites and the randomness of the coefficients."""
    secret = draw(st.binary(min_size=1, max_size=40))
    num_shares = draw(st.integers(2, 12))
    threshold = draw(st.integers(1, num_shares))
    length = len(secret) * (threshold - 1)
    return secret, threshold, num_shares, draw(st.binary(min_size=length, max_size=length))


def fixed(content: bytes) -> Callable[[int], bytes]:
    """A source that gives exactly these bytes, in one piece."""

    def random(num_bytes: int) -> bytes:
        assert num_bytes == len(content)
        return content

    return random


def test_multiplication_is_that_of_logarithms_to_the_base_three(plain: SimpleNamespace) -> None:
    expected = [[plain.times(a, b) for b in range(256)] for a in range(256)]
    assert sharing._PRODUCT.tolist() == expected


def test_every_byte_but_zero_has_its_inverse(plain: SimpleNamespace) -> None:
    assert [plain.times(a, sharing._INVERSE[a]) for a in range(256)] == [0] + [1] * 255


@given(splits())
def test_shares_are_the_values_of_one_polynomial_per_byte(
    plain: SimpleNamespace, drawn: tuple[bytes, int, int, bytes]
) -> None:
    secret, threshold, num_shares, random = drawn
    length = len(secret)
    coefficients = [random[k * length : (k + 1) * length] for k in range(threshold - 1)]
    made = split(secret, threshold=threshold, num_shares=num_shares, random=fixed(random))
    assert made == [plain.share(secret, coefficients, x) for x in range(1, num_shares + 1)]


@given(splits(), st.data())
def test_any_shares_that_are_enough_give_the_secret_back(
    drawn: tuple[bytes, int, int, bytes], data: st.DataObject
) -> None:
    secret, threshold, num_shares, _ = drawn
    shares = split(secret, threshold=threshold, num_shares=num_shares)
    chosen = data.draw(st.permutations(range(num_shares)))[:threshold]
    assert recover({site: shares[site] for site in chosen}) == secret
    assert recover(dict(enumerate(shares))) == secret  # more than enough


@given(st.dictionaries(st.integers(0, 254), st.binary(min_size=5, max_size=5), min_size=1))
def test_recovering_is_lagranges_formula(plain: SimpleNamespace, shares: dict[int, bytes]) -> None:
    assert recover(shares) == plain.at_zero({site + 1: share for site, share in shares.items()})


def test_the_most_sites_that_are_possible_share_and_recover() -> None:
    secret = bytes(range(64))
    shares = split(secret, threshold=171, num_shares=255)
    assert len(set(shares)) == 255
    assert recover({site: shares[site] for site in range(84, 255)}) == secret
    assert recover({site: shares[site] for site in range(85, 255)}) != secret


@pytest.mark.parametrize("site", [0, 1, 254])
def test_one_share_of_two_leaves_every_byte_equally_likely(site: int) -> None:
    """For each secret, over every coefficient, the share takes each value exactly once."""
    every = bytes(range(256))
    for secret in range(256):
        shares = split(bytes([secret]) * 256, threshold=2, num_shares=255, random=fixed(every))
        assert sorted(shares[site]) == list(every)


@pytest.mark.parametrize("sites", [(0, 1), (0, 254), (7, 100)])
def test_two_shares_of_three_leave_every_byte_equally_likely(sites: tuple[int, int]) -> None:
    """For each secret, over every pair of coefficients, each pair of shares comes exactly once."""
    every = np.arange(256, dtype=np.uint8)
    pairs = np.repeat(every, 256).tobytes() + np.tile(every, 256).tobytes()
    for secret in (0, 1, 2, 0x53, 0x80, 0xCA, 0xFF):
        repeated = bytes([secret]) * 65536
        shares = split(repeated, threshold=3, num_shares=255, random=fixed(pairs))
        one, other = (np.frombuffer(shares[site], np.uint8).astype(int) for site in sites)
        assert np.array_equal(np.bincount(256 * one + other, minlength=65536), np.ones(65536))


@given(st.binary(min_size=8, max_size=8), st.integers(0, 3), st.integers(0, 7), st.integers(1, 255))
def test_one_wrong_share_spoils_the_secret(secret: bytes, site: int, place: int, by: int) -> None:
    shares = dict(enumerate(split(secret, threshold=4, num_shares=4)))
    altered = bytearray(shares[site])
    altered[place] ^= by
    wrong = recover({**shares, site: bytes(altered)})
    assert [k for k in range(8) if wrong[k] != secret[k]] == [place]


def test_the_same_secret_is_never_shared_the_same_way() -> None:
    one, other = (split(bytes(32), threshold=2, num_shares=3) for _ in range(2))
    assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("threshold", "num_shares"),
    [
        pytest.param(0, 3, id="no share is needed"),
        pytest.param(-1, 3, id="a negative threshold"),
        pytest.param(4, 3, id="more are needed than there are"),
        pytest.param(3, 256, id="more sites than points of the field"),
        pytest.param(0, 0, id="nobody"),
    ],
)
def test_a_sharing_that_cannot_be_is_refused(threshold: int, num_shares: int) -> None:
    with pytest.raises(ValueError, match="1 to 255 are possible"):
        split(b"secret", threshold=threshold, num_shares=num_shares)


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param({0: b"abcd", 1: b"abc"}, id="one byte short"),
        pytest.param({0: b"abcd", 1: b"a"}, id="a single byte"),
        pytest.param({0: b"a", 1: b"abcd"}, id="a single byte first"),
        pytest.param({0: b"abcd", 1: b""}, id="nothing"),
    ],
)
def test_shares_of_different_lengths_are_not_put_together(shares: Mapping[int, bytes]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which words is not the point
        recover(shares)


def _text_or_hex(value: str) -> bytes:
    return value.strip('"').encode() if value.startswith('"') else bytes.fromhex(value)


def test_published_seals_are_made_and_opened(
    published: Callable[[str], list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = published("ciphers/ChaCha20Poly1305/boringssl.txt")
    assert len(records) == 66
    for record in records:
        key, nonce, content, context, sealed, tag = (
            _text_or_hex(record[name]) for name in ("key", "nonce", "in", "ad", "ct", "tag")
        )
        monkeypatch.setattr(sharing, "_NONCE", nonce)
        assert seal(key, content, context) == sealed + tag
        assert unseal(key, sealed + tag, context) == content


def test_published_seals_that_are_not_authentic_are_refused(
    published: Callable[[str], list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for record in published("ciphers/ChaCha20Poly1305/openssl.txt"):
        key, nonce, context, sealed, tag = (
            bytes.fromhex(record[name]) for name in ("key", "iv", "aad", "ciphertext", "tag")
        )
        monkeypatch.setattr(sharing, "_NONCE", nonce)
        try:
            assert unseal(key, sealed + tag, context).hex() == record["plaintext"]
            outcomes.append("")
        except RemoteProtocolError:
            outcomes.append("CIPHERFINAL_ERROR")
        assert outcomes[-1] == record.get("result", "")
    assert set(outcomes) == {"", "CIPHERFINAL_ERROR"}


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_a_seal_is_chacha20_poly1305_with_a_nonce_of_zeros(share: bytes, context: bytes) -> None:
    sealed = seal(KEY, share, context)
    assert sealed == ChaCha20Poly1305(KEY).encrypt(bytes(12), share, context)
    assert unseal(KEY, sealed, context) == share


def test_every_flipped_bit_of_a_sealed_share_is_noticed() -> None:
    sealed = seal(KEY, b"a share", CONTEXT)
    for place, bit in itertools.product(range(len(sealed)), range(8)):
        altered = bytearray(sealed)
        altered[place] ^= 1 << bit
        with pytest.raises(RemoteProtocolError) as error:
            unseal(KEY, bytes(altered), CONTEXT)
        assert error.value.rule == "R13"


SEALED = seal(KEY, b"a share", CONTEXT)


@pytest.mark.parametrize(
    ("key", "sealed", "context"),
    [
        pytest.param(KEY[::-1], SEALED, CONTEXT, id="another key"),
        pytest.param(KEY, SEALED, CONTEXT + b"'", id="another context"),
        pytest.param(KEY, SEALED, b"", id="no context"),
        pytest.param(KEY, SEALED[:-1], CONTEXT, id="one byte short"),
        pytest.param(KEY, SEALED + b"\0", CONTEXT, id="one byte long"),
        pytest.param(KEY, SEALED[-16:], CONTEXT, id="the tag alone"),
        pytest.param(KEY, SEALED[:15], CONTEXT, id="shorter than a tag"),
        pytest.param(KEY, b"", CONTEXT, id="nothing"),
    ],
)
def test_a_share_opens_only_as_it_was_sealed(key: bytes, sealed: bytes, context: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not authentic") as error:
        unseal(key, sealed, context)
    assert error.value.rule == "R13"
