"""Weights <-> one flat vector and its schema: what of a model travels, and what stays.

The parameters of a network are laid as views into one flat tensor, and so are their gradients:
reading or writing the whole model is one copy, and an optimizer updates one tensor instead of many.
Only parameters that require a gradient travel; frozen ones stay where they are, and so do local
ones, which a site trains for itself. Behind the parameters the vector may hold blocks that belong
to an algorithm: they travel with the model and are part of every sum, but of no network.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CONTROL = "control/"  # beginning of the names of SCAFFOLD's block; no parameter's name has a slash
SUMMED = "sites/summed"  # for each site of the study the last round whose sum holds its update
WEIGHT = "sites/weight"  # one entry: the largest weight that any sum had


def is_parameter(name: str) -> bool:
    """Whether an entry of a schema belongs to the network, and not to an algorithm's block."""
    return "/" not in name


@dataclass(frozen=True)
class Schema:
    """Names and shapes of what travels, in the order of the vector: parameters, then blocks."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_params(self) -> int:
        """Length of the vector."""
        return sum(self.sizes)

    @property
    def num_own(self) -> int:
        """How many of its entries are parameters; they come first."""
        known = zip(self.names, self.sizes, strict=True)
        return sum(size for name, size in known if is_parameter(name))

    def own(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Views of the parameters alone, by name, each in its shape."""
        parts = self.split(vector)
        return {name: part for name, part in parts.items() if is_parameter(name)}

    def control(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """A view of SCAFFOLD's block, which stands right behind the parameters; (num_own,)."""
        return vector[self.num_own : 2 * self.num_own]

    def digest(self) -> str:
        """SHA-256 over names, shapes and order; 64 hex digits."""
        text = json.dumps([self.names, self.shapes], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Views of the vector by parameter name, each in its shape."""
        ends = np.cumsum(self.sizes)
        parts = np.split(vector, ends[:-1])
        return {
            name: part.reshape(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }


class FlatNetwork:
    """A network whose travelling parameters live in one tensor.

    Attributes:
      module: The network itself; call it as usual.
      schema: Order of the vector.
      values: All parameters that are trained, in the network's own order, those that stay at the
        site too; writing here changes the network.

    With ``channels_last`` images of two dimensions go through the network with their channels side
    by side, which the convolutions of a U-Net do 1.3 times faster. Per-sample gradients do not
    follow this path: they call ``module`` itself.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        channels_last: bool = False,
        local: Collection[str] = (),
        blocks: Sequence[tuple[str, tuple[int, ...]]] = (),
    ) -> None:
        """Lay a module's parameters into one tensor.

        Args:
          module: Is changed in place.
          device: Where it shall live.
          dtype: Of the parameters.
          channels_last: See above.
          local: Names of parameters that are trained and do not travel.
          blocks: Names and shapes of what travels behind the parameters.
        """
        self.module = module.to(device)
        self._channels_last = channels_last
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        travels = [(n, tuple(p.shape)) for n, p in named if n not in local] + list(blocks)
        self.schema = Schema(tuple(n for n, _ in travels), tuple(shape for _, shape in travels))
        self._local = frozenset(local)
        sizes = [p.numel() for _, p in named]
        self.values = torch.empty(sum(sizes), device=device, dtype=dtype)
        self._stays: NDArray[np.bool_] | None = None  # of the values
        if local:
            self._stays = np.repeat([n in self._local for n, _ in named], sizes)
        self._gradients: Tensor | None = None
        self._parameters = [parameter for _, parameter in named]
        for parameter, own in zip(self._parameters, self._views(self.values), strict=True):
            own.copy_(parameter.detach())
            parameter.data = own

    def __call__(self, images: Tensor) -> Tensor:
        """Outputs of the network, shape (batch, num_outputs, ...)."""
        outputs: Tensor = self.module(_channels_last(images) if self._channels_last else images)
        return outputs

    @property
    def gradients(self) -> Tensor:
        """All their gradients, shape (num_params,); from the first look on, backward adds to it."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.values)
            for parameter, own in zip(self._parameters, self._views(self._gradients), strict=True):
                if parameter.grad is not None:
                    own.copy_(parameter.grad)
                parameter.grad = own
        return self._gradients

    def drop_gradients(self) -> None:
        """Give their memory back: who only scores a model, or sends an update, needs none."""
        self._gradients = self.values.grad = None
        for parameter in self._parameters:
            parameter.grad = None

    def _views(self, vector: Tensor) -> Iterator[Tensor]:
        """The parts of a vector, each in its parameter's shape."""
        parts = torch.split(vector, [parameter.numel() for parameter in self._parameters])
        for part, parameter in zip(parts, self._parameters, strict=True):
            yield part.view(parameter.shape)

    def kept(self) -> dict[str, NDArray[np.float32]]:
        """Copies of the parameters that never travel, frozen and local ones, by name."""
        return {
            name: parameter.detach().cpu().numpy().copy()
            for name, parameter in self.module.named_parameters()
            if not parameter.requires_grad or name in self._local
        }

    def load(self, vector: NDArray[np.float32]) -> None:
        """Set every travelling parameter from a vector of shape (num_params,)."""
        own = vector[: self.schema.num_own]
        if self._stays is not None:
            self._put(~self._stays, own)
        elif self.values.device.type == "cpu":
            np.copyto(self.values.numpy(), own)
        else:
            self.values.copy_(torch.tensor(own))

    def vector(self) -> NDArray[np.float32]:
        """A copy of every travelling parameter, and blocks of zeros; shape (num_params,)."""
        own, num_more = self._own(), self.schema.num_params - self.schema.num_own
        return np.concatenate([own, np.zeros(num_more, np.float32)]) if num_more else own.copy()

    def minus(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """What changed since ``load`` of that vector; blocks of zeros; shape (num_params,)."""
        own, num_own = self._own(), self.schema.num_own
        if num_own == self.schema.num_params:
            changed: NDArray[np.float32] = own - vector
            return changed
        update = np.zeros(self.schema.num_params, np.float32)
        np.subtract(own, vector[:num_own], out=update[:num_own])
        return update

    def local(self) -> NDArray[np.float32]:
        """A copy of the local parameters, in the network's own order."""
        values: NDArray[np.float32] = self.values.detach().cpu().numpy()
        return values[:0].copy() if self._stays is None else values[self._stays]

    def load_local(self, vector: NDArray[np.float32]) -> None:
        """Set the local parameters, as ``local`` gave them."""
        if self._stays is not None:
            self._put(self._stays, vector)

    def spread(self, vector: NDArray[np.float32]) -> Tensor:
        """A vector over the travelling parameters as one over all; 0 for those that stay."""
        spread = torch.zeros_like(self.values)
        given = torch.tensor(vector, device=spread.device)
        if self._stays is None:
            return spread.copy_(given)
        spread[torch.from_numpy(~self._stays).to(spread.device)] = given
        return spread

    def _own(self) -> NDArray[np.float32]:
        """The travelling parameters: a view of them where all travel."""
        values: NDArray[np.float32] = self.values.detach().cpu().numpy()
        return values if self._stays is None else values[~self._stays]

    def _put(self, places: NDArray[np.bool_], vector: NDArray[np.float32]) -> None:
        device = self.values.device
        self.values[torch.from_numpy(places).to(device)] = torch.tensor(vector, device=device)


def _channels_last(images: Tensor) -> Tensor:
    _, channels, height, width = images.shape
    kept = images.contiguous(memory_format=torch.channels_last)
    # With one channel both layouts are the same memory; only the strides say which one is meant.
    strides = (height * width * channels, 1, width * channels, channels)
    return kept.as_strided(kept.shape, strides)
