"""The sum of clipped gradients from one backward over the batch, at little more than its cost.

While a batch goes through the network, the layers with parameters note what they saw; on the way
back each notes the gradient of its output. From both come the units' gradients, or their norms
alone; when all norms are known, the gradients are scaled and added up.

Source: Bu et al. (2023), Differentially Private Optimization on Large Model at Small Cost.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
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
)
from client.pooling import is_two_by_two, pooled
from client.tape import Tape, Total
from client.units import Grouping, Units, physical_batches
from common.errors import ConfigError
from common.models.flat import FlatNetwork
from common.tasks import Loss

MAX_PIXELS = 1 << 21  # of the images that go through the network at once
MAX_IMAGES = 128  # of them on a CPU: more at once are no faster there, and take memory
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
        self._values = network.values
        trained = [p for p in network.module.parameters() if p.requires_grad]
        self._sizes = {id(p): p.numel() for p in trained}
        self._max_pixels = max_pixels
        on_cpu = network.values.device.type == "cpu"
        self._max_images = MAX_IMAGES if on_cpu else max_pixels
        self._sum: Tensor | None = None  # one for all steps: fresh memory costs as much as noise
        self._layers = layers_of(network.module)
        children = network.module.modules() if on_cpu else ()
        self._pools = [child for child in children if is_two_by_two(child)]
        owners = Counter(id(p) for layer in self._layers.values() for p in layer.trained.values())
        self._shared = {key for key, number in owners.items() if number > 1}

    @torch.no_grad()
    def clipped_sum(self, units: Units, loss: Loss, clip_norm: float) -> Tensor:
        """See ``ClippingEngine``."""
        most = max(1, min(self._max_images, self._max_pixels // max(1, units.pixels[:1].numel())))
        num_parts = max(1, math.ceil(len(units.pixels) / most))
        # As large as each other, up to one unit: no unit is cut, and no part more comes of it.
        fair = math.ceil(len(units.pixels) / num_parts) + max(units.sizes, default=1) - 1
        if self._sum is None:
            self._sum = torch.empty_like(self._values)
        total = Total(self._sum, self._sizes)
        for batch in physical_batches(units, min(most, fair)):
            grouping = Grouping(batch.sizes, batch.pixels.device)
            tape = Tape(grouping, self._shared, total.room())
            self._note(tape, batch, loss)
            with _in_full_precision():
                for key, part in tape.clipped(clip_norm, self._values.dtype):
                    total.add(key, part)
        return total.done()

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
        """Let layers note what they see, without gradients of weights, and pools be ours."""
        for module, layer in self._layers.items():
            module.forward = partial(_noted, layer, tape)
        for pool in self._pools:
            pool.forward = pooled
        try:
            yield
        finally:
            for module in (*self._layers, *self._pools):
                del module.forward


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
