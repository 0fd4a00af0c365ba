"""The stream of a key is AES-256-CTR from any block on, whichever way it is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given
from hypothesis import strategies as st

from common.secagg import keystream as module
from common.secagg.keystream import gcm_is_faster, gcm_nonce, keystream

VECTORS = Path(__file__).parent.parent / "vectors"
COUNTERS = 1 << 32  # of GCM

keys = st.binary(min_size=32, max_size=32)
blocks = st.integers(0, 1000) | st.integers(0, COUNTERS - 10)


def encrypted_counters(key: bytes, block: int, num_blocks: int) -> bytes:
    """The definition of CTR with a first counter block of zeros."""
    counters = [(block + k).to_bytes(16, "big") for k in range(num_blocks)]
    return Cipher(AES256(key), ECB()).encryptor().update(b"".join(counters))  # noqa: S305


@pytest.fixture(params=["CTR", "GCM"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of making the stream, whichever is faster here and however short it is."""
    monkeypatch.setattr(module, "gcm_is_faster", lambda: request.param == "GCM")
    monkeypatch.setattr(module, "WORTH", 0)
    return str(request.param)


def test_the_stream_starts_anywhere_as_in_rfc_3686(
    published: Callable[[str], list[dict[str, str]]],
) -> None:
    records = published("ciphers/AES/CTR/aes-256-ctr.txt")
    assert len(records) == 3
    for record in records:
        content = bytes.fromhex(record["plaintext"])
        stream = keystream(bytes.fromhex(record["key"]), int(record["iv"], 16), len(content))
        assert stream.update(content).hex().upper() == record["ciphertext"]


def test_the_stream_is_that_of_nist_from_each_of_its_blocks(mode: str) -> None:
    vector = json.loads((VECTORS / "sp800_38a_f55.json").read_text())
    first = int(vector["initial_counter"], 16)
    for block in range(4):
        content = bytes.fromhex("".join(vector["plaintext"][block:]))
        stream = keystream(bytes.fromhex(vector["key"]), first + block, len(content))
        assert stream.update(content).hex() == "".join(vector["ciphertext"][block:])


@pytest.mark.parametrize("block", [0, 1, 2, 3, 255, 256, 65535, 2**31 - 1, 2**31, COUNTERS - 9])
def test_every_way_gives_the_encrypted_counters(mode: str, block: int) -> None:
    key = bytes(range(32))
    stream = keystream(key, block, 8 * 16)
    is_gcm = hasattr(stream, "authenticate_additional_data")
    assert is_gcm == (mode == "GCM")
    out = bytearray(8 * 16)
    # In pieces, also such that end inside a block.
    for start, end in ((0, 32), (32, 39), (39, 64), (64, 128)):
        stream.update_into(bytes(end - start), memoryview(out)[start:end])
    assert bytes(out) == encrypted_counters(key, block, 8)


@given(keys, blocks)
def test_a_nonce_is_found_for_every_key_and_block(key: bytes, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gcm_is_faster", lambda: True)
        patch.setattr(module, "WORTH", 0)
        stream = keystream(key, block, 48)
    assert stream.update(bytes(48)) == encrypted_counters(key, block, 3)
    assert len(gcm_nonce(key, block)) == 16


@pytest.mark.parametrize("block", [COUNTERS - 3, COUNTERS - 1, COUNTERS, 2**64 - 2, 2**127])
def test_a_stream_beyond_the_counters_of_gcm_is_made_by_ctr(mode: str, block: int) -> None:
    key = bytes(range(32))
    stream = keystream(key, block, 64)
    assert stream.update(bytes(64)) == encrypted_counters(key, block, 4)
    assert not hasattr(stream, "authenticate_additional_data")


def test_the_last_counter_comes_before_the_first_one_again() -> None:
    stream = keystream(bytes(32), 2**128 - 1, 32)
    first, second = (
        encrypted_counters(bytes(32), 2**128 - 1, 1),
        encrypted_counters(bytes(32), 0, 1),
    )
    assert stream.update(bytes(32)) == first + second


def test_a_short_stream_is_made_by_ctr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gcm_is_faster", lambda: True)
    kinds = [
        hasattr(keystream(bytes(32), 0, num_bytes), "authenticate_additional_data")
        for num_bytes in (16, module.WORTH - 1, module.WORTH)
    ]
    assert kinds == [False, False, True]


def test_which_way_is_faster_is_tried_once() -> None:
    assert gcm_is_faster() in (True, False)
    assert gcm_is_faster() is gcm_is_faster()
    assert gcm_is_faster.cache_info().misses == 1


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33, 64])
def test_a_key_of_another_length_is_refused(mode: str, length: int) -> None:
    with pytest.raises(ValueError, match="key"):
        keystream(bytes(length), 0, 64)
