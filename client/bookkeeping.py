"""The sum of clipped gradients from one backward over the batch, at little more than its cost.

While a batch goes through the network, the layers with parameters note what they saw; on the way
back each notes the gradient of its output. From both come the units' gradients, or their norms
alone; when all norms are known, the gradients are scaled and added up.

Source: Bu et al. (2023), Differentially Private Optimization on Large Model at Small Cost.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from client.convolution import Convolution
from client.layer_gradients import (
    Embedding,
    GroupNorm,
    Layer,
    LayerNorm,
    Linear,
    PReLU,
    Weighted,
)
from client.units import Grouping, Units, factors_of, physical_batches, squares_of
from common.errors import ConfigError
from common.models.flat import FlatNetwork
from common.tasks import Loss

MAX_PIXELS = 1 << 21  # of the images that go through the network at once
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
    nn.Embedding: Embedding,
}


class BookKeepingEngine:
    """Book-keeping for every layer of every model that a study may name.

    Raises:
      ConfigError: The network has another layer with parameters that are trained; it is named.
    """

    def __init__(self, network: FlatNetwork, max_pixels: int = MAX_PIXELS) -> None:
        self._module = network.module
        self._num_params = network.schema.num_params
        self._max_pixels = max_pixels
        self._layers = layers_of(network.module)
        owners = Counter(id(p) for layer in self._layers.values() for p in layer.trained.values())
        self._shared = {key for key, number in owners.items() if number > 1}

    @torch.no_grad()
    def clipped_sum(self, units: Units, loss: Loss, clip_norm: float) -> Tensor:
        """See ``ClippingEngine``."""
        trained = [p for p in self._module.parameters() if p.requires_grad]
        most = self._max_pixels // max(1, units.pixels[:1].numel())
        total: Tensor | None = None
        for batch in physical_batches(units, max(1, most)):
            tape = Tape(Grouping(batch.sizes, batch.pixels.device), self._shared)
            self._note(tape, batch, loss)
            with _in_full_precision():
                parts = tape.clipped(clip_norm, trained[0].dtype)
            some = torch.cat([parts.pop(id(p), p.new_zeros(p.numel())) for p in trained])
            total = some if total is None else total.add_(some)
        if total is None:  # an empty draw
            return torch.zeros(self._num_params, dtype=trained[0].dtype, device=trained[0].device)
        return total

    def _note(self, tape: Tape, units: Units, loss: Loss) -> None:
        """Forward and backward through the network; the tape holds what the layers noted."""
        with self._noting(tape), _in_full_precision(), torch.enable_grad():
            outputs = self._module(units.pixels)
            # By its definition for one image: what a loss does over a batch would couple units.
            losses = vmap(loss)(outputs.unsqueeze(1), units.targets.unsqueeze(1))
            means = losses / torch.tensor(units.sizes, device=losses.device)[tape.grouping.unit_of]
            means.sum().backward(inputs=[tape.anchor])  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _noting(self, tape: Tape) -> Iterator[None]:
        """Let every layer note what it sees, and nothing compute gradients of weights."""
        for module, layer in self._layers.items():
            module.forward = partial(_noted, layer, tape)
        try:
            yield
        finally:
            for module in self._layers:
                del module.forward


class Tape:
    """Private. What one batch left behind at every layer.

    Attributes:
      grouping: Which images belong together.
      anchor: Makes autograd come by every layer, the first one, too.
    """

    def __init__(self, grouping: Grouping, shared: set[int]) -> None:
        self.grouping = grouping
        self.anchor = torch.zeros((), device=grouping.unit_of.device, requires_grad=True)
        self._shared = shared
        self._calls: Counter[Layer] = Counter()
        # By parameter: some units and their gradients, (as many, num).
        self._each: dict[int, list[tuple[slice | Tensor, Tensor]]] = {}
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
        flat = [(units, part.flatten(1)) for units, part in parts]
        if id(parameter) in self._each:
            whole = parameter.new_zeros((self.grouping.num_units, parameter.numel()))
            for units, part in [*self._each[id(parameter)], *flat]:
                whole[units] += part
            flat = [(slice(None), whole)]
        self._each[id(parameter)] = flat

    def clipped(self, clip_norm: float, dtype: torch.dtype) -> dict[int, Tensor]:
        """The sum of the units' gradients, each scaled to the clip norm; flat, by parameter."""
        nothing = self.anchor.new_zeros(self.grouping.num_units, dtype=torch.float64)
        squares = torch.stack([nothing, *self._squares]).sum(dim=0)
        for units, part in itertools.chain.from_iterable(self._each.values()):
            squares[units] += squares_of(part)
        factors = factors_of(squares.sqrt(), clip_norm, dtype)
        if not bool(factors.all()):
            self._leave_out(factors)
        made: dict[int, Tensor] = {}
        for key in list(self._each):
            for units, part in self._each.pop(key):
                scaled = factors[units] @ part
                made[key] = made[key].add_(scaled) if key in made else scaled
        by_image = factors[self.grouping.unit_of]
        while self._later:
            layer, inputs, gradient = self._later.pop()
            scaled = gradient * _over(gradient, by_image)
            made[id(layer.weight)] = layer.weighted(inputs, scaled).flatten()
        return made

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


