"""From ``QuantizedUpdate`` to ``MaskedUpdate`` and from the sum of masked updates to the sum.

The mask is the identity: the types and the ring are those of the secure sum, the masks are not
there yet. Until they are, a coordinator can read a single site's update.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.update import MaskedUpdate, QuantizedUpdate


def mask(update: QuantizedUpdate, *, bits: int) -> MaskedUpdate:
    """Enter the ring: signed integers become residues modulo ``2**bits``."""
    values = update.values.view(np.uint32)
    if bits < 32:  # noqa: PLR2004
        values = values & np.uint32(2**bits - 1)
    return MaskedUpdate(values, update.tail.view(np.uint64))


def add(total: NDArray[np.uint32], values: NDArray[np.uint32]) -> None:
    """Add one masked update to the running sum, in place, modulo 2**32."""
    np.add(total, values, out=total)


def unmask(total: NDArray[np.uint32], *, bits: int) -> NDArray[np.int32]:
    """The exact signed sum from its residues modulo ``2**bits``, shape (num_params,)."""
    shift = np.uint32(32 - bits)
    return (total << shift).view(np.int32) >> np.int32(32 - bits)


def pack(values: NDArray[np.uint32], *, bits: int) -> NDArray[np.uint8]:
    """The low ``bits`` of every entry as little-endian bytes, shape (num_params * bits / 8,)."""
    as_bytes = values.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(as_bytes[:, : bits // 8]).reshape(-1)


def unpack(packed: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint32]:
    """The inverse of ``pack``, shape (num_params,)."""
    num_bytes = bits // 8
    if num_bytes == 4:  # noqa: PLR2004
        return packed.view("<u4")
    wide = np.zeros((packed.size // num_bytes, 4), np.uint8)
    wide[:, :num_bytes] = packed.reshape(-1, num_bytes)
    return wide.view("<u4").reshape(-1)
