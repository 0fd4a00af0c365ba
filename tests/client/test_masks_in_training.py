"""A mask moves with its image, and every pixel that is known counts once in the figures."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from client import evaluate as scoring
from client.augment import augment
from client.evaluate import evaluate, predictions
from client.images import Batch, Images, Scans
from client.train import train
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.study import Augmentation, Segmentation, Study, TrainingLoss
from common.tasks import SegmentationTask, task_of
from common.tasks.losses import OUTSIDE

NONE = Augmentation()
CHANGES = {
    "flip": {"flip": 0.5},
    "vertical flip": {"flip_vertical": 0.5},
    "quarter turns": {"quarter_turns": True},
    "rotation": {"rotate_degrees": 180},
    "shift": {"shift": 0.3},
    "zoom": {"zoom": 0.4},
    "all of them": {
        "flip": 0.5, "flip_vertical": 0.5, "quarter_turns": True, "rotate_degrees": 30,
        "shift": 0.1, "zoom": 0.2, "contrast": 0.1, "brightness": 0.1, "noise": 0.01,
    },
}  # fmt: skip
every_change = pytest.mark.parametrize("title", CHANGES)


def stream(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(num: int, height: int = 48, width: int = 48) -> Batch:
    """Copies of a bright rectangle far from every middle, class 3; a dim corner is outside."""
    image, mask = torch.zeros(height, width), torch.zeros(height, width, dtype=torch.uint8)
    mask[6:18, 25:44] = 3
    mask[32:, :12] = OUTSIDE
    image[mask == 3], image[mask == OUTSIDE] = 1.0, -1.0
    return image.expand(num, 1, -1, -1).clone(), mask.expand(num, -1, -1).clone()


def overlap(one: Tensor, other: Tensor) -> float:
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0


@every_change
@pytest.mark.parametrize("size", [(48, 48), (40, 60)])
def test_image_and_mask_move_together(title: str, size: tuple[int, int]) -> None:
    images, masks = scenes(40, *size)
    moved, classes = augment(images, masks, Augmentation(**CHANGES[title]), stream())
    known = classes != OUTSIDE
    assert classes.shape == masks.shape
    for image, mask, inside in zip(moved[:, 0], classes, known, strict=True):
        assert overlap((image > 0.5) & inside, mask == 3) > 0.9
        assert not ((image < -0.5) & inside).sum() > 8  # what was outside still is
    shapes = {mask.numpy().tobytes() for mask in classes}
    assert len(shapes) > (20 if title in ("rotation", "shift", "zoom", "all of them") else 1)


@every_change
def test_a_moved_mask_holds_no_class_that_was_not_there(title: str) -> None:
    images, masks = scenes(20)
    _, classes = augment(images, masks, Augmentation(**CHANGES[title]), stream())
    assert classes.dtype == torch.uint8
    assert np.unique(classes).tolist() == [0, 3, OUTSIDE]


@every_change
def test_masks_do_not_change_how_images_move(title: str) -> None:
    images, masks = scenes(10)
    config = Augmentation(**CHANGES[title])
    labelled, targets = augment(images, torch.zeros(10), config, stream())
    assert torch.equal(augment(images, masks, config, stream())[0], labelled)
    assert not targets.any()
    assert torch.equal(images, scenes(10)[0])
    assert torch.equal(masks, scenes(10)[1])


@pytest.mark.parametrize(
    "labels",
    [torch.arange(6), torch.arange(18).reshape(6, 3) % 2],
    ids=["a class each", "several labels each"],
)
@every_change
def test_labels_are_left_alone(title: str, labels: Tensor) -> None:
    images, _ = scenes(6)
    _, targets = augment(images, labels, Augmentation(**CHANGES[title]), stream())
    assert targets is labels


def test_a_change_of_grey_values_leaves_masks_alone() -> None:
    images, masks = scenes(5)
    config = Augmentation(contrast=0.5, brightness=0.5, noise=0.5)
    changed, targets = augment(images, masks, config, stream())
    assert targets is masks
    assert not torch.allclose(changed, images)


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
@pytest.mark.parametrize(("change", "axis"), [("flip", -1), ("flip_vertical", -2)])
def test_a_flip_of_a_mask_is_a_flip(change: str, axis: int, size: tuple[int, int]) -> None:
    images = torch.randn(4, 2, *size, generator=stream())
    masks = torch.randint(8, (4, *size), generator=stream()).to(torch.uint8)
    moved, classes = augment(images, masks, Augmentation(**{change: 1.0}), stream())
    assert torch.allclose(moved, images.flip(axis), atol=1e-5)
    assert torch.equal(classes, masks.flip(axis))


def test_each_flip_has_its_own_probability_and_draw() -> None:
    images, masks = scenes(400)
    config = Augmentation(flip=0.5, flip_vertical=0.25)
    _, classes = augment(images, masks, config, stream())
    kinds = [masks[0], masks[0].flip(1), masks[0].flip(0), masks[0].flip(0, 1)]
    counts = [sum(torch.equal(mask, kind) for mask in classes) for kind in kinds]
    assert sum(counts) == 400
    assert chisquare(counts, [150, 150, 50, 50]).pvalue > 1e-3


def test_quarter_turns_hit_all_four_with_image_and_mask_alike() -> None:
    images = torch.randn(1, 1, 16, 16, generator=stream()).repeat(400, 1, 1, 1)
    masks = torch.randint(8, (1, 16, 16), generator=stream()).to(torch.uint8).repeat(400, 1, 1)
    moved, classes = augment(images, masks, Augmentation(quarter_turns=True), stream())
    counts = [0] * 4
    for image, mask in zip(moved[:, 0], classes, strict=True):
        turns = [k for k in range(4) if torch.equal(mask, masks[0].rot90(k))]
        assert len(turns) == 1
        assert torch.allclose(image, images[0, 0].rot90(turns[0]), atol=1e-4)
        counts[turns[0]] += 1
    assert chisquare(counts).pvalue > 1e-3


def ramps(num: int, height: int, width: int) -> Batch:
    """Images whose two channels are row and column, everywhere of class 1."""
    where = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack(where).float().expand(num, -1, -1, -1).clone()
    return images, torch.ones(num, height, width, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_what_a_shift_brings_in_from_beyond_the_edge_is_outside(size: tuple[int, int]) -> None:
    images, masks = ramps(30, *size)
    moved, classes = augment(images, masks, Augmentation(shift=0.3), stream())
    middle = (slice(None), slice(None), slice(12, 13), slice(16, 17))
    shift = moved[middle] - images[middle]  # (30, 2, 1, 1): read from this much further
    limits = torch.tensor(size).reshape(1, 2, 1, 1)
    source = images + shift
    inside = ((source > -0.5) & (source < limits - 0.5)).all(1)
    assert torch.equal(classes == 1, inside)
    assert torch.equal(classes == OUTSIDE, ~inside)
    assert 0.05 < (~inside).float().mean() < 0.6


@pytest.mark.parametrize("title", ["rotation", "quarter turns", "zoom"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
def test_no_change_shears_or_stretches_an_image(size: tuple[int, int], title: str) -> None:
    images, masks = ramps(30, *size)
    moved, _ = augment(images, masks, Augmentation(**CHANGES[title]), stream())
    row, column = size[0] // 2, size[1] // 2
    here = moved[:, :, row, column]
    down, right = moved[:, :, row + 1, column] - here, moved[:, :, row, column + 1] - here
    assert torch.allclose((down * right).sum(1), torch.zeros(30), atol=1e-3)
    assert torch.allclose(down.norm(dim=1), right.norm(dim=1), atol=1e-3)
    if title != "zoom":
        assert torch.allclose(down.norm(dim=1), torch.ones(30), atol=1e-3)


def test_a_zoom_out_is_surrounded_by_outside_and_a_zoom_in_is_not() -> None:
    images, masks = ramps(40, 32, 32)
    moved, classes = augment(images, masks, Augmentation(zoom=0.4), stream())
    scales = moved[:, 0, 17, 16] - moved[:, 0, 16, 16]  # source pixels in one of the result
    shares = (classes == OUTSIDE).float().mean((1, 2))
    assert scales.min() < 0.8
    assert scales.max() > 1.2
    assert (shares[scales <= 1] == 0).all()
    wanted = 1 - 1 / scales[scales > 1.1] ** 2
    assert torch.allclose(shares[scales > 1.1], wanted, atol=0.07)


@every_change
def test_a_volume_moves_within_its_slices_as_an_image_does(title: str) -> None:
    depths = range(5)
    changes = {k: v for k, v in CHANGES[title].items() if k != "noise"}  # drawn per voxel
    config = Augmentation(**changes)
    images = torch.randn(6, 2, 5, 24, 20, generator=stream())
    masks = torch.randint(4, (6, 5, 24, 20), generator=stream()).to(torch.uint8)
    moved, classes = augment(images, masks, config, stream())
    assert not torch.equal(classes, masks)
    for depth in depths:
        alone, mask = augment(images[:, :, depth], masks[:, depth], config, stream())
        assert torch.allclose(moved[:, :, depth], alone, atol=1e-3)
        assert (classes[:, depth] == mask).float().mean() > 0.999  # ties of rounding


OLD_CHANGES = {
    "flip": {"flip": 0.5},
    "geometry": {"flip": 0.5, "rotate_degrees": 10, "shift": 0.1, "zoom": 0.1},
    "grey values": {"contrast": 0.2, "brightness": 0.1},
}


@pytest.mark.parametrize("title", OLD_CHANGES)
def test_a_study_without_vertical_flips_and_turns_draws_the_numbers_it_always_drew(
    title: str,
) -> None:
    images, masks = scenes(9)
    used, wanted = stream(), stream()
    augment(images, masks, Augmentation(**OLD_CHANGES[title]), used)
    torch.rand((7, 9), generator=wanted)
    assert torch.equal(used.get_state(), wanted.get_state())


def test_the_numbers_of_a_draw_keep_their_places() -> None:
    images, masks = scenes(50)
    numbers = torch.rand((7, 50), generator=stream())
    _, classes = augment(images, masks, Augmentation(flip=0.5), stream())
    flipped = torch.tensor([torch.equal(mask, masks[0].flip(-1)) for mask in classes])
    assert torch.equal(flipped, numbers[2] < 0.5)
    brighter, _ = augment(images, masks, Augmentation(brightness=0.5), stream())
    offsets = (brighter - images).mean((1, 2, 3))
    assert torch.allclose(offsets, numbers[6] - 0.5, atol=1e-5)
    # A study that asks for turns too keeps its flips.
    _, turned = augment(images, masks, Augmentation(flip=0.5, quarter_turns=True), stream())
    for mask, is_flipped in zip(turned, flipped.tolist(), strict=True):
        start = masks[0].flip(-1) if is_flipped else masks[0]
        assert any(torch.equal(mask, start.rot90(k)) for k in range(4))


# Scoring


def pointwise(num_outputs: int, num_dims: int = 2) -> FlatNetwork:
    """A network that decides on each pixel by that pixel alone."""
    torch.manual_seed(4)
    kind = nn.Conv2d if num_dims == 2 else nn.Conv3d
    return FlatNetwork(kind(1, num_outputs, kernel_size=1), torch.device("cpu"))


def scans_of(sizes: list[tuple[int, ...]], patch: tuple[int, ...], classes: int = 3) -> Scans:
    """Noise with masks of noise, a tenth of it outside."""
    rng, pixels, targets = stream(9), [], []
    for size in sizes:
        mask = torch.randint(classes, size, generator=rng)
        mask[torch.rand(size, generator=rng) < 0.1] = OUTSIDE
        pixels.append(torch.randn(1, *size, generator=rng))
        targets.append(mask.to(torch.uint8))
    return Scans(tuple(pixels), tuple(targets), tuple("abcdefgh"[: len(sizes)]), patch)


def task(classes: int = 3) -> SegmentationTask:
    config = Segmentation(kind="segmentation", classes=tuple("abcdefgh"[:classes]))
    return SegmentationTask(config, TrainingLoss(), (16, 16))


SIZES: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...]]] = {
    "as large as a window": ([(16, 16)], (16, 16)),
    "a little larger": ([(17, 16), (16, 19)], (16, 16)),
    "many windows": ([(50, 43), (16, 70)], (16, 16)),
    "oblong windows": ([(40, 40)], (8, 24)),
    "volumes": ([(9, 20, 16), (8, 8, 8)], (8, 8, 8)),
}


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("title", SIZES)
def test_outputs_of_a_window_that_slides_over_a_scan_are_those_of_the_whole(
    title: str, num_outputs: int
) -> None:
    sizes, patch = SIZES[title]
    scans, network = scans_of(sizes, patch), pointwise(num_outputs, len(patch))
    found = list(predictions(scans, network))
    assert len(found) == len(sizes)
    for (outputs, targets), pixels, mask in zip(found, scans.pixels, scans.targets, strict=True):
        assert outputs.shape == (1, num_outputs, *mask.shape)
        assert torch.equal(targets, mask[None])
        with torch.no_grad():
            assert torch.allclose(outputs, network(pixels[None]), atol=1e-4)


@pytest.mark.parametrize("title", SIZES)
def test_every_known_pixel_of_every_scan_gets_one_decision(title: str) -> None:
    sizes, patch = SIZES[title]
    scans, network, three = scans_of(sizes, patch), pointwise(3, len(patch)), task()
    counts = evaluate(network.vector(), scans, network=network, task=three)
    truth, given = [], []
    for pixels, mask in zip(scans.pixels, scans.targets, strict=True):
        with torch.no_grad():
            decided = network(pixels[None])[0].argmax(0)
        truth.append(mask[mask != OUTSIDE].long())
        given.append(decided[mask != OUTSIDE])
    actual, predicted = torch.cat(truth), torch.cat(given)
    view = three.view(counts)
    assert view.num_examples.tolist() == [len(sizes)]
    assert view.actual.tolist() == actual.bincount(minlength=3).tolist()
    assert view.predicted.tolist() == predicted.bincount(minlength=3).tolist()
    assert view.right.tolist() == actual[actual == predicted].bincount(minlength=3).tolist()


def test_pixels_outside_are_not_counted_whatever_the_network_says_there() -> None:
    network = pointwise(3)
    scans = scans_of([(30, 22)], (16, 16))
    outside = scans.targets[0] == OUTSIDE
    spoilt = scans.pixels[0].clone()
    spoilt[0, outside] = 1e3
    other = Scans((spoilt,), scans.targets, scans.patients, scans.patch)
    one, two = (evaluate(network.vector(), s, network=network, task=task()) for s in (scans, other))
    assert np.array_equal(one, two)
    assert task().view(one).actual.sum() == int((~outside).sum()) < outside.numel()


def test_counts_of_scans_of_several_sizes_are_those_of_each_alone() -> None:
    sizes = [(16, 16), (40, 17), (23, 31)]
    scans, network = scans_of(sizes, (16, 16)), pointwise(3)
    alone = [
        evaluate(
            network.vector(), Scans((p,), (t,), ("a",), (16, 16)), network=network, task=task()
        )
        for p, t in zip(scans.pixels, scans.targets, strict=True)
    ]
    together = evaluate(network.vector(), scans, network=network, task=task())
    assert np.array_equal(together, sum(alone))


class Recorder(nn.Module):
    """Keeps the shape of everything it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.decide = nn.Conv2d(1, 1, kernel_size=3, padding=1)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        outputs: Tensor = self.decide(images)
        return outputs


