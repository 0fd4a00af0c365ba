"""The keys of an epoch: fresh key pairs, one chain per pair of sites, one key per use.

Two sites agree by X25519 and ML-KEM-768 together: who records the traffic today needs to break
both. A chain key only moves forward, so that what a site holds today opens nothing it said
yesterday.

Source: RFC 7748; FIPS 203; RFC 5869 (extract with the run's id as salt, then expand).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from common.errors import RemoteProtocolError
from common.secagg.encoding import derive, digest

KEY_BYTES, NONCE_BYTES = 32, 16
KEM_KEY_BYTES, KEM_SEED_BYTES, CIPHERTEXT_BYTES = 1184, 64, 1088


@dataclass(frozen=True)
class EpochKeys:
    """Private. A site's own key pairs of one epoch, as their 32 and 64 secret bytes."""

    dh: bytes
    kem: bytes
    nonce: bytes

    @classmethod
    def generate(cls) -> EpochKeys:
        """Fresh ones from the operating system."""
        return cls(os.urandom(KEY_BYTES), os.urandom(KEM_SEED_BYTES), os.urandom(NONCE_BYTES))

    @property
    def public_key(self) -> bytes:
        """The X25519 public key, 32 bytes."""
        return X25519PrivateKey.from_private_bytes(self.dh).public_key().public_bytes_raw()

    @property
    def kem_key(self) -> bytes:
        """The ML-KEM-768 encapsulation key, 1184 bytes."""
        return MLKEM768PrivateKey.from_seed_bytes(self.kem).public_key().public_bytes_raw()


def run_id(
    manifest: bytes,
    public_keys: Sequence[bytes],
    kem_keys: Sequence[bytes],
    nonces: Sequence[bytes],
) -> bytes:
    """What names a run from here on: the manifest and everybody's keys; 32 bytes."""
    listed = [list(of_site) for of_site in zip(public_keys, kem_keys, nonces, strict=True)]
    return digest("run", manifest, listed)


def exchange(dh: bytes, public_key: bytes) -> bytes:
    """The Diffie-Hellman secret of two sites, 32 bytes.

    Raises:
      RemoteProtocolError: The other key is a point of low order, which gives everybody the same.
    """
    try:
        private = X25519PrivateKey.from_private_bytes(dh)
        return private.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        raise RemoteProtocolError("a public key is a point of low order", rule="R3") from None


def encapsulate(kem_key: bytes) -> tuple[bytes, bytes]:
    """A fresh secret for the owner of a key: (32 secret bytes, ciphertext).

    Raises:
      RemoteProtocolError: It is no ML-KEM-768 key.
    """
    try:
        return MLKEM768PublicKey.from_public_bytes(kem_key).encapsulate()
    except ValueError:
        raise RemoteProtocolError("a key is no ML-KEM-768 key", rule="R3") from None


def decapsulate(kem: bytes, ciphertext: bytes) -> bytes:
    """The secret in a ciphertext, 32 bytes; another one if the ciphertext was changed.

    Raises:
      RemoteProtocolError: The ciphertext has the wrong length.
    """
    try:
        return MLKEM768PrivateKey.from_seed_bytes(kem).decapsulate(ciphertext)
    except ValueError:
        raise RemoteProtocolError("a ciphertext is none of ML-KEM-768", rule="R3") from None


def first_chain_key(run: bytes, dh: bytes, kem: bytes, one: int, other: int) -> bytes:
    """The chain key of a pair of sites before the first sum."""
    extracted = hmac.digest(run, dh + kem, "sha256")
    return derive(extracted, "pair", min(one, other), max(one, other))


def advance(chain_key: bytes, *, at: int, to: int) -> bytes:
    """The chain key of sum ``to`` from that of sum ``at``; there is no way back."""
    for step in range(at, to):
        chain_key = derive(chain_key, "chain", step)
    return chain_key


def mask_key(chain_key: bytes, sum_number: int, task: bytes, one: int, other: int) -> bytes:
    """The key of a pair's mask, bound to the very task: sites given two tasks do not cancel."""
    return derive(chain_key, "mask", sum_number, task, min(one, other), max(one, other))


def share_key(chain_key: bytes, sum_number: int, task: bytes, sender: int, receiver: int) -> bytes:
    """The key that seals one share."""
    return derive(chain_key, "share-key", sum_number, task, sender, receiver)
