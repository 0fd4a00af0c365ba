"""Memory that is not needed now goes back to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LEAST_BYTES = 1 << 20  # of an array that is worth a file
# glibc's names and numbers: what is freed on top of the heap is kept; what is larger lies outside.
_TRIM_THRESHOLD, _KEPT_BYTES = -1, 1 << 30
_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1 << 25


def keep_freed() -> None:
    """Keep what one training step frees for the next, until ``give_back``.

    Getting it anew from the operating system, page by page, took a tenth of a step of a 3D U-Net.
    Only glibc can.
    """
    with contextlib.suppress(AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Return what was freed, in a few milliseconds at most: the C library would keep it for ever.

    Only glibc can.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_memory(num_bytes: int, parts: Iterable[memoryview]) -> NDArray[np.uint8]:
    """An array of so many bytes, from its parts one after the other."""
    array, start = np.empty(num_bytes, np.uint8), 0
    for part in parts:
        array[start : start + len(part)] = part
        start += len(part)
    return array


def on_disk(folder: Path, num_bytes: int, parts: Iterable[memoryview]) -> NDArray[np.uint8]:
    """The same in a file without a name, so that ``let_go`` can take it out of memory.

    Args:
      folder: Whose disk it is; where there is no room on it, the array is in memory.
      num_bytes: Of the array.
      parts: They are its content.
    """
    if num_bytes < LEAST_BYTES:
        return in_memory(num_bytes, parts)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError:
            return in_memory(num_bytes, parts)
        for part in parts:
            file.write(part)
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ), np.uint8)


def let_go(array: NDArray[np.generic]) -> None:
    """Take an array out of memory until somebody looks at it, if it lies in a file."""
    owner: object = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)
