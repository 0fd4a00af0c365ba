"""A dataclass as plain JSON values, for what is kept: bytes as hex, an array as its digest."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")


def as_table(record: DataclassInstance) -> dict[str, Any]:
    """Every field of a message, or of another record like one, ready for JSON."""
    table = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {"kind": type(record).__name__} | {key: _plain(value) for key, value in table.items()}


def from_table(table: dict[str, Any], kind: type[D]) -> D:
    """What ``as_table`` was given; a record without arrays."""
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
