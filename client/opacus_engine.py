"""Opacus' per-sample gradients behind the same seam: slower, and somebody else's code.

A study may choose it; the check at start-up (client/clipping.py) refuses the models of which it
tells gradients wrongly.

Source: Yousefpour et al. (2021), Opacus: User-Friendly Differential Privacy Library in PyTorch.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import vmap

from client.units import Grouping, Units, factors_of, physical_batches, squares_of
from common.models.flat import FlatNetwork
from common.tasks import Loss

MAX_ENTRIES = 1 << 26  # of per-image gradients held at once


class OpacusEngine:
    """Per-image gradients by Opacus' hooks; added up by unit, clipped and summed here."""

    def __init__(self, network: FlatNetwork) -> None:
        self._module = network.module
        self._num_params = network.values.numel()

    def clipped_sum(self, units: Units, loss: Loss, clip_norm: float) -> Tensor:
        """See ``ClippingEngine``."""
        trained = [p for p in self._module.parameters() if p.requires_grad]
        total = torch.zeros(self._num_params, dtype=trained[0].dtype, device=trained[0].device)
        most = max(1, MAX_ENTRIES // self._num_params)
        for batch in physical_batches(units, most):
            rows = self._rows(batch, loss, trained)
            factors = factors_of(squares_of(rows).sqrt(), clip_norm, rows.dtype)
            # Nothing times 0 is not always 0.
            rows = torch.where(factors[:, None] > 0, rows, torch.zeros_like(rows))
            total += factors @ rows
        return total

    def _rows(self, units: Units, loss: Loss, trained: list[nn.Parameter]) -> Tensor:
        """The units' mean gradients, (num_units, num_params)."""
        from opacus.grad_sample import GradSampleModule

        grouping = Grouping(units.sizes, units.pixels.device)
        kept = [p.grad for p in trained]
        # Opacus looks at layers in training mode alone; dropout keeps the mode that it has.
        layers = [m for m in self._module.modules() if list(m.parameters(recurse=False))]
        modes = [layer.training for layer in layers]
        hooked = GradSampleModule(self._module, loss_reduction="sum", strict=True)
        try:
            for layer in layers:
                layer.training = True
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about hooks on the first layer
                outputs = hooked(units.pixels)
                losses = vmap(loss)(outputs.unsqueeze(1), units.targets.unsqueeze(1))
                sizes = torch.tensor(units.sizes, device=losses.device)
                means = losses / sizes[grouping.unit_of]
                means.sum().backward()  # type: ignore[no-untyped-call]
            each = [_of_each(p, len(losses)) for p in trained]
        finally:
            hooked.to_standard_module()
            for layer, mode in zip(layers, modes, strict=True):
                layer.training = mode
            for parameter, grad in zip(trained, kept, strict=True):
                parameter.grad = grad
        return grouping.add_up(torch.cat(each, dim=1))


def _of_each(parameter: nn.Parameter, num_images: int) -> Tensor:
    """A parameter's gradient by image, flat; zeros where no layer that has it was called."""
    found = getattr(parameter, "grad_sample", None)
    if found is None:
        return parameter.new_zeros((num_images, parameter.numel()))
    rows: Tensor = found.detach().flatten(1)
    return rows
