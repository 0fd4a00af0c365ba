"""Arrays straight to disk and back: safetensors files without a copy of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.disk import replacing
from common.errors import ConfigError

NAMES = {"float32": "F32", "uint32": "U32", "uint64": "U64"}  # that a run folder holds


def write_tensors(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    mode: int = 0o644,
) -> None:
    """Put a safetensors file in the place of another; on disk when this returns.

    Args:
      path: Of the file.
      tensors: By name; float32, uint32 or uint64.
      metadata: Goes into its head, if there is any.
      mode: Of the file.

    Guarantees:
      The same bytes as ``safetensors.numpy.save`` gives.
    """
    # The library's own order: wide entries first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    with replacing(path, mode=mode) as file:
        file.write(_head(ordered, metadata))
        for _, tensor in ordered:
            little = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).data)


def _head(ordered: list[tuple[str, NDArray[Any]]], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON, padded so that the entries behind it are aligned."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        table[name] = {
            "dtype": NAMES[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_tensors(path: Path, into: Mapping[str, NDArray[Any]]) -> None:
    """Fill arrays from a file that ``write_tensors`` wrote.

    Args:
      path: Of the file.
      into: By name; contiguous, and of the type and shape that they were written with.

    Raises:
      ConfigError: The file does not hold them.
    """
    try:
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(num_bytes))
            for name, array in into.items():
                _fill(array, file, 8 + num_bytes, table[name])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        text = f"{path} is damaged ({type(error).__name__}); restore it from a copy"
        raise ConfigError(text) from None


def _fill(array: NDArray[Any], file: BufferedReader, start: int, about: Mapping[str, Any]) -> None:
    if (about["dtype"], about["shape"]) != (NAMES[array.dtype.name], [*array.shape]):
        raise ValueError("another type or shape")
    file.seek(start + about["data_offsets"][0])
    if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise ValueError("cut")
