"""Images grouped by privacy unit, and the factor that bounds what a unit counts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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


class Grouping:
    """Private. Which images belong to one unit; several images of one stand together.

    Attributes:
      num_units: How many there are, at least one.
      largest: Images of the largest one.
      slices: The images of each unit.
      unit_of: Unit of each image, shape (num_images,).
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.num_units, self.largest = len(sizes), max(sizes)
        ends = itertools.accumulate(sizes)
        self.slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        lengths = torch.tensor(sizes, device=device)
        self.unit_of = torch.repeat_interleave(torch.arange(len(sizes), device=device), lengths)
        starts = lengths.cumsum(0) - lengths
        self._alike = [
            (units, starts[units, None] + torch.arange(size, device=device))
            for size in sorted(set(sizes))
            for units in [torch.nonzero(lengths == size).squeeze(1)]
        ]

    def alike(self, one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Units with equally many images: (num,), and of both (num, images of each, ...)."""
        for units, rows in self._alike:
            if len(units) == self.num_units:  # all of them, as they stand
                yield units, one.unflatten(0, rows.shape), other.unflatten(0, rows.shape)  # type: ignore[no-untyped-call]
            else:
                yield units, one[rows], other[rows]

    def add_up(self, each: Tensor) -> Tensor:
        """Sums over the images of each unit: (num_images, ...) to (num_units, ...)."""
        if self.largest == 1:
            return each
        sums = each.new_zeros((self.num_units, *each.shape[1:]))
        return sums.index_add_(0, self.unit_of, each)


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
