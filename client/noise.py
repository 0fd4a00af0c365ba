"""Noise for differential privacy, and every draw that must stay as secret as the noise.

A keystream of AES-256 in counter mode is turned into uniform and Gaussian numbers. Its key comes
from the operating system, or, where a study says ``randomness = "seeded"`` (simulation and tests),
from the study's seed.

A Gaussian number in floating point has gaps, from which an attacker could read the value that it
hides. Each number here is half the sum of four, and is added to that value in float64 before the
result is rounded to float32, once: 52 random bits stand behind the 24 that are left.

Source: Mironov (2012), On Significance of the Least Significant Bits for Differential Privacy;
Holohan and Braghin (2021), Secure Random Sampling in Differential Privacy.
"""

from __future__ import annotations

import hashlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray
from torch import Tensor

ONE = np.uint64(0x3FF << 52)  # the bits of 1.0; with 52 others behind them, a number from 1 to 2
MAX_THREADS = 4  # beyond it, memory is what they wait for
_BLOCK = 1 << 17  # numbers made at once: they stay in a cache
_ZEROS = memoryview(bytes(8 * _BLOCK))  # what becomes the keystream
_TAG = 16  # bytes that the cipher puts behind its output


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

    def gaussians(self, num: int) -> NDArray[np.float64]:
        """Independent standard normal numbers, shape (num,)."""
        quarter = -(-num // 4)
        room = np.empty((2, quarter))
        return _normal(self.integers(4 * quarter).copy(), room, 1.0)[:num]

    def add_noise(self, values: Tensor, scale: float, divisor: float = 1.0) -> Tensor:
        """Add normal numbers of a standard deviation, in place; rounded once, and then divided.

        The numbers come from a key of their own, and each block's from its place: how many threads
        make them cannot be seen.
        """
        key = self._cipher.update(bytes(32))
        blocks = list(enumerate(torch.split(values, _BLOCK)))
        workers = min(torch.get_num_threads(), MAX_THREADS, len(blocks))
        if workers < 2:  # noqa: PLR2004 - nobody to share with
            _add_to(blocks, key, scale, divisor)
            return values
        # What a thread computes it computes alone: torch would give each a team of as many again.
        before = torch.get_num_threads()
        with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:
            shares = [blocks[worker::workers] for worker in range(workers)]
            tasks = [pool.submit(_add_to, share, key, scale, divisor) for share in shares]
        torch.set_num_threads(before)
        for done in tasks:
            done.result()
        return values


def _add_to(blocks: list[tuple[int, Tensor]], key: bytes, scale: float, divisor: float) -> None:
    """Noise for some blocks, each from its number and the key."""
    # Fresh memory for every block would cost as much as the numbers do.
    keystream = np.empty(8 * _BLOCK + _TAG, np.uint8)
    room = np.empty(_BLOCK)
    # GCM encrypts by CTR, and faster, and lets other threads run; nobody reads the tag.
    cipher = AESGCM(key)
    for number, block in blocks:
        quarter = -(-len(block) // 4)
        num = 32 * quarter  # bytes
        nonce, zeros = number.to_bytes(12, "big"), _ZEROS[:num]
        cipher.encrypt_into(nonce, zeros, None, keystream[: num + _TAG].data)
        bits = keystream[:num].view(np.uint64)
        noise = _normal(bits, room[: 2 * quarter].reshape(2, -1), scale)[: len(block)]
        # Types that differ in one operation cost twice what two more operations do.
        wide = torch.from_numpy(room[: len(block)]).copy_(block)
        block.copy_(wide.add_(torch.from_numpy(noise))).div_(divisor)


def _normal(bits: NDArray[np.uint64], room: NDArray[np.float64], scale: float) -> NDArray[Any]:
    """Independent normal numbers in the place of random bits, shape (4 * quarter,).

    NumPy's functions, not torch's: on processors with wide registers they take a third of the time.

    Args:
      bits: Uniform, shape (4 * quarter,).
      room: (2, quarter), for what is between.
      scale: Their standard deviation.
    """
    bits >>= np.uint64(12)
    bits |= ONE
    between = bits.view(np.float64).reshape(2, 2, -1)  # 1 to 2
    radius, tangent = between
    # 2 - x is in (0, 1]: the logarithm is finite.
    np.log(np.subtract(2.0, radius, out=radius), out=radius)
    radius *= -0.5 * scale**2
    np.sqrt(radius, out=radius)  # half a radius
    # One tangent tells cosine and sine, and costs less than either: with t that of half the angle
    # and w = 2 / (1 + t * t) they are w - 1 and t * w. Around 0 no two angles are rounded to one.
    tangent -= 1.5
    np.tan(np.multiply(tangent, np.pi, out=tangent), out=tangent)
    np.multiply(tangent, tangent, out=room)
    room += 1.0
    np.divide(2.0, room, out=room)
    room *= radius
    other = np.multiply(tangent, room, out=tangent)
    one = np.subtract(room, radius, out=room)
    sums, differences = np.add(one, other, out=radius), np.subtract(one, other, out=one)
    # Four numbers in, four out: an orthogonal matrix with entries of one half leaves them
    # independent and normal, and each is made of all four.
    np.add(sums[0], sums[1], out=other[0])
    np.subtract(sums[0], sums[1], out=other[1])
    np.add(differences[0], differences[1], out=sums[0])
    np.subtract(differences[0], differences[1], out=sums[1])
    return between.reshape(-1)
