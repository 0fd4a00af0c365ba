"""One split of one site's data, prepared for the network and ready to be drawn from.

``Images`` all have the network's size. ``Scans`` keep their own: training draws patches from them,
scoring slides a window over them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # pixels (batch, channels, ...), targets (batch, ...)


@dataclass(frozen=True)
class Images:
    """Private. Images of one size."""

    pixels: Tensor  # (num_images, channels, *size) float32
    targets: Tensor  # classes (num_images,) or (num_images, labels) int64; masks uint8
    patients: tuple[str, ...]  # (num_images,)

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def num_patients(self) -> int:
        """Number of different patients."""
        return len(set(self.patients))

    def draw(self, rows: Tensor, _: torch.Generator) -> Batch:
        """The images of these rows."""
        return self.pixels[rows], self.targets[rows]

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        return replace(self, pixels=self.pixels.to(device), targets=self.targets.to(device))


@dataclass(frozen=True)
class Scans:
    """Private. Images of any size, each at least as large as a patch on every side."""

    pixels: tuple[Tensor, ...]  # each (channels, *its own size) float32
    targets: tuple[Tensor, ...]  # each (*its own size) uint8
    patients: tuple[str, ...]
    patch: tuple[int, ...]  # size of what is drawn

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def num_patients(self) -> int:
        """Number of different patients."""
        return len(set(self.patients))

    def draw(self, rows: Tensor, rng: torch.Generator) -> Batch:
        """A random patch of each of these rows; every place is as likely."""
        if not len(rows):
            channels = self.pixels[0].shape[0]
            none = self.pixels[0].new_empty((0, channels, *self.patch))
            return none, self.targets[0].new_empty((0, *self.patch))
        patches = [self._patch(row, rng) for row in rows.tolist()]
        pixels, targets = zip(*patches, strict=True)
        return torch.stack(pixels), torch.stack(targets)

    def _patch(self, row: int, rng: torch.Generator) -> Batch:
        target = self.targets[row]
        place = tuple(
            slice(start, start + side)
            for side, start in (
                (side, int(torch.randint(whole - side + 1, (1,), generator=rng)))
                for side, whole in zip(self.patch, target.shape, strict=True)
            )
        )
        return self.pixels[row][(slice(None), *place)], target[place]

    def to(self, device: torch.device) -> Scans:
        """The same scans on another device."""
        return replace(
            self,
            pixels=tuple(each.to(device) for each in self.pixels),
            targets=tuple(each.to(device) for each in self.targets),
        )
