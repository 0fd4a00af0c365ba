"""Prepared images beside memory: what a site may hold of 100,000 images or 500 volumes is bounded.

Up to ``MAX_IN_MEMORY`` bytes are kept in memory. More go to a file without a name in the site's own
folder, and training reads from it what a batch needs; the operating system keeps of it what fits.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ConfigError
from common.memory import let_go

MAX_IN_MEMORY = 1 << 29
LOOKED_AT = 1 << 25  # bytes that are read before pages are let go; many more are mapped than read


class Store:
    """Private. Tensors are added one after the other; then they are there to be read.

    Args:
      folder: Where the file is, if one is needed; without one, everything stays in memory.
      max_in_memory: Bytes.
    """

    def __init__(self, folder: Path | None, max_in_memory: int | None = None) -> None:
        self._folder = folder
        self._most = MAX_IN_MEMORY if max_in_memory is None else max_in_memory
        self._parts: list[Tensor] = []
        self._held = 0
        self._file: int | None = None
        self._shapes: list[tuple[tuple[int, ...], torch.dtype]] = []

    def add(self, part: Tensor) -> None:
        """Keep a tensor, in memory or in the file.

        Raises:
          ConfigError: The disk has no room for it.
        """
        part = part.contiguous()
        self._shapes.append((tuple(part.shape), part.dtype))
        if self._file is None:
            self._parts.append(part)
            self._held += part.nbytes
            if self._folder is None or self._held <= self._most:
                return
            self._file = self._opened(self._folder)
            for each in self._parts:
                self._write(each)
            self._parts = []
            return
        self._write(part)

    def tensors(self) -> tuple[list[Tensor], Reading | None]:
        """What was added, in the same order; and what to tell when it is read from the file."""
        if self._file is None:
            return self._parts, None
        whole = self._mapped()
        made, start = [], 0
        for shape, dtype in self._shapes:
            num_bytes = math.prod(shape) * dtype.itemsize
            made.append(_as_tensor(whole[start : start + num_bytes], dtype).view(shape))
            start += num_bytes
        return made, Reading(whole)

    def joined(self) -> tuple[Tensor, Reading | None]:
        """All of it as one tensor, along the first axis: parts of one type and width.

        Raises:
          ValueError: Nothing was added.
        """
        if not self._shapes:
            raise ValueError("nothing was added")
        if self._file is None:
            return torch.cat(self._parts), None
        whole, ((_, *rest), dtype) = self._mapped(), self._shapes[0]
        return _as_tensor(whole, dtype).view(-1, *rest), Reading(whole)

    def _mapped(self) -> NDArray[np.uint8]:
        assert self._file is not None  # noqa: S101 - asked before
        size = os.fstat(self._file).st_size
        mapped = mmap.mmap(self._file, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        os.close(self._file)
        return np.frombuffer(mapped, np.uint8)

    def _opened(self, folder: Path) -> int:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())

    def _write(self, part: Tensor) -> None:
        assert self._file is not None  # noqa: S101 - opened by whoever calls
        values = part.reshape(-1).view(torch.uint8).numpy().data
        try:
            while values:
                values = values[os.write(self._file, values) :]
        except OSError as error:
            raise ConfigError(
                f"{self._folder}: no room for the prepared images ({error.strerror}); move "
                "state_dir to a larger disk"
            ) from None


class Reading:
    """Counts what is read of a mapped file, and lets its pages go from time to time."""

    def __init__(self, mapped: NDArray[np.uint8]) -> None:
        self._mapped = mapped
        self._num_bytes = 0

    def note(self, *read: Tensor) -> None:
        """These copies were made of it."""
        self._num_bytes += sum(each.nbytes for each in read)
        if self._num_bytes >= LOOKED_AT:
            self._num_bytes = 0
            let_go(self._mapped)


def _as_tensor(values: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is read-only: nobody writes to it
        return torch.from_numpy(values).view(dtype)
