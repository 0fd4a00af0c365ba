"""The bytes of the protocol, held against a vector that a second implementation wrote.

A change that breaks one of these tests breaks every site that was not updated too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.identity import Identity
from common.messages import KINDS, Encapsulated, Purpose, RoundTask, signed_content
from common.record import from_table
from common.secagg.header import Header, commit, row_digest, slot_of
from common.secagg.keys import (
    EpochKeys,
    advance,
    decapsulate,
    exchange,
    first_chain_key,
    mask_key,
    run_id,
    share_key,
)
from common.secagg.masking import Mask, add_masks, add_packed, add_tail_masks, signed, split_body
from common.secagg.protect import Place, Protected, protect, share_context
from common.secagg.sharing import recover, unseal
from common.secagg.task import digest_of_task
from common.secagg.view import digest_of_view
from common.update import QuantizedUpdate

VECTOR = json.loads((Path(__file__).parent.parent / "vectors/masked_sum_v1.json").read_text())
INPUTS, KEYS = VECTOR["inputs"], VECTOR["keys"]
NUM_SITES, SUM = len(INPUTS["sites"]), INPUTS["sum_number"]
SURVIVORS = [site for site in range(NUM_SITES) if site != INPUTS["dropout"]]
RUN, TASK = bytes.fromhex(KEYS["run"]), bytes.fromhex(KEYS["task"])

rings = pytest.mark.parametrize("bits", [int(bits) for bits in VECTOR["sums"]])
pairs = pytest.mark.parametrize("pair", KEYS["pairs"])
sites = pytest.mark.parametrize("site", range(NUM_SITES))


def from_hex(entries: list[str]) -> list[bytes]:
    return [bytes.fromhex(entry) for entry in entries]


def epoch_keys() -> list[EpochKeys]:
    names = ("x25519_private_key", "ml_kem_768_seed", "nonce")
    return [EpochKeys(*from_hex([site[name] for name in names])) for site in INPUTS["sites"]]


def chain(one: int, other: int) -> bytes:
    if one == other:
        return b""
    keys = KEYS["pairs"][f"{min(one, other)}-{max(one, other)}"]["chain_keys"]
    return bytes.fromhex(keys[SUM])


def identity(site: int) -> Identity:
    number = int(INPUTS["sites"][site]["p256_private_key"], 16)
    return Identity(f"site-{site}", ec.derive_private_key(number, ec.SECP256R1()), b"")


def protected(site: int, bits: int) -> Protected:
    given = INPUTS["sites"][site]
    update = INPUTS["updates"][str(bits)][site]
    randomness = io.BytesIO(bytes.fromhex(given["randomness"]))
    made = protect(
        QuantizedUpdate(np.array(update["values"], np.int32), np.array(update["tail"], np.int64)),
        Place(RUN, SUM, TASK, site, INPUTS["threshold"]),
        [chain(site, other) for other in range(NUM_SITES)],
        identity(site),
        statement=given["statement"],
        bits=bits,
        random=randomness.read,
    )
    assert not randomness.read()
    return made


def test_the_stored_vector_is_what_the_second_implementation_makes(plain: SimpleNamespace) -> None:
    assert plain.vector(INPUTS["ciphertexts"]) == VECTOR


def test_public_keys_and_run() -> None:
    keys = epoch_keys()
    assert [one.public_key.hex() for one in keys] == KEYS["public_keys"]
    digests = [hashlib.sha256(one.kem_key).hexdigest() for one in keys]
    assert digests == KEYS["ml_kem_768_keys_sha256"]
    found = run_id(
        bytes.fromhex(INPUTS["manifest_digest"]),
        [one.public_key for one in keys],
        [one.kem_key for one in keys],
        [one.nonce for one in keys],
    )
    assert found.hex() == KEYS["run"]


def test_task() -> None:
    task = RoundTask(
        run=KEYS["run"],
        sum_number=SUM,
        round_number=INPUTS["task"]["round_number"],
        purpose=Purpose(INPUTS["task"]["purpose"]),
        exponents=tuple(INPUTS["task"]["exponents"]),
        model_digest=INPUTS["task"]["model_digest"],
        ciphertexts=(),
        ciphertext_signatures=(),
        revoked=b"",
        model=np.empty(0, np.float32),
    )
    assert digest_of_task(task).hex() == KEYS["task"]


@pairs
def test_keys_of_a_pair(pair: str) -> None:
    one, other = map(int, pair.split("-"))
    keys, expected = epoch_keys(), KEYS["pairs"][pair]
    dh = exchange(keys[one].dh, keys[other].public_key)
    assert dh.hex() == exchange(keys[other].dh, keys[one].public_key).hex() == expected["x25519"]
    kem = decapsulate(keys[other].kem, bytes.fromhex(INPUTS["ciphertexts"][pair]))
    assert kem.hex() == expected["ml_kem_768"]
    first = first_chain_key(RUN, dh, kem, other, one)
    chains = [advance(first, at=0, to=step).hex() for step in range(SUM + 1)]
    assert chains == expected["chain_keys"]
    now = bytes.fromhex(chains[SUM])
    assert mask_key(now, SUM, TASK, one, other).hex() == expected["mask_key"]
    assert share_key(now, SUM, TASK, one, other).hex() == expected["share_key"]
    assert share_key(now, SUM, TASK, other, one).hex() == expected["share_key_back"]


@sites
@rings
def test_shares_commitments_and_seals(site: int, bits: int) -> None:
    expected, upload = VECTOR["sharing"][site], protected(site, bits)
    assert [one.hex() for one in upload.sealed] == expected["sealed"]
    assert [one.hex() for one in upload.share_commitments] == expected["share_commitments"]
    assert upload.own_share.hex() == expected["shares"][site]
    slots = range(NUM_SITES)
    assert [upload.header.commitment(slot).hex() for slot in slots] == expected["commitments"]
    digests = [
        row_digest(row, sealed)
        for row, sealed in zip(upload.share_commitments, upload.sealed, strict=True)
    ]
    assert [one.hex() for one in digests] == expected["row_digests"]
    assert upload.header.rows.hex() == expected["rows"]


@sites
@rings
def test_body_and_header(site: int, bits: int) -> None:
    expected, upload = VECTOR["sums"][str(bits)]["uploads"][site], protected(site, bits)
    assert upload.body.tobytes().hex() == expected["body"]
    assert upload.header.body.hex() == expected["body_sha256"]
    stored = Header.decode(bytes.fromhex(expected["header"]))
    assert stored.encode().hex() == expected["header"]
    # Signatures of one's own are random; the stored one must hold for what is signed today.
    assert dataclasses.replace(upload.header, signature=stored.signature) == stored
    stored.check_signature(identity(site).key.public_key(), f"site {site}")


def recovered(sender: int) -> Iterator[tuple[int, bytes]]:
    """One site's secrets by slot, from what the survivors open."""
    expected, opened = VECTOR["sharing"][sender], {}
    for receiver in SURVIVORS:
        opened[receiver] = bytes.fromhex(expected["shares"][receiver])
        if receiver != sender:
            key = share_key(chain(sender, receiver), SUM, TASK, sender, receiver)
            context = share_context(RUN, SUM, TASK, sender, receiver)
            sealed = bytes.fromhex(expected["sealed"][receiver])
            assert unseal(key, sealed, context) == opened[receiver]
    whole = recover(opened)
    yield from ((slot, slot_of(whole, slot)) for slot in range(NUM_SITES))


