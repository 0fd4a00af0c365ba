"""Every kind of layer, with every setting that a unit's gradient could be told wrongly under."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from client import convolution, layer_gradients, tape
from client.bookkeeping import BookKeepingEngine, layers_of
from client.clipping import by_brute_force
from client.convolution import Convolution
from client.layer_gradients import Linear
from client.units import Grouping, Units
from common.errors import ConfigError
from common.models.flat import FlatNetwork

RAGGED = (1, 3, 1, 2)
CHANNELS = 6


class Tokens(nn.Module):
    """(num, channels, ...) to (num, positions, channels), as linear layers take it."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(2).mT


class Looked(nn.Module):
    """A row of a table for each pixel, by its value."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        numbers = (images.detach() * 3).long() % self.table.num_embeddings
        return images + self.table(numbers).mean(dim=-1)


class Twice(nn.Module):
    """One layer goes twice over what it made; under two names, too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = self.other_name = layer

    def forward(self, images: Tensor) -> Tensor:
        return self.other_name(self.layer(images).tanh())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, one: nn.Conv2d, other: nn.Conv2d) -> None:
        super().__init__()
        other.weight = one.weight
        self.one, self.other = one, other

    def forward(self, images: Tensor) -> Tensor:
        return self.other(self.one(images).relu())


