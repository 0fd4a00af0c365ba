"""The clipping engine equals its definition on every model, and one unit never counts more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federation import tiny_study
from torch import Tensor, nn

from client import bookkeeping
from client.bookkeeping import BookKeepingEngine
from client.clipping import by_brute_force, check_engine, check_layers
from client.opacus_engine import OpacusEngine
from client.units import Units, factors_of, squares_of
from common.errors import ConfigError
from common.models.build import build_network, row_shape
from common.models.flat import FlatNetwork
from common.study import Study
from common.tasks import task_of

LABELS = {"kind": "classification", "classes": ["no lesion", "lesion"]}
MASKS = {"kind": "segmentation", "classes": ["background", "lung", "lesion"]}
BOXES = {"kind": "detection", "classes": ["cell", "platelet"], "max_boxes": 4}
SMALL = {"channels": [4, 8, 16]}
OVERLAP = {"kind": "dice-cross-entropy", "class_weights": [1.0, 2.0, 5.0]}

# Title: task, model, side of an image, loss.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "cnn": (LABELS, {"name": "cnn", "width": 4}, (16, 16), {}),
    "cnn, tanh, max": (
        LABELS,
        {"name": "cnn", "width": 4, "activation": "tanh", "pooling": "max"},
        (16, 16),
        {"kind": "focal", "class_weights": [1.0, 3.0]},
    ),
    "cnn, partly frozen": (
        LABELS,
        {"name": "cnn", "width": 4, "frozen": ["features.0", "features.1"]},
        (16, 16),
        {},
    ),
    "resnet18": (LABELS, {"name": "resnet18", "stem_stride": 2}, (16, 16), {}),
    "resnet18 in 3D": (LABELS, {"name": "resnet18", "max_pool": False}, (16, 16, 16), {}),
    "densenet121": (LABELS, {"name": "densenet121"}, (32, 32), {}),
    "efficientnet-b0": (LABELS, {"name": "efficientnet-b0"}, (32, 32), {}),
    "unet": (MASKS, {"name": "unet"}, (32, 32), OVERLAP),
    "unet without residual units": (
        MASKS,
        {"name": "unet", **SMALL, "residual_units": 0},
        (16, 24),
        {"kind": "dice"},
    ),
    "unet in 3D": (MASKS, {"name": "unet", **SMALL}, (16, 16, 16), OVERLAP),
    "attention-unet": (MASKS, {"name": "attention-unet", **SMALL}, (32, 32), OVERLAP),
    "segresnet": (MASKS, {"name": "segresnet", "blocks": [1, 2]}, (16, 24), OVERLAP),
    "segresnet in 3D": (MASKS, {"name": "segresnet", "blocks": [1, 1]}, (8, 16, 8), OVERLAP),
    "attention-unet in 3D": (MASKS, {"name": "attention-unet", **SMALL}, (8, 16, 16), OVERLAP),
    "logistic": (LABELS, {"name": "logistic"}, (), {}),
    "mlp": (LABELS, {"name": "mlp", "hidden": [6, 4]}, (), {"kind": "focal"}),
    "multimodal": (
        LABELS,
        {"name": "multimodal", "image": {"name": "cnn", "width": 4}, "image_features": 5},
        (16, 16),
        {},
    ),
    "center-unet": (BOXES, {"name": "center-unet", **SMALL}, (32, 32), {"kind": "focal"}),
}
CLINICAL = {"columns": [{"name": f"lab {k}", "kind": "number"} for k in range(7)]}
RAGGED = (1, 5, 2, 3)


class Odd(nn.Module):
    """A module called twice, and operations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(1, 1)

    def forward(self, images: Tensor) -> Tensor:
        kept = self.shared(self.shared(images)) * 1.5
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


def _study(title: str) -> Study:
    task, model, size, loss = MODELS[title]
    training = {"learning_rate": 0.1, "batch_size": 4, "local_steps": 1, "loss": loss}
    beside = {"table": CLINICAL} if model["name"] in ("logistic", "mlp", "multimodal") else {}
    given = {"size": size, "intensity": "image"}
    return tiny_study(task=task, model=model, training=training, input=given, **beside)


