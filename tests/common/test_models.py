"""Every network a study can name: its shape, its weights, what stays frozen, how it normalises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from federation import federate, tiny_study
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError
from common.models import flat
from common.models.build import build_network, digest_of_weights
from common.models.flat import FlatNetwork
from common.study import Study
from server.run_dir import FINAL

CPU = torch.device("cpu")
SMALL_UNET = {"name": "unet", "channels": [4, 8]}
PIXELS = {"kind": "segmentation", "classes": ["background", "lesion"]}
FOUR_PIXELS = {"kind": "segmentation", "classes": list("abcd")}
LABEL = {"kind": "classification", "classes": ["no", "yes"]}
FOUR_LABELS = {"kind": "classification", "labels": "multilabel", "classes": list("abcd")}

# Model and input: the smallest size that a study may give each network, and one that is not square.
CLASSIFIERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "cnn": ({"name": "cnn", "width": 4}, [8, 11]),
    "resnet18": ({"name": "resnet18"}, [16, 21]),
    "resnet18 of volumes": ({"name": "resnet18"}, [16, 17, 20]),
    "densenet121": ({"name": "densenet121"}, [32, 37]),
    "densenet121 of volumes": ({"name": "densenet121"}, [32, 32, 33]),
    "efficientnet-b0": ({"name": "efficientnet-b0"}, [32, 45]),
    "efficientnet-b0 of volumes": ({"name": "efficientnet-b0"}, [32, 32, 33]),
}
SEGMENTERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "unet": ({"name": "unet"}, [8, 24]),
    "unet without residual units": ({**SMALL_UNET, "residual_units": 0}, [8, 10]),
    "unet with dropout": ({**SMALL_UNET, "dropout": 0.5}, [8, 10]),
    "unet of volumes": ({"name": "unet"}, [8, 16, 8]),
    "attention-unet": ({"name": "attention-unet"}, [8, 24]),
    "segresnet": ({"name": "segresnet", "blocks": [1, 1]}, [8, 10]),
    "segresnet of volumes": ({"name": "segresnet", "blocks": [1, 2, 2]}, [8, 16, 8]),
    "attention-unet of volumes": ({"name": "attention-unet", "channels": [8, 16]}, [8, 10, 12]),
}
NETWORKS = CLASSIFIERS | SEGMENTERS
ONCE = [title for title in NETWORKS if "volumes" not in title]  # weights are as many and as slow

every_planar_network = pytest.mark.parametrize("title", ONCE)


@pytest.fixture
def study_with(make_study: Callable[..., Study]) -> Callable[..., Study]:
    def study(title: str, *, several: bool = False, channels: int = 1, **more: Any) -> Study:
        model, size = NETWORKS[title]
        task = (PIXELS, FOUR_PIXELS) if title in SEGMENTERS else (LABEL, FOUR_LABELS)
        sized = {"size": size, "channels": channels, "intensity": "image"}
        model = {**model, **more.pop("model", {})}
        return make_study({"task": task[several], "input": sized, "model": model}, **more)

    return study


def images(num: int, size: list[int], channels: int = 1) -> Tensor:
    return torch.randn(num, channels, *size, generator=torch.Generator().manual_seed(5))


# Shapes


@pytest.mark.parametrize(
    ("title", "channels", "several"),
    [
        pytest.param(title, *kind, id=f"{title}, {kind[0]} channels")
        for title in NETWORKS
        for kind in ([(3, True)] if "volumes" in title else [(1, False), (3, True)])
    ],
)
def test_every_network_takes_the_studys_input_and_gives_its_outputs(
    title: str, channels: int, several: bool, study_with: Callable[..., Study]
) -> None:
    study = study_with(title, several=several, channels=channels)
    size = list(study.input.size)
    network = build_network(study)
    network.module.train()
    outputs = network(images(1, size, channels))  # a batch of one: nothing to normalise over
    assert outputs.shape == (1, 4 if several else 1, *(size if title in SEGMENTERS else []))
    outputs.square().mean().backward()
    assert torch.isfinite(outputs).all()
    assert torch.isfinite(network.gradients).all()
    assert network.gradients.any()


@pytest.mark.parametrize("size", [[16, 16], [28, 28], [16, 16, 16]], ids=str)
def test_an_efficientnet_takes_every_size_that_a_study_may_give_it(
    size: list[int], make_study: Callable[..., Study]
) -> None:
    config = {"size": size, "intensity": "image"}
    try:
        study = make_study({"model": {"name": "efficientnet-b0"}, "input": config})
    except ConfigError:
        return  # refused before a site opens its data: as good
    build_network(study)(images(1, size))


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("name", ["unet", "attention-unet"])
def test_a_narrow_unet_of_small_images_learns_at_its_deepest_level(
    name: str, num_images: int, make_study: Callable[..., Study]
) -> None:
    model = {"name": name, "channels": [4, 4, 4, 4]}
    try:
        config = {"size": [8, 8], "intensity": "image"}
        study = make_study({"model": model, "task": PIXELS, "input": config})
    except ConfigError:
        return  # refused before a site opens its data: as good
    network = build_network(study)
    network.module.train()
    deepest = []
    for place, layer in network.module.named_modules():
        if place.endswith("adn.N"):
            layer.register_forward_hook(lambda _, __, out: deepest.append(out.detach()))
    network(images(num_images, [8, 8]))
    single = [out for out in deepest if out.shape[-1] == 1]
    assert single
    assert all(out.abs().max() > 0.01 for out in single)


@pytest.mark.parametrize("title", ["unet", "unet of volumes", "attention-unet"])
def test_a_unet_takes_any_size_that_halves_often_enough(
    title: str, study_with: Callable[..., Study]
) -> None:
    study = study_with(title, several=True)
    network = build_network(study)
    with torch.no_grad():
        for side in (8, 16, 40):
            size = [side, *(8 for _ in study.input.size[1:])]
            assert network(images(1, size)).shape == (1, 4, *size)


def test_the_unet_has_as_many_parameters_as_its_description_says(
    study_with: Callable[..., Study],
) -> None:
    num_params = build_network(study_with("unet")).schema.num_params
    assert round(num_params, -3) in (405_000, 406_000)  # "as given, 405,000 parameters"


@pytest.mark.parametrize(
    ("title", "millions"), [("resnet18", 11), ("densenet121", 7), ("efficientnet-b0", 4)]
)
def test_the_classifiers_have_about_as_many_parameters_as_their_description_says(
    title: str, millions: int, study_with: Callable[..., Study]
) -> None:
    assert round(build_network(study_with(title)).schema.num_params / 1e6) == millions


# Weights


@every_planar_network
def test_equal_studies_give_equal_weights_and_another_seed_others(
    title: str, study_with: Callable[..., Study]
) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    one = build_network(study_with(title))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(100)
    same, other = build_network(study_with(title)), build_network(study_with(title, seed=4))
    assert one.schema == same.schema == other.schema
    assert np.array_equal(one.vector(), same.vector())
    assert digest_of_weights(one) == digest_of_weights(same) != digest_of_weights(other)
    weights = one.vector() != other.vector()
    assert weights.mean() > 0.9  # not the head alone
    assert np.isfinite(one.vector()).all()


# Normalisation


@every_planar_network
def test_no_network_keeps_or_mixes_anything_of_its_images(
    title: str, study_with: Callable[..., Study]
) -> None:
    study = study_with(title)
    network = build_network(study)
    norms = [layer for layer in network.module.modules() if "Norm" in type(layer).__name__]
    assert norms
    assert not any(isinstance(layer, _BatchNorm) for layer in norms)
    assert not list(network.module.buffers())  # no statistic of patients
    network.module.eval()
    batch = images(3, list(study.input.size))
    with torch.no_grad():
        before = network(batch)
        alone = torch.cat([network(image[None]) for image in batch])
    assert torch.allclose(before, alone, atol=1e-4)
    assert not torch.allclose(before[0], before[1], atol=1e-4)
    network.module.train()
    network(4 * batch + 2)  # a pass in training leaves no trace
    network.module.eval()
    with torch.no_grad():
        assert torch.equal(network(batch), before)


# AttentionUnet promises GroupNorm; MONAI's merge layers keep InstanceNorm without scale or offset,
# which is each image's own too. If they are replaced, tighten the set to GroupNorm alone.
@every_planar_network
def test_every_layer_normalises_within_one_image(
    title: str, study_with: Callable[..., Study]
) -> None:
    module = build_network(study_with(title)).module
    kinds = {type(layer) for layer in module.modules() if "Norm" in type(layer).__name__}
    allowed = {nn.GroupNorm}
    assert kinds - {nn.InstanceNorm2d} == allowed
    if title != "attention-unet":
        assert kinds == allowed


@pytest.mark.parametrize("residual_units", [0, 2])
def test_a_unet_can_call_one_whole_image_lesion_and_another_none(
    residual_units: int, make_study: Callable[..., Study]
) -> None:
    # Were the logits of every image brought to mean 0, as MONAI's last layer does, both images
    # would keep pixels on either side; without the last convolution the loss stays above 0.3.
    model = {"name": "unet", "channels": [8, 16], "residual_units": residual_units}
    config = {"size": [16, 16], "intensity": "image"}
    network = build_network(make_study({"model": model, "task": PIXELS, "input": config}))
    grain = images(1, [16, 16])
    cloud = F.interpolate(images(1, [4, 4]), size=(16, 16), mode="bilinear")
    pair = torch.cat([grain / grain.std(), cloud / cloud.std()])
    wanted = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 16, 16)
    network.values.grad = network.gradients
    steps = torch.optim.Adam([network.values], lr=0.01)
    for _ in range(40):
        network.gradients.zero_()
        F.binary_cross_entropy_with_logits(network(pair), wanted).backward()
        steps.step()
    with torch.no_grad():
        none, lesion = network(pair)
        loss = F.binary_cross_entropy_with_logits(network(pair), wanted)
    assert loss < 0.05
    assert (none < 0).all()
    assert (lesion > 0).all()


# Frozen parameters


FREEZING = {
    "cnn": ("features.0", ("features.0.weight", "features.0.bias")),
    "resnet18": ("fc", ("fc.weight", "fc.bias")),
    "densenet121": ("class_layers", ("class_layers.out.weight", "class_layers.out.bias")),
    "efficientnet-b0": ("_fc", ("_fc.weight", "_fc.bias")),
    "unet": ("decide", ("decide.weight", "decide.bias")),
    "attention-unet": ("decide", ("decide.weight", "decide.bias")),
}
every_frozen_network = pytest.mark.parametrize("title", FREEZING)


@every_frozen_network
def test_frozen_parameters_do_not_travel_and_are_kept_by_name(
    title: str, study_with: Callable[..., Study]
) -> None:
    beginning, names = FREEZING[title]
    plain = build_network(study_with(title))
    frozen = build_network(study_with(title, model={"frozen": [beginning]}))
    assert tuple(frozen.kept()) == names
    assert frozen.schema.names == tuple(n for n in plain.schema.names if n not in names)
    whole = plain.schema.split(plain.vector())
    # The rest is drawn as if nothing were frozen, and what is frozen as well.
    for name, part in {**frozen.schema.split(frozen.vector()), **frozen.kept()}.items():
        assert np.array_equal(part, whole[name]), name
    assert not plain.kept()
    num_kept = sum(part.size for part in frozen.kept().values())
    assert frozen.schema.num_params + num_kept == plain.schema.num_params


@every_frozen_network
def test_frozen_parameters_do_not_change_whatever_is_loaded_or_trained(
    title: str, study_with: Callable[..., Study]
) -> None:
    study = study_with(title, model={"frozen": [FREEZING[title][0]]})
    network = build_network(study)
    initial, values = network.kept(), network.vector()
    network.values.grad = network.gradients
    steps = torch.optim.AdamW([network.values], lr=0.1, weight_decay=0.5)
    network(images(2, list(study.input.size))).square().sum().backward()
    steps.step()
    assert not np.array_equal(network.vector(), values)
    network.load(np.full_like(values, 0.25))
    for name, kept in network.kept().items():
        assert np.array_equal(kept, initial[name])
    parameters = dict(network.module.named_parameters())
    assert all(parameters[name].grad is None for name in initial)


def test_several_beginnings_freeze_all_that_they_name(study_with: Callable[..., Study]) -> None:
    network = build_network(study_with("cnn", model={"frozen": ["features.", "head.3.bias"]}))
    assert network.schema.names == ("head.3.weight",)
    assert len(network.kept()) == 13


def test_what_is_kept_is_a_copy(study_with: Callable[..., Study]) -> None:
    network = build_network(study_with("cnn", model={"frozen": ["head"]}))
    for part in network.kept().values():
        part[...] = 7
    assert not any((part == 7).any() for part in network.kept().values())


def test_the_digest_covers_travelling_and_frozen_weights(study_with: Callable[..., Study]) -> None:
    def fresh() -> FlatNetwork:
        return build_network(study_with("cnn", model={"frozen": ["features.0"]}))

    digests = {digest_of_weights(fresh())}
    named = list(fresh().module.named_parameters())
    for name, _ in named:
        changed = fresh()
        with torch.no_grad():
            dict(changed.module.named_parameters())[name].view(-1)[-1] += 1e-3
        digests.add(digest_of_weights(changed))
    assert len(digests) == 1 + len(named)
    assert digest_of_weights(fresh()) in digests
    assert {len(digest) for digest in digests} == {64}


@pytest.mark.parametrize(
    ("title", "frozen", "parts"),
    [
        ("cnn", ["head", "neck"], "features, head"),
        ("cnn", ["0.weight"], "features, head"),  # a beginning, not any part
        ("unet", ["model.0"], "unet, decide"),
        ("resnet18", ["layer5"], "conv1, bn1, layer1, layer2, layer3, layer4, fc"),
    ],
)
def test_freezing_what_is_not_there_is_refused_with_the_parts_that_are(
    title: str, frozen: list[str], parts: str, study_with: Callable[..., Study]
) -> None:
    study = study_with(title, model={"frozen": frozen})
    with pytest.raises(ConfigError, match=r"model\.frozen: no parameter's name") as refused:
        build_network(study)
    assert repr(frozen[-1]) in str(refused.value)
    assert str(refused.value).endswith(f"the names are {parts}")


@pytest.mark.parametrize("frozen", [["features", "head"], [""], ["f", "h"]], ids=str)
def test_freezing_everything_is_refused(
    frozen: list[str], study_with: Callable[..., Study]
) -> None:
    study = study_with("cnn", model={"frozen": frozen})
    with pytest.raises(ConfigError, match="nothing is left to train"):
        build_network(study)


def test_a_federation_returns_the_frozen_weights_it_began_with(tmp_path: Path) -> None:
    model = {"name": "cnn", "width": 4, "frozen": ["features.0", "head"]}
    study = tiny_study(num_rounds=1, model=model)
    initial, folder = build_network(study), tmp_path / "run"
    assert federate(study, folder)["num_params"] == initial.schema.num_params
    travelling = load_file(folder / "models" / "round-0001.safetensors")
    assert set(travelling) == set(initial.schema.names)
    final = load_file(folder / FINAL)
    assert set(final) == set(initial.schema.names) | set(initial.kept())
    for name, kept in initial.kept().items():
        assert np.array_equal(final[name], kept)
    first = initial.schema.split(initial.vector())
    assert any(not np.array_equal(final[name], part) for name, part in first.items())


# Channels last


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("title", ["unet", "unet without residual units", "attention-unet"])
@pytest.mark.parametrize("num_images", [1, 3])
def test_channels_last_changes_neither_outputs_nor_gradients(
    title: str, channels: int, num_images: int, study_with: Callable[..., Study]
) -> None:
    study = study_with(title, several=True, channels=channels)
    last = build_network(study)
    first = FlatNetwork(build_network(study).module, CPU, channels_last=False)
    assert np.array_equal(last.vector(), first.vector())
    batch = images(num_images, list(study.input.size), channels)
    outputs = []
    for network in (last, first):
        outputs.append(network(batch))
        (outputs[-1] * images(num_images, list(study.input.size), 4)).mean().backward()
    assert torch.allclose(*outputs, atol=1e-5)
    assert torch.allclose(last.gradients, first.gradients, atol=1e-5)
    assert first.gradients.abs().max() > 1e-2


@pytest.mark.parametrize("title", ["cnn", *SEGMENTERS])
def test_planar_unets_alone_see_their_channels_side_by_side(
    title: str, study_with: Callable[..., Study]
) -> None:
    study = study_with(title, channels=3)
    network = build_network(study)
    seen = []

    def look(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])

    network.module.register_forward_pre_hook(look)
    batch = images(2, list(study.input.size), 3)
    with torch.no_grad():
        network(batch)
    planar = title in SEGMENTERS and "volumes" not in title
    assert seen[0].stride(1) == (1 if planar else batch.stride(1))
    assert torch.equal(seen[0], batch)


@given(
    st.sampled_from([1, 3]),
    st.integers(1, 4),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from(["whole", "tail", "every other", "turned", "already so"]),
)
def test_laying_channels_side_by_side_keeps_every_value(
    channels: int, num: int, sides: tuple[int, int], view: str
) -> None:
    height, width = sides
    batch = torch.arange(float(2 * num * channels * height * width))
    batch = batch.reshape(2 * num, channels, height, width)
    part = {
        "whole": batch,
        "tail": batch[num:],
        "every other": batch[::2],
        "turned": batch.transpose(2, 3),
        "already so": batch.contiguous(memory_format=torch.channels_last),
    }[view]
    laid = flat._channels_last(part)
    assert torch.equal(laid, part)
    _, _, height, width = part.shape
    assert laid.stride() == (height * width * channels, 1, width * channels, channels)
    assert torch.equal(laid.clone() + 1, part + 1)


def test_the_table_of_networks_names_every_model_of_a_study() -> None:
    schema = Study.model_json_schema()["properties"]["model"]["discriminator"]["mapping"]
    named = {model["name"] for model, _ in itertools.chain(NETWORKS.values())}
    boxes, tables = {"center-unet"}, {"logistic", "mlp", "multimodal"}  # tests of their own
    assert named | boxes | tables == set(schema)
