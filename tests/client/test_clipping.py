"""The clipping engine equals its definition on every model, and one unit never counts more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federation import tiny_study
from torch import Tensor, nn

from client.clipping import (
    PerImageEngine,
    Units,
    by_brute_force,
    check_engine,
    check_layers,
)
from common.errors import ConfigError
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.tasks import task_of

MODELS: list[dict[str, Any]] = [
    {"name": "cnn", "width": 4},
    {"name": "cnn", "width": 4, "activation": "tanh", "pooling": "max"},
    {"name": "resnet18", "stem_stride": 2},
]
RAGGED = (1, 5, 2, 3)


class Odd(nn.Module):
    """A module called twice, an in-place operation, a parameter used on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(1, 1)

    def forward(self, images: Tensor) -> Tensor:
        kept = self.shared(self.shared(images)) * self.scale
        kept += images
        return self.head(kept.relu_().mean(dim=(2, 3)))


def _double(module: nn.Module) -> FlatNetwork:
    return FlatNetwork(module.double().eval(), torch.device("cpu"), dtype=torch.float64)


def _units(sizes: tuple[int, ...], side: int = 16, seed: int = 0) -> Units:
    rng = torch.Generator().manual_seed(seed)
    num = sum(sizes)
    pixels = torch.randn((num, 1, side, side), generator=rng, dtype=torch.float64)
    return Units(pixels, torch.arange(num) % 2, sizes)


def _loss() -> Any:
    return task_of(tiny_study()).local_loss(None)


def _relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("clip_norm", [1e-3, 1e6], ids=["all clipped", "none clipped"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m['name']}-{len(m)}")
def test_the_engine_equals_brute_force_on_ragged_patients(
    model: dict[str, Any], clip_norm: float
) -> None:
    network = _double(build_network(tiny_study(model=model)).module)
    units = _units(RAGGED)
    exact = by_brute_force(network.module, units, _loss(), clip_norm)
    ours = PerImageEngine(network).clipped_sum(units, _loss(), clip_norm)
    assert _relative_error(ours, exact) <= 1e-12


def test_modules_called_twice_and_operations_in_place_are_exact() -> None:
    network, units = _double(Odd()), _units(RAGGED)
    exact = by_brute_force(network.module, units, _loss(), 0.01)
    ours = PerImageEngine(network).clipped_sum(units, _loss(), 0.01)
    assert _relative_error(ours, exact) <= 1e-12


def test_physical_batches_do_not_cut_a_patient_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _double(build_network(tiny_study()).module)
    units = _units((2, 5, 1, 4, 3))
    whole = PerImageEngine(network).clipped_sum(units, _loss(), 0.01)
    small = PerImageEngine(network)
    monkeypatch.setattr(small, "_max_images", 4)
    assert _relative_error(small.clipped_sum(units, _loss(), 0.01), whole) <= 1e-12


def test_an_empty_draw_is_a_sum_of_zero() -> None:
    network = _double(build_network(tiny_study()).module)
    total = PerImageEngine(network).clipped_sum(_units(()), _loss(), 1.0)
    assert total.shape == (network.schema.num_params,)
    assert not total.any()


def test_a_patient_with_many_images_never_exceeds_the_clip_norm() -> None:
    network = _double(build_network(tiny_study()).module)
    engine, clip_norm = PerImageEngine(network), 0.05
    images, same_class = _units((4,)).pixels, torch.ones(4, dtype=torch.int64)
    one_patient = Units(images, same_class, (4,))
    contribution = engine.clipped_sum(one_patient, _loss(), clip_norm).norm()
    assert float(contribution) <= clip_norm * (1 + 1e-12)
    # The same four images as four units do exceed it: the unit is what makes the bound.
    four = engine.clipped_sum(Units(images, same_class, (1,) * 4), _loss(), clip_norm).norm()
    assert float(four) > 1.05 * clip_norm


def test_a_gradient_that_is_not_finite_is_left_out_of_the_sum() -> None:
    network = _double(build_network(tiny_study()).module)
    units = _units((1, 1))
    alone = Units(units.pixels[1:], units.targets[1:], (1,))
    expected = PerImageEngine(network).clipped_sum(alone, _loss(), 0.1)
    units.pixels[0] = torch.inf
    assert torch.allclose(PerImageEngine(network).clipped_sum(units, _loss(), 0.1), expected)


def test_batch_norm_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    with pytest.raises(ConfigError, match="BatchNorm"):
        check_layers(module)


def test_the_start_up_check_refuses_an_engine_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = build_network(tiny_study())
    targets = torch.tensor([0, 1, 0])
    check_engine(network, (1, 32, 32), _loss(), targets)
    right = PerImageEngine.clipped_sum
    monkeypatch.setattr(
        PerImageEngine, "clipped_sum", lambda *args, **kw: right(*args, **kw) * 1.001
    )
    with pytest.raises(ConfigError, match="differs from brute force"):
        check_engine(network, (1, 32, 32), _loss(), targets)
