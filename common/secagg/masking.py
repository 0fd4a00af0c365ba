"""From ``QuantizedUpdate`` to ``MaskedUpdate``, and from the sum of masked updates to the sum.

A mask is the AES-256-CTR stream of a key, read as little-endian integers: one uint32 for every
entry of the update, then, from the next 16-byte boundary on, one uint64 for every entry of the
tail. Entries are masked modulo 2**32 and their low bits are sent; a tail is masked modulo 2**64.

Source: Bonawitz et al. (2017), Practical Secure Aggregation, section 4; NIST SP 800-38A for CTR.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.secagg.keystream import BLOCK, keystream
from common.update import MaskedUpdate, QuantizedUpdate

CHUNK = 192 << 10  # bytes of a stream at a time: it stays in the cache until it is added
MAX_THREADS = 2  # each holds two chunks at most; together they stay under 1 MiB
THREADS = min(MAX_THREADS, os.cpu_count() or 1)  # what this machine has for masks
_ENTRY = 4  # bytes
_ZEROS = bytes(CHUNK)


class Mask(NamedTuple):
    """Secret. One stream to be added or subtracted; the key is used for nothing else."""

    key: bytes  # 32 bytes
    is_added: bool


def mask(
    update: QuantizedUpdate, masks: Sequence[Mask], *, bits: int, threads: int = 1
) -> MaskedUpdate:
    """Hide an update under masks, entry by entry.

    Args:
      update: What to hide.
      masks: The self mask and one per other site. Using a key twice reveals a difference.
      bits: Of the ring: 16, 24 or 32.
      threads: 1 or 2; the result is the same.

    Returns:
      The packed residues and, behind them, the tail; memory beyond it stays under 1 MiB.

    Guarantees:
      Equal inputs give equal bytes on every machine.

    Raises:
      ValueError: There is no mask, or a key is not 32 bytes.
    """
    if not masks:
        raise ValueError("an update is never sent without a mask")
    num_params, width = update.values.size, bits // 8
    body = np.empty(num_params * width + update.tail.nbytes, np.uint8)
    packed, tail = split_body(body, num_params, bits=bits)
    residues = update.values.view(np.uint32)

    def fill(low: int, high: int) -> None:
        whole = packed.view("<u4") if bits == 32 else None  # noqa: PLR2004 - nothing to pack
        for start, part in _masked(residues, masks, low, high, out=whole):
            if whole is None:
                pack(part, out=packed[start * width : (start + part.size) * width])

    _in_ranges(fill, num_params, threads)
    np.copyto(tail, update.tail.view(np.uint64))
    add_tail_masks(tail, masks, num_params)
    return MaskedUpdate(body)


def split_body(
    body: NDArray[np.uint8], num_params: int, *, bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Views of the two parts of a body: packed entries and the tail, shape (num_tail,)."""
    num_packed = num_params * bits // 8
    return body[:num_packed], body[num_packed:].view("<u8")


def add_masks(values: NDArray[np.uint32], masks: Sequence[Mask], *, threads: int = 1) -> None:
    """Add or subtract the masks of an update, in place; shape (num_params,)."""

    def fill(low: int, high: int) -> None:
        for _ in _masked(values, masks, low, high, out=values):
            pass

    _in_ranges(fill, values.size, threads)


def add_tail_masks(tail: NDArray[np.uint64], masks: Sequence[Mask], num_params: int) -> None:
    """Add or subtract the same masks' part for the tail, in place; shape (num_tail,)."""
    first_block = -(-num_params * _ENTRY // BLOCK)
    for key, is_added in masks:
        encryptor = keystream(key, first_block, tail.nbytes)
        stream = np.frombuffer(encryptor.update(bytes(tail.nbytes)), "<u8")
        (np.add if is_added else np.subtract)(tail, stream, out=tail)


def _masked(
    values: NDArray[np.uint32],
    masks: Sequence[Mask],
    low: int,
    high: int,
    *,
    out: NDArray[np.uint32] | None,
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Entries ``low`` to ``high`` with their masks, chunk by chunk: (first entry, chunk).

    ``low`` is a multiple of four. The chunk is the outer loop and the mask the inner one: a chunk
    comes from memory once for all masks. Without ``out`` every chunk is the same scratch memory.
    """
    block, num_bytes = low * _ENTRY // BLOCK, (high - low) * _ENTRY
    streams = [
        (keystream(key, block, num_bytes).update_into, np.add if is_added else np.subtract)
        for key, is_added in masks
    ]
    entries = CHUNK // _ENTRY
    buffer = np.empty(min(CHUNK, num_bytes), np.uint8)
    scratch = np.empty(min(entries, high - low) if out is None else 0, np.uint32)
    for start in range(low, high, entries):
        part = values[start : min(start + entries, high)]
        into = scratch[: part.size] if out is None else out[start : start + part.size]
        zeros, stream = _ZEROS[: part.nbytes], buffer[: part.nbytes]
        numbers, writable = stream.view("<u4"), stream.data
        for fill, combine in streams:
            fill(zeros, writable)
            combine(part, numbers, into)
            part = into
        yield start, into


def _in_ranges(fill: Callable[[int, int], None], num_entries: int, threads: int) -> None:
    """Call ``fill(low, high)`` over ranges; AES and numpy release the interpreter's lock."""
    threads = min(threads, MAX_THREADS)
    chunk = CHUNK // _ENTRY
    per_thread = -(-num_entries // (threads * chunk)) * chunk
    if threads == 1 or per_thread >= num_entries:
        fill(0, num_entries)
        return
    starts = range(0, num_entries, per_thread)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda low: fill(low, min(low + per_thread, num_entries)), starts))


def add_packed(total: NDArray[np.uint32], body: NDArray[np.uint8], *, bits: int) -> None:
    """Add one masked update to the running sum, in place, modulo 2**32."""
    width = bits // 8
    if width == _ENTRY:
        np.add(total, body.view("<u4"), out=total)
        return
    entries = CHUNK // _ENTRY
    for start in range(0, total.size, entries):
        part = total[start : start + entries]
        packed = body[start * width : (start + part.size) * width]
        np.add(part, unpack(packed, bits=bits), out=part)


def signed(total: NDArray[np.uint32], *, bits: int) -> NDArray[np.int32]:
    """The exact signed sum from its residues modulo ``2**bits``, in place, shape (num_params,)."""
    if bits < 32:  # noqa: PLR2004
        np.left_shift(total, np.uint32(32 - bits), out=total)
    numbers = total.view(np.int32)
    if bits < 32:  # noqa: PLR2004
        np.right_shift(numbers, np.int32(32 - bits), out=numbers)
    return numbers


def pack(values: NDArray[np.uint32], *, out: NDArray[np.uint8]) -> None:
    """The low bytes of every entry, little-endian; ``out`` has 2 or 3 bytes for each."""
    as_bytes = values.astype("<u4", copy=False).view(np.uint8)
    width = out.size // max(values.size, 1)
    for place in range(width):  # byte by byte is four times faster than entry by entry
        out[place::width] = as_bytes[place::_ENTRY]


def unpack(packed: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint32]:
    """Entries from their packed low bytes, shape (num_params,)."""
    width = bits // 8
    if width == _ENTRY:
        return packed.view("<u4")
    entries = np.zeros(packed.size // width, "<u4")
    as_bytes = entries.view(np.uint8)
    for place in range(width):
        as_bytes[place::_ENTRY] = packed[place::width]
    return entries
