"""Networks as one vector: views, not copies; and networks whose images do not touch each other."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.models.build import build_network
from common.models.flat import FlatNetwork, Schema
from common.models.normalise import to_group_norm
from common.study import Study

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"name": "cnn", "width": 8},
    "cnn with GELU and dropout": {"name": "cnn", "activation": "gelu", "dropout": 0.5},
    "cnn with tanh": {"name": "cnn", "activation": "tanh"},
    "cnn with max pooling": {"name": "cnn", "pooling": "max"},
    "resnet18": {"name": "resnet18"},
    "resnet18 without pooling": {"name": "resnet18", "stem_stride": 1, "max_pool": False},
}
SMALL = "cnn"

every_model = pytest.mark.parametrize("model", MODELS)


class TwoLayers(nn.Module):
    """A frozen layer between two that travel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.first(inputs)).tanh())


@pytest.fixture
def study_with(make_study: Callable[..., Study]) -> Callable[..., Study]:
    def study(model: str, **more: Any) -> Study:
        return make_study({"model": MODELS[model]}, **more)

    return study


@pytest.fixture
def network(study_with: Callable[..., Study]) -> FlatNetwork:
    return build_network(study_with(SMALL))


def images(num: int, size: int = 32, channels: int = 1) -> torch.Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(5))


def test_writing_the_vector_changes_the_network(network: FlatNetwork) -> None:
    batch = images(2)
    with torch.no_grad():
        before = network(batch)
        network.values.zero_()
        assert not torch.equal(before, network(batch))
        assert not network(batch).any()
    assert all(not parameter.any() for parameter in network.module.parameters())


def test_writing_a_parameter_changes_the_vector(network: FlatNetwork) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(network.module.parameters()):
            parameter.fill_(number)
    sizes = network.schema.sizes
    assert network.vector().tolist() == np.repeat(range(len(sizes)), sizes).tolist()


def test_backward_fills_the_flat_gradients_and_adds_to_them(network: FlatNetwork) -> None:
    network(images(2)).sum().backward()
    once = network.gradients.clone()
    of_parameters = [p.grad.reshape(-1) for p in network.module.parameters() if p.grad is not None]
    assert torch.equal(once, torch.cat(of_parameters))
    assert once.abs().sum() > 0
    network(images(2)).sum().backward()
    assert torch.allclose(network.gradients, 2 * once)


def test_loading_a_vector_gives_the_same_network_bit_for_bit(
    study_with: Callable[..., Study],
) -> None:
    one, other = (build_network(study_with(SMALL, seed=seed)) for seed in (3, 4))
    batch = images(3)
    assert not torch.equal(one(batch), other(batch))
    other.load(one.vector())
    assert torch.equal(one(batch), other(batch))
    assert np.array_equal(one.vector(), other.vector())


def test_vector_and_load_copy(network: FlatNetwork) -> None:
    vector = network.vector()
    vector[:] = 7
    assert not (network.values == 7).any()
    network.load(vector)
    vector[:] = 8
    assert (network.values == 7).all()


def test_a_read_only_vector_can_be_loaded(network: FlatNetwork) -> None:
    vector = np.frombuffer(bytes(4 * network.schema.num_params), np.float32)
    network.load(vector)
    assert not network.values.any()


def test_frozen_parameters_do_not_travel() -> None:
    module = TwoLayers()
    kept = module.frozen.weight.clone()
    flat = FlatNetwork(module, CPU)
    assert flat.schema.names == ("first.weight", "first.bias", "last.weight", "last.bias")
    assert flat.schema.shapes == ((4, 3), (4,), (2, 4), (2,))
    assert flat.schema.num_params == 12 + 4 + 8 + 2 == len(flat.vector())
    flat.load(np.full(26, 0.5, np.float32))
    flat(torch.ones(1, 3)).sum().backward()
    assert torch.equal(module.frozen.weight, kept)
    assert module.frozen.weight.grad is None
    assert (module.first.weight == 0.5).all()


