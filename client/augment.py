"""Random changes of a batch of training images, drawn anew each time.

One draw per image and one resampling per batch: geometry goes through MONAI's batched affine layer,
so the cost is that of a few tensor operations, not of a loop over images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.layers import AffineTransform
from torch import Tensor

from common.study import Augmentation
from common.tasks.boxes import BOX, NO_BOX
from common.tasks.losses import OUTSIDE

STILL_THERE = 0.25  # share of a box inside the moved image, from which it is still to be found
NUM_DRAWS = 7  # angle, zoom, flip, two shifts, contrast, brightness
MORE_DRAWS = 2  # vertical flip, quarter turns: drawn where a study asks for one
_NONE = Augmentation()
_RESAMPLE = AffineTransform(
    normalized=True, reverse_indexing=False, padding_mode="border", align_corners=False
)
_RESAMPLE_MASKS = AffineTransform(
    normalized=True,
    mode="nearest",
    reverse_indexing=False,
    padding_mode="zeros",
    align_corners=False,
)


def augment(
    images: Tensor, targets: Tensor, config: Augmentation, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A changed copy of a batch; the batch itself when the study asks for no change.

    Args:
      images: (batch, channels, *size), normalised. Volumes are moved within each slice.
      targets: Labels, which no change touches; masks (batch, *size) uint8, which move with the
        image: what comes from beyond its edge is ``OUTSIDE``; or boxes (batch, max_boxes, 5)
        float32, which are cut at the edge, and left out where less than a quarter remains.
      config: How large the changes may be.
      rng: Source of every draw; on the CPU.
    """
    if config == _NONE or not len(images):
        return images, targets
    num = len(images)
    more = MORE_DRAWS if config.flip_vertical or config.quarter_turns else 0
    drawn = 2 * torch.rand((NUM_DRAWS + more, num), generator=rng) - 1  # uniform in [-1, 1)
    if config.moves_pixels:
        height, width = images.shape[-2:]
        matrices = _matrices(drawn, width / height, config)
        if images.ndim == 5:  # noqa: PLR2004 - (batch, channels, depth, height, width)
            matrices = _in_every_slice(matrices)
        matrices = matrices.to(images.device)
        images = _RESAMPLE(images, matrices)
        if targets.is_floating_point() and targets.shape[2:] == (BOX,):
            targets = _move_boxes(targets, matrices, images.shape[-2:])
        elif targets.ndim == images.ndim - 1:
            targets = _move_masks(targets, matrices)
    if config.contrast or config.brightness:
        shape = (num, *[1] * (images.ndim - 1))
        gain, offset = 1 + config.contrast * drawn[5], config.brightness * drawn[6]
        images = torch.addcmul(
            offset.reshape(shape).to(images.device), images, gain.reshape(shape).to(images.device)
        )
    if config.noise:
        images = images + config.noise * torch.randn(images.shape, generator=rng).to(images.device)
    return images, targets


def _move_masks(masks: Tensor, matrices: Tensor) -> Tensor:
    # Beyond the edge the layer gives 0; counted down from OUTSIDE, that is OUTSIDE.
    below = (OUTSIDE - masks.int()).float().unsqueeze(1)
    moved = _RESAMPLE_MASKS(below, matrices).squeeze(1).round()
    classes: Tensor = (OUTSIDE - moved).to(masks.dtype)
    return classes


def _move_boxes(boxes: Tensor, matrices: Tensor, size: Sequence[int]) -> Tensor:
    """Where the boxes are in the moved images: those around their moved corners."""
    height, width = size
    half = boxes.new_tensor([width, height]) / 2
    corners = torch.stack([boxes[..., [x, y]] for x in (0, 2) for y in (1, 3)], dim=2) / half - 1
    # The matrix says where an output pixel is read from; here the way back is wanted.
    turned, shift = matrices[:, :, :2], matrices[:, None, None, :, 2]
    back = torch.linalg.inv(turned).to(corners)
    moved = (torch.einsum("bij,bmkj->bmki", back, corners - shift) + 1) * half
    low, high = moved.amin(dim=2), moved.amax(dim=2)
    edges = boxes.new_tensor([width, height])
    seen_low, seen_high = low.clamp_min(0), torch.minimum(high, edges)
    whole = (high - low).prod(dim=2)
    seen = (seen_high - seen_low).clamp_min(0).prod(dim=2)
    sides, kinds = torch.cat([seen_low, seen_high], dim=2), boxes[..., 4:]
    there = (kinds >= 0) & (seen > STILL_THERE * whole).unsqueeze(2)
    return torch.where(there, torch.cat([sides, kinds], dim=2), NO_BOX)


def _in_every_slice(matrices: Tensor) -> Tensor:
    """(batch, 2, 3) for a plane to (batch, 3, 4) for a volume; depth stays where it is.

    The layer counts a matrix's axes from the last one of the volume, so depth comes last.
    """
    volumes = torch.zeros((len(matrices), 3, 4))
    volumes[:, :2, :2], volumes[:, :2, 3] = matrices[:, :, :2], matrices[:, :, 2]
    volumes[:, 2, 2] = 1
    return volumes


def _matrices(drawn: Tensor, aspect: float, config: Augmentation) -> Tensor:
    """Where each output pixel is read from: (batch, 2, 3) in coordinates from -1 to 1.

    ``aspect`` is width over height: both sides are two units long, and a rotation must not shear.
    """
    angle = math.radians(config.rotate_degrees) * drawn[0]
    if config.quarter_turns:
        angle = angle + math.pi / 2 * torch.floor(2 * (drawn[8] + 1))
    scale = 1 + config.zoom * drawn[1]
    mirror = torch.where(drawn[2] < 2 * config.flip - 1, -scale, scale)
    upside = scale
    if config.flip_vertical:
        upside = torch.where(drawn[7] < 2 * config.flip_vertical - 1, -scale, scale)
    shift = 2 * config.shift * drawn[3:5]
    cosine, sine = angle.cos(), angle.sin()
    rows = [mirror * cosine, mirror * sine / -aspect, shift[0]]
    rows += [upside * sine * aspect, upside * cosine, shift[1]]
    return torch.stack(rows, dim=1).reshape(-1, 2, 3)
