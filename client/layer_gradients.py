"""Layers of which every unit's share of the gradient can be told from one backward over a batch.

From a layer's input and the gradient of its output alone, each kind tells the gradients of the
units (``each``), or, where it has weights that are large for the number of positions they are used
at, the norms of those gradients without making them (``squares``), and then their weighted sum
(``weighted``).

Source: Bu et al. (2023), Differentially Private Optimization on Large Model at Small Cost;
Goodfellow (2015), Efficient Per-Example Gradient Computations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

Kept = tuple[Tensor, ...]
Parts = Iterator[tuple[slice | Tensor, Tensor]]  # some units, and (as many, *shape)
# Fitted to times of bench/clipping.py's layers; they depend on shapes alone.
GRAM_ENTRIES = 64  # of a weight, for which one of a Gram matrix is made in the same time
MAX_TOGETHER = 1 << 20  # entries of units' gradients that are made at once: they stay in a cache
FEWEST_TOGETHER = 8  # units; fewer are made one by one


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


class Layer:
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

    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """The output, and what the other methods need of this call besides the input."""
        raise NotImplementedError

    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """The gradient of the input from that of the output."""
        raise NotImplementedError

    def each(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> dict[str, Tensor]:
        """The units' gradients by parameter, (num_units, *shape)."""
        raise NotImplementedError


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

    def bias_of_each(self, gradient: Tensor, grouping: Grouping) -> Tensor:
        """The units' gradients of the bias."""
        raise NotImplementedError

    def weight_of_each(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> Parts:
        """The units' gradients of the weight, some units at a time."""
        raise NotImplementedError

    def has_large_weight(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> bool:
        """Whether norms are told sooner than gradients: a rule on shapes alone.

        It must not depend on time or load: the two ways differ in their last bits, and a run that
        is repeated must take the same one.
        """
        raise NotImplementedError

    def grams(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """What sums up to the squared norms of the units' gradients of the weight.

        Args:
          inputs: Of units with equally many images, (num_units, images of each, ...), float64.
          gradient: The same of the output.

        Returns:
          Products of two Gram matrices over the unit's positions, (num_units, num, num).
        """
        raise NotImplementedError

    def weighted(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """The weight's gradient, summed over all images."""
        raise NotImplementedError

    def squares(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> Tensor:
        """Squared norms of the units' gradients of the weight, float64, shape (num_units,).

        They are bounds: what adds up to a small gradient may be large, and ``weighted`` adds it up
        in the layer's own precision. As many roundings of every position's part are counted in.
        """
        squares = inputs.new_empty(grouping.num_units, dtype=torch.float64)
        for units, one, other in grouping.alike(inputs, gradient):
            products = self.grams(one.double(), other.double())
            norms = products.sum(dim=(1, 2)).clamp(min=0).sqrt()
            parts = products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(dim=1)
            roundings = (products.shape[1] + 2) * torch.finfo(inputs.dtype).eps
            squares[units] = (norms + roundings * parts).square()
        return squares

    def is_large(self, num_positions: int) -> bool:
        """Whether two Gram matrices of so many positions take less than the gradient itself."""
        return GRAM_ENTRIES * num_positions**2 <= self.weight.numel()


class Convolution(Weighted):
    """Convolution and its transpose, in one to three dimensions."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.weight, self._bias = module.weight, module.bias
        self._transposed = module.transposed
        self._kernel, self._groups = module.kernel_size, module.groups
        self._stride, self._dilation = module.stride, module.dilation
        self._output_padding = module.output_padding
        self._padding, self._before, self._mode = module.padding, None, module.padding_mode
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            self._before = module._reversed_padding_repeated_twice  # noqa: SLF001
            self._padding = (0,) * len(module.kernel_size)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Pad, where it is done with anything but as many zeros on both sides."""
        if self._before is None:
            return inputs
        mode = "constant" if self._mode == "zeros" else self._mode
        return F.pad(inputs, self._before, mode=mode)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """See ``Layer``."""
        return torch.convolution(
            inputs,
            self.weight,
            self._bias,
            *self._settings(),
            self._groups,  # type: ignore[call-arg]
        ), ()

    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """See ``Layer``."""
        del kept
        return self._backward(gradient, inputs, self.weight, self._groups, of_input=True)

    def bias_of_each(self, gradient: Tensor, grouping: Grouping) -> Tensor:
        """See ``Weighted``."""
        return grouping.add_up(gradient.flatten(2).sum(dim=2))

    def weight_of_each(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> Parts:
        """See ``Weighted``."""
        most = MAX_TOGETHER // self.weight.numel()
        if most < FEWEST_TOGETHER:
            for unit, images in enumerate(grouping.slices):
                made = self.weighted(inputs[images], gradient[images])
                yield slice(unit, unit + 1), made.unsqueeze(0)
            return
        for units, *both in grouping.alike(inputs, gradient):
            num_parts = -(-len(units) // most)
            parts = (each.chunk(num_parts) for each in (units, *both))
            for some, one, other in zip(*parts, strict=True):
                yield some, self._by_groups(one, other)

    def has_large_weight(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> bool:
        """See ``Weighted``."""
        places = inputs if self._transposed else gradient
        return self._groups == 1 and self.is_large(places[0, 0].numel() * grouping.largest)

    def grams(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """See ``Weighted``."""
        # The transpose's weight meets the output where the other's meets the input.
        seen, alone = (gradient, inputs) if self._transposed else (inputs, gradient)
        made = self._gram_of_windows(seen, alone.shape[3:]) * _gram(alone)
        num_positions = alone.shape[1] * alone[0, 0, 0].numel()
        return made.view(len(made), num_positions, num_positions)

    def _gram_of_windows(self, seen: Tensor, places: Sequence[int]) -> Tensor:
        """The Gram matrix of the windows that a kernel sees at each place.

        Two windows' product is the sum, over the kernel, of the products of two pixels: windows
        overlap, and pixels are fewer.

        Args:
          seen: (num_units, images, channels, *pixels).
          places: Of the kernel, by dimension.

        Returns:
          (num_units, images, *places, images, *places).
        """
        num_dims = len(places)
        around = [num for each in reversed(self._padding) for num in (each, each)]
        pixels = F.pad(_gram(seen), [*around, 0, 0, *around])
        unit, image, *rows = pixels.stride()
        other, columns = rows[num_dims], rows[num_dims + 1 :]
        rows = rows[:num_dims]
        steps = [s * far for s, far in zip(rows, self._stride, strict=True)]
        other_steps = [s * far for s, far in zip(columns, self._stride, strict=True)]
        in_kernel = [(s + o) * far for s, o, far in zip(rows, columns, self._dilation, strict=True)]
        num_units, images = seen.shape[:2]
        pairs = pixels.as_strided(
            (num_units, images, *places, images, *places, *self._kernel),
            (unit, image, *steps, other, *other_steps, *in_kernel),
        )
        return pairs.sum(dim=tuple(range(-num_dims, 0)))

    def weighted(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """See ``Weighted``."""
        return self._backward(gradient, inputs, self.weight, self._groups, of_input=False)

    def _by_groups(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """All units' gradients at once: they are the groups of one convolution.

        Args:
          inputs: (num_units, images of each, channels, ...).
          gradient: The same of the output.
        """
        num_units = len(inputs)
        one, *rest = self.weight.shape
        shape = self.weight.new_empty(1).expand(num_units * one, *rest)  # nothing else is asked for
        made = self._backward(
            gradient.transpose(0, 1).flatten(1, 2),
            inputs.transpose(0, 1).flatten(1, 2),
            shape,
            num_units * self._groups,
            of_input=False,
        )
        return made.view(num_units, *self.weight.shape)

    def _backward(
        self, gradient: Tensor, inputs: Tensor, weight: Tensor, groups: int, *, of_input: bool
    ) -> Tensor:
        wanted = [of_input, not of_input, False]
        found = torch.ops.aten.convolution_backward(
            gradient, inputs, weight, None, *self._settings(), groups, wanted
        )
        made: Tensor = found[0 if of_input else 1]
        return made

    def _settings(self) -> tuple[Any, ...]:
        return (
            self._stride,
            self._padding,
            self._dilation,
            self._transposed,
            self._output_padding,
        )


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

    def has_large_weight(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> bool:
        """See ``Weighted``."""
        del gradient
        return self.is_large(inputs[0, ..., 0].numel() * grouping.largest)

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
        wanted = [True, False, False]
        made: Tensor = torch.ops.aten.native_group_norm_backward(
            gradient, inputs, *kept, self._weight, *_sizes(inputs), self._num_groups, wanted
        )[0]
        return made

    def each(
        self, inputs: Tensor, gradient: Tensor, kept: Kept, grouping: Grouping
    ) -> dict[str, Tensor]:
        """See ``Layer``."""
        sums = _by_channel(gradient).sum(dim=2)
        channels = inputs.shape[1] // self._num_groups
        mean, inverse = (each.repeat_interleave(channels, dim=1) for each in kept)
        products = _by_channel(gradient * inputs).sum(dim=2)
        weights = (products - mean * sums) * inverse
        return {"weight": grouping.add_up(weights), "bias": grouping.add_up(sums)}


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


KINDS: dict[type[nn.Module], type[Layer]] = {
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.ConvTranspose1d: Convolution,
    nn.ConvTranspose2d: Convolution,
    nn.ConvTranspose3d: Convolution,
    nn.Linear: Linear,
    nn.GroupNorm: GroupNorm,
    nn.InstanceNorm1d: GroupNorm,
    nn.InstanceNorm2d: GroupNorm,
    nn.InstanceNorm3d: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.PReLU: PReLU,
}


def _gram(images: Tensor) -> Tensor:
    """Products of all pairs of pixels of a unit, over the channels.

    (num_units, images, channels, *pixels) to (num_units, images, *pixels, images, *pixels).
    """
    num_units, num_images, _, *pixels = images.shape
    rows = images.flatten(3).mT.flatten(1, 2)  # (num_units, images and pixels, channels)
    return (rows @ rows.mT).view(num_units, num_images, *pixels, num_images, *pixels)


def _rows(inputs: Tensor) -> Tensor:
    """(num, ..., features) to (num, positions, features)."""
    return inputs.reshape(len(inputs), -1, inputs.shape[-1])


def _by_channel(images: Tensor) -> Tensor:
    """(num, channels, ...) to (num, channels, pixels)."""
    return images.reshape(*images.shape[:2], -1)


def _sizes(images: Tensor) -> tuple[int, int, int]:
    """Images, channels, and pixels of each."""
    return images.shape[0], images.shape[1], images[0, 0].numel()
