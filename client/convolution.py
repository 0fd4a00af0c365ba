"""A convolution's units' gradients: by windows, as groups of one, or norms first.

Which way is taken depends on shapes alone; the numbers here were fitted to measured layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from client.layer_gradients import Kept, Parts, Weighted
from client.units import Grouping

MAX_TOGETHER = 1 << 20  # entries of units' gradients that are made at once: they stay in a cache
MAX_UNITS = 16  # that they are of: more at once are no faster, and take memory
MAX_WINDOWS = 1 << 22  # entries of windows that are laid out at once
# Laying windows out pays where few places are seen by many channels, and for all images together
# at four places: torch's own function is made for many.
FEW_PLACES, MANY_CHANNELS, FEWEST_PLACES = 144, 96, 4
# Up to so many channels on both sides, the gradient of the input takes a third of the time on a CPU
# where they lie side by side; putting them there is counted in. The output takes four fifths where
# an image has many pixels and every one is a place, and longer elsewhere.
NARROW, MANY_PIXELS = 8, 1 << 12


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
        is_plain = self._groups == 1 and not self._transposed
        # Sees one pixel at each place: as a product of matrices it takes a tenth of the time.
        self._is_pointwise = is_plain and (
            {*self._kernel, *self._stride} == {1} and not any(self._padding)
        )
        self._is_narrow = is_plain and max(self.weight.shape[:2]) <= NARROW

    def prepare(self, inputs: Tensor) -> Tensor:
        """Pad, where it is done with anything but as many zeros on both sides."""
        if self._before is None:
            return inputs
        mode = "constant" if self._mode == "zeros" else self._mode
        return F.pad(inputs, self._before, mode=mode)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        """See ``Layer``."""
        if self._is_pointwise:
            # No view of anything: what follows may change it in place.
            made = inputs.new_empty((len(inputs), len(self.weight), *inputs.shape[2:]))
            rows = made.view(*made.shape[:2], -1)
            torch.bmm(self._matrices(len(inputs)), inputs.flatten(2), out=rows)
            if self._bias is not None:
                rows += self._bias.unsqueeze(1)
            return made, ()
        is_wide = set(self._stride) == {1} and inputs[0, 0].numel() >= MANY_PIXELS
        order = self._best_order(inputs) if is_wide else torch.contiguous_format
        made = torch.convolution(
            inputs.contiguous(memory_format=order),
            self.weight,
            self._bias,
            *self._settings(),
            self._groups,  # type: ignore[call-arg]
        )
        return made if order == torch.contiguous_format else _in_usual_order(made), ()

    def backward(self, inputs: Tensor, gradient: Tensor, kept: Kept) -> Tensor:
        """See ``Layer``."""
        del kept
        if self._is_pointwise:
            made = torch.bmm(self._matrices(len(inputs)).mT, gradient.flatten(2))
            return made.view_as(inputs)
        order = self._best_order(gradient)
        if order == torch.contiguous_format:
            made = self._backward(gradient, inputs, self.weight, self._groups, of_input=True)
            return made.contiguous()
        gradient = gradient.contiguous(memory_format=order)
        # Of the input nothing but its shape and order is asked for.
        inputs = torch.empty_like(inputs, memory_format=order)
        made = self._backward(gradient, inputs, self.weight, self._groups, of_input=True)
        return _in_usual_order(made)

    def bias_of_each(self, gradient: Tensor, grouping: Grouping) -> Tensor:
        """See ``Weighted``."""
        return grouping.add_up(gradient.flatten(2).sum(dim=2))

    def weight_of_each(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> Parts:
        """See ``Weighted``."""
        if self._has_good_windows(*self._seen_and_alone(inputs, gradient)):
            yield from self._by_windows(inputs, gradient, grouping)
            return
        # Alone, each takes half as long again.
        most = min(MAX_UNITS, max(2, MAX_TOGETHER // self.weight.numel()))
        for units, *both in grouping.alike(inputs, gradient):
            num_parts = -(-len(units) // most)
            parts = (each.chunk(num_parts) for each in (units, *both))
            for some, one, other in zip(*parts, strict=True):
                yield some, self._by_groups(one, other)

    def num_positions(self, inputs: Tensor, gradient: Tensor) -> int:
        """See ``Weighted``."""
        # A Gram matrix is made over the pixels of either; strides make one of them the larger.
        pixels = max(inputs[0, 0].numel(), gradient[0, 0].numel())
        return pixels if self._groups == 1 else 0

    def grams(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """See ``Weighted``."""
        seen, alone = self._seen_and_alone(inputs, gradient)
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
        # From the first place to the last all pixels in one run, those of the margin too: longer
        # runs are faster than they are longer. With strides there are no runs.
        is_run = set(self._stride) == {1}
        end = 1 + sum(step * (num - 1) for step, num in zip(columns, places, strict=True))
        others_shape, others_steps = ([end], [1]) if is_run else (places, other_steps)
        pairs = pixels.as_strided(
            (num_units, images, *places, images, *others_shape, *self._kernel),
            (unit, image, *steps, other, *others_steps, *in_kernel),
        )
        # One place of the kernel after the other: torch's sum over strides takes three times it.
        in_kernel_order = [pairs]
        for _ in range(num_dims):
            in_kernel_order = [part for each in in_kernel_order for part in each.unbind(-1)]
        first, *others = in_kernel_order
        total = first.clone(memory_format=torch.contiguous_format)
        for place in others:
            total += place
        if not is_run:
            return total
        shape = (*total.shape[:-1], *places)
        return total.as_strided(shape, (*total.stride()[:-1], *columns))

    def weighted(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """See ``Weighted``."""
        if self._is_pointwise:
            one, other = (each.transpose(0, 1).flatten(1) for each in (gradient, inputs))
            return (one @ other.mT).view_as(self.weight)
        seen, alone = self._seen_and_alone(inputs.unsqueeze(0), gradient.unsqueeze(0))
        if self._groups == 1 and alone[0, 0, 0].numel() <= FEWEST_PLACES:
            return self._product(seen, alone)[0]
        return self._backward(gradient, inputs, self.weight, self._groups, of_input=False)

    def _best_order(self, images: Tensor) -> torch.memory_format:
        """Of memory, but for the weight's gradient; in one dimension there is but one."""
        if not self._is_narrow or images.device.type != "cpu":
            return torch.contiguous_format
        orders = {4: torch.channels_last, 5: torch.channels_last_3d}
        return orders.get(images.ndim, torch.contiguous_format)

    def _matrices(self, num: int) -> Tensor:
        """The weight of a kernel of one pixel, for each of so many images."""
        return self.weight.flatten(1).expand(num, -1, -1)

    def _seen_and_alone(self, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernel's windows are of, and what meets each: a transpose has them exchanged."""
        return (gradient, inputs) if self._transposed else (inputs, gradient)

    def _has_good_windows(self, seen: Tensor, alone: Tensor) -> bool:
        """Whether laying windows out is the fastest way: a rule on shapes alone."""
        few = alone[0, 0].numel() <= FEW_PLACES and alone.shape[1] >= MANY_CHANNELS
        return self._is_pointwise or (self._groups == 1 and (few or seen.shape[1] == 1))

    def _by_windows(self, inputs: Tensor, gradient: Tensor, grouping: Grouping) -> Parts:
        """Each unit's gradient as one product of matrices."""
        for units, *both in grouping.alike(inputs, gradient):
            seen, alone = self._seen_and_alone(*both)
            entries = alone[0, :, 0].numel() * self.weight[0].numel()
            num_parts = -(-len(units) * entries // MAX_WINDOWS)
            parts = (each.chunk(num_parts) for each in (units, seen, alone))
            for some, one, other in zip(*parts, strict=True):
                yield some, self._product(one, other)

    def _product(self, seen: Tensor, alone: Tensor) -> Tensor:
        """Units' gradients by windows, (num_units, *shape), from (num_units, images, ...)."""
        windows = self._windows(seen, alone.shape[3:])
        rows = alone.movedim(1, -1).flatten(2)  # (units, channels, places and images)
        return torch.bmm(rows, windows.mT).view(len(seen), *self.weight.shape)

    def _windows(self, seen: Tensor, places: Sequence[int]) -> Tensor:
        """What the kernel sees at each place.

        Args:
          seen: (num_units, images, channels, *pixels).
          places: Of the kernel, by dimension.

        Returns:
          (num_units, channels and kernel, places and images): copied in the longest runs.
        """
        around = [num for each in reversed(self._padding) for num in (each, each)]
        padded = F.pad(seen.movedim(1, -1), [0, 0, *around]).contiguous()
        unit, channel, *pixels, image = padded.stride()
        num_units, images, channels = seen.shape[:3]
        in_kernel = [step * far for step, far in zip(pixels, self._dilation, strict=True)]
        steps = [step * far for step, far in zip(pixels, self._stride, strict=True)]
        return padded.as_strided(
            (num_units, channels, *self._kernel, *places, images),
            (unit, channel, *in_kernel, *steps, image),
        ).reshape(num_units, channels * self.weight[0, 0].numel(), -1)

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


def _in_usual_order(images: Tensor) -> Tensor:
    """A copy with one plane behind the other.

    ``contiguous`` leaves strides of another order where they do not matter, as for a single pixel;
    to torch's gradients of weights they do, which then raise.
    """
    return images.clone(memory_format=torch.contiguous_format)


def _gram(images: Tensor) -> Tensor:
    """Products of all pairs of pixels of a unit, over the channels.

    (num_units, images, channels, *pixels) to (num_units, images, *pixels, images, *pixels).
    """
    num_units, num_images, _, *pixels = images.shape
    rows = images.flatten(3).mT.flatten(1, 2)  # (num_units, images and pixels, channels)
    return (rows @ rows.mT).view(num_units, num_images, *pixels, num_images, *pixels)
