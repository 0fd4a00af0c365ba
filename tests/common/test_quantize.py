"""From updates to integers of a ring and back: exact in any order, and bounded where it rounds."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import DataError
from common.quantize import (
    EXPONENT_RANGE,
    MARGIN,
    WIDEST,
    Ring,
    dequantize,
    first_exponents,
    next_exponents,
    only_counts,
    quantize,
)
from common.secagg.masking import (
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
from common.update import LocalUpdate, QuantizedUpdate

BITS = (16, 24, 32)
CAP = 1000  # patients
NO_COUNTS = np.zeros(0, np.int64)

bits_of = pytest.mark.parametrize("bits", BITS)


def quantized(
    values: NDArray[np.float32],
    ring: Ring,
    exponents: tuple[int, ...],
    *,
    sizes: tuple[int, ...] = (),
    weight: int = CAP,
) -> QuantizedUpdate:
    return quantize(
        LocalUpdate(values),
        NO_COUNTS,
        sizes=sizes or (len(values),),
        exponents=exponents,
        weight=weight,
        weight_cap=CAP,
        ring=ring,
    )


def summed(updates: list[QuantizedUpdate], bits: int) -> NDArray[np.int32]:
    """The way of an update: masked, packed, sent, added up; the masks go from the sum alone."""
    total = np.zeros(updates[0].values.shape, np.uint32)
    keys = [number.to_bytes(32, "big") for number in range(len(updates))]
    for update, key in zip(updates, keys, strict=True):
        body = mask(update, [Mask(key, is_added=True)], bits=bits).body
        packed, _ = split_body(body, total.size, bits=bits)
        add_packed(total, packed, bits=bits)
    add_masks(total, [Mask(key, is_added=False) for key in keys])
    return signed(total, bits=bits)


@st.composite
def federations(draw: st.DrawFn) -> tuple[int, list[NDArray[np.float32]], list[int], float]:
    """Bits, one update per site, weights, and a bound that no entry exceeds."""
    bits = draw(st.sampled_from(BITS))
    num_sites = draw(st.integers(3, 9))
    weights = draw(st.lists(st.integers(1, CAP), min_size=num_sites, max_size=num_sites))
    bound = 2.0 ** draw(st.integers(-12, 6)) * draw(st.floats(0.5, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    updates = [rng.uniform(-bound, bound, 23).astype(np.float32) for _ in range(num_sites)]
    return bits, updates, weights, bound * (1 + 1e-6)


@settings(max_examples=60)
@given(federations())
def test_the_sum_gives_the_weighted_mean_within_the_rounding_bound(
    federation: tuple[int, list[NDArray[np.float32]], list[int], float],
) -> None:
    bits, updates, weights, bound = federation
    ring, sizes = Ring(bits, len(updates)), (5, 11, 7)
    (exponent, *_) = exponents = first_exponents(len(sizes), bound, ring)
    sent = [
        quantized(update, ring, exponents, sizes=sizes, weight=weight)
        for update, weight in zip(updates, weights, strict=True)
    ]
    mean = dequantize(
        summed(sent, bits), sizes=sizes, exponents=exponents, weight=sum(weights), weight_cap=CAP
    )
    wanted = np.average(np.stack(updates).astype(np.float64), axis=0, weights=weights)
    half_steps = len(updates) * 2.0**exponent / 2  # every site rounds by half a step at most
    tolerance = half_steps * CAP / sum(weights) + np.finfo(np.float32).eps * bound
    assert np.abs(mean - wanted).max() <= tolerance
    assert not sum(update.tail[1:4].sum() for update in sent)


@settings(max_examples=30)
@given(federations(), st.randoms(use_true_random=False))
def test_the_sum_does_not_depend_on_the_order_of_arrival(
    federation: tuple[int, list[NDArray[np.float32]], list[int], float], chance: random.Random
) -> None:
    bits, updates, _, bound = federation
    ring = Ring(bits, len(updates))
    sent = [quantized(update, ring, first_exponents(1, bound, ring)) for update in updates]
    one = summed(sent, bits)
    chance.shuffle(sent)
    assert np.array_equal(one, summed(sent, bits))


def test_half_steps_round_to_even_like_ieee_says() -> None:
    update = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 0.51], np.float32)
    assert quantized(update, Ring(32, 3), (0,)).values.tolist() == [0, 2, 2, 0, -2, 0, 1]


def test_a_site_counts_by_its_share_of_the_weight_cap() -> None:
    update = np.array([8.0, -8.0], np.float32)
    assert quantized(update, Ring(32, 3), (0,), weight=CAP // 4).values.tolist() == [2, -2]


@bits_of
def test_entries_beyond_the_ring_are_clipped_and_counted_per_tensor(bits: int) -> None:
    ring = Ring(bits, 5)
    edge = float(ring.max_magnitude)
    step = 2.0**-3
    update = np.array([edge, -edge, 3 * edge, -3 * edge, 1e30, edge, 0.0]) * step
    result = quantized(update.astype(np.float32), ring, (-3, -3), sizes=(4, 3))
    assert np.abs(result.values.astype(np.int64)).max() <= ring.max_magnitude
    # 2**31 / 5 is no float32: the nearest one lies just outside.
    received = update.astype(np.float32).astype(np.float64) / step
    beyond = np.abs(received) > ring.max_magnitude
    assert result.tail.tolist() == [CAP, beyond[:4].sum(), beyond[4:].sum()]
    assert beyond[2:5].all()
    assert result.values[2] == result.values[4] == ring.max_magnitude == -result.values[3]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17])
def test_an_update_that_is_not_finite_is_never_sent(wrong: float, place: int) -> None:
    update = np.zeros(18, np.float32)
    update[place] = wrong
    with pytest.raises(DataError, match="training diverged"):
        quantized(update, Ring(32, 3), (0,))


def test_a_tensor_longer_than_a_block_is_rounded_like_a_short_one(rng: np.random.Generator) -> None:
    sizes = (3, (1 << 16) + 5, 70_000)
    update = rng.normal(size=sum(sizes)).astype(np.float32)
    exponents = (-20, -18, -22)
    result = quantized(update, Ring(32, 3), exponents, sizes=sizes, weight=700)
    steps = np.repeat([2.0**exponent for exponent in exponents], sizes)
    assert np.array_equal(result.values, np.rint(update.astype(np.float64) * 0.7 / steps))


def test_the_tail_holds_weight_clipped_entries_and_counts() -> None:
    counts = np.array([9, 8, 7], np.int64)
    result = quantize(
        LocalUpdate(np.zeros(2, np.float32)), counts,
        sizes=(1, 1), exponents=(0, 0), weight=12, weight_cap=CAP, ring=Ring(16, 3),
    )  # fmt: skip
    assert result.tail.tolist() == [12, 0, 0, 9, 8, 7]
    assert only_counts(counts, 12, 2).tail.tolist() == result.tail.tolist()
    assert only_counts(counts, 12, 2).values.shape == (0,)


@bits_of
def test_every_number_of_members_leaves_room_for_the_whole_sum(bits: int) -> None:
    for num_members in range(1, 256):
        ring = Ring(bits, num_members)
        assert num_members * ring.max_magnitude <= 2 ** (bits - 1) - 1
        assert num_members * (ring.max_magnitude + 1) > 2 ** (bits - 1) - 1


@bits_of
@pytest.mark.parametrize("num_members", [1, 3, 7, 255])
def test_the_sum_of_extreme_values_is_exact(bits: int, num_members: int) -> None:
    edge = Ring(bits, num_members).max_magnitude
    values = np.array([edge, -edge, edge - 1, 1 - edge, 1, -1, 0], np.int32)
    sent = [QuantizedUpdate(values, NO_COUNTS)] * num_members
    assert summed(sent, bits).tolist() == [num_members * int(value) for value in values]


@settings(max_examples=50)
@given(st.sampled_from(BITS), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_packing_keeps_the_low_bits_and_nothing_else(bits: int, numbers: list[int]) -> None:
    residues = np.array([number % 2**32 for number in numbers], np.uint32)
    packed = np.zeros(len(numbers) * bits // 8, np.uint8)
    pack(residues, out=packed)
    assert unpack(packed, bits=bits).tolist() == [number % 2**bits for number in numbers]


@bits_of
def test_bytes_travel_least_significant_first(bits: int) -> None:
    packed = np.zeros(bits // 8, np.uint8)
    pack(np.array([0x04030201], np.uint32), out=packed)
    assert packed.tolist() == [1, 2, 3, 4][: bits // 8]


@bits_of
def test_a_masked_update_says_nothing_until_its_mask_is_taken_off(
    bits: int, rng: np.random.Generator
) -> None:
    edge = Ring(bits, 3).max_magnitude
    values = rng.integers(-edge, edge + 1, 101, dtype=np.int32)
    update = QuantizedUpdate(values, np.array([-1, 5], np.int64))
    key = rng.bytes(32)
    body = mask(update, [Mask(key, is_added=True)], bits=bits).body
    assert body.size == 101 * bits // 8 + 2 * 8
    packed, tail = split_body(body, 101, bits=bits)
    residues = unpack(packed, bits=bits).copy()
    assert np.mean(signed(residues.copy(), bits=bits) == values) < 0.05
    off = [Mask(key, is_added=False)]
    add_masks(residues, off)
    assert np.array_equal(signed(residues, bits=bits), values)
    assert set(tail.tolist()).isdisjoint({2**64 - 1, 5})
    add_tail_masks(tail, off, 101)
    assert tail.tolist() == [2**64 - 1, 5]


@settings(max_examples=100)
@given(st.sampled_from(BITS), st.integers(3, 255), st.floats(1e-20, 1e15, exclude_min=True))
def test_the_first_step_is_the_smallest_that_reaches_the_bound(
    bits: int, num_members: int, bound: float
) -> None:
    ring = Ring(bits, num_members)
    (exponent,) = set(first_exponents(4, bound, ring))
    assert ring.max_magnitude * 2.0**exponent >= bound
    assert ring.max_magnitude * 2.0 ** (exponent - 1) < bound


@bits_of
@pytest.mark.parametrize("power", [-40, -1, 0, 3])
def test_a_bound_that_a_step_reaches_exactly_needs_no_larger_one(bits: int, power: int) -> None:
    ring = Ring(bits, 3)
    assert first_exponents(1, ring.max_magnitude * 2.0**power, ring) == (power,)


@pytest.mark.parametrize(("bound", "end"), [(1e-300, 0), (1e300, 1)])
def test_steps_stay_in_their_range(bound: float, end: int) -> None:
    assert first_exponents(1, bound, Ring(16, 3)) == (EXPONENT_RANGE[end],)


def following(totals: list[int], clipped: list[int], exponents: tuple[int, ...]) -> tuple[int, ...]:
    return next_exponents(
        np.array(totals, np.int32),
        np.array(clipped, np.int64),
        sizes=(2,) * len(exponents),
        exponents=exponents,
        num_summands=4,
        ring=Ring(32, 4),
    )


def test_a_clipped_tensor_gets_four_times_more_room_and_a_small_one_stays_near_it() -> None:
    clipped, free = following([0, 7, 40, -80], [3, 0], (-9, -9))
    assert clipped == -7
    assert free == clipped - WIDEST
    assert first_exponents(1, MARGIN * 80 * 2.0**-9 / 4, Ring(32, 4))[0] < free


def test_clipping_cannot_push_a_step_out_of_range() -> None:
    assert following([1, 1], [1], (EXPONENT_RANGE[1] - 1,)) == (EXPONENT_RANGE[1],)


def test_a_sum_of_zeros_asks_for_finer_steps() -> None:
    assert following([0, 0], [0], (-11,)) == (-15,)


@settings(max_examples=50)
@given(st.integers(-(2**31) + 1, 2**31 - 1).filter(bool), st.integers(-40, 20))
def test_the_next_step_leaves_the_margin_above_the_average_summand(
    largest: int, exponent: int
) -> None:
    ring = Ring(32, 4)
    (chosen,) = following([largest, 0], [0], (exponent,))
    needed = MARGIN * abs(largest) * 2.0**exponent / 4
    assert ring.max_magnitude * 2.0**chosen >= needed > ring.max_magnitude * 2.0 ** (chosen - 1)


@bits_of
def test_room_is_found_again_after_a_few_clipped_sums(bits: int, rng: np.random.Generator) -> None:
    ring = Ring(bits, 3)
    updates = [rng.normal(scale=50, size=30).astype(np.float32) for _ in range(3)]
    exponents = first_exponents(1, 0.01, ring)
    for _ in range(9):
        sent = [quantized(update, ring, exponents) for update in updates]
        clipped = np.sum([update.tail[1:] for update in sent], axis=0)
        if not clipped.any():
            break
        exponents = next_exponents(
            summed(sent, bits), clipped, sizes=(30,), exponents=exponents, num_summands=3, ring=ring
        )
    assert not clipped.any()
    mean = dequantize(
        summed(sent, bits), sizes=(30,), exponents=exponents, weight=3 * CAP, weight_cap=CAP
    )
    wanted = np.mean(updates, axis=0, dtype=np.float64)
    assert np.abs(mean - wanted).max() <= 2.0 ** exponents[0] + 200 * np.finfo(np.float32).eps
