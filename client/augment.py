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

NUM_DRAWS = 7  # angle, zoom, flip, two shifts, contrast, brightness
_NONE = Augmentation()
_RESAMPLE = AffineTransform(
    normalized=True, reverse_indexing=False, padding_mode="border", align_corners=False
)


def augment(images: Tensor, config: Augmentation, rng: torch.Generator) -> Tensor:
    """A changed copy of a batch; the batch itself when the study asks for no change.

    Args:
      images: (batch, channels, height, width), normalised.
      config: How large the changes may be.
      rng: Source of every draw; on the CPU.
    """
    if config == _NONE:
        return images
    num = len(images)
    drawn = 2 * torch.rand((NUM_DRAWS, num), generator=rng) - 1  # uniform in [-1, 1)
    if config.flip or config.rotate_degrees or config.shift or config.zoom:
        height, width = images.shape[-2:]
        matrices = _matrices(drawn, width / height, config).to(images.device)
        images = _RESAMPLE(images, matrices)
    if config.contrast or config.brightness:
        shape = (num, *[1] * (images.ndim - 1))
        gain, offset = 1 + config.contrast * drawn[5], config.brightness * drawn[6]
        images = torch.addcmul(
            offset.reshape(shape).to(images.device), images, gain.reshape(shape).to(images.device)
        )
    if config.noise:
        images = images + config.noise * torch.randn(images.shape, generator=rng).to(images.device)
    return images


def _matrices(drawn: Tensor, aspect: float, config: Augmentation) -> Tensor:
    """Where each output pixel is read from: (batch, 2, 3) in coordinates from -1 to 1.

    ``aspect`` is width over height: both sides are two units long, and a rotation must not shear.
    """
    angle = math.radians(config.rotate_degrees) * drawn[0]
    scale = 1 + config.zoom * drawn[1]
    mirror = torch.where(drawn[2] < 2 * config.flip - 1, -scale, scale)
    shift = 2 * config.shift * drawn[3:5]
    cosine, sine = angle.cos(), angle.sin()
    rows = [mirror * cosine, mirror * sine / -aspect, shift[0]]
    rows += [scale * sine * aspect, scale * cosine, shift[1]]
    return torch.stack(rows, dim=1).reshape(-1, 2, 3)
