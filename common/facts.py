"""What logs say of a message: its kind, its sizes, its digest; never its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, get_args

import numpy as np

from common.messages import Message, Signed, Upload, signed_content
from common.record import as_table

MAX_CHARS = 100  # of a value that came over the wire


def facts_of(message: Message) -> dict[str, str | int]:
    """What an audit log says of a message: kind, size, digest, and what it belongs to."""
    facts: dict[str, str | int] = {
        "type": type(message).__name__,
        "bytes": sum(sizes(message).values()),
        "digest": hashlib.sha256(_content(message)).hexdigest(),
    }
    for key in ("run", "sum_number", "reason"):
        value = getattr(message, key, "")
        if isinstance(value, int):
            facts[key] = value
        elif value:
            facts[key] = ascii(str(value))[1:-1][:MAX_CHARS]
    return facts


def _content(message: Message) -> bytes:
    """What stands for the whole message."""
    if isinstance(message, Upload):
        return message.header  # signed, and binds everything else
    if isinstance(message, get_args(Signed)):
        try:
            return signed_content(message)
        except (OverflowError, UnicodeEncodeError):  # nobody can have signed that
            return b""
    return json.dumps(as_table(message)).encode()


def sizes(message: Message) -> dict[str, int]:
    """Bytes of each field of a message."""
    return {
        field.name: _size(getattr(message, field.name)) for field in dataclasses.fields(message)
    }


def _size(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 8
