"""Random changes of a batch of training images, drawn anew each time.

One draw per image and one resampling per batch: geometry goes through MONAI's batched affine layer,
so the cost is that of a few tensor operations, not of a loop over images.
"""

from __future__ import annotations

import math

import torch
from monai.networks.layers import AffineTransform
from torch import Tensor

from common.study import Augmentation


def augment(images: Tensor, config: Augmentation, rng: torch.Generator) -> Tensor:
    """A changed copy of a batch; the batch itself when the study asks for no change.

    Args:
      images: (batch, channels, height, width), normalised.
      config: How large the changes may be.
      rng: Source of every draw; on the CPU.
    """
    if _moves(config):
        matrices = _matrices(len(images), config, rng).to(images.device)
        resample = AffineTransform(
            normalized=True, reverse_indexing=False, padding_mode="border", align_corners=False
        )
        images = resample(images, matrices)
    if config.contrast or config.brightness:
        gain = 1 + config.contrast * _uniform(len(images), rng)
        offset = config.brightness * _uniform(len(images), rng)
        images = images * _per_image(gain, images) + _per_image(offset, images)
    if config.noise:
        drawn = torch.randn(images.shape, generator=rng).to(images.device)
        images = images + config.noise * drawn
    return images


def _moves(config: Augmentation) -> bool:
    return any((config.flip, config.rotate_degrees, config.shift, config.zoom))


def _matrices(num: int, config: Augmentation, rng: torch.Generator) -> Tensor:
    """Where each output pixel is read from: (num, 2, 3) in coordinates from -1 to 1."""
    angle = math.radians(config.rotate_degrees) * _uniform(num, rng)
    scale = 1 + config.zoom * _uniform(num, rng)
    mirror = torch.where(torch.rand(num, generator=rng) < config.flip, -1.0, 1.0)
    # A side is two units long.
    shift_x, shift_y = (2 * config.shift * _uniform(num, rng) for _ in range(2))
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [mirror * cosine, -mirror * sine, shift_x, sine, cosine, shift_y]
    return torch.stack(rows, dim=1).reshape(num, 2, 3)


def _uniform(num: int, rng: torch.Generator) -> Tensor:
    """Uniform in [-1, 1), shape (num,)."""
    return 2 * torch.rand(num, generator=rng) - 1


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device).reshape(-1, *[1] * (images.ndim - 1))
