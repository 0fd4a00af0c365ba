"""One split of one site's data, prepared for the network and ready to be drawn from.

``Images`` all have the network's size. ``Scans`` keep their own: training draws patches from them,
scoring slides a window over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.store import Reading
from common.models.tabular import pack

Batch = tuple[Tensor, Tensor]  # pixels (batch, channels, ...), targets (batch, ...)
Readings = tuple[Reading, ...]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Images:
    """Private. Images of one size."""

    pixels: Tensor  # (num_images, channels, *size) float32
    targets: Tensor  # classes (num_images,) or (num_images, labels) int64; masks uint8
    patients: tuple[str, ...]  # (num_images,)
    reading: Readings = ()  # of the files that pixels and targets lie in, if they do
    device: torch.device = CPU  # where what is drawn goes
    table: Tensor | None = None  # (num_images, num_features) float32: clinical columns

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def num_patients(self) -> int:
        """Number of different patients."""
        return len(set(self.patients))

    def draw(self, rows: Tensor, _: torch.Generator) -> Batch:
        """The images of these rows; their tables are packed to them later."""
        return self._given(self.pixels[rows], self.targets[rows])

    def packed(self, pixels: Tensor, rows: Tensor | slice) -> Tensor:
        """What the network takes: the pixels of these rows, with their tables where there are."""
        return pixels if self.table is None else pack(pixels, self.table[rows].to(pixels.device))

    def part(self, rows: slice) -> Batch:
        """What the network takes for these images, in their order, and their targets."""
        pixels, targets = self._given(self.pixels[rows], self.targets[rows])
        return self.packed(pixels, rows), targets

    def to(self, device: torch.device) -> Images:
        """The same images for another device; those in a file go there batch by batch."""
        if self.reading:
            return replace(self, device=device)
        pixels, targets = self.pixels.to(device), self.targets.to(device)
        return replace(self, pixels=pixels, targets=targets, device=device)

    def _given(self, pixels: Tensor, targets: Tensor) -> Batch:
        for file in self.reading:
            file.note(pixels, targets)
        return pixels.to(self.device), targets.to(self.device)


@dataclass(frozen=True)
class Scans:
    """Private. Images of any size, each at least as large as a patch on every side."""

    pixels: tuple[Tensor, ...]  # each (channels, *its own size) float32
    targets: tuple[Tensor, ...]  # each (*its own size) uint8
    patients: tuple[str, ...]
    patch: tuple[int, ...]  # size of what is drawn
    reading: Readings = ()  # of the files that pixels and targets lie in, if they do
    device: torch.device = CPU  # where what is drawn goes

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
            return self._given(none, self.targets[0].new_empty((0, *self.patch)))
        patches = [self._patch(row, rng) for row in rows.tolist()]
        pixels, targets = zip(*patches, strict=True)
        return self._given(torch.stack(pixels), torch.stack(targets))

    def whole(self) -> Iterator[Batch]:
        """Scan after scan: pixels (1, channels, ...) and target (1, ...)."""
        for pixels, target in zip(self.pixels, self.targets, strict=True):
            yield self._given(pixels[None], target[None])

    def packed(self, pixels: Tensor, _: Tensor) -> Tensor:
        """Patches have no table."""
        return pixels

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
        """The same scans for another device; those in a file go there patch by patch."""
        if self.reading:
            return replace(self, device=device)
        return replace(
            self,
            device=device,
            pixels=tuple(each.to(device) for each in self.pixels),
            targets=tuple(each.to(device) for each in self.targets),
        )

    def _given(self, pixels: Tensor, targets: Tensor) -> Batch:
        for file in self.reading:
            file.note(pixels, targets)
        return pixels.to(self.device), targets.to(self.device)
