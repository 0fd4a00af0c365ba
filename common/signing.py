"""Sign a message, and check who signed it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import RemoteProtocolError
from common.identity import Identity, check_signature
from common.messages import Signed, signed_content

S = TypeVar("S", bound=Signed)


def sign(message: S, identity: Identity) -> S:
    """The same message with its sender's signature."""
    return replace(message, signature=identity.sign(signed_content(message)))


def check_signed(
    message: Signed, key: ec.EllipticCurvePublicKey, *, sender: str, rule: str
) -> None:
    """Refuse a message that its sender did not sign.

    Raises:
      RemoteProtocolError: ``rule``, naming the kind of message and who should have signed it.
    """
    try:
        content = signed_content(message)
    except (OverflowError, UnicodeEncodeError):  # a number or a text that nobody can have signed
        content = b""
    if not content or not check_signature(key, message.signature, content):
        kind = type(message).__name__
        raise RemoteProtocolError(f"{kind}: the signature of {sender} is not good", rule=rule)
