"""Losses against numbers worked out by hand, torch's, MONAI's: one value per image, uncoupled."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceLoss
from monai.losses import FocalLoss as MonaiFocal
from torch import Tensor

from common.study import Classification, Segmentation, TrainingLoss
from common.tasks import ClassificationTask, SegmentationTask
from common.tasks.losses import OUTSIDE, missed_overlap, surprise, surprise_by_label

SIZE = (6, 5)
KINDS = ("cross-entropy", "focal", "dice", "dice-cross-entropy")
WEIGHTS = (0.25, 3.0, 1.5, 8.0)
SEEDS = st.integers(0, 2**32 - 1)


def loss(kind: str = "cross-entropy", **more: Any) -> TrainingLoss:
    return TrainingLoss(kind=kind, **more)  # type: ignore[arg-type]


def drawn(num: int, num_classes: int, seed: int = 5, *, outside: float = 0.0, sd: float = 2.0):
    """Logits in float64 and masks, of which a share is outside."""
    rng = np.random.default_rng(seed)
    num_outputs = 1 if num_classes == 2 else num_classes
    logits = sd * rng.normal(size=(num, num_outputs, *SIZE))
    masks = rng.integers(num_classes, size=(num, *SIZE))
    masks[rng.random(masks.shape) < outside] = OUTSIDE
    return torch.tensor(logits), torch.tensor(masks.astype(np.uint8))


def task_of(num_classes: int, config: TrainingLoss) -> SegmentationTask:
    classes = tuple(f"class {k}" for k in range(num_classes))
    return SegmentationTask(Segmentation(kind="segmentation", classes=classes), config, SIZE)


def by_image(task: SegmentationTask, logits: Tensor, masks: Tensor) -> list[float]:
    """The training loss of every image by itself."""
    of = task.local_loss(None)
    return [of(logits[k : k + 1], masks[k : k + 1]).item() for k in range(len(masks))]


# Properties


@given(
    SEEDS, st.sampled_from(KINDS), st.sampled_from([2, 4]), st.booleans(), st.permutations(range(4))
)
def test_an_image_costs_the_same_alone_and_in_any_batch(
    seed: int, kind: str, num_classes: int, weighted: bool, order: list[int]
) -> None:
    weights = WEIGHTS[:num_classes] if weighted and kind != "dice" else ()
    task = task_of(num_classes, loss(kind, class_weights=weights))
    logits, masks = drawn(4, num_classes, seed, outside=0.3)
    alone = by_image(task, logits, masks)
    for num in (2, 4):
        chosen = order[:num]
        together = task.local_loss(None)(logits[chosen], masks[chosen]).item()
        assert together == pytest.approx(np.mean([alone[k] for k in chosen]), rel=1e-12)


@given(SEEDS, st.sampled_from(["cross-entropy", "focal"]), st.sampled_from(["one", "many", "free"]))
def test_a_label_costs_the_same_alone_and_in_any_batch(seed: int, kind: str, labels: str) -> None:
    kinds = {"one": "binary", "many": "multiclass", "free": "multilabel"}
    classes = ("no", "yes") if labels == "one" else ("a", "b", "c", "d")
    config = Classification(kind="classification", labels=kinds[labels], classes=classes)  # type: ignore[arg-type]
    weighted = loss(kind, class_weights=WEIGHTS[: len(classes)])
    of = ClassificationTask(config, weighted, adjust_logits=False).local_loss(None)
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(5, config.num_outputs)))
    shape = (5, 4) if labels == "free" else (5,)
    targets = torch.tensor(rng.integers(2 if labels != "many" else 4, size=shape))
    alone = [of(logits[k : k + 1], targets[k : k + 1]).item() for k in range(5)]
    assert of(logits, targets).item() == pytest.approx(np.mean(alone), rel=1e-12)


@given(SEEDS, st.sampled_from(["dice", "dice-cross-entropy"]), st.sampled_from([2, 4]))
def test_dice_over_the_batch_is_that_of_the_images_laid_side_by_side(
    seed: int, kind: str, num_classes: int
) -> None:
    logits, masks = drawn(3, num_classes, seed, outside=0.2)
    coupled, apart = loss(kind, dice_over="batch"), loss(kind)
    side_by_side = torch.cat(list(logits), dim=-1)[None], torch.cat(list(masks), dim=-1)[None]
    joined = missed_overlap(*side_by_side, apart)
    missed = missed_overlap(logits, masks, coupled)
    assert missed.shape == (3,)
    assert missed.tolist() == pytest.approx(joined.expand(3).tolist(), rel=1e-12)
    # The cross-entropy beside it stays each image's own.
    beside = np.mean(by_image(task_of(num_classes, loss()), logits, masks)) if "-" in kind else 0
    whole = task_of(num_classes, coupled).local_loss(None)(logits, masks).item()
    assert whole == pytest.approx(joined.item() + beside, rel=1e-12)
    one = logits[:1], masks[:1]
    assert missed_overlap(*one, coupled).item() == missed_overlap(*one, apart).item()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_only_dice_over_the_batch_couples_images(num_classes: int) -> None:
    logits, masks = drawn(3, num_classes)
    others = logits.clone()
    others[1:, -1] += 2.0
    for kind in KINDS:
        for over in ("image", "batch"):
            task = task_of(num_classes, loss(kind, dice_over=over))
            first = [task._losses(each, masks, task.loss)[0].item() for each in (logits, others)]
            coupled = over == "batch" and "dice" in kind
            assert (first[0] != pytest.approx(first[1], abs=1e-9)) == coupled, (kind, over)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("over", ["image", "batch"])
def test_pixels_outside_change_neither_the_loss_nor_its_gradient(
    kind: str, num_classes: int, over: str
) -> None:
    task = task_of(num_classes, loss(kind, dice_over=over))
    logits, masks = drawn(3, num_classes, outside=0.4)
    outside = (masks == OUTSIDE).unsqueeze(1).expand_as(logits)
    assert 0.2 < outside.double().mean() < 0.6
    wanted = task.local_loss(None)(logits, masks).item()
    signs = drawn(3, num_classes, seed=6)[0].sign()
    for far in (0.0, 3.0, 1e4, 1e30):
        moved = torch.where(outside, far * signs, logits).requires_grad_()
        value = task.local_loss(None)(moved, masks)
        value.backward()
        assert value.item() == pytest.approx(wanted, rel=1e-12), far
        assert not moved.grad[outside].any()
        assert moved.grad[~outside].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_extreme_logits_give_finite_gradients(kind: str, num_classes: int) -> None:
    _, masks = drawn(4, num_classes, outside=0.2)
    right = torch.stack([masks == k for k in range(num_classes)], dim=1)
    if num_classes == 2:
        right = right[:, 1:]
    for sign, far in ((1, 100.0), (-1, 100.0), (1, 30.0), (-1, 30.0), (1, 0.0)):
        logits = (sign * torch.where(right, far, -far)).float().requires_grad_()
        for gamma in (1.0, 1.5, 2.0) if kind == "focal" else (2.0,):
            value = task_of(num_classes, loss(kind, focal_gamma=gamma)).local_loss(None)(
                logits, masks
            )
            logits.grad = None
            value.backward()
            assert torch.isfinite(value), (sign, far, gamma)
            assert torch.isfinite(logits.grad).all(), (sign, far, gamma)
            if sign < 0 and "dice" not in kind:  # all wrong: the way back is not flat
                assert logits.grad.abs().max() > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_extreme_logits_of_labels_give_finite_gradients(gamma: float) -> None:
    values = torch.tensor([-100.0, 100.0, 0.0, -100.0])
    for kind in ("cross-entropy", "focal"):
        config = loss(kind, focal_gamma=gamma)
        for targets in (torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])):
            one = values[:, None].clone().requires_grad_()
            surprise(one, targets, config).sum().backward()
            free = values[None].clone().requires_grad_()
            surprise_by_label(free, targets[None], config).sum().backward()
            assert torch.isfinite(one.grad).all()
            assert torch.isfinite(free.grad).all()
            assert torch.equal(one.grad.flatten(), free.grad.flatten())


# Numbers by hand: log-odds of log 3 are a chance of three quarters.

SURE = math.log(3)


@pytest.mark.parametrize(
    ("target", "weights", "gamma", "wanted"),
    [
        (1, (), None, math.log(4 / 3)),
        (0, (), None, math.log(4)),
        (1, (2.0, 5.0), None, 5 * math.log(4 / 3)),
        (0, (2.0, 5.0), None, 2 * math.log(4)),
        (1, (), 1.0, math.log(4 / 3) / 4),
        (0, (), 1.0, math.log(4) * 3 / 4),
        (1, (), 2.0, math.log(4 / 3) / 16),
        (0, (), 2.0, math.log(4) * 9 / 16),
        (1, (2.0, 5.0), 3.0, 5 * math.log(4 / 3) / 64),
    ],
)
def test_one_logit_costs_what_was_worked_out_by_hand(
    target: int, weights: tuple[float, ...], gamma: float | None, wanted: float
) -> None:
    config = loss(class_weights=weights)
    if gamma is not None:
        config = loss("focal", class_weights=weights, focal_gamma=gamma)
    logits = torch.tensor([[SURE]], dtype=torch.float64)
    assert surprise(logits, torch.tensor([target]), config).tolist() == pytest.approx([wanted])
    # Labels that go together freely have no class for "not": a weight is the label's.
    of_label = loss(config.kind, class_weights=weights[1:], focal_gamma=config.focal_gamma)
    free = surprise_by_label(logits, torch.tensor([[target]]), of_label).item()
    assert free == pytest.approx(wanted * (weights[1] / weights[target] if weights else 1))


@pytest.mark.parametrize(
    ("target", "weights", "gamma", "wanted"),
    [
        (0, (), None, math.log(2)),
        (1, (), None, math.log(4)),
        (2, (), None, math.log(8)),
        (2, (1.0, 3.0, 7.0, 9.0), None, 7 * math.log(8)),
        (0, (), 2.0, math.log(2) / 4),
        (2, (), 2.0, math.log(8) * 49 / 64),
        (1, (1.0, 3.0, 7.0, 9.0), 1.0, 3 * math.log(4) * 3 / 4),
    ],
)
def test_four_logits_cost_what_was_worked_out_by_hand(
    target: int, weights: tuple[float, ...], gamma: float | None, wanted: float
) -> None:
    config = loss(class_weights=weights)
    if gamma is not None:
        config = loss("focal", class_weights=weights, focal_gamma=gamma)
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]], dtype=torch.float64).log() + 3
    assert surprise(logits, torch.tensor([target]), config).tolist() == pytest.approx([wanted])
    pixels = logits[..., None, None].expand(1, 4, 2, 3)
    masks = torch.full((1, 2, 3), target, dtype=torch.uint8)
    assert surprise(pixels, masks, config).tolist() == [[[pytest.approx(wanted)] * 3] * 2]


@pytest.mark.parametrize(
    ("title", "logits", "mask", "wanted"),
    [
        # Shares of one half: 2 * 1/2 + 1 over 1 + 1 + 1; then the same without the right half.
        ("one class, half of it outside", [0, 0, 0, 0], [1, 0, 255, 255], 1 - 2 / 3),
        ("one class, all inside", [0, 0, 0, 0], [1, 0, 1, 0], 1 - 3 / 5),
        ("found, with one pixel outside", [99, -99, -99, 99], [1, 0, 0, 255], 0.0),
        ("missed: only the smoothing is left", [-99, -99, -99, -99], [1, 1, 1, 0], 1 - 1 / 4),
        ("absent and not seen", [-99, -99, -99, -99], [0, 0, 0, 255], 0.0),
        ("absent and seen twice", [99, 99, -99, -99], [0, 0, 0, 0], 1 - 1 / 3),
        ("nothing but outside", [99, 0, -99, 3], [255, 255, 255, 255], 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overlap_by_hand(title: str, logits: list[float], mask: list[int], wanted: float) -> None:
    pixels = torch.tensor(logits, dtype=torch.float64).reshape(1, 1, 2, 2)
    masks = torch.tensor(mask, dtype=torch.uint8).reshape(1, 2, 2)
    for over in ("image", "batch"):
        missed = missed_overlap(pixels, masks, loss("dice", dice_over=over))
        assert missed.tolist() == pytest.approx([wanted], abs=1e-12)


def test_overlap_of_three_classes_by_hand_leaves_out_the_background() -> None:
    # Shares of one third for every class; four pixels inside.
    logits = torch.zeros(1, 3, 5, dtype=torch.float64)
    masks = torch.tensor([[1, 1, 0, 0, 255]], dtype=torch.uint8)
    first = (2 * 2 / 3 + 1) / (4 / 3 + 2 + 1)
    second = (0 + 1) / (4 / 3 + 0 + 1)
    wanted = 1 - (first + second) / 2
    assert missed_overlap(logits, masks, loss("dice")).tolist() == pytest.approx([wanted])


def test_cross_entropy_of_an_image_is_the_mean_over_its_known_pixels() -> None:
    logits = torch.tensor([SURE, SURE, -50.0, 50.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    masks = torch.tensor([1, 0, 255, 255], dtype=torch.uint8).reshape(1, 2, 2)
    pixels = [math.log(4 / 3), math.log(4)]
    plain, both, weighted = (
        task_of(2, config).local_loss(None)(logits, masks).item()
        for config in (loss(), loss("dice-cross-entropy"), loss(class_weights=(2.0, 5.0)))
    )
    assert plain == pytest.approx(np.mean(pixels))
    # Overlap of the two known pixels, each with a share of 3/4: (2 * 3/4 + 1) over (3/2 + 1 + 1).
    assert both == pytest.approx(np.mean(pixels) + 1 - 2.5 / 3.5)
    assert weighted == pytest.approx((5 * pixels[0] + 2 * pixels[1]) / 2)  # by 2, not by 5 + 2


def test_an_image_without_a_known_pixel_costs_nothing() -> None:
    logits, masks = drawn(2, 4)
    masks[1] = OUTSIDE
    for kind in KINDS:
        losses = task_of(4, loss(kind))._losses(logits, masks, loss(kind))
        assert losses[0] > 0
        assert losses[1] == 0


# References


@pytest.mark.parametrize("shape", [(), SIZE, (4, 3, 2)], ids=["labels", "images", "volumes"])
def test_weights_are_torchs_before_torch_divides_by_their_sum(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    logits = torch.tensor(rng.normal(size=(7, 4, *shape)))
    targets = torch.tensor(rng.integers(4, size=(7, *shape)))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    ours = surprise(logits, targets, loss(class_weights=WEIGHTS))
    assert torch.allclose(ours, F.cross_entropy(logits, targets, weights, reduction="none"))
    divided = F.cross_entropy(logits, targets, weights)
    assert (ours.sum() / weights[targets].sum()).item() == pytest.approx(divided.item())
    assert abs(ours.mean() - divided) > 0.1 * divided
    plain = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(surprise(logits, targets, loss()), plain)


@pytest.mark.parametrize("labels", ["binary", "multiclass", "multilabel"])
def test_a_classifiers_weighted_loss_is_torchs_over_the_number_of_images(labels: str) -> None:
    rng = np.random.default_rng(5)
    classes = ("no", "yes") if labels == "binary" else ("a", "b", "c", "d")
    config = Classification(kind="classification", labels=labels, classes=classes)  # type: ignore[arg-type]
    logits = torch.tensor(rng.normal(size=(9, config.num_outputs)))
    weights = torch.tensor(WEIGHTS[: len(classes)], dtype=torch.float64)
    if labels == "multilabel":
        targets = torch.tensor(rng.integers(2, size=(9, 4)))
        wanted = F.binary_cross_entropy_with_logits(logits, targets.double(), weights)
    elif labels == "multiclass":
        targets = torch.tensor(rng.integers(4, size=9))
        wanted = F.cross_entropy(logits, targets, weights, reduction="sum") / 9
    else:
        targets = torch.tensor(rng.integers(2, size=9))
        two = torch.cat([torch.zeros_like(logits), logits], dim=1)
        wanted = F.cross_entropy(two, targets, weights, reduction="sum") / 9
    task = ClassificationTask(
        config, loss(class_weights=tuple(weights.tolist())), adjust_logits=False
    )
    assert task.local_loss(None)(logits, targets).item() == pytest.approx(wanted.item())
    figures = task.figures(task.counts(logits, targets))
    assert figures["loss"] == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_focal_loss_is_monais(gamma: float, num_classes: int) -> None:
    logits, masks = drawn(3, num_classes)
    softmax = num_classes > 2
    monai = MonaiFocal(gamma=gamma, use_softmax=softmax, to_onehot_y=softmax, reduction="none")
    wanted = monai(logits, masks[:, None].long()).sum(dim=1).double()  # MONAI counts in float32
    ours = surprise(logits, masks, loss("focal", focal_gamma=gamma))
    assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-6)
    if not softmax:
        free = surprise_by_label(logits, masks[:, None], loss("focal", focal_gamma=gamma))
        assert torch.equal(free[:, 0], ours)


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_dice_is_monais_where_every_pixel_is_known(over: str, num_classes: int) -> None:
    logits, masks = drawn(4, num_classes)
    masks[1] = 0  # an image of background alone
    softmax = num_classes > 2
    monai = DiceLoss(
        include_background=not softmax,  # MONAI ignores it, loudly, where there is one output
        to_onehot_y=softmax,
        softmax=softmax,
        sigmoid=not softmax,
        smooth_nr=1,
        smooth_dr=1,
        batch=over == "batch",
        reduction="none",
    )
    wanted = monai(logits, masks[:, None].long())
    wanted = wanted.reshape(-1 if over == "image" else 1, max(1, num_classes - 1)).mean(dim=1)
    missed = missed_overlap(logits, masks, loss("dice", dice_over=over))
    assert torch.allclose(missed, wanted.expand(4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_gradients_agree_with_finite_differences(kind: str, num_classes: int) -> None:
    logits, masks = drawn(2, num_classes, outside=0.2)
    of: Callable[[Tensor, Tensor], Tensor] = task_of(num_classes, loss(kind)).local_loss(None)
    small = logits[..., :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: of(each, masks[..., :2, :2]), (small,))
