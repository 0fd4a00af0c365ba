"""A site's whole calculation for one sum: what leaves fits together, and nothing repeats."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RemoteProtocolError
from common.identity import Identity
from common.secagg.header import (
    SECRET_BYTES,
    Header,
    commit,
    commit_row,
    digest_of_rows,
    row_digest,
    slot_of,
)
from common.secagg.keys import share_key
from common.secagg.masking import Mask, add_masks, add_packed, add_tail_masks, signed, split_body
from common.secagg.protect import Place, Protected, protect, share_context
from common.secagg.sharing import recover, unseal
from common.update import QuantizedUpdate

RUN, TASK, SUM = b"r" * 32, b"t" * 32, 5
NUM_PARAMS, NUM_TAIL = 37, 3


class Cohort(NamedTuple):
    """Sites that agreed on chain keys; ``chains[i][j]`` is that of i and j."""

    chains: list[list[bytes]]
    threshold: int

    def place(self, site: int, task: bytes = TASK) -> Place:
        return Place(RUN, SUM, task, site, self.threshold)


def cohort(num_sites: int, threshold: int) -> Cohort:
    chains = [[b""] * num_sites for _ in range(num_sites)]
    for one, other in combinations(range(num_sites), 2):
        key = hashlib.sha256(f"{one}/{other}".encode()).digest()
        chains[one][other] = chains[other][one] = key
    return Cohort(chains, threshold)


def update_of(site: int, bits: int = 32, num_sites: int = 4) -> QuantizedUpdate:
    rng = np.random.default_rng(site)
    bound = (2 ** (bits - 1) - 1) // num_sites
    values = rng.integers(-bound, bound + 1, NUM_PARAMS, dtype=np.int32)
    return QuantizedUpdate(values, rng.integers(-(2**40), 2**40, NUM_TAIL))


@pytest.fixture(scope="session")
def protected(members: Sequence[Identity]) -> tuple[Cohort, list[Protected]]:
    """Four sites' uploads of one sum; any three recover."""
    sites = cohort(4, 3)
    uploads = [
        protect(
            update_of(site), sites.place(site), sites.chains[site], members[site],
            statement=f"statement {site}", bits=32,
        )
        for site in range(4)
    ]  # fmt: skip
    return sites, uploads


def opened(sites: Cohort, uploads: Sequence[Protected], sender: int, receiver: int) -> bytes:
    """The share that one site opens, or has kept."""
    if sender == receiver:
        return uploads[sender].own_share
    key = share_key(sites.chains[receiver][sender], SUM, TASK, sender, receiver)
    context = share_context(RUN, SUM, TASK, sender, receiver)
    return unseal(key, uploads[sender].sealed[receiver], context)


def secrets_of(
    sites: Cohort, uploads: Sequence[Protected], sender: int, helpers: Sequence[int]
) -> list[bytes]:
    """One site's secrets by slot, put together from the shares of others."""
    whole = recover({site: opened(sites, uploads, sender, site) for site in helpers})
    return [slot_of(whole, slot) for slot in range(len(uploads))]


def test_a_header_binds_everything_that_leaves_with_it(
    protected: tuple[Cohort, list[Protected]], members: Sequence[Identity]
) -> None:
    _, uploads = protected
    for site, upload in enumerate(uploads):
        header = Header.decode(upload.header.encode())
        header.check_signature(members[site].key.public_key(), f"site {site}")
        about = (header.run, header.sum_number, header.task, header.site, header.num_slots)
        assert about == (RUN, SUM, TASK, site, 4)
        assert header.body == hashlib.sha256(upload.body.tobytes()).digest()
        assert header.statement == hashlib.sha256(f"statement {site}".encode()).digest()
        rows = [
            row_digest(row, sealed)
            for row, sealed in zip(upload.share_commitments, upload.sealed, strict=True)
        ]
        assert header.rows == digest_of_rows(rows)


def test_every_receiver_opens_its_share_and_finds_it_as_committed(
    protected: tuple[Cohort, list[Protected]],
) -> None:
    sites, uploads = protected
    for sender, upload in enumerate(uploads):
        assert upload.sealed[sender] == b""
        for receiver in range(4):
            share = opened(sites, uploads, sender, receiver)
            assert len(share) == 4 * SECRET_BYTES
            row = commit_row(RUN, SUM, sender, receiver, share)
            assert upload.share_commitments[receiver] == row


def test_nobody_else_opens_a_share(protected: tuple[Cohort, list[Protected]]) -> None:
    sites, uploads = protected
    sealed = uploads[0].sealed[1]
    for key, context in [
        (share_key(sites.chains[1][0], SUM, TASK, 1, 0), share_context(RUN, SUM, TASK, 0, 1)),
        (share_key(sites.chains[1][2], SUM, TASK, 0, 1), share_context(RUN, SUM, TASK, 0, 1)),
        (share_key(sites.chains[1][0], SUM, TASK, 0, 1), share_context(RUN, SUM, TASK, 1, 0)),
        (share_key(sites.chains[1][0], SUM, TASK, 0, 1), share_context(RUN, SUM + 1, TASK, 0, 1)),
        (share_key(sites.chains[1][0], SUM, TASK, 0, 1), share_context(b"", SUM, TASK, 0, 1)),
    ]:
        with pytest.raises(RemoteProtocolError):
            unseal(key, sealed, context)


