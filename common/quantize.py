"""Round an update to integers of a ring, so that a sum is exact in any order; and back.

Each tensor has a power-of-two step ``2**exponent``. A site multiplies its update by its declared
weight, rounds to the nearest step and clips to what ``num_members`` sites can add without overflow.
The mean follows from the sum and the summed weights alone. Everything is float64 and IEEE rint:
the same bits on every machine of a kind, in any order of arrival.

docs/life-of-a-round.md tells how a round uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.update import LocalUpdate, QuantizedUpdate

FIXED_POINT = 2.0**32  # steps per unit of a tail entry that is not an integer
MARGIN = 4.0  # room between what the last sum suggests and the largest entry that is not clipped
FINER = 4  # bits
FEW = 256  # entries; in a sum of so few all may cancel by chance
WIDEST = 4  # bits between the coarsest step and that of a tensor of few entries
EXPONENT_RANGE = (-120, 60)
DIVERGED = "training diverged: the update is not finite; lower the learning rate"
_BLOCK = 1 << 16  # entries per pass: float64 scratch stays in the cache


@dataclass(frozen=True)
class Ring:
    """Integers modulo ``2**bits``, shared by at most ``num_members`` summands."""

    bits: int
    num_members: int

    @property
    def max_magnitude(self) -> int:
        """Largest entry a single site may send: the sum of all of them still fits."""
        return int((2 ** (self.bits - 1) - 1) // self.num_members)


def quantize(
    update: LocalUpdate,
    counts: NDArray[np.int64],
    *,
    sizes: Sequence[int],
    exponents: Sequence[int],
    weight: int,
    weight_cap: int,
    ring: Ring,
) -> QuantizedUpdate:
    """Weight an update, round it to the ring and put the tail together.

    Args:
      update: The site's change of the model, shape (num_params,).
      counts: The task's summable counts, shape (num_counts,).
      sizes: Number of entries of each tensor, in schema order; they add up to num_params.
      exponents: One per tensor; the step is ``2**exponent``.
      weight: The site's declared number of patients.
      weight_cap: The study's largest weight; the factor applied is ``weight / weight_cap``.
      ring: Bits and number of members.

    Returns:
      Integers and tail ``[weight, clipped entries per tensor, counts]``.

    Raises:
      DataError: The update holds NaN or infinity (training diverged).
    """
    bound = ring.max_magnitude
    values = np.empty(update.values.shape, np.int32)
    clipped = np.zeros(len(sizes), np.int64)
    scratch = np.empty(_BLOCK, np.float64)
    start = 0
    for tensor, (size, exponent) in enumerate(zip(sizes, exponents, strict=True)):
        factor = (weight / weight_cap) * 2.0**-exponent
        for low in range(start, start + size, _BLOCK):
            high = min(low + _BLOCK, start + size)
            block = scratch[: high - low]
            # Named, because NumPy would multiply float32 by a Python float in float32.
            np.multiply(update.values[low:high], factor, out=block, dtype=np.float64)
            np.rint(block, out=block)
            smallest, largest = block.min(), block.max()
            # NaN would become some integer: an update that is not finite must never be sent.
            if not (math.isfinite(smallest) and math.isfinite(largest)):
                raise DataError(DIVERGED)
            if largest > bound or smallest < -bound:
                clipped[tensor] += np.count_nonzero(np.abs(block) > bound)
                np.clip(block, -bound, bound, out=block)
            values[low:high] = block
        start += size
    return QuantizedUpdate(values, _tail(weight, clipped, counts))


def only_counts(counts: NDArray[np.int64], weight: int, num_tensors: int) -> QuantizedUpdate:
    """The answer to an evaluation: no update, and the same tail as a training answer has."""
    nothing_clipped = np.zeros(num_tensors, np.int64)
    return QuantizedUpdate(np.empty(0, np.int32), _tail(weight, nothing_clipped, counts))


def _tail(weight: int, clipped: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.array([weight], np.int64), clipped, counts])


def dequantize(
    total: NDArray[np.int32],
    *,
    sizes: Sequence[int],
    exponents: Sequence[int],
    weight: int,
    weight_cap: int,
) -> NDArray[np.float32]:
    """The weighted mean update from the exact sum.

    Args:
      total: Sum of the sites' integers, shape (num_params,).
      sizes: Number of entries of each tensor.
      exponents: One per tensor.
      weight: Sum of the declared weights, above 0.
      weight_cap: The study's largest weight.

    Returns:
      ``weight_cap * 2**exponent * total / weight``, shape (num_params,).
    """
    mean = np.empty(total.shape, np.float32)
    scratch = np.empty(_BLOCK, np.float64)
    start = 0
    for size, exponent in zip(sizes, exponents, strict=True):
        factor = (weight_cap / weight) * 2.0**exponent
        for low in range(start, start + size, _BLOCK):
            high = min(low + _BLOCK, start + size)
            mean[low:high] = np.multiply(total[low:high], factor, out=scratch[: high - low])
        start += size
    return mean


def first_exponents(num_tensors: int, bound: float, ring: Ring) -> tuple[int, ...]:
    """Steps for the first sum: the smallest that reach ``bound`` for every tensor."""
    return (_exponent(bound, ring),) * num_tensors


def next_exponents(
    total: NDArray[np.int32],
    clipped: NDArray[np.int64],
    *,
    sizes: Sequence[int],
    exponents: Sequence[int],
    num_summands: int,
    ring: Ring,
) -> tuple[int, ...]:
    """Steps for the next sum, from this one.

    Room for ``MARGIN`` times the average summand; four times more wherever an entry was clipped;
    16 times finer where everything was rounded to zero. For a tensor of few entries no step is
    finer than the coarsest one by more than ``WIDEST`` bits: where a sum cancels by chance, it says
    little about its summands.
    """
    result = []
    start = 0
    for size, exponent, num_clipped in zip(sizes, exponents, clipped, strict=True):
        part = total[start : start + size]
        largest = max(int(part.max(initial=0)), -int(part.min(initial=0)))
        start += size
        if num_clipped:
            result.append(min(exponent + 2, EXPONENT_RANGE[1]))
        elif largest:
            result.append(_exponent(MARGIN * largest * 2.0**exponent / num_summands, ring))
        else:
            # Nothing reached half a step: unless the steps become finer, nothing ever will.
            result.append(max(exponent - FINER, EXPONENT_RANGE[0]))
    finest = max(result, default=0) - WIDEST
    return tuple(
        max(exponent, finest) if size < FEW else exponent
        for size, exponent in zip(sizes, result, strict=True)
    )


def _exponent(bound: float, ring: Ring) -> int:
    """The smallest exponent with ``max_magnitude * 2**exponent >= bound``."""
    mantissa, exponent = math.frexp(bound / ring.max_magnitude)
    exponent -= mantissa == 0.5  # noqa: PLR2004 - a power of two is reached exactly
    return min(max(exponent, EXPONENT_RANGE[0]), EXPONENT_RANGE[1])
