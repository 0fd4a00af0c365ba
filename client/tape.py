"""What one batch left behind at every layer, and the clipped sum that is made of it."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from client.layer_gradients import Layer, Weighted
from client.units import Grouping, factors_of, squares_of

MAX_SMALL = 1 << 12  # entries of a parameter that is looked at together with others
SMALL = 0  # stands for all of these; no object has it as its number


class Total:
    """Private. The sum over the physical batches, put together where it stays.

    Args:
      whole: Is written over, shape (num_params,).
      sizes: Entries of each parameter by its number, in their order.
    """

    def __init__(self, whole: Tensor, sizes: dict[int, int]) -> None:
        self._whole = whole
        parts = torch.split(self._whole, list(sizes.values()))
        self._parts = dict(zip(sizes, parts, strict=True))
        self._empty = set(sizes)

    def add(self, key: int, part: Tensor) -> None:
        """Add to a parameter's part; to one that nothing was added to, write."""
        if key in self._empty:
            self._empty.remove(key)
            self._parts[key].copy_(part)
        else:
            self._parts[key].add_(part)

    def room(self) -> Tensor:
        """Numbers that nobody needs before the next ``add``, shape (num,)."""
        return self._whole if len(self._empty) == len(self._parts) else self._whole[:0]

    def done(self) -> Tensor:
        """All of it, shape (num_params,)."""
        for key in self._empty:  # nobody used it
            self._parts[key].zero_()
        return self._whole


class Tape:
    """Private. What one batch left behind at every layer.

    Args:
      grouping: Which images belong together.
      shared: Parameters that several layers use, by number.
      room: Is written over, until ``clipped`` gives its first part: the units' gradients of a deep
        network's first layers take as much memory as the sum, which waits for them.

    Attributes:
      grouping: Which images belong together.
      anchor: Makes autograd come by every layer, the first one, too.
    """

    def __init__(self, grouping: Grouping, shared: set[int], room: Tensor) -> None:
        self.grouping = grouping
        self.anchor = torch.zeros((), device=grouping.unit_of.device, requires_grad=True)
        self._shared = shared
        self._room = room
        self._calls: Counter[Layer] = Counter()
        # By parameter: some units, and their gradients, (as many, num).
        self._each: dict[int, list[tuple[slice | Tensor, Tensor]]] = {}
        self._small: dict[int, Tensor] = {}  # of these, those that are looked at together
        self._later: list[tuple[Weighted, Tensor, Tensor]] = []  # norms are known, gradients not
        self._squares: list[Tensor] = []  # of those norms

    def called(self, layer: Layer) -> None:
        """A batch goes through a layer."""
        self._calls[layer] += 1

    def take(self, layer: Layer, inputs: Tensor, gradient: Tensor, each: dict[str, Tensor]) -> None:
        """Note what a layer saw, the gradient of its output, and what it tells of each unit."""
        if isinstance(layer, Weighted) and "weight" in layer.trained:
            if self._is_large(layer, inputs, gradient):
                self._squares.append(layer.squares(inputs, gradient, self.grouping))
                self._later.append((layer, inputs, gradient))
            else:
                self._add(layer.weight, layer.weight_of_each(inputs, gradient, self.grouping))
        for name, made in each.items():
            if name in layer.trained:
                self._add(layer.trained[name], [(slice(None), made)])

    def _add(self, parameter: Tensor, parts: Iterable[tuple[slice | Tensor, Tensor]]) -> None:
        """Keep the units' gradients; those of one parameter's several uses add up."""
        flat = [(units, self._put(part.flatten(1))) for units, part in parts]
        if id(parameter) in self._each:
            whole = parameter.new_zeros((self.grouping.num_units, parameter.numel()))
            for units, part in [*self._each[id(parameter)], *flat]:
                whole[units] += part
            flat = [(slice(None), whole)]
        self._each[id(parameter)] = flat

    def _put(self, part: Tensor) -> Tensor:
        """The same, in the room where it is large and there is some left."""
        num = part.numel()
        if part.shape[1] <= MAX_SMALL or num > len(self._room):
            return part
        place, self._room = self._room[:num], self._room[num:]
        return place.view_as(part).copy_(part)

    def clipped(self, clip_norm: float, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """The sum of the units' gradients, each scaled to the clip norm: parts, by parameter."""
        self._together()
        nothing = self.anchor.new_zeros(self.grouping.num_units, dtype=torch.float64)
        squares = torch.stack([nothing, *self._squares]).sum(dim=0)
        for units, part in itertools.chain.from_iterable(self._each.values()):
            squares[units] += squares_of(part)
        factors = factors_of(squares.sqrt(), clip_norm, dtype)
        if not bool(factors.all()):
            self._leave_out(factors)
        sums: list[tuple[int, Tensor]] = []
        while self._each:
            key, parts = self._each.popitem()
            scaled = (factors[units] @ part for units, part in parts)
            sums += self._apart(key, functools.reduce(torch.add, scaled))
        yield from sums  # from here on there is no room
        by_image = factors[self.grouping.unit_of]
        while self._later:
            layer, inputs, gradient = self._later.pop()
            gradient = gradient * _over(gradient, by_image)
            yield id(layer.weight), layer.weighted(inputs, gradient).flatten()

    def _together(self) -> None:
        """Make one parameter of many small ones: what is done with each costs more than they do."""
        for key, parts in list(self._each.items()):
            units, part = parts[0]
            if (
                isinstance(units, slice)
                and len(part) == self.grouping.num_units
                and part.shape[1] <= MAX_SMALL
            ):
                self._small[key] = part
                del self._each[key]
        if self._small:
            self._each[SMALL] = [(slice(None), torch.cat(list(self._small.values()), dim=1))]

    def _apart(self, key: int, scaled: Tensor) -> Iterator[tuple[int, Tensor]]:
        if key != SMALL:
            yield key, scaled
            return
        sizes = [part.shape[1] for part in self._small.values()]
        yield from zip(self._small, torch.split(scaled, sizes), strict=True)

    def _leave_out(self, factors: Tensor) -> None:
        """Put zeros where a unit's factor is 0: nothing times 0 is not always 0."""
        for parts in self._each.values():
            for number, (units, part) in enumerate(parts):
                parts[number] = units, _zeroed(part, factors[units])
        by_image = factors[self.grouping.unit_of]
        for number, (layer, *both) in enumerate(self._later):
            inputs, gradient = (_zeroed(each, by_image) for each in both)
            self._later[number] = layer, inputs, gradient

    def _is_large(self, layer: Weighted, inputs: Tensor, gradient: Tensor) -> bool:
        # Gradients of several uses add up before the norm is taken.
        is_used_once = self._calls[layer] == 1 and id(layer.trained["weight"]) not in self._shared
        return is_used_once and layer.has_large_weight(inputs, gradient, self.grouping)


def _over(rows: Tensor, factors: Tensor) -> Tensor:
    """Factors of rows, shaped so that they multiply them."""
    return factors.view(-1, *[1] * (rows.ndim - 1))


def _zeroed(rows: Tensor, factors: Tensor) -> Tensor:
    return torch.where(_over(rows, factors) != 0, rows, 0)