def _made_up(study: Study, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Units:
    shape = (sum(sizes), *row_shape(study))
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return Units(pixels, task_of(study).made_up_targets(sum(sizes)), sizes)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e6], ids=["all clipped", "none clipped"])
@pytest.mark.parametrize("title", MODELS)
def test_the_engine_equals_brute_force_on_ragged_patients(title: str, clip_norm: float) -> None:
    study = _study(title)
    network, loss = _double(build_network(study).module), task_of(study).local_loss(None)
    units = _made_up(study, RAGGED)
    check_layers(network.module.train())
    network.module.eval()
    exact = by_brute_force(network.module, units, loss, clip_norm)
    assert exact.shape == (network.schema.num_params,)
    ours = BookKeepingEngine(network).clipped_sum(units, loss, clip_norm)
    assert _relative_error(ours, exact) <= 1e-12


@pytest.mark.parametrize("title", MODELS)
def test_every_model_takes_an_empty_draw_and_trains(title: str) -> None:
    study = _study(title)
    network, loss = build_network(study), task_of(study).local_loss(None)
    network.module.train()  # dropout and skipped layers are drawn for each image
    engine = BookKeepingEngine(network)
    none = _made_up(study, (), torch.float32)
    assert not engine.clipped_sum(none, loss, 1.0).any()
    some = engine.clipped_sum(_made_up(study, (1, 2), torch.float32), loss, 0.5)
    assert 0 < float(some.norm()) <= 1.0 * (1 + 1e-5)


def test_overlap_over_the_whole_batch_is_refused_under_privacy() -> None:
    loss = {"kind": "dice", "dice_over": "batch"}
    training = {"learning_rate": 0.1, "batch_size": 4, "local_steps": 1, "loss": loss}
    private = {"noise_multiplier": 1.0, "delta": 1e-5, "example_clip_norm": 1.0}
    changes = {"task": MASKS, "model": {"name": "unet"}, "training": training}
    tiny_study(**changes)  # without privacy it may
    with pytest.raises(ConfigError, match=r"training\.loss\.dice_over: .*depend on another"):
        tiny_study(**changes, privacy=private)


def test_modules_called_twice_and_operations_in_place_are_exact() -> None:
    network, units = _double(Odd()), _units(RAGGED)
    exact = by_brute_force(network.module, units, _loss(), 0.01)
    ours = BookKeepingEngine(network).clipped_sum(units, _loss(), 0.01)
    assert _relative_error(ours, exact) <= 1e-12


def test_physical_batches_do_not_cut_a_patient_in_two() -> None:
    network = _double(build_network(tiny_study()).module)
    units = _units((2, 5, 1, 4, 3))
    whole = BookKeepingEngine(network).clipped_sum(units, _loss(), 0.01)
    small = BookKeepingEngine(network, max_pixels=4 * units.pixels[0].numel())
    assert _relative_error(small.clipped_sum(units, _loss(), 0.01), whole) <= 1e-12


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ((2, 5, 1, 4, 3), 6, [2, 6, 4, 3]),
        ((1,) * 7, 6, [4, 3]),
        ((4,) * 5, 13, [12, 8]),
    ],
)
def test_a_large_draw_goes_through_in_parts(sizes, most, expected, monkeypatch) -> None:
    network, units = _double(build_network(tiny_study()).module), _units(sizes)
    whole = BookKeepingEngine(network).clipped_sum(units, _loss(), 0.01)
    monkeypatch.setattr(bookkeeping, "MAX_IMAGES", most)
    parts: list[int] = []
    network.module.register_forward_pre_hook(lambda _, given: parts.append(len(given[0])))
    small = BookKeepingEngine(network).clipped_sum(units, _loss(), 0.01)
    assert parts == expected
    assert _relative_error(small, whole) <= 1e-12


def test_a_step_does_not_see_the_one_before() -> None:
    network, units = _double(build_network(tiny_study()).module), _units((2, 1, 3))
    engine = BookKeepingEngine(network)
    first = engine.clipped_sum(units, _loss(), 0.01).clone()
    assert not engine.clipped_sum(_units(()), _loss(), 0.01).any()
    assert torch.equal(engine.clipped_sum(units, _loss(), 0.01), first)