def test_any_three_of_four_recover_the_secrets_that_were_committed_to_and_two_do_not(
    protected: tuple[Cohort, list[Protected]],
) -> None:
    sites, uploads = protected
    for sender, upload in enumerate(uploads):
        committed = [upload.header.commitment(slot) for slot in range(4)]
        for size in (2, 3, 4):
            for helpers in combinations(range(4), size):
                secrets = secrets_of(sites, uploads, sender, helpers)
                found = [commit(RUN, SUM, sender, slot, s) for slot, s in enumerate(secrets)]
                assert (found == committed) == (size >= sites.threshold)
                if size < sites.threshold:
                    assert not set(found) & set(committed)


def test_both_sites_of_a_pair_commit_to_the_same_secret_and_share_no_other(
    protected: tuple[Cohort, list[Protected]],
) -> None:
    _, uploads = protected
    for one, other in combinations(range(4), 2):
        headers = uploads[one].header, uploads[other].header
        assert headers[0].commitment(other) == headers[1].commitment(one)
    everything = {upload.header.commitment(slot) for upload in uploads for slot in range(4)}
    assert len(everything) == 4 + 6  # self masks and pairs


def test_sites_that_were_given_different_tasks_show_it_in_their_commitments(
    protected: tuple[Cohort, list[Protected]], members: Sequence[Identity]
) -> None:
    sites, uploads = protected
    misled = protect(
        update_of(2), sites.place(2, task=b"x" * 32), sites.chains[2], members[2],
        statement="", bits=32,
    )  # fmt: skip
    for other in (0, 1, 3):
        assert misled.header.commitment(other) != uploads[other].header.commitment(2)


def test_the_same_update_protected_twice_has_nothing_in_common_but_its_pairs(
    protected: tuple[Cohort, list[Protected]], members: Sequence[Identity]
) -> None:
    sites, uploads = protected
    again = protect(
        update_of(1), sites.place(1), sites.chains[1], members[1], statement="statement 1", bits=32
    )
    first = uploads[1]
    assert np.mean(again.body == first.body) < 0.1
    assert again.own_share != first.own_share
    same = [again.header.commitment(k) == first.header.commitment(k) for k in range(4)]
    assert same == [True, False, True, True]
    assert not set(again.sealed[2:]) & set(first.sealed[2:])
    assert not set(again.share_commitments) & set(first.share_commitments)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_randomness_gives_the_same_upload(
    members: Sequence[Identity], bits: int, threads: int
) -> None:
    sites = cohort(4, 3)
    made = [
        protect(
            update_of(1, bits), sites.place(1), sites.chains[1], members[1],
            statement="", bits=bits, threads=used, random=hashlib.shake_256(b"random").digest,
        )
        for used in (1, threads)
    ]  # fmt: skip
    assert np.array_equal(made[0].body, made[1].body)
    assert made[0].sealed == made[1].sealed
    unsigned = [dataclasses.replace(one.header, signature=b"") for one in made]
    assert unsigned[0] == unsigned[1]


def test_an_evaluation_hides_its_tail_alone(members: Sequence[Identity]) -> None:
    sites, tail = cohort(3, 3), np.array([10, 0, 7], np.int64)
    update = QuantizedUpdate(np.empty(0, np.int32), tail)
    upload = protect(update, sites.place(0), sites.chains[0], members[0], statement="", bits=24)
    assert upload.body.nbytes == tail.nbytes
    assert not any(upload.body.view("<i8") == tail)


@settings(max_examples=60)
@given(st.integers(3, 5), st.sampled_from([16, 24, 32]), st.data())
def test_any_survivors_that_are_enough_give_their_exact_sum(
    members: Sequence[Identity], num_sites: int, bits: int, data: st.DataObject
) -> None:
    sites = cohort(num_sites, data.draw(st.integers(2, num_sites)))
    updates = [update_of(site, bits, num_sites) for site in range(num_sites)]
    uploads = [
        protect(
            update, sites.place(site), sites.chains[site], members[site], statement="", bits=bits
        )
        for site, update in enumerate(updates)
    ]
    order = data.draw(st.permutations(range(num_sites)))
    survivors = order[: data.draw(st.integers(sites.threshold, num_sites))]
    helpers = data.draw(st.permutations(survivors))[: sites.threshold]
    total, tails = np.zeros(NUM_PARAMS, np.uint32), np.zeros(NUM_TAIL, np.uint64)
    left = []
    for site in survivors:
        packed, tail = split_body(uploads[site].body, NUM_PARAMS, bits=bits)
        add_packed(total, packed, bits=bits)
        tails += tail
        secrets = secrets_of(sites, uploads, site, helpers)
        left += [
            Mask(secrets[slot], is_added=slot < site)
            for slot in range(num_sites)
            if slot == site or slot not in survivors
        ]
    add_masks(total, left)
    add_tail_masks(tails, left, NUM_PARAMS)
    expected = np.sum([updates[site].values for site in survivors], axis=0, dtype=np.int64)
    assert signed(total, bits=bits).tolist() == expected.tolist()
    expected = np.sum([updates[site].tail for site in survivors], axis=0)
    assert tails.view(np.int64).tolist() == expected.tolist()
