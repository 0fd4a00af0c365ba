"""Noise for differential privacy, and every draw that must stay as secret as the noise.

A keystream of AES-256-CTR is turned into uniform and Gaussian numbers. Its key comes from the
operating system, or, where a study says ``randomness = "seeded"`` (simulation and tests), from the
study's seed. Each Gaussian number is the scaled sum of four: a single one in floating point has
gaps from which an attacker could read the value that was hidden.

Source: Mironov (2012), On Significance of the Least Significant Bits for Differential Privacy;
Holohan and Braghin (2021), Secure Random Sampling in Differential Privacy.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

NUM_SUMMED = 4  # Gaussian numbers in one sample
_BLOCK = 1 << 16  # samples made at once: scratch memory stays small


class Keystream:
    """Unpredictable numbers from one 32-byte key. Never saved, never restored.

    The same noise on two models would cancel in their difference.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_os(cls) -> Keystream:
        """A stream nobody can repeat."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def from_seed(cls, *parts: object) -> Keystream:
        """A stream that anybody who knows the parts can repeat: simulation and tests only."""
        text = "/".join(map(str, ("consilium/seeded", *parts)))
        return cls(hashlib.sha256(text.encode()).digest())

    def integers(self, num: int) -> NDArray[np.uint64]:
        """Uniform 64-bit integers, shape (num,)."""
        return np.frombuffer(self._cipher.update(bytes(8 * num)), np.uint64)

    def uniforms(self, num: int) -> NDArray[np.float64]:
        """Uniform in [0, 1) in steps of 2**-53, shape (num,)."""
        return (self.integers(num) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussians(self, num: int) -> NDArray[np.float32]:
        """Standard normal numbers, shape (num,)."""
        result = np.empty(num, np.float32)
        for low in range(0, num, _BLOCK):
            part = result[low : low + _BLOCK]
            summed = self._box_muller(NUM_SUMMED * len(part)).reshape(NUM_SUMMED, -1).sum(axis=0)
            part[:] = summed / np.sqrt(NUM_SUMMED)
        return result

    def _box_muller(self, num: int) -> NDArray[np.float64]:
        """``num`` (even) standard normal numbers from as many uniform ones."""
        first, second = self.uniforms(num).reshape(2, -1)
        radius = np.sqrt(-2.0 * np.log1p(-first))  # 1 - first is in (0, 1]: the log is finite
        angle = 2 * np.pi * second
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