@pytest.mark.parametrize("title", ["cnn", "cnn, tanh, max", "unet", "unet in 3D"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), RAGGED], ids=["images", "patients"])
def test_the_engine_equals_opacus_where_that_is_right(title: str, sizes: tuple[int, ...]) -> None:
    study = _study(title)
    network, loss = _double(build_network(study).module), task_of(study).local_loss(None)
    units, clip_norm = _made_up(study, sizes), 1e-2
    ours = BookKeepingEngine(network).clipped_sum(units, loss, clip_norm)
    theirs = OpacusEngine(network).clipped_sum(units, loss, clip_norm)
    assert _relative_error(ours, theirs) <= 1e-12
    # Nothing of Opacus stays behind: the engine may be used beside plain training.
    assert not any(hasattr(p, "grad_sample") for p in network.module.parameters())
    assert _relative_error(OpacusEngine(network).clipped_sum(units, loss, clip_norm), theirs) == 0


def test_what_opacus_tells_wrongly_is_refused_at_the_start() -> None:
    targets = torch.tensor([0, 1, 0])
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 1),
    )
    network = FlatNetwork(module, torch.device("cpu"))
    check_engine("book-keeping", network, (1, 32, 32), _loss(), targets)
    with pytest.raises(ConfigError, match="clipping engine opacus differs from brute force"):
        check_engine("opacus", network, (1, 32, 32), _loss(), targets)


def test_an_empty_draw_is_a_sum_of_zero() -> None:
    network = _double(build_network(tiny_study()).module)
    total = BookKeepingEngine(network).clipped_sum(_units(()), _loss(), 1.0)
    assert total.shape == (network.schema.num_params,)
    assert not total.any()


def test_a_patient_with_many_images_never_exceeds_the_clip_norm() -> None:
    network = _double(build_network(tiny_study()).module)
    engine, clip_norm = BookKeepingEngine(network), 0.05
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
    expected = BookKeepingEngine(network).clipped_sum(alone, _loss(), 0.1)
    units.pixels[0] = torch.inf
    assert torch.allclose(BookKeepingEngine(network).clipped_sum(units, _loss(), 0.1), expected)


def test_batch_norm_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    with pytest.raises(ConfigError, match="BatchNorm"):
        check_layers(module)


def test_the_start_up_check_refuses_an_engine_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = build_network(tiny_study())
    targets = torch.tensor([0, 1, 0])
    check_engine("book-keeping", network, (1, 32, 32), _loss(), targets)
    right = BookKeepingEngine.clipped_sum
    monkeypatch.setattr(
        BookKeepingEngine, "clipped_sum", lambda *args, **kw: right(*args, **kw) * 1.001
    )
    with pytest.raises(ConfigError, match="differs from brute force"):
        check_engine("book-keeping", network, (1, 32, 32), _loss(), targets)


def test_the_bound_holds_in_float32_with_as_many_parameters_as_a_resnet() -> None:
    rows = torch.randn((3, 11_000_000), generator=torch.Generator().manual_seed(0))
    for row in rows:
        factors = factors_of(squares_of(row[None]).sqrt(), 0.7, row.dtype)
        clipped = (factors @ row[None]).double().norm()
        assert 0.7 * (1 - 1e-4) < float(clipped) <= 0.7


def test_the_start_up_check_refuses_an_engine_that_does_not_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("client.tape.factors_of", lambda norms, *_: torch.ones_like(norms))
    with pytest.raises(ConfigError, match="differs from brute force"):
        check_engine(
            "book-keeping",
            build_network(tiny_study()),
            (1, 32, 32),
            _loss(),
            torch.tensor([0, 1, 0]),
        )


def test_the_start_up_check_refuses_a_sum_that_is_too_long_even_where_brute_force_agrees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = build_network(tiny_study())
    unclipped = torch.ones(network.values.numel(), dtype=torch.float64)
    monkeypatch.setattr("client.clipping.by_brute_force", lambda *_, **__: unclipped)
    monkeypatch.setattr(BookKeepingEngine, "clipped_sum", lambda *_, **__: unclipped)
    with pytest.raises(ConfigError, match="differential privacy would not hold"):
        check_engine("book-keeping", network, (1, 32, 32), _loss(), torch.tensor([0, 1, 0]))
