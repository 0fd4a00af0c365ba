"""Split secrets so that any ``threshold`` of the shares give them back, and fewer give nothing.

Byte by byte over GF(2^8) with the polynomial 0x11b; site j holds the value at x = j + 1. A share is
sealed for the one site that may read it.

Source: Shamir (1979), How to Share a Secret; RFC 8439 for the seal.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from common.errors import RemoteProtocolError

_POLYNOMIAL = 0x11B
_NONCE = bytes(12)  # every share key seals one share and is never used again


def _multiply(a: int, b: int) -> int:
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a & 0x100:
            a ^= _POLYNOMIAL
        b >>= 1
    return product


_PRODUCT = np.array([[_multiply(a, b) for b in range(256)] for a in range(256)], np.uint8)
_INVERSE = [0, *(int(np.flatnonzero(_PRODUCT[a] == 1)[0]) for a in range(1, 256))]


def split(
    secret: bytes,
    *,
    threshold: int,
    num_shares: int,
    random: Callable[[int], bytes] = os.urandom,
) -> list[bytes]:
    """Share a secret among ``num_shares`` sites.

    Args:
      secret: Any number of bytes.
      threshold: Shares that give it back, 1 to num_shares.
      num_shares: Sites, at most 255.
      random: Where the coefficients come from; tests only.

    Returns:
      Share of site 0, 1, ...; each as long as the secret.

    Raises:
      ValueError: The numbers do not fit.
    """
    if not 1 <= threshold <= num_shares <= 255:  # noqa: PLR2004
        raise ValueError(f"threshold {threshold} of {num_shares} shares: 1 to 255 are possible")
    length = len(secret)
    drawn = np.frombuffer(random(length * (threshold - 1)), np.uint8).reshape(-1, length)
    shares = []
    for x in range(1, num_shares + 1):
        value = np.zeros(length, np.uint8)
        for coefficient in drawn[::-1]:  # Horner's rule, the highest power first
            value = _PRODUCT[x][value ^ coefficient]
        shares.append((value ^ np.frombuffer(secret, np.uint8)).tobytes())
    return shares


def recover(shares: Mapping[int, bytes]) -> bytes:
    """The secret from exactly ``threshold`` good shares by site index.

    With fewer, or with a wrong one, the result is some other value: compare it with a commitment.

    Raises:
      ValueError: The shares differ in length, or there is none.
    """
    factors = _at_zero(tuple(site + 1 for site in shares))
    lengths = {len(share) for share in shares.values()}
    if len(lengths) != 1:
        raise ValueError("the shares of one secret are equally long, and there is one at least")
    secret = np.zeros(lengths.pop(), np.uint8)
    for factor, share in zip(factors, shares.values(), strict=True):
        secret ^= _PRODUCT[factor][np.frombuffer(share, np.uint8)]
    return secret.tobytes()


@functools.lru_cache(maxsize=64)
def _at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange coefficients of the points at x = 0; subtraction is exclusive or."""
    factors = []
    for own in points:
        factor = 1
        for other in points:
            if other != own:
                factor = int(_PRODUCT[factor, _PRODUCT[other, _INVERSE[other ^ own]]])
        factors.append(factor)
    return tuple(factors)


def seal(key: bytes, share: bytes, context: bytes) -> bytes:
    """Encrypt a share for one site; 16 bytes longer than the share.

    ``key`` is 32 bytes, derived for one sender, one receiver and one sum: it seals nothing else.
    """
    return ChaCha20Poly1305(key).encrypt(_NONCE, share, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """Open a sealed share.

    Raises:
      RemoteProtocolError: It was not sealed with this key for this context.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, context)
    except InvalidTag:
        raise RemoteProtocolError("a sealed share is not authentic", rule="R13") from None
