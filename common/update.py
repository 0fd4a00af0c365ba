"""The forms a model update takes on its way out of a site.

A step cannot be skipped, because its type is missing: ``quantize`` takes what ``train`` returns,
masking takes what ``quantize`` returns, and an upload holds a ``MaskedUpdate``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LocalUpdate:
    """Private. What one site's training changed: local model minus global model."""

    values: NDArray[np.float32]  # (num_params,)


@dataclass(frozen=True)
class QuantizedUpdate:
    """Private. The weighted update as integers of the ring, and the tail that rides with it."""

    values: NDArray[np.int32]  # (num_params,), each within +-max_magnitude of the ring
    tail: NDArray[np.int64]  # (num_tail,): weight, clipped entries per tensor, the task's counts


@dataclass(frozen=True)
class MaskedUpdate:
    """What may leave a site. Uniform to anyone without the masks."""

    body: NDArray[np.uint8]  # packed entries modulo 2**bits, then the tail modulo 2**64
