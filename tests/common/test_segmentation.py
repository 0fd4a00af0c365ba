"""Figures of summed pixels against scikit-learn on the pooled pixels."""

import json
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance
from numpy.typing import NDArray
from torch import Tensor

from common.quantize import FIXED_POINT
from common.study import Segmentation, TrainingLoss
from common.tasks.base import MAX_LOSS
from common.tasks.losses import OUTSIDE
from common.tasks.outline import hausdorff_95
from common.tasks.segmentation import SegmentationTask

SIZE = (12, 10)
VOLUME = (4, 6, 5)
FIGURES = {
    "dice": sk.f1_score,
    "iou": sk.jaccard_score,
    "sensitivity": sk.recall_score,
    "precision": sk.precision_score,
}
both = pytest.mark.parametrize("num_classes", [2, 4])


def task_of(num_classes: int, size: tuple[int, ...] = SIZE, **loss: Any) -> SegmentationTask:
    classes = ("background", *(f"class {k}" for k in range(1, num_classes)))
    config = Segmentation(kind="segmentation", classes=classes)
    return SegmentationTask(config, TrainingLoss(**loss), size)


def predictions(
    num: int,
    num_classes: int,
    rng: np.random.Generator,
    *,
    size: tuple[int, ...] = SIZE,
    skew: float = 0.0,
    outside: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Logits that know something about the masks; ``skew`` makes later classes rare."""
    odds = np.exp(-skew * np.arange(num_classes))
    masks = rng.choice(num_classes, (num, *size), p=odds / odds.sum())
    signal = np.moveaxis(np.eye(num_classes)[masks], -1, 1)
    if num_classes == 2:
        signal = 2 * signal[:, 1:] - 1
    logits = rng.normal(size=signal.shape) + signal
    masks[rng.random(masks.shape) < outside] = OUTSIDE
    return torch.tensor(logits), torch.tensor(masks.astype(np.uint8))


def summed_counts(
    task: SegmentationTask, logits: Tensor, masks: Tensor, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Counts over three sites, each in a random number of batches."""
    total = np.zeros(task.num_counts, np.int64)
    site_of = rng.integers(3, size=len(masks))
    for site in range(3):
        mine = np.flatnonzero(site_of == site)
        for batch in np.array_split(mine, rng.integers(1, 4)):
            total += task.counts(logits[batch], masks[batch])
    return total


def pooled(logits: Tensor, masks: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """True and given class of all known pixels, decided without the code under test."""
    scores = logits.numpy()
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
    known = masks.numpy() != OUTSIDE
    return masks.numpy()[known].astype(np.int64), scores.argmax(axis=1)[known]


# Properties


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 5]), st.lists(st.integers(0, 6)))
def test_counts_are_the_sum_over_any_batches(seed: int, num_classes: int, cuts: list[int]) -> None:
    task = task_of(num_classes, (3, 2), kind="dice-cross-entropy")
    logits, masks = predictions(6, num_classes, np.random.default_rng(seed), size=(3, 2))
    whole = task.counts(logits, masks)
    parts = [part for part in np.split(np.arange(6), sorted(cuts)) if len(part)]
    total = np.sum([task.counts(logits[part], masks[part]) for part in parts], axis=0)
    loss_at = 1
    rest = np.arange(task.num_counts) != loss_at
    assert np.array_equal(whole[rest], total[rest])
    assert abs(whole[loss_at] - total[loss_at]) <= 6  # one step of the fixed point per image
    order = np.random.default_rng(seed).permutation(6)
    assert np.array_equal(task.counts(logits[order], masks[order])[rest], whole[rest])
    assert whole.dtype == np.int64


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4]))
def test_every_known_pixel_is_counted_once_as_predicted_and_once_as_actual(
    seed: int, num_classes: int
) -> None:
    task = task_of(num_classes)
    logits, masks = predictions(3, num_classes, np.random.default_rng(seed), size=(3, 3))
    view = task.view(task.counts(logits, masks))
    known = int((masks != OUTSIDE).sum())
    assert view.predicted.sum() == view.actual.sum() == known
    assert view.actual.tolist() == [int((masks == k).sum()) for k in range(num_classes)]
    assert (view.right <= np.minimum(view.predicted, view.actual)).all()
    assert (view.right >= 0).all()