@sites
def test_the_survivors_recover_a_sites_secrets(site: int) -> None:
    expected = VECTOR["sharing"][site]
    for slot, secret in recovered(site):
        assert secret.hex() == expected["secrets"][slot]
        assert commit(RUN, SUM, site, slot, secret).hex() == expected["commitments"][slot]


@rings
def test_view_and_exact_sum_without_the_dropout(bits: int) -> None:
    stored = VECTOR["sums"][str(bits)]
    headers = from_hex([stored["uploads"][site]["header"] for site in SURVIVORS])
    assert digest_of_view(RUN, SUM, TASK, headers).hex() == stored["view"]
    expected = stored["sum"]
    num_params = len(expected["values"])
    total, tails = np.zeros(num_params, np.uint32), np.zeros(len(expected["tail"]), np.uint64)
    left = []
    for site in SURVIVORS:
        body = np.frombuffer(bytes.fromhex(stored["uploads"][site]["body"]), np.uint8)
        packed, tail = split_body(body, num_params, bits=bits)
        add_packed(total, packed, bits=bits)
        tails += tail
        wanted = {site, INPUTS["dropout"]}
        left += [Mask(key, is_added=k < site) for k, key in recovered(site) if k in wanted]
    add_masks(total, left)
    add_tail_masks(tails, left, num_params)
    assert signed(total, bits=bits).tolist() == expected["values"]
    assert tails.view(np.int64).tolist() == expected["tail"]


@pytest.mark.parametrize("kind", VECTOR["messages"])
def test_what_is_signed_of_a_message(kind: str) -> None:
    stored = VECTOR["messages"][kind]
    table: dict[str, Any] = {**stored["fields"], "signature": "ff"}
    message_type = {**KINDS, "Encapsulated": Encapsulated}[kind]
    if kind == "RoundTask":
        task = from_table({**table, "model": None}, RoundTask)
        message = dataclasses.replace(task, model=np.ones(2, np.float32))
    else:
        message = from_table(table, message_type)
    assert signed_content(message).hex() == stored["signed_content"]
