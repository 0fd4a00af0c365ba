"""One site of a bare cast, and what a test expects of its answers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from protocol import NUM_PARAMS, Cast, summed

from common.errors import RemoteProtocolError
from common.messages import Message, Shares, Upload

SITE = 1  # one with sites before and after it
MODEL = np.linspace(-1, 1, NUM_PARAMS, dtype=np.float32)


def refused(rule: str, says: str = "") -> Any:
    """The rule stands in the message, and the peer is to blame."""
    return pytest.raises(RemoteProtocolError, match=rf"{says}.*\[{rule}\]$")


def same(one: Message, other: Message) -> bool:
    """Equal in every field, arrays bit for bit and in their type."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return type(one) is type(other) and all(
        (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()) if isinstance(a, np.ndarray) else a == b
        for a, b in pairs
    )


def is_exact(cast: Cast, uploads: dict[int, Upload], shares: dict[int, Shares]) -> bool:
    total, wanted = cast.total(uploads, shares), summed([cast.members[k] for k in uploads])
    return np.array_equal(total.values, wanted.values) and np.array_equal(total.tail, wanted.tail)
