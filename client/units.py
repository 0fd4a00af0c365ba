"""Images grouped by privacy unit, and the factor that bounds what a unit counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRETCH = 256  # entries of a gradient whose squares are added in its own precision


@dataclass(frozen=True)
class Units:
    """Private. Images of several privacy units, one unit after the other.

    Attributes:
      pixels: (num_images, channels, ...).
      targets: (num_images, ...).
      sizes: Images of each unit; they add up to num_images.
    """

    pixels: Tensor
    targets: Tensor
    sizes: tuple[int, ...]


def physical_batches(units: Units, max_images: int) -> list[Units]:
    """Split on the borders of units, so that a unit is never cut in two."""
    parts: list[Units] = []
    start, first, held = 0, 0, 0
    for index, size in enumerate(units.sizes):
        if held and held + size > max_images:
            parts.append(_slice(units, start, held, units.sizes[first:index]))
            start, first, held = start + held, index, 0
        held += size
    if held:
        parts.append(_slice(units, start, held, units.sizes[first:]))
    return parts


def squares_of(rows: Tensor) -> Tensor:
    """Squared norms of gradients, (num_units, num) to float64 of shape (num_units,).

    Stretches of a row in its own precision, which is many times faster; their sum in float64.
    """
    whole = rows.shape[1] // STRETCH * STRETCH
    stretches = rows[:, :whole].view(len(rows), whole // STRETCH, STRETCH)
    norms: Tensor = torch.linalg.vector_norm(stretches, dim=2).double()
    rest: Tensor = torch.linalg.vector_norm(rows[:, whole:], dim=1).double()
    return norms.square_().sum(dim=1) + rest.square_()


def factors_of(norms: Tensor, clip_norm: float, dtype: torch.dtype) -> Tensor:
    """What brings gradients of these norms to at most ``clip_norm``, shape (num_units,).

    A gradient that is not finite, or so large that no exact factor is left, counts as zero: it must
    not reach the sum unbounded.

    Args:
      norms: In float64: in float32 the squares of millions of entries add up to too little, and
        the bound would fail.
      clip_norm: The bound.
      dtype: Of the gradients. In it a stretch's square is too small by at most as many roundings
        as it has entries, its norm by half of them; the margin covers that, and factor and product.
    """
    margin = 1 - STRETCH / 2 * torch.finfo(dtype).eps
    factors = (margin * clip_norm / norms.clamp_min(1e-300)).clamp(max=1.0).to(dtype)
    is_usable = torch.isfinite(norms) & (factors >= torch.finfo(dtype).tiny)
    return torch.where(is_usable, factors, torch.zeros_like(factors))


def _slice(units: Units, start: int, num: int, sizes: tuple[int, ...]) -> Units:
    part = slice(start, start + num)
    return Units(units.pixels[part], units.targets[part], sizes)