class InPlace(nn.Module):
    """What a layer made is changed where it lies: once lost by hooks on views."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        made = self.layer(images)
        made.mul_(1.5)
        made += images
        return made.relu_()


def conv(dims: int = 2, **settings: object) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(CHANNELS, CHANNELS, **{"kernel_size": 3, "padding": 1, **settings})


def transposed(dims: int = 2, **settings: object) -> nn.Module:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return kind(CHANNELS, CHANNELS, **{"kernel_size": 3, "padding": 1, **settings})


# Title: dimensions, side, layer.
KINDS: dict[str, tuple[int, int, Callable[[], nn.Module]]] = {
    **{
        f"{title}, {dims}D, side {side}": (dims, side, make)
        for dims in (1, 2, 3)
        for side in (2, 7)
        for title, make in {
            "convolution": lambda dims=dims: conv(dims),
            "its transpose": lambda dims=dims: transposed(dims),
        }.items()
    },
    **{
        f"{title}, side {side}": (2, side, make)
        for side in (3, 8)
        for title, make in {
            "stride": lambda: conv(stride=2),
            "dilation": lambda: conv(dilation=2, padding=2),
            "groups": lambda: conv(groups=3),
            "depthwise": lambda: conv(groups=CHANNELS),
            "one pixel": lambda: conv(kernel_size=1, padding=0, bias=False),
            "uneven": lambda: conv(kernel_size=(3, 1), padding=(1, 0), stride=(1, 2)),
            "same": lambda: conv(kernel_size=2, padding="same"),
            "valid": lambda: conv(kernel_size=2, padding="valid"),
            "reflect": lambda: conv(padding_mode="reflect"),
            "replicate": lambda: conv(padding_mode="replicate"),
            "circular": lambda: conv(padding_mode="circular"),
            "transposed, stride": lambda: transposed(stride=2, output_padding=1),
            "transposed, dilation": lambda: transposed(dilation=2, padding=2),
            "transposed, groups": lambda: transposed(groups=2, stride=2),
            "group norm": lambda: nn.GroupNorm(3, CHANNELS),
            "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
            "one slope": nn.PReLU,
            "a slope for each channel": lambda: nn.PReLU(CHANNELS),
            "linear with positions": lambda: nn.Sequential(Tokens(), nn.Linear(CHANNELS, 5)),
            "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 9)),
            "layer norm": lambda: nn.Sequential(Tokens(), nn.LayerNorm(CHANNELS)),
            "embedding": lambda: Looked(nn.Embedding(7, 3)),
            "embedding with a padding row": lambda: Looked(nn.Embedding(7, 3, padding_idx=2)),
            "called twice": lambda: Twice(conv()),
            "transpose called twice": lambda: Twice(transposed()),
            "two with one weight": lambda: Tied(conv(), conv()),
            "pooled": lambda: nn.Sequential(conv(), nn.MaxPool2d(2), conv()),
            "pooled, then in place": lambda: nn.Sequential(
                conv(), nn.MaxPool2d(2), nn.ReLU(inplace=True), conv()
            ),
            "in place, then pooled": lambda: nn.Sequential(InPlace(conv()), nn.MaxPool2d(2)),
            "narrow to one pixel": lambda: nn.Sequential(
                conv(padding=0), nn.Conv2d(CHANNELS, 4, 3, padding=1, groups=2)
            ),
            "in place": lambda: InPlace(conv()),
            "in place after one pixel": lambda: InPlace(conv(kernel_size=1, padding=0)),
            "in place after a norm": lambda: InPlace(nn.InstanceNorm2d(CHANNELS, affine=True)),
        }.items()
    },
}


def network_of(layer: nn.Module, dims: int) -> FlatNetwork:
    """A convolution before it, so that gradients of its input are needed; images have a channel."""
    torch.manual_seed(0)
    before = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](1, CHANNELS, 1)
    module = nn.Sequential(before, layer).double()
    return FlatNetwork(module, torch.device("cpu"), dtype=torch.float64)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1).cos().sum(dim=1) * (1.0 + targets)).mean()


def units_of(dims: int, side: int, sizes: tuple[int, ...]) -> Units:
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randn((sum(sizes), 1, *[side] * dims), generator=rng, dtype=torch.float64)
    return Units(pixels, torch.arange(sum(sizes)) % 3, sizes)


def error_of(network: FlatNetwork, units: Units) -> float:
    exact = by_brute_force(network.module, units, loss, 0.05)
    ours = BookKeepingEngine(network).clipped_sum(units, loss, 0.05)
    return float((ours - exact).abs().max() / exact.abs().max())


# How a layer comes to its units' gradients: a rule on shapes decides, and these decide the rule.
GRAM_ENTRIES, MAX_TOGETHER = (layer_gradients, "GRAM_ENTRIES"), (convolution, "MAX_TOGETHER")
MANY_CHANNELS, FEW_PLACES = (convolution, "MANY_CHANNELS"), (convolution, "FEW_PLACES")
MAX_WINDOWS, FEWEST_PLACES = (convolution, "MAX_WINDOWS"), (convolution, "FEWEST_PLACES")
MAX_PRODUCTS, MAX_SMALL = (layer_gradients, "MAX_PRODUCTS"), (tape, "MAX_SMALL")
MAX_UNITS, MANY_PIXELS = (convolution, "MAX_UNITS"), (convolution, "MANY_PIXELS")
NO_NORMS, NO_WINDOWS = {GRAM_ENTRIES: 1 << 40}, {FEW_PLACES: 0}
WAYS = {
    "by windows": {**NO_NORMS, MANY_CHANNELS: 1, FEW_PLACES: 1 << 40},
    "by a few windows": {**NO_NORMS, MANY_CHANNELS: 1, FEW_PLACES: 1 << 40, MAX_WINDOWS: 1},
    "by groups": {**NO_NORMS, **NO_WINDOWS, MAX_TOGETHER: 1 << 40, MANY_PIXELS: 0},
    "two by two": {**NO_NORMS, **NO_WINDOWS, MAX_TOGETHER: 0},
    "one by one, where the sum will be": {**NO_NORMS, **NO_WINDOWS, MAX_UNITS: 1, MAX_SMALL: 0},
    "norms first": {GRAM_ENTRIES: 0, FEWEST_PLACES: 0},
    "a few norms first, then windows": {
        GRAM_ENTRIES: 0,
        MAX_PRODUCTS: 1,
        FEWEST_PLACES: 1 << 40,
    },
}


@pytest.mark.filterwarnings("ignore:Using padding=.same")  # torch tells how it does that
@pytest.mark.parametrize("sizes", [RAGGED, (1, 1, 1)], ids=["ragged", "single"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("title", KINDS)
def test_every_layer_equals_brute_force(
    title: str, way: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for (module, name), value in WAYS[way].items():
        monkeypatch.setattr(module, name, value)
    dims, side, make = KINDS[title]
    assert error_of(network_of(make(), dims), units_of(dims, side, sizes)) <= 1e-12


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("many_pixels", [0, 1 << 12])
def test_narrow_convolutions_are_as_exact_in_single_precision(
    dims: int, kernel: int, many_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "MANY_PIXELS", many_pixels)
    module = conv(dims, kernel_size=kernel, padding=kernel // 2)
    exact = Convolution(copy.deepcopy(module).double())
    layer = Convolution(module)
    torch.manual_seed(2)
    inputs, gradient = torch.randn((2, 3, CHANNELS, *[9] * dims), dtype=torch.float64)
    with torch.no_grad():
        for single, double in (
            (layer.forward(inputs.float())[0], exact.forward(inputs)[0]),
            (
                layer.backward(inputs.float(), gradient.float(), ()),
                exact.backward(inputs, gradient, ()),
            ),
            (layer.weighted(inputs.float(), gradient.float()), exact.weighted(inputs, gradient)),
        ):
            assert single.is_contiguous()
            assert torch.allclose(single.double(), double, rtol=0, atol=1e-5 * double.abs().max())


def test_norms_come_first_where_a_large_weight_is_used_at_few_places() -> None:
    layer, grouping = Convolution(nn.Conv2d(64, 64, 3)), Grouping((1, 2), torch.device("cpu"))
    few, many = torch.empty(3, 64, 3, 3), torch.empty(3, 64, 16, 16)
    assert layer.has_large_weight(few, few, grouping)
    assert not layer.has_large_weight(many, many, grouping)
    eight = Grouping((8,), torch.device("cpu"))  # images of one unit count together
    assert not layer.has_large_weight(few, few, eight)
    assert not Convolution(nn.Conv2d(64, 64, 3, groups=2)).has_large_weight(few, few, grouping)
    assert not Convolution(nn.Conv2d(4, 4, 3)).has_large_weight(few, few, grouping)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_layer_may_be_frozen_in_part(which: str) -> None:
    layer = conv()
    getattr(layer, which).requires_grad_(False)
    network = network_of(layer, 2)
    assert network.schema.num_params < sum(p.numel() for p in network.module.parameters())
    assert error_of(network, units_of(2, 2, RAGGED)) <= 1e-12
    assert error_of(network, units_of(2, 8, RAGGED)) <= 1e-12


def test_torchs_own_pooling_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError

    network = network_of(nn.Sequential(conv(), nn.MaxPool2d(2)), 2)
    monkeypatch.setattr(nn.MaxPool2d, "forward", refuse)
    BookKeepingEngine(network).clipped_sum(units_of(2, 8, RAGGED), loss, 0.05)
    with pytest.raises(AssertionError):
        network.module(units_of(2, 8, RAGGED).pixels)


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_what_waits_where_the_sum_will_be_is_not_in_it(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for (module, name), value in WAYS["one by one, where the sum will be"].items():
        monkeypatch.setattr(module, name, value)
    network, units = network_of(conv(), 2), units_of(2, 8, RAGGED)
    exact = by_brute_force(network.module, units, loss, 0.05)
    engine = BookKeepingEngine(network, max_pixels=at_once * 64)
    for _ in range(2):
        assert float((engine.clipped_sum(units, loss, 0.05) - exact).abs().max()) <= 1e-13


def test_channels_may_lie_side_by_side_in_memory() -> None:
    units = units_of(2, 8, RAGGED)
    wide = units.pixels.expand(-1, 4, -1, -1).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, CHANNELS, 3), nn.GroupNorm(2, CHANNELS), conv()).double()
    network = FlatNetwork(module, torch.device("cpu"), dtype=torch.float64)
    assert error_of(network, Units(wide, units.targets, units.sizes)) <= 1e-12


def test_a_network_is_as_it_was_afterwards() -> None:
    network = network_of(nn.Sequential(conv(), nn.MaxPool2d(2)), 2)
    units = units_of(2, 8, RAGGED)
    before, outputs = network.vector(), network.module(units.pixels)
    BookKeepingEngine(network).clipped_sum(units, loss, 0.05)
    assert (network.vector() == before).all()
    assert torch.equal(network.module(units.pixels), outputs)
    assert all("forward" not in vars(child) for child in network.module.modules())
    assert all(parameter.grad is None for parameter in network.module.parameters())


def test_a_network_is_as_it_was_after_an_error() -> None:
    network = network_of(conv(), 2)
    with pytest.raises(RuntimeError):
        BookKeepingEngine(network).clipped_sum(units_of(3, 2, RAGGED), loss, 0.05)
    assert all("forward" not in vars(child) for child in network.module.modules())


class Given(nn.Module):
    """Multiplies by a number for each image and pixel, so that a test chooses the gradients."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, images: Tensor) -> Tensor:
        return images * self.numbers