@both
@pytest.mark.parametrize("kind", ["cross-entropy", "focal", "dice", "dice-cross-entropy"])
def test_pixels_outside_change_no_count_whatever_the_logits_there(
    num_classes: int, kind: str, rng: np.random.Generator
) -> None:
    task = task_of(num_classes, kind=kind)
    logits, masks = predictions(3, num_classes, rng, outside=0.5)
    counts = task.counts(logits, masks)
    outside = (masks == OUTSIDE).unsqueeze(1).expand_as(logits)
    for far in (-1e30, -20.0, 0.0, 20.0, 1e30):
        moved = logits.clone()
        moved[:, -1:][outside[:, -1:]] = far
        assert not torch.equal(moved, logits)
        assert np.abs(task.counts(moved, masks) - counts).max() <= 3  # fixed point, 3 images
        rest = np.arange(len(counts)) != 1
        assert np.array_equal(task.counts(moved, masks)[rest], counts[rest])
    # The same pixels, known: now they count.
    known = torch.where(masks == OUTSIDE, 1, masks)
    assert (task.counts(logits, known)[2:] != counts[2:]).any()


# References


@both
@pytest.mark.parametrize("skew", [0.0, 1.5], ids=["balanced", "skewed"])
@pytest.mark.parametrize("size", [SIZE, VOLUME], ids=["images", "volumes"])
def test_figures_of_the_summed_counts_are_those_of_the_pooled_pixels(
    num_classes: int, skew: float, size: tuple[int, ...], rng: np.random.Generator
) -> None:
    task = task_of(num_classes, size)
    logits, masks = predictions(60, num_classes, rng, size=size, skew=skew)
    counts = summed_counts(task, logits, masks, rng)
    figures, by_class = task.figures(counts), task.figures_by_class(counts)
    truth, given_class = pooled(logits, masks)
    labels = range(num_classes)
    for name, reference in FIGURES.items():
        wanted = reference(truth, given_class, labels=labels, average=None)
        assert len(set(wanted)) == num_classes  # a mix-up of classes cannot pass
        assert [of_class[name] for of_class in by_class] == pytest.approx(wanted, rel=1e-12)
        assert figures[name] == pytest.approx(wanted[1:].mean(), rel=1e-12), name
    dice = sk.f1_score(truth, given_class, labels=labels, average=None)
    assert figures["dice_by_class"] == pytest.approx(dict(zip(task.classes, dice, strict=True)))
    assert list(figures["dice_by_class"]) == list(task.classes)
    assert figures["num_examples"] == 60


@both
def test_pooled_figures_are_not_the_mean_of_the_images_own(
    num_classes: int, rng: np.random.Generator
) -> None:
    task = task_of(num_classes)
    logits, masks = predictions(8, num_classes, rng, skew=1.0)
    masks[1:, 1:] = OUTSIDE  # images with few known pixels weigh less
    each = [task.figures(task.counts(logits[k : k + 1], masks[k : k + 1])) for k in range(8)]
    together = task.figures(sum(task.counts(logits[k : k + 1], masks[k : k + 1]) for k in range(8)))
    own = [figures["dice"] for figures in each if figures["dice"] is not None]
    assert abs(together["dice"] - np.mean(own)) > 0.01


@both
@pytest.mark.parametrize("kind", ["cross-entropy", "focal", "dice", "dice-cross-entropy"])
def test_the_loss_among_the_figures_is_the_one_training_lowers(
    num_classes: int, kind: str, rng: np.random.Generator
) -> None:
    weights = () if kind == "dice" else tuple(1.0 + k for k in range(num_classes))
    task = task_of(num_classes, kind=kind, class_weights=weights)
    logits, masks = predictions(12, num_classes, rng)
    figures = task.figures(summed_counts(task, logits, masks, rng))
    assert figures["num_examples"] == 12
    assert figures["loss"] == pytest.approx(task.local_loss(None)(logits, masks).item(), rel=1e-8)
    # It does not depend on what the site has.
    assert task.local_loss(masks)(logits, masks) == task.local_loss(None)(logits, masks)


# By hand


def test_figures_of_six_pixels_by_hand() -> None:
    task = task_of(3, (1, 7))
    masks = torch.tensor([[[0, 0, 1, 1, 2, 2, 255]]], dtype=torch.uint8)
    given_class = torch.tensor([[0, 1, 1, 1, 1, 2, 2]])
    logits = 5.0 * torch.eye(3)[given_class].permute(0, 2, 1).unsqueeze(2)
    counts = task.counts(logits, masks)
    view = task.view(counts)
    assert view.right.tolist() == [1, 2, 1]
    assert view.predicted.tolist() == [1, 4, 1]
    assert view.actual.tolist() == [2, 2, 2]
    figures = task.figures(counts)
    assert figures["dice"] == pytest.approx((4 / 6 + 2 / 3) / 2)
    assert figures["iou"] == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert figures["sensitivity"] == pytest.approx((1 + 1 / 2) / 2)
    assert figures["precision"] == pytest.approx((2 / 4 + 1) / 2)
    assert figures["dice_by_class"] == pytest.approx(
        {"background": 2 / 3, "class 1": 4 / 6, "class 2": 2 / 3}
    )