def test_windows_have_the_size_of_training_patches() -> None:
    recorder = Recorder()
    network = FlatNetwork(recorder, torch.device("cpu"))
    list(predictions(scans_of([(50, 43), (16, 16)], (16, 16)), network))
    assert {shape[1:] for shape in recorder.shapes} == {(1, 16, 16)}
    assert max(shape[0] for shape in recorder.shapes) > 1  # several windows at once


@pytest.mark.parametrize("most", [1, 700, 2**22])
def test_large_images_are_scored_in_smaller_batches_with_the_same_counts(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_PIXELS", most)
    recorder = Recorder()
    torch.nn.init.constant_(recorder.decide.weight, 0.3)
    network = FlatNetwork(recorder, torch.device("cpu"))
    whole = scans_of([(16, 16)] * 5, (16, 16), classes=2)
    images = Images(torch.stack(whole.pixels), torch.stack(whole.targets), whole.patients)
    counts = evaluate(network.vector(), images, network=network, task=task(2))
    assert [shape[0] for shape in recorder.shapes] == {1: [1] * 5, 700: [2, 2, 1]}.get(most, [5])
    scanned = evaluate(network.vector(), whole, network=network, task=task(2))
    assert np.array_equal(np.delete(counts, 1), np.delete(scanned, 1))
    losses = [task(2).figures(each)["loss"] for each in (counts, scanned)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_scoring_leaves_gradients_on_for_training() -> None:
    network = pointwise(3)
    evaluate(network.vector(), scans_of([(20, 20)], (16, 16)), network=network, task=task())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


# Training


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Callable[..., Study]:
    def make(size: tuple[int, ...] = (16, 16), **training: Any) -> Study:
        changes = {f"training.{name}": value for name, value in training.items()}
        return make_study({
            "task": {"kind": "segmentation", "classes": ["background", "bright"]},
            "model": {"name": "unet", "channels": [4, 8], "residual_units": 0},
            "input": {"size": list(size), "patches": True, "intensity": "image"},
            "training": {"learning_rate": 0.02, "batch_size": 6, "local_steps": 25,
                         "optimizer": "adam", "loss": {"kind": "dice-cross-entropy"}},
            **changes,
        })  # fmt: skip

    return make


def bright_scans(sizes: list[tuple[int, ...]], noise: float = 0.3) -> Scans:
    """Rectangles brighter than the noise around them, and masks of the rectangles."""
    rng, pixels, targets = stream(2), [], []
    for size in sizes:
        mask = torch.zeros(size, dtype=torch.uint8)
        mask[tuple(slice(side // 4, side - side // 4) for side in size)] = 1
        pixels.append(mask + noise * torch.randn(1, *size, generator=rng))
        targets.append(mask)
    return Scans(tuple(pixels), tuple(targets), tuple("abcdefgh"[: len(sizes)]), (16,) * len(size))


@pytest.mark.parametrize("sizes", [[(20, 40), (33, 24)], [(16, 20, 18)]], ids=["images", "volumes"])
def test_training_on_patches_learns_to_outline_and_moving_them_does_no_harm(
    sizes: list[tuple[int, ...]], study: Callable[..., Study]
) -> None:
    turns = {"flip": 0.5, "flip_vertical": 0.5, "quarter_turns": True, "shift": 0.1}
    planned = study((16,) * len(sizes[0]), augmentation=turns)
    network, asked, scans = build_network(planned), task_of(planned), bright_scans(sizes)
    before = network.vector()
    update = train(before, scans, planned.training, network=network, task=asked, rate=0.02,
                   rng=stream()).values  # fmt: skip

    def dice(model: Any) -> float:
        counts = evaluate(model, scans, network=network, task=asked)
        return float(asked.figures(counts)["dice"])

    assert dice(before) < 0.75
    assert dice(before + update) > 0.9


def test_mixed_precision_outlines_almost_like_full_precision(study: Callable[..., Study]) -> None:
    scans, updates = bright_scans([(20, 40), (33, 24)]), []
    for is_mixed in (False, True):
        planned = study(mixed_precision=is_mixed, optimizer="sgd", local_steps=2)
        network = build_network(planned)
        updates.append(
            train(network.vector(), scans, planned.training, network=network,
                  task=task_of(planned), rate=0.02, rng=stream()).values
        )  # fmt: skip
    full, mixed = updates
    assert mixed.dtype == np.float32
    assert np.isfinite(mixed).all()
    assert 0 < np.linalg.norm(mixed - full) < 0.1 * np.linalg.norm(full)