@pytest.mark.parametrize("large", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_a_unit_whose_parts_cancel_is_within_the_bound_in_float32(
    large: float, rest: float
) -> None:
    """What float32 rounds then is as large as the parts, not as what they add up to."""
    torch.manual_seed(0)
    numbers = torch.tensor([large + rest, large / 3, -large, -large / 3]).view(1, 1, 2, 2)
    module = nn.Sequential(nn.Conv2d(256, 256, 1, bias=False), Given(numbers))
    network = FlatNetwork(module, torch.device("cpu"))
    pixels = torch.randn(1, 256, 1, 1).expand(1, 256, 2, 2).contiguous()
    units = Units(pixels, torch.zeros(1), (1,))
    made = BookKeepingEngine(network).clipped_sum(units, lambda out, _: out.sum(), 1.0)
    assert float(made.double().norm()) <= 1.0


@pytest.mark.parametrize("large", [1e15, 1e19, 1e25])
def test_a_gradient_beyond_float32_counts_as_zero_and_never_more(large: float) -> None:
    network = FlatNetwork(nn.Linear(512, 512, bias=False), torch.device("cpu"))
    units = Units(torch.full((1, 512), large), torch.zeros(1), (1,))
    made = BookKeepingEngine(network).clipped_sum(units, lambda out, _: out.sum() * large, 1.0)
    assert float(made.double().norm()) <= 1.0


class Unfinished(nn.Module):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.left = conv(), nn.Linear(2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.used(images)


def test_what_no_output_depends_on_has_a_gradient_of_zero() -> None:
    network = FlatNetwork(Unfinished().double(), torch.device("cpu"), dtype=torch.float64)
    pixels = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64)
    made = BookKeepingEngine(network).clipped_sum(Units(pixels, torch.zeros(2), (1, 1)), loss, 0.05)
    assert made[:-9].any()
    assert not made[-9:].any()


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(CHANNELS),
        nn.BatchNorm2d(CHANNELS, affine=False),
        nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False),
        nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
    ],
)
def test_statistics_of_many_images_are_refused_with_or_without_weights(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"layer 1 .*one patient's gradient would depend"):
        layers_of(nn.Sequential(conv(), layer))


