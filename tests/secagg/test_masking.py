"""Masks are AES-256-CTR streams, they cancel exactly, and hiding takes little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.secagg.masking import (
    CHUNK,
    Mask,
    add_masks,
    add_packed,
    add_tail_masks,
    mask,
    pack,
    signed,
    split_body,
    unpack,
)
from common.update import QuantizedUpdate

RINGS = (16, 24, 32)  # bits
ENTRIES = CHUNK // 4  # of one chunk
EDGES = (0, 1, 3, ENTRIES - 1, ENTRIES, ENTRIES + 1, 2 * ENTRIES, 2 * ENTRIES + 5, 5 * ENTRIES - 3)

ring_of = pytest.mark.parametrize("bits", RINGS)
rings = st.sampled_from(RINGS)
keys = st.binary(min_size=32, max_size=32)
streams = st.lists(st.builds(Mask, keys, st.booleans()), min_size=1, max_size=4)


def updates(
    rng: np.random.Generator, num_params: int, bits: int, num_sites: int
) -> QuantizedUpdate:
    """What one of ``num_sites`` sites may send."""
    bound = (2 ** (bits - 1) - 1) // num_sites
    values = rng.integers(-bound, bound + 1, num_params, dtype=np.int32)
    return QuantizedUpdate(values, rng.integers(-(2**40), 2**40, 3))


def masks_of(sites: Sequence[int], rng: np.random.Generator) -> dict[int, list[Mask]]:
    """By site: its self mask, then one mask for each pair, added by the smaller of the two."""
    secret = {(i, j): rng.bytes(32) for i in sites for j in sites if i <= j}
    return {
        i: [
            Mask(secret[min(i, j), max(i, j)], is_added=j >= i) for j in sorted(sites, key=i.__ne__)
        ]
        for i in sites
    }


def opposite(masks: Sequence[Mask]) -> list[Mask]:
    return [Mask(key, is_added=not is_added) for key, is_added in masks]


def collected(
    bodies: Sequence[NDArray[np.uint8]], num_params: int, bits: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """The masked sum of entries and of tails, as the coordinator adds them up."""
    total, tails = np.zeros(num_params, np.uint32), np.zeros(3, np.uint64)
    for body in bodies:
        packed, tail = split_body(body, num_params, bits=bits)
        add_packed(total, packed, bits=bits)
        tails += tail
    return total, tails


def exact(sent: Sequence[QuantizedUpdate]) -> tuple[list[int], list[int]]:
    """The plain sums, in Python's integers."""
    return (
        np.sum([one.values for one in sent], axis=0, dtype=np.int64).tolist(),
        np.sum([one.tail for one in sent], axis=0).tolist(),
    )


