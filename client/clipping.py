"""The sum of clipped per-patient gradients: what differential privacy adds its noise to.

``ClippingEngine`` is the seam: an engine gets images grouped by privacy unit and returns the sum of
the units' gradients, each scaled down to at most the clip norm over all parameters.
``by_brute_force`` is what every engine must equal; ``check_engine`` holds this site's engine and
model against it before data is opened.

Source: Abadi et al. (2016), Deep Learning with Differential Privacy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from client.bookkeeping import BookKeepingEngine
from client.opacus_engine import OpacusEngine
from client.units import Units
from common.errors import ConfigError
from common.models.flat import FlatNetwork
from common.study import Engine
from common.tasks import Loss

TOLERANCE = 1e-9  # of the start-up check, in float64


class ClippingEngine(Protocol):
    """Anything that returns the sum of clipped unit gradients."""

    def clipped_sum(self, units: Units, loss: Loss, clip_norm: float) -> Tensor:
        """Sum over units of their clipped mean gradient, shape (num_params,).

        The next call may write over it, with anything if it fails.
        """
        ...


ENGINES: dict[Engine, Callable[[FlatNetwork], ClippingEngine]] = {
    "book-keeping": BookKeepingEngine,
    "opacus": OpacusEngine,
}


def by_brute_force(module: nn.Module, units: Units, loss: Loss, clip_norm: float) -> Tensor:
    """The definition, one unit after the other: mean gradient, clip, add; shape (num_params,)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    total = total.to(units.pixels.device)
    start = 0
    for size in units.sizes:
        part = slice(start, start + size)
        start += size
        losses = [
            loss(module(image.unsqueeze(0)), target.unsqueeze(0))
            for image, target in zip(units.pixels[part], units.targets[part], strict=True)
        ]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
        gradient = torch.cat([g.flatten() for g in gradients])
        norm = float(gradient.square().sum().sqrt())
        total += gradient * min(1.0, clip_norm / norm) if norm else gradient
    return total


def check_engine(
    name: Engine, network: FlatNetwork, shape: Sequence[int], loss: Loss, targets: Tensor
) -> None:
    """Two made-up patients through the engine and by brute force, before data is opened.

    Args:
      name: The study's engine.
      network: The site's own network.
      shape: Of one image, (channels, ...).
      loss: The study's loss.
      targets: Three made-up targets.

    Raises:
      ConfigError: The engine differs from the definition on this model: no guarantee would hold.
    """
    # A copy in float64, where a real difference shows, and without dropout, which would draw anew.
    module = copy.deepcopy(network.module).double().eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    units = Units(pixels.to(network.values.device), targets, sizes=(1, 2))
    flat = FlatNetwork(module, network.values.device, dtype=torch.float64)
    engine = ENGINES[name](flat)
    exact = by_brute_force(module, units, loss, clip_norm=1e-3)
    ours = engine.clipped_sum(units, loss, clip_norm=1e-3)
    error = float((ours - exact).abs().max() / exact.abs().max().clamp_min(1e-300))
    # Two clipped units: what they add up to is bounded whatever both of the above say.
    if not error <= TOLERANCE or float(ours.norm()) > 2e-3 * (1 + TOLERANCE):
        raise ConfigError(
            f"the clipping engine {name} differs from brute force on this model (relative error "
            f"{error:.1e}, at most {TOLERANCE:.0e}); differential privacy would not hold, so "
            "nothing is trained"
        )


def check_layers(module: nn.Module) -> None:
    """Refuse layers that couple the images of a batch, by name.

    Raises:
      ConfigError: The model has such a layer; one patient's gradient would depend on another's.
    """
    from opacus.validators import ModuleValidator

    if errors := ModuleValidator.validate(module, strict=False):
        named = "; ".join(str(error) for error in errors)
        raise ConfigError(f"model: this network cannot be trained privately: {named}")
