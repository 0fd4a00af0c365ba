"""The sum of clipped per-patient gradients: what differential privacy adds its noise to.

``ClippingEngine`` is the seam: an engine gets images grouped by privacy unit and returns the sum of
the units' gradients, each scaled down to at most the clip norm over all parameters. This one takes
per-image gradients with ``torch.func``; it is exact for every model the project offers, in-place
operations and modules called twice included. ``by_brute_force`` is what every engine must equal.

Source: Abadi et al. (2016), Deep Learning with Differential Privacy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from common.errors import ConfigError
from common.models.flat import FlatNetwork
from common.tasks import Loss

MAX_GRADIENT_BYTES = 256 * 2**20  # per-image gradients held at once
MAX_PIXELS = 2**19  # of the images differentiated at once: what lies between layers grows with them
TOLERANCE = 1e-9  # of the start-up check, in float64


@dataclass(frozen=True)
class Units:
    """Private. Images of several privacy units, one unit after the other.

    Attributes:
      pixels: (num_images, channels, ...).
      targets: (num_images, ...).
      sizes: Images of each unit; they add up to num_images.
    """

    pixels: Tensor
    targets: Tensor
    sizes: tuple[int, ...]


class ClippingEngine(Protocol):
    """Anything that returns the sum of clipped unit gradients."""

    def clipped_sum(self, units: Units, loss: Loss, clip_norm: float) -> Tensor:
        """Sum over units of their clipped mean gradient, shape (num_params,)."""
        ...


class PerImageEngine:
    """Per-image gradients by vectorised reverse mode, in physical batches of whole units."""

    def __init__(self, network: FlatNetwork) -> None:
        self._module = network.module
        self._names = network.schema.names
        per_image = network.schema.num_params * network.values.element_size()
        self._max_images = MAX_GRADIENT_BYTES // per_image

    def clipped_sum(self, units: Units, loss: Loss, clip_norm: float) -> Tensor:
        """See ``ClippingEngine``."""
        parameters = {
            name: parameter.detach()
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad
        }
        total = torch.zeros(
            sum(p.numel() for p in parameters.values()),
            dtype=next(iter(parameters.values())).dtype,
            device=units.pixels.device,
        )
        most = min(self._max_images, MAX_PIXELS // max(1, units.pixels[:1].numel()))
        for part in _physical_batches(units, max(1, most)):
            total += self._part(parameters, part, loss, clip_norm)
        return total

    def _part(
        self, parameters: dict[str, Tensor], units: Units, loss: Loss, clip_norm: float
    ) -> Tensor:
        def one_image(values: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            outputs = functional_call(self._module, values, (image.unsqueeze(0),))
            return loss(outputs, target.unsqueeze(0))

        each = vmap(grad(one_image), in_dims=(None, 0, 0), randomness="different")
        by_name = each(parameters, units.pixels, units.targets)
        flat = torch.cat([by_name[name].flatten(1) for name in self._names], dim=1)
        return _sum_clipped(_unit_means(flat, units.sizes), clip_norm)


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


def check_engine(network: FlatNetwork, shape: Sequence[int], loss: Loss, targets: Tensor) -> None:
    """Two made-up patients through the engine and by brute force, before data is opened.

    Args:
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
    engine = PerImageEngine(FlatNetwork(module, network.values.device, dtype=torch.float64))
    exact = by_brute_force(module, units, loss, clip_norm=1e-3)
    ours = engine.clipped_sum(units, loss, clip_norm=1e-3)
    error = float((ours - exact).abs().max() / exact.abs().max().clamp_min(1e-300))
    # Two clipped units: what they add up to is bounded whatever both of the above say.
    if not error <= TOLERANCE or float(ours.norm()) > 2e-3 * (1 + TOLERANCE):
        raise ConfigError(
            f"the clipping engine differs from brute force on this model (relative error "
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


def _physical_batches(units: Units, max_images: int) -> list[Units]:
    """Split on the borders of units, so that a unit is never cut in two."""
    parts: list[Units] = []
    start, first, held = 0, 0, 0
    for index, size in enumerate(units.sizes):
        if held and held + size > max_images:
            parts.append(_slice(units, start, held, units.sizes[first:index]))
            start, first, held = start + held, index, 0
        held += size
    if held:
        parts.append(_slice(units, start, held, units.sizes[first:]))
    return parts


def _slice(units: Units, start: int, num: int, sizes: tuple[int, ...]) -> Units:
    part = slice(start, start + num)
    return Units(units.pixels[part], units.targets[part], sizes)


def _unit_means(each: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Mean of each unit's rows: (num_images, num_params) to (num_units, num_params)."""
    if all(size == 1 for size in sizes):
        return each
    lengths = torch.tensor(sizes, device=each.device)
    unit_of = torch.repeat_interleave(torch.arange(len(sizes), device=each.device), lengths)
    sums = torch.zeros((len(sizes), each.shape[1]), dtype=each.dtype, device=each.device)
    return sums.index_add_(0, unit_of, each) / lengths[:, None]


def _sum_clipped(gradients: Tensor, clip_norm: float) -> Tensor:
    """Scale each row to at most ``clip_norm`` and add up: (num_units, num_params) to (num_params,).

    A gradient that is not finite counts as zero: it must not reach the sum unbounded.
    """
    # In float32 the squares of millions of entries add up to too little, and the bound would fail;
    # the margin covers the rounding of factor and product.
    margin = 1 - 8 * torch.finfo(gradients.dtype).eps
    norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
    factors = (margin * clip_norm / norms.clamp_min(1e-300)).clamp(max=1.0).to(gradients.dtype)
    usable = torch.isfinite(norms)
    factors = torch.where(usable, factors, torch.zeros_like(factors))
    if not bool(usable.all()):
        gradients = torch.where(usable[:, None], gradients, torch.zeros_like(gradients))
    return factors @ gradients
