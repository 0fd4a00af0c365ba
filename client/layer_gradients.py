"""Layers of which every unit's share of the gradient can be told from one backward over a batch.

From a layer's input and the gradient of its output alone, each kind tells the gradients of the
units (``each``), or, where it has weights that are large for the number of positions they are used
at, the norms of those gradients without making them (``squares``), and then their weighted sum
(``weighted``).

Source: Bu et al. (2023), Differentially Private Optimization on Large Model at Small Cost;
Goodfellow (2015), Efficient Per-Example Gradient Computations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from client.units import Grouping
from common.errors import ConfigError

Kept = tuple[Tensor, ...]
Parts = Iterator[tuple[slice | Tensor, Tensor]]  # some units, and (as many, *shape)
# Of a weight, for which one of a Gram matrix is made in the same time; fitted to measured layers.
GRAM_ENTRIES = 12
MAX_PRODUCTS = 1 << 16  # entries of Gram matrices that are made at once: they stay in a cache


class Layer(ABC):
    """One layer with parameters, some of which are trained."""

    def __init__(self, module: nn.Module) -> None:
        self.trained = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }

    def prepare(self, inputs: Tensor) -> Tensor:
        """What stands before the layer proper, with gradients as usual."""
        return inputs

    @abstractmethod
    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """The output, and what the other methods need of this call besides the input."""

    @abstractmethod
    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """The gradient of the input from that of the output."""

    @abstractmethod
    def each(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> dict[str, Tensor]:
        """The units' gradients by parameter, (num_units, *shape)."""

    def both(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``backward`` and ``each`` return, for layers that make them in one go."""
        each = self.each(inputs, gradient, kept, grouping)
        return self.backward(inputs, gradient, kept), each


class Weighted(Layer):
    """A layer that multiplies windows of its input by a weight: convolution or linear."""

    weight: Tensor

    def each(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> dict[str, Tensor]:
        """See ``Layer``; of the weight, see ``weight_of_each``."""
        del inputs, kept
        if "bias" not in self.trained:
            return {}
        return {"bias": self.bias_of_each(gradient, grouping)}

    @abstractmethod
    def bias_of_each(self, gradient: Tensor, grouping: Grouping) -> Tensor:
        """The units' gradients of the bias."""

    @abstractmethod
    def weight_of_each(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> Parts:
        """The units' gradients of the weight, some units at a time."""

    @abstractmethod
    def num_positions(self, inputs: Tensor, gradient: Tensor) -> int:
        """Of one image, which the Gram matrices are made over; 0 where there are no such."""

    @abstractmethod
    def grams(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """What sums up to the squared norms of the units' gradients of the weight.

        Args:
          inputs: Of units with equally many images, (num_units, images of each, ...), float64.
          gradient: The same of the output.

        Returns:
          Products of two Gram matrices over the unit's positions, (num_units, num, num).
        """

    @abstractmethod
    def weighted(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """The weight's gradient, summed over all images."""

    def squares(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> Tensor:
        """Squared norms of the units' gradients of the weight, float64, shape (num_units,).

        They are bounds: what adds up to a small gradient may be large, and ``weighted`` adds it up
        in the layer's own precision. As many roundings of every position's part are counted in.
        """
        squares = inputs.new_empty(grouping.num_units, dtype=torch.float64)
        for units, *both in grouping.alike(inputs, gradient):
            positions = self.num_positions(inputs, gradient) * both[0].shape[1]
            most = max(1, MAX_PRODUCTS // positions**2)
            parts = (torch.split(each, most) for each in (units, *both))
            for some, one, other in zip(*parts, strict=True):
                squares[some] = self._squares(one.double(), other.double(), inputs.dtype)
        return squares

    def _squares(self, inputs: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The same of units with equally many images, (num_units, images of each, ...), float64."""
        products = self.grams(inputs, gradient)
        norms = products.sum(dim=(1, 2)).clamp(min=0).sqrt()
        parts = products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(dim=1)
        roundings = (products.shape[1] + 2) * torch.finfo(dtype).eps
        return (norms + roundings * parts).square()

    def has_large_weight(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> bool:
        """Whether two Gram matrices take less than the gradient itself: a rule on shapes alone.

        It must not depend on time or load: the two ways differ in their last bits, and a run that
        is repeated must take the same one.
        """
        positions = self.num_positions(inputs, gradient) * grouping.largest
        return positions > 0 and GRAM_ENTRIES * positions**2 <= self.weight.numel()


class Linear(Weighted):
    """A linear layer on the last dimension; between it and the first are positions."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.weight, self._bias = module.weight, module.bias

    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """See ``Layer``."""
        return F.linear(inputs, self.weight, self._bias), ()

    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """See ``Layer``."""
        del inputs, kept
        return gradient @ self.weight

    def bias_of_each(self, gradient: Tensor, grouping: Grouping) -> Tensor:
        """See ``Weighted``."""
        return grouping.add_up(_rows(gradient).sum(dim=1))

    def weight_of_each(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> Parts:
        """See ``Weighted``."""
        yield slice(None), grouping.add_up(_rows(gradient).mT @ _rows(inputs))

    def num_positions(self, inputs: Tensor, gradient: Tensor) -> int:
        """See ``Weighted``."""
        del gradient
        return inputs[0, ..., 0].numel()

    def grams(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """See ``Weighted``."""
        one, other = _rows(inputs), _rows(gradient)
        return (one @ one.mT) * (other @ other.mT)

    def weighted(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """See ``Weighted``."""
        return gradient.flatten(0, -2).mT @ inputs.flatten(0, -2)


class GroupNorm(Layer):
    """GroupNorm, and InstanceNorm, whose groups are single channels."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._weight, self._bias, self._eps = module.weight, module.bias, module.eps
        is_by_group = isinstance(module, nn.GroupNorm)
        self._num_groups = module.num_groups if is_by_group else module.num_features

    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """See ``Layer``."""
        output, *kept = torch.native_group_norm(
            inputs, self._weight, self._bias, *_sizes(inputs), self._num_groups, self._eps
        )
        return output, tuple(kept)

    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """See ``Layer``."""
        return self._backward(inputs, gradient, kept, [True, False, False])[0].view_as(inputs)

    def each(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> dict[str, Tensor]:
        """See ``Layer``."""
        found = self._backward(inputs, gradient, kept, [False, True, True])
        return self._by_unit(found, len(inputs), grouping)

    def both(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Layer``."""
        found = self._backward(inputs, gradient, kept, [True, True, True])
        return found[0].view_as(inputs), self._by_unit(found, len(inputs), grouping)

    def _backward(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, wanted: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As if all images were one with so many times the channels: each keeps its gradients."""
        num, channels, pixels = _sizes(inputs)
        one, other = (whole.view(1, num * channels, pixels) for whole in (gradient, inputs))
        mean, inverse = (each.view(1, -1) for each in kept)
        weight = self._weight.repeat(num)
        groups = num * self._num_groups
        made: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward(
            one, other, mean, inverse, weight, 1, num * channels, pixels, groups, wanted
        )
        return made

    def _by_unit(
        self, found: tuple[Tensor, Tensor, Tensor], num: int, grouping: Grouping
    ) -> dict[str, Tensor]:
        """Gradients of weight and bias from those of every image."""
        weights, biases = (each.view(num, -1) for each in found[1:])
        return {"weight": grouping.add_up(weights), "bias": grouping.add_up(biases)}


class LayerNorm(Layer):
    """LayerNorm over the last dimensions."""

    def __init__(self, module: nn.LayerNorm) -> None:
        super().__init__(module)
        self._weight, self._bias, self._eps = module.weight, module.bias, module.eps
        self._shape = module.normalized_shape

    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """See ``Layer``."""
        output, *kept = torch.native_layer_norm(
            inputs, self._shape, self._weight, self._bias, self._eps
        )
        return output, tuple(kept)

    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """See ``Layer``."""
        wanted = [True, False, False]
        made: Tensor = torch.ops.aten.native_layer_norm_backward(
            gradient, inputs, self._shape, *kept, self._weight, self._bias, wanted
        )[0]
        return made

    def each(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> dict[str, Tensor]:
        """See ``Layer``."""
        mean, inverse = kept
        weights = gradient * (inputs - mean) * inverse
        return {"weight": self._added(weights, grouping), "bias": self._added(gradient, grouping)}

    def _added(self, each: Tensor, grouping: Grouping) -> Tensor:
        return grouping.add_up(each.reshape(len(each), -1, *self._shape).sum(dim=1))


class Embedding(Layer):
    """A row of the weight for each number of the input."""

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__(module)
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise ConfigError(
                "model: an Embedding with max_norm, scale_grad_by_freq or sparse: what one patient "
                "adds to its weight depends on others; leave these out"
            )
        self._weight, self._padding = module.weight, module.padding_idx

    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """See ``Layer``."""
        return F.embedding(inputs, self._weight, self._padding), ()

    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """Whole numbers have no gradient: nobody asks for one."""
        del gradient, kept
        return torch.zeros_like(inputs)

    def each(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> dict[str, Tensor]:
        """See ``Layer``."""
        del kept
        num_rows, width = self._weight.shape
        made = gradient.new_zeros((grouping.num_units * num_rows, width))
        unit_of = grouping.unit_of.view(-1, *[1] * (inputs.ndim - 1))
        made.index_add_(0, (unit_of * num_rows + inputs).flatten(), gradient.reshape(-1, width))
        rows = made.view(grouping.num_units, num_rows, width)
        if self._padding is not None:
            rows[:, self._padding] = 0  # that row is never trained
        return {"weight": rows}


class PReLU(Layer):
    """A ReLU whose slope below zero is learned, one or one for each channel."""

    def __init__(self, module: nn.PReLU) -> None:
        super().__init__(module)
        self._weight = module.weight

    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """See ``Layer``."""
        if self._is_one:
            return F.leaky_relu(inputs, self._weight.item()), ()
        return F.prelu(inputs, self._weight), ()

    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """See ``Layer``."""
        del kept
        if self._is_one:  # ten times faster than torch's function for learned slopes
            slope = self._weight.item()
            made: Tensor = torch.ops.aten.leaky_relu_backward(gradient, inputs, slope, False)
            return made
        slopes = self._weight.view(-1, *[1] * (inputs.ndim - 2))
        return torch.where(inputs > 0, gradient, gradient * slopes)

    def each(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> dict[str, Tensor]:
        """See ``Layer``."""
        del kept
        below = inputs.clamp(max=0).mul_(gradient)
        if self._is_one:
            return {"weight": grouping.add_up(below.flatten(1).sum(dim=1, keepdim=True))}
        return {"weight": grouping.add_up(_by_channel(below).sum(dim=2))}

    @property
    def _is_one(self) -> bool:
        return len(self._weight) == 1


def _rows(inputs: Tensor) -> Tensor:
    """(num, ..., features) to (num, positions, features)."""
    return inputs.reshape(len(inputs), -1, inputs.shape[-1])


def _by_channel(images: Tensor) -> Tensor:
    """(num, channels, ...) to (num, channels, pixels)."""
    return images.reshape(*images.shape[:2], -1)


def _sizes(images: Tensor) -> tuple[int, int, int]:
    """Images, channels, and pixels of each."""
    return images.shape[0], images.shape[1], images[0, 0].numel()
