"""How the secure sum writes things down before it hashes, signs or derives from them.

Every part is written with its length, so that two different lists never give the same bytes, and
every use has a label, so that a digest made for one purpose never fits another.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import TypeAlias

from common.errors import RemoteProtocolError

Part: TypeAlias = "int | str | bytes | Sequence[Part]"

PROTOCOL = "msum1/"
_LENGTH = 4  # bytes


def encode(*parts: Part) -> bytes:
    """Each part as its length (u32, big-endian) and its bytes; integers as u64, lists nested.

    Raises:
      OverflowError: An integer is negative or does not fit 64 bits.
    """
    return b"".join(_sized(_bytes(part)) for part in parts)


def decode(content: bytes) -> list[bytes]:
    """The parts of one level, the inverse of ``encode`` for byte strings.

    Raises:
      RemoteProtocolError: The lengths do not add up.
    """
    parts = []
    start = 0
    while start < len(content):
        end = start + _LENGTH
        size = int.from_bytes(content[start:end], "big")
        start, end = end, end + size
        if end > len(content) or start > len(content):
            raise RemoteProtocolError("an encoded list ends in the middle of an entry", rule="R11")
        parts.append(content[start:end])
        start = end
    return parts


def digest(label: str, *parts: Part) -> bytes:
    """SHA-256 of labelled parts; 32 bytes."""
    return hashlib.sha256(encode(PROTOCOL + label, *parts)).digest()


def derive(key: bytes, label: str, *parts: Part) -> bytes:
    """A key for one purpose from a key: HMAC-SHA256, one block of HKDF-Expand; 32 bytes.

    Source:
      RFC 5869, section 2.3, with the labelled parts as info.
    """
    return hmac.digest(key, encode(PROTOCOL + label, *parts) + b"\x01", "sha256")


def _sized(content: bytes) -> bytes:
    return len(content).to_bytes(_LENGTH, "big") + content


def _bytes(part: Part) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, int):
        return part.to_bytes(8, "big")
    if isinstance(part, str):
        return part.encode()
    return encode(*part)