@pytest.mark.parametrize(
    ("title", "given_class", "truth", "wanted"),
    [
        ("nowhere", [0, 0, 0], [0, 0, 0], (None, None, None, None)),
        ("there and missed", [0, 0, 0], [0, 1, 0], (0.0, 0.0, 0.0, None)),
        ("seen and not there", [0, 1, 0], [0, 0, 0], (0.0, 0.0, None, 0.0)),
        ("there and seen elsewhere", [1, 0, 0], [0, 1, 0], (0.0, 0.0, 0.0, 0.0)),
        ("everywhere and seen", [1, 1, 1], [1, 1, 1], (1.0, 1.0, 1.0, 1.0)),
        ("there, but outside", [1, 0, 0], [255, 0, 0], (None, None, None, None)),
        ("all outside", [1, 1, 0], [255, 255, 255], (None, None, None, None)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_divides_by_zero_is_undefined_and_not_zero(
    title: str, given_class: list[int], truth: list[int], wanted: tuple[float | None, ...]
) -> None:
    logits = torch.tensor([[[given_class]]]) * 8.0 - 4
    figures = task_of(2, (1, 3)).figures(
        task_of(2, (1, 3)).counts(logits, torch.tensor([[truth]], dtype=torch.uint8))
    )
    assert tuple(figures[name] for name in FIGURES) == wanted
    assert figures["num_examples"] == 1


def test_a_class_that_nobody_has_or_sees_is_left_out_of_the_means() -> None:
    task = task_of(4, (1, 4))
    masks = torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint8)
    logits = torch.eye(4)[torch.tensor([[0, 1, 0, 0]])].permute(0, 2, 1).unsqueeze(2)
    figures = task.figures(task.counts(logits, masks))
    assert figures["dice"] == pytest.approx(2 / 3)  # of class 1 alone; the background has 4 / 5
    assert figures["sensitivity"] == 0.5
    assert figures["dice_by_class"]["class 2"] is figures["dice_by_class"]["class 3"] is None
    assert figures["dice_by_class"]["background"] == pytest.approx(4 / 5)


@both
def test_without_images_every_figure_is_undefined(num_classes: int) -> None:
    task = task_of(num_classes)
    figures = task.figures(np.zeros(task.num_counts, np.int64))
    assert figures.pop("num_examples") == 0
    assert set(figures.pop("dice_by_class").values()) == {None}
    assert set(figures.pop("intervals").values()) <= {None}
    assert set(figures.values()) == {None}


def test_figures_name_what_the_study_says_that_the_task_has(rng: np.random.Generator) -> None:
    config = Segmentation(kind="segmentation", classes=("a", "b", "c"))
    task = SegmentationTask(config, TrainingLoss(), SIZE)
    figures = task.figures(task.counts(*predictions(2, 3, rng)))
    scalars = [name for name, value in figures.items() if isinstance(value, float)]
    assert sorted(scalars) == sorted(config.figures)


@both
def test_figures_are_ready_for_json(num_classes: int, rng: np.random.Generator) -> None:
    task = task_of(num_classes)
    logits, masks = predictions(3, num_classes, rng)
    figures = task.figures(task.counts(logits, masks))
    assert json.loads(json.dumps(figures)) == figures


@both
def test_a_view_names_every_count_exactly_once(num_classes: int) -> None:
    task = task_of(num_classes)
    vector = np.zeros(task.num_counts, np.int64)
    for part in vars(task.view(vector)).values():
        np.add(part, 1, out=part)
    assert (vector == 1).all()


@both
@pytest.mark.parametrize("kind", ["cross-entropy", "focal", "dice", "dice-cross-entropy"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e38])
def test_a_diverged_network_is_counted_and_cannot_overflow_the_loss(
    num_classes: int, kind: str, wrong: float, rng: np.random.Generator
) -> None:
    task = task_of(num_classes, kind=kind)
    _, masks = predictions(4, num_classes, rng)
    outputs = torch.full((4, 1 if num_classes == 2 else num_classes, *SIZE), wrong)
    outputs[:, 0, 0] = -wrong
    counts = task.counts(outputs, masks)
    view, figures = task.view(counts), task.figures(counts)
    known = int((masks != OUTSIDE).sum())
    assert view.predicted.sum() == view.actual.sum() == known
    assert figures["num_examples"] == 4
    assert 0 <= figures["loss"] <= MAX_LOSS
    assert (counts >= 0).all()
    if np.isnan(wrong):
        assert figures["loss"] == MAX_LOSS  # the worst, not the best
    # A healthy site beside it is not lost.
    healthy = task.counts(*predictions(4, num_classes, rng))
    assert task.figures(counts + healthy)["num_examples"] == 8


def test_one_diverged_image_costs_the_most_and_its_neighbours_what_they_did(
    rng: np.random.Generator,
) -> None:
    task = task_of(4)
    logits, masks = predictions(3, 4, rng)
    wanted = task.counts(logits[1:], masks[1:])[1] + int(MAX_LOSS * FIXED_POINT)
    logits[0, 2, 5] = np.nan
    assert task.counts(logits, masks)[1] == pytest.approx(wanted, abs=4)


def test_two_million_diverged_images_do_not_overflow_the_sum() -> None:
    assert 2_000_000 * int(MAX_LOSS * FIXED_POINT) < 2**63


def test_one_output_is_decided_by_its_sign_and_several_by_the_largest() -> None:
    one = torch.tensor([[-1.0, 0.0, 1e-6, 7.0]]).reshape(1, 1, 2, 2)
    decided = task_of(2).decide(one)
    assert decided.tolist() == [[[0, 0], [1, 1]]]
    many = torch.tensor([[3.0, -9.0], [2.0, -5.0], [-1.0, -7.0]]).reshape(1, 3, 1, 2)
    assert task_of(3).decide(many).tolist() == [[[0, 1]]]
    assert decided.dtype == torch.uint8
    assert task_of(4, VOLUME).decide(torch.zeros(2, 4, *VOLUME)).shape == (2, *VOLUME)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 12])