class _Note(torch.autograd.Function):
    """A layer whose output is its own; what is done to that in place stays behind it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, _: Tensor, layer: Layer, tape: Tape) -> Tensor:
        inputs = inputs.contiguous()  # in another order some of torch's functions go wrong
        outputs, kept = layer.forward(inputs)
        ctx.save_for_backward(inputs, *kept)
        ctx.layer, ctx.tape = layer, tape
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        inputs, *kept = ctx.saved_tensors
        gradient = gradient.contiguous()
        layer, tape = ctx.layer, ctx.tape
        about = inputs, gradient, tuple(kept), tape.grouping
        made, each = layer.both(*about) if ctx.needs_input_grad[0] else (None, layer.each(*about))
        tape.take(layer, inputs, gradient, each)
        return made, None, None, None


def layers_of(module: nn.Module) -> dict[nn.Module, Layer]:
    """Every layer that is trained, by its module.

    Raises:
      ConfigError: One is of a kind whose units' gradients nobody here can tell.
    """
    found = {}
    for name, child in module.named_modules():
        keeps = isinstance(child, _InstanceNorm) and child.track_running_stats
        if keeps or isinstance(child, _BatchNorm):
            raise ConfigError(
                f"model: layer {name or 'itself'} ({type(child).__name__}) has statistics of many "
                "images; one patient's gradient would depend on another's"
            )
        if not any(p.requires_grad for p in child.parameters(recurse=False)):
            continue
        if type(child) not in KINDS:
            raise ConfigError(
                f"model: layer {name or 'itself'} ({type(child).__name__}) has parameters of its "
                "own; the clipping engine cannot tell a patient's part of their gradient"
            )
        found[child] = KINDS[type(child)](child)
    return found


@contextlib.contextmanager
def _in_full_precision() -> Iterator[None]:
    """A GPU's convolutions keep ten bits of each number where they may: no margin covers that."""
    cudnn = torch.backends.cudnn
    kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    with cudnn.flags(**kept, allow_tf32=False):
        yield


def _noted(layer: Layer, tape: Tape, inputs: Tensor) -> Tensor:
    tape.called(layer)
    outputs: Tensor = _Note.apply(layer.prepare(inputs), tape.anchor, layer, tape)  # type: ignore[no-untyped-call]
    return outputs


def _over(rows: Tensor, factors: Tensor) -> Tensor:
    """Factors of rows, shaped so that they multiply them."""
    return factors.view(-1, *[1] * (rows.ndim - 1))


def _zeroed(rows: Tensor, factors: Tensor) -> Tensor:
    return torch.where(_over(rows, factors) != 0, rows, 0)