def test_an_optimizer_over_the_vector_equals_one_over_the_parameters() -> None:
    torch.manual_seed(1)
    module, reference = TwoLayers(), TwoLayers()
    reference.load_state_dict(module.state_dict())
    flat = FlatNetwork(module, CPU)
    flat.values.grad = flat.gradients
    flat_steps = torch.optim.AdamW([flat.values], lr=0.1)
    steps = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        flat.gradients.zero_()
        steps.zero_grad()
        for model in (flat, reference):
            model(torch.ones(5, 3)).square().sum().backward()
        flat_steps.step()
        steps.step()
    for one, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_schema_splits_a_vector_into_named_views(network: FlatNetwork) -> None:
    vector = network.vector()
    parts = network.schema.split(vector)
    for name, parameter in network.module.named_parameters():
        assert np.array_equal(parts[name], parameter.detach().numpy())
    next(iter(parts.values()))[...] = 9
    assert (vector[: network.schema.sizes[0]] == 9).all()


def test_the_schema_digest_depends_on_names_shapes_and_order() -> None:
    schema = Schema(("a", "b"), ((2, 3), (3, 2)))
    others = [
        Schema(("b", "a"), ((3, 2), (2, 3))),
        Schema(("b", "a"), ((2, 3), (3, 2))),
        Schema(("a", "b"), ((3, 2), (2, 3))),
        Schema(("a", "b"), ((6,), (6,))),
        Schema(("a", "c"), ((2, 3), (3, 2))),
        Schema(("a",), ((2, 3),)),
    ]
    digests = {other.digest() for other in (schema, *others)}
    assert len(digests) == 1 + len(others)
    assert Schema(("a", "b"), ((2, 3), (3, 2))).digest() == schema.digest()
    assert len(schema.digest()) == 64


@every_model
def test_every_model_normalises_each_image_by_itself(
    model: str, study_with: Callable[..., Study]
) -> None:
    module = build_network(study_with(model)).module
    kinds = [type(layer) for layer in module.modules() if "Norm" in type(layer).__name__]
    assert set(kinds) == {nn.GroupNorm}
    assert not list(module.buffers())  # no statistic of patients, nothing that does not travel
    module.eval()
    batch = images(2)
    with torch.no_grad():
        alone = torch.cat([module(image[None]) for image in batch])
        assert torch.allclose(module(batch), alone, atol=1e-5)


@every_model
@pytest.mark.parametrize(("channels", "size"), [(1, [16, 24]), (3, [21, 16])])
def test_every_model_takes_the_studys_input_and_gives_its_outputs(
    model: str, channels: int, size: list[int], study_with: Callable[..., Study]
) -> None:
    task = {"kind": "classification", "labels": "multilabel", "classes": list("abcd")}
    config = {"channels": channels, "size": size}
    network = build_network(study_with(model, task=task, input=config))
    with torch.no_grad():
        assert network(torch.zeros(1, channels, *size)).shape == (1, 4)


@every_model
def test_the_seed_alone_decides_the_weights_and_the_global_generators_stay(
    model: str, study_with: Callable[..., Study]
) -> None:
    study = study_with(model)
    torch.manual_seed(99)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = build_network(study).vector()
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    torch.manual_seed(100)
    assert np.array_equal(one, build_network(study).vector())
    assert not np.array_equal(one, build_network(study_with(model, seed=study.seed + 1)).vector())
    assert np.isfinite(one).all()
    assert one.dtype == np.float32


@pytest.mark.parametrize(("width", "num_params"), [(12, 13_369), (24, 52_657)])
def test_the_cnn_has_as_many_parameters_as_its_layers(
    width: int, num_params: int, make_study: Callable[..., Study]
) -> None:
    # Convolutions of 3x3 with bias, two numbers per GroupNorm channel, one linear layer.
    planes = [1, width, 2 * width, 4 * width]
    layers = sum((9 * one + 3) * two for one, two in pairwise(planes))
    assert layers + planes[-1] + 1 == num_params
    schema = build_network(make_study({"model.width": width})).schema
    assert schema.num_params == num_params
    assert sum(schema.sizes) == num_params


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, _BatchNorm))


def test_batch_normalisation_is_replaced_wherever_it_hides() -> None:
    inner = nn.Sequential(nn.Conv2d(1, 48, 1), nn.BatchNorm2d(48))
    network = nn.Sequential(inner, nn.ModuleDict({"deep": nn.Sequential(nn.BatchNorm1d(5))}))
    assert to_group_norm(network) is network
    assert not list(batch_norms(network))
    replaced = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    assert [(layer.num_groups, layer.num_channels) for layer in replaced] == [(8, 48), (1, 5)]