@pytest.fixture(params=["CTR", "GCM"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of making a stream, whichever is faster here and however short it is."""
    monkeypatch.setattr("common.secagg.keystream.gcm_is_faster", lambda: request.param == "GCM")
    monkeypatch.setattr("common.secagg.keystream.WORTH", 0)
    return str(request.param)


@settings(max_examples=200)
@given(rings, st.integers(0, 40), st.integers(0, 5), streams, st.randoms(use_true_random=False))
def test_a_body_is_what_entry_by_entry_arithmetic_gives(
    plain: SimpleNamespace, bits: int, num_params: int, num_tail: int, masks: list[Mask], chance
) -> None:
    values = [chance.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in range(num_params)]
    tail = [chance.randrange(-(2**63), 2**63) for _ in range(num_tail)]
    update = QuantizedUpdate(np.array(values, np.int32), np.array(tail, np.int64))
    expected = plain.masked(
        values, tail, [(key, 1 if is_added else -1) for key, is_added in masks], bits
    )
    assert mask(update, masks, bits=bits).body.tobytes() == expected
    assert update.values.tolist() == values
    assert update.tail.tolist() == tail


@ring_of
@pytest.mark.parametrize("num_params", EDGES)
def test_chunks_and_threads_leave_no_trace_in_the_bytes(
    plain: SimpleNamespace, rng: np.random.Generator, mode: str, bits: int, num_params: int
) -> None:
    update = updates(rng, num_params, bits, num_sites=3)
    masks = [Mask(rng.bytes(32), is_added=True), Mask(rng.bytes(32), is_added=False)]
    body = mask(update, masks, bits=bits).body
    for threads in (2, 5):
        assert np.array_equal(mask(update, masks, bits=bits, threads=threads).body, body)
    tail_begins = -(-num_params // 4) * 16
    made = [plain.stream(key, tail_begins + 24) for key, _ in masks]
    lanes = [np.frombuffer(one[: 4 * num_params], "<u4") for one in made]
    tails = [np.frombuffer(one[tail_begins:], "<u8") for one in made]
    packed, tail = split_body(body, num_params, bits=bits)
    residues = (update.values.view(np.uint32) + lanes[0] - lanes[1]) & np.uint32(2**bits - 1)
    assert np.array_equal(unpack(packed, bits=bits), residues)
    assert np.array_equal(tail, update.tail.view(np.uint64) + tails[0] - tails[1])


@ring_of
@pytest.mark.parametrize("num_params", range(10))
def test_the_tail_begins_at_the_next_16_bytes_of_the_stream(
    plain: SimpleNamespace, bits: int, num_params: int
) -> None:
    update = QuantizedUpdate(np.zeros(num_params, np.int32), np.zeros(2, np.int64))
    body = mask(update, [Mask(b"k" * 32, is_added=True)], bits=bits).body
    begins = {0: 0, 1: 16, 2: 16, 3: 16, 4: 16, 5: 32, 6: 32, 7: 32, 8: 32, 9: 48}[num_params]
    assert body[num_params * bits // 8 :].tobytes() == plain.stream(b"k" * 32, begins + 16)[begins:]


@settings(max_examples=60)
@given(st.integers(3, 8), rings, st.integers(0, 70), st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_pair_masks_cancel_when_everybody_sends(
    num_sites: int, bits: int, num_params: int, seed: int, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    masks = masks_of(range(num_sites), rng)
    sent = [updates(rng, num_params, bits, num_sites) for _ in masks]
    pairs = [of_site[1:] for of_site in masks.values()]
    bodies = [
        mask(update, of_site, bits=bits, threads=threads).body
        for update, of_site in zip(sent, pairs, strict=True)
    ]
    total, tails = collected(bodies, num_params, bits)
    found = signed(total, bits=bits).tolist(), tails.view(np.int64).tolist()
    assert found == exact(sent)


@settings(max_examples=100)
@given(st.integers(3, 8), rings, st.integers(0, 70), st.integers(0, 2**32 - 1), st.data())
def test_removing_the_survivors_self_masks_and_the_dropouts_pair_masks_leaves_the_exact_sum(
    num_sites: int, bits: int, num_params: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    masks = masks_of(range(num_sites), rng)
    survivors = data.draw(st.permutations(range(num_sites)))
    survivors = survivors[: data.draw(st.integers(1, num_sites))]
    sent = {site: updates(rng, num_params, bits, num_sites) for site in survivors}
    bodies = [mask(sent[site], masks[site], bits=bits).body for site in survivors]
    total, tails = collected(bodies, num_params, bits)
    partners = {site: [site, *(j for j in range(num_sites) if j != site)] for site in survivors}
    left = [
        one
        for site in survivors
        for partner, one in zip(partners[site], masks[site], strict=True)
        if partner == site or partner not in survivors
    ]
    add_masks(total, opposite(left), threads=data.draw(st.integers(1, 2)))
    add_tail_masks(tails, opposite(left), num_params)
    found = signed(total, bits=bits).tolist(), tails.view(np.int64).tolist()
    assert found == exact(list(sent.values()))


@ring_of
@pytest.mark.parametrize("num_params", EDGES)
def test_masks_are_removed_at_the_edges_of_chunks(
    rng: np.random.Generator, mode: str, bits: int, num_params: int
) -> None:
    masks = masks_of(range(3), rng)
    sent = {site: updates(rng, num_params, bits, num_sites=3) for site in masks}
    bodies = [mask(sent[site], masks[site], bits=bits, threads=2).body for site in masks]
    total, tails = collected(bodies, num_params, bits)
    self_masks = opposite([of_site[0] for of_site in masks.values()])
    add_masks(total, self_masks, threads=2)
    add_tail_masks(tails, self_masks, num_params)
    found = signed(total, bits=bits).tolist(), tails.view(np.int64).tolist()
    assert found == exact(list(sent.values()))


@ring_of
@pytest.mark.parametrize("missing", ["self mask", "pair mask"])
def test_one_mask_that_stays_hides_the_whole_sum(
    rng: np.random.Generator, bits: int, missing: str
) -> None:
    masks = masks_of(range(3), rng)
    sent = {site: updates(rng, 4000, bits, num_sites=3) for site in (0, 1)}
    bodies = [mask(sent[site], masks[site], bits=bits).body for site in sent]
    total, tails = collected(bodies, 4000, bits)
    # Site 2 dropped: its pair masks stand last.
    left = [masks[0][0], masks[1][0], masks[0][-1], masks[1][-1]]
    del left[0 if missing == "self mask" else 2]
    add_masks(total, opposite(left))
    add_tail_masks(tails, opposite(left), 4000)
    values, tail = exact(list(sent.values()))
    assert np.mean(signed(total, bits=bits) == values) < 0.01
    assert not any(tails.view(np.int64) == tail)


@ring_of
def test_the_order_of_arrival_and_of_masks_leaves_no_trace(
    rng: np.random.Generator, bits: int
) -> None:
    masks = masks_of(range(4), rng)
    bodies = []
    for site, of_site in masks.items():
        update = updates(np.random.default_rng(site), 100, bits, num_sites=4)
        bodies.append(mask(update, of_site, bits=bits).body)
        assert np.array_equal(mask(update, of_site[::-1], bits=bits).body, bodies[-1])
    one, other = (collected(order, 100, bits) for order in (bodies, bodies[::-1]))
    assert np.array_equal(signed(one[0], bits=bits), signed(other[0], bits=bits))
    assert np.array_equal(one[1], other[1])


@ring_of
def test_an_update_is_never_sent_without_a_mask(bits: int) -> None:
    update = QuantizedUpdate(np.ones(3, np.int32), np.ones(1, np.int64))
    with pytest.raises(ValueError, match="never sent without a mask"):
        mask(update, [], bits=bits)


@ring_of
@pytest.mark.parametrize("num_params", [0, 3])
@pytest.mark.parametrize("length", [0, 16, 24, 31, 33, 64])
def test_a_mask_key_of_another_length_is_refused(bits: int, num_params: int, length: int) -> None:
    update = QuantizedUpdate(np.ones(num_params, np.int32), np.ones(1, np.int64))
    good = Mask(b"k" * 32, is_added=True)
    with pytest.raises(ValueError, match="key"):
        mask(update, [good, Mask(b"k" * length, is_added=True)], bits=bits)


@ring_of
def test_bytes_travel_least_significant_first(bits: int) -> None:
    packed = np.zeros(bits // 8, np.uint8)
    values = np.array([0x04030201], np.uint32)
    if bits < 32:
        pack(values, out=packed)
    else:
        packed = values.astype("<u4").view(np.uint8)
    assert packed.tolist() == [1, 2, 3, 4][: bits // 8]
    assert unpack(packed, bits=bits).tolist() == [0x04030201 % 2**bits]


@given(st.sampled_from([16, 24]), st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_packing_keeps_the_low_bits_and_nothing_else(bits: int, numbers: list[int]) -> None:
    packed = np.full(len(numbers) * bits // 8, 0xA5, np.uint8)
    pack(np.array(numbers, np.uint32), out=packed)
    assert unpack(packed, bits=bits).tolist() == [number % 2**bits for number in numbers]
    expected = b"".join((number % 2**bits).to_bytes(bits // 8, "little") for number in numbers)
    assert packed.tobytes() == expected


@given(rings, st.data())
def test_residues_become_the_signed_numbers_they_stand_for(bits: int, data: st.DataObject) -> None:
    half = 2 ** (bits - 1)
    edges = [-half, 1 - half, -1, 0, 1, half - 1]
    drawn = data.draw(st.lists(st.integers(-half, half - 1), max_size=20))
    # What is above the ring's bits is carried from adding, and means nothing.
    carried = [data.draw(st.integers(0, 2 ** (32 - bits) - 1)) * 2**bits for _ in edges + drawn]
    residues = [
        number % 2**bits + more for number, more in zip(edges + drawn, carried, strict=True)
    ]
    assert signed(np.array(residues, np.uint32), bits=bits).tolist() == edges + drawn


@ring_of
def test_the_two_parts_of_a_body_are_views_of_it(bits: int) -> None:
    body = np.zeros(5 * bits // 8 + 16, np.uint8)
    packed, tail = split_body(body, 5, bits=bits)
    assert (packed.size, tail.size) == (5 * bits // 8, 2)
    packed[-1], tail[1] = 7, 2**64 - 2
    assert body.tolist() == [0] * (5 * bits // 8 - 1) + [7] + [0] * 8 + [254] + [255] * 7


@ring_of
@pytest.mark.parametrize("threads", [1, 2])
def test_hiding_five_million_parameters_takes_the_output_and_one_mebibyte(
    bits: int, threads: int, mode: str, rng: np.random.Generator
) -> None:
    # The last chunk is almost whole: pieces of chunks need memory of their own.
    num_params = 5_000_000 // ENTRIES * ENTRIES + ENTRIES - 1
    update = QuantizedUpdate(np.zeros(num_params, np.int32), np.zeros(40, np.int64))
    masks = [Mask(rng.bytes(32), is_added=k % 2 == 0) for k in range(8)]
    mask(update, masks, bits=bits, threads=threads)  # whatever is made once is made now
    tracemalloc.start()
    try:
        body = mask(update, masks, bits=bits, threads=threads).body
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak >= body.nbytes
    assert peak - body.nbytes <= 1 << 20