@pytest.mark.parametrize("layer", [nn.GroupNorm(3, CHANNELS), nn.PReLU(CHANNELS)])
def test_features_without_pixels_are_taken_too(layer: nn.Module) -> None:
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 6), layer)
    assert error_of(network_of(flat, 2), units_of(2, 4, RAGGED)) <= 1e-12


class Scaled(nn.Module):
    """A parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale


@pytest.mark.parametrize("layer", [Scaled(), nn.Bilinear(2, 2, 2), nn.BatchNorm2d(CHANNELS)])
def test_a_layer_that_nobody_can_tell_apart_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=rf"layer body\.1 \({type(layer).__name__}\)"):
        layers_of(nn.ModuleDict({"body": nn.Sequential(conv(), layer)}))


def test_such_a_layer_may_be_there_when_it_is_frozen() -> None:
    layer = Scaled()
    layer.scale.requires_grad_(False)
    assert error_of(network_of(layer, 2), units_of(2, 8, RAGGED)) <= 1e-12


def test_a_subclass_may_compute_something_else_and_is_refused() -> None:
    class Other(nn.Linear):
        """Who knows what its forward does."""

    with pytest.raises(ConfigError, match="Other"):
        layers_of(Other(2, 2))
    assert isinstance(next(iter(layers_of(nn.Linear(2, 2)).values())), Linear)
    assert isinstance(next(iter(layers_of(conv()).values())), Convolution)


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_couples_patients_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="an Embedding with max_norm"):
        BookKeepingEngine(network_of(Looked(nn.Embedding(7, 3, **setting)), 2))
