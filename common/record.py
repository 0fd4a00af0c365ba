"""A message as plain JSON values, for what is kept: bytes as hex, an array as its digest."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, TypeVar

import numpy as np

from common.messages import Message

M = TypeVar("M", bound=Message)


def as_table(message: Message) -> dict[str, Any]:
    """Every field of a message, ready for JSON."""
    table = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return {"kind": type(message).__name__} | {key: _plain(value) for key, value in table.items()}


def from_table(table: dict[str, Any], kind: type[M]) -> M:
    """The message that ``as_table`` was given; one without arrays."""
    values = {}
    for field in dataclasses.fields(kind):
        value, hint = table[field.name], str(field.type)
        if hint == "bytes":
            value = bytes.fromhex(value)
        elif hint == "tuple[bytes, ...]":
            value = tuple(map(bytes.fromhex, value))
        elif hint == "tuple[int, ...]":
            value = tuple(value)
        values[field.name] = value
    return kind(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"bytes": value.nbytes, "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value