@pytest.mark.parametrize("size", [(8, 8), (32, 16), (8, 8, 8)])
def test_made_up_targets_hold_every_class_and_pixels_outside(
    num_classes: int, size: tuple[int, ...]
) -> None:
    task = task_of(num_classes, size)
    masks = task.made_up_targets(3)
    assert masks.shape == (3, *size)
    assert masks.dtype == torch.uint8
    assert sorted(set(masks.flatten().tolist())) == [*range(num_classes), OUTSIDE]
    outputs = torch.zeros(3, 1 if num_classes == 2 else num_classes, *size)
    assert task.counts(outputs, masks)[0] == 3


def test_the_scored_loss_does_not_depend_on_the_batch_even_if_the_trained_one_does(
    rng: np.random.Generator,
) -> None:
    task = task_of(4, kind="dice", dice_over="batch")
    logits, masks = predictions(6, 4, rng, skew=1.0)
    one_by_one = sum(task.counts(logits[k : k + 1], masks[k : k + 1]) for k in range(6))
    assert task.counts(logits, masks)[1] == pytest.approx(one_by_one[1], rel=1e-6)


@pytest.mark.parametrize("seed_of", range(12))
@pytest.mark.filterwarnings("ignore:monai.metrics.utils")  # MONAI calls itself as it should not
def test_hd95_is_monais(seed_of: int) -> None:
    rng = torch.Generator().manual_seed(seed_of)
    shape = (30, 27) if seed_of % 2 else (14, 12, 11)
    one, other = (torch.rand(shape, generator=rng) > 0.8 + 0.05 * k for k in range(2))
    if seed_of % 3 == 0:  # two bodies, one of them at the border
        one = torch.zeros(shape, dtype=torch.bool)
        one[:7, 3:9] = True
        other = one.roll(3, 1)
    spacing = [2.0, 0.5, 1.25][: len(shape)]
    expected = compute_hausdorff_distance(
        one[None, None], other[None, None], include_background=True, percentile=95, spacing=spacing
    )
    assert hausdorff_95(one, other, spacing) == pytest.approx(float(expected), abs=1e-4)


def test_hd95_is_the_mean_over_images_that_have_both_outlines() -> None:
    config = Segmentation(kind="segmentation", classes=("background", "lesion"))
    task = SegmentationTask(config, TrainingLoss(), SIZE, spacing=(2.0, 2.0))
    truth = torch.zeros((4, *SIZE), dtype=torch.uint8)
    truth[:3, 2:5, 2:5] = 1
    given = truth.clone()
    given[1] = truth[1].roll(1, 0)  # one row, two millimetres
    given[2] = 0  # not found: there is no outline to compare
    outputs = torch.where(given == 1, 5.0, -5.0).unsqueeze(1)
    counts = sum(task.counts(outputs[k : k + 2], truth[k : k + 2]) for k in (0, 2))
    figures = task.figures(counts)
    assert figures["hd95"] == pytest.approx((0.0 + 2.0) / 2)
    assert task.view(counts).compared.tolist() == [0, 2]


def test_outlines_beyond_the_valid_region_are_not_compared() -> None:
    config = Segmentation(kind="segmentation", classes=("background", "lesion"))
    task = SegmentationTask(config, TrainingLoss(), SIZE)
    truth = torch.zeros((1, *SIZE), dtype=torch.uint8)
    truth[0, 2:5, 2:5], truth[0, -1] = 1, OUTSIDE
    outputs = torch.where(truth == 1, 5.0, -5.0).unsqueeze(1)
    outputs[0, 0, -1] = 5.0
    assert task.figures(task.counts(outputs, truth))["hd95"] == 0
