"""Boxes: targets and decoding, overlaps against MONAI, figures of sums against pooled findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_giou, box_iou
from monai.metrics import compute_froc_curve_data, compute_froc_score
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from common.models.build import build_network
from common.study import Detection, Study, TrainingLoss
from common.tasks.base import MAX_LOSS
from common.tasks.boxes import (
    NO_BOX,
    STRIDE,
    Found,
    centres_of,
    found_in,
    lost_overlap,
    overlaps,
    partners_of,
    sides_of,
)
from common.tasks.detection import DetectionTask

SIZE = (64, 96)
ROWS, COLUMNS = SIZE[0] // STRIDE, SIZE[1] // STRIDE
CLASSES = ("cell", "platelet", "parasite")
MOST = 12


def task_of(**changes: Any) -> DetectionTask:
    loss = TrainingLoss(kind="focal", **changes)
    config = Detection(kind="detection", classes=CLASSES, max_boxes=MOST)
    return DetectionTask(config, loss, SIZE)


def padded(boxes: Sequence[Sequence[float]]) -> Tensor:
    whole = torch.full((MOST, 5), NO_BOX)
    whole[: len(boxes)] = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
    return whole


def random_boxes(num: int, rng: np.random.Generator) -> Tensor:
    """Of any class, with sides from 4 to 40 pixels, inside the image."""
    height, width = SIZE
    sides = rng.uniform(4, 40, (num, 2))
    low = rng.uniform(0, 1, (num, 2)) * ([width, height] - sides)
    kinds = rng.integers(0, len(CLASSES), (num, 1))
    return torch.tensor(np.concatenate([low, low + sides, kinds], axis=1), dtype=torch.float32)


def perfect(boxes: Tensor) -> Tensor:
    """What a network that knows the boxes of a batch says."""
    wanted = centres_of(boxes, len(CLASSES), ROWS, COLUMNS)
    heat = 40 * wanted.heat - 30
    x = STRIDE * (torch.arange(COLUMNS) + 0.5)
    y = STRIDE * (torch.arange(ROWS) + 0.5)[:, None]
    left, upper, right, lower = wanted.sides.unbind(dim=1)
    away = torch.stack([x - left, y - upper, right - x, lower - y], dim=1) / STRIDE
    return torch.cat([heat, away.clamp_min(1e-3).log()], dim=1)


def noisy_findings(boxes: Tensor, rng: np.random.Generator) -> Found:
    """Most boxes, moved; some twice; and some that are none; with scores that know a little."""
    seen = boxes[torch.tensor(rng.random(len(boxes)) < 0.8)]
    again = seen[torch.tensor(rng.random(len(seen)) < 0.3)]
    wrong = random_boxes(int(rng.integers(0, 6)), rng)
    found = torch.cat([seen, again, wrong])
    found[:, :4] += torch.tensor(rng.normal(0, 1.5, (len(found), 4)), dtype=torch.float32)
    found[:, 2:4] = torch.maximum(found[:, 2:4], found[:, :2] + 1)
    logits = rng.normal(0, 1.5, len(found))
    logits[: len(seen)] += 1.5
    order = torch.tensor(np.argsort(-logits))
    return Found(found[order, :4], torch.tensor(logits)[order], found[order, 4].long())


@given(st.integers(0, 2**32 - 1))
def test_overlaps_are_monais(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = random_boxes(7, rng)[:, :4], random_boxes(5, rng)[:, :4]
    assert torch.allclose(overlaps(one, other), box_iou(one, other), atol=1e-5)
    lost = lost_overlap(one[:, None], other[None])
    assert torch.allclose(lost, 1 - box_giou(one, other), atol=1e-5)


def test_a_box_without_an_area_overlaps_nothing() -> None:
    point, box = torch.tensor([[4.0, 4, 4, 4]]), torch.tensor([[0.0, 0, 8, 8]])
    assert overlaps(point, box).item() == overlaps(point, point).item() == 0
    assert lost_overlap(point, box).isfinite().all()


@given(st.integers(0, 2**32 - 1))
def test_of_boxes_that_are_apart_a_network_that_knows_them_finds_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = rng.permutation(6)[: rng.integers(0, 7)]  # one box in each of six parts of the image
    sides = rng.uniform(6, 28, (len(cells), 2))
    low = np.stack([32 * (cells % 3), 32 * (cells // 3)], axis=1) + 1
    kinds = rng.integers(0, len(CLASSES), (len(cells), 1))
    boxes = np.concatenate([low, low + sides, kinds], axis=1).tolist()
    task, targets = task_of(), padded(boxes)[None]
    counts = task.counts(perfect(targets), targets)
    view, first = task.view(counts), task.first_shown
    assert view.boxes.sum() == view.scores[:, 1, first:].sum() == len(cells)
    assert view.scores[:, 0, first:].sum() == 0


def test_sides_lie_where_the_distances_say() -> None:
    distances = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().reshape(1, 4, 1, 1).expand(1, 4, 3, 5)
    boxes = sides_of(distances)
    x, y = 4 * 4.5, 4 * 2.5  # the middle of the last place
    assert boxes[0, :, 2, 4].tolist() == pytest.approx([x - 4, y - 8, x + 12, y + 16])


def test_heat_is_one_at_the_centre_and_falls_around_it() -> None:
    wanted = centres_of(padded([[8, 8, 56, 40, 1]])[None], len(CLASSES), ROWS, COLUMNS)
    heat = wanted.heat[0]
    assert heat[1, 6, 8] == heat.max() == 1
    assert (heat == 1).sum() == 1
    assert not heat[0].any()
    assert not heat[2].any()
    assert heat[1, 6, 10] > heat[1, 8, 8]  # the box is wider than high
    assert wanted.near[0].sum() == 9
    assert (torch.tensor([8.0, 8, 56, 40]) == wanted.sides[0][:, wanted.near[0]].T).all()
    assert wanted.num_boxes.tolist() == [1]


def test_where_two_centres_are_near_the_smaller_box_is_learned() -> None:
    boxes = padded([[0, 0, 60, 60, 0], [24, 24, 36, 36, 0]])[None]
    wanted = centres_of(boxes, len(CLASSES), ROWS, COLUMNS)
    assert wanted.sides[0, :, 7, 7].tolist() == [24, 24, 36, 36]


def test_an_image_without_boxes_has_a_loss_and_findings_that_are_wrong() -> None:
    task, targets = task_of(), padded([])[None]
    outputs = torch.zeros(1, len(CLASSES) + 4, ROWS, COLUMNS)
    outputs[0, 0, 3, 3] = 5
    counts = task.counts(outputs, targets)
    figures = task.figures(counts)
    assert figures["map50"] is figures["froc"] is figures["recall"] is None
    assert figures["loss"] > 0
    assert task.view(counts).scores[:, 0].sum() > 0
    assert not task.view(counts).scores[:, 1].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_network_that_diverged_is_counted_and_stops_nothing(value: float) -> None:
    task, targets = task_of(), padded([[8, 8, 56, 40, 1]])[None]
    counts = task.counts(torch.full((1, len(CLASSES) + 4, ROWS, COLUMNS), value), targets)
    figures = task.figures(counts)
    assert 0 <= figures["loss"] <= MAX_LOSS
    assert figures["map50"] == 0


def test_each_true_box_is_found_once_by_the_surest_finding() -> None:
    boxes = padded([[0, 0, 20, 20, 0], [40, 0, 60, 20, 0]])[:2]
    found = Found(
        torch.tensor([[0.0, 0, 20, 19], [0, 0, 20, 20], [40, 0, 60, 20], [40, 0, 60, 20]]),
        torch.tensor([3.0, 2, 1, 0]),
        torch.tensor([0, 0, 1, 0]),
    )
    assert partners_of(found.as_boxes(), boxes).tolist() == [0, -1, -1, 1]


def test_of_two_findings_that_are_one_the_surer_is_kept() -> None:
    outputs = torch.full((len(CLASSES) + 4, ROWS, COLUMNS), -10.0)
    outputs[len(CLASSES) :] = 1.5
    outputs[0, 4, 4], outputs[0, 4, 6], outputs[1, 4, 5] = 3, 2, 1
    found = found_in(outputs, len(CLASSES), SIZE)
    sure = found.logits > 0
    assert found.classes[sure].tolist() == [0, 1]
    assert found.logits[sure].tolist() == [3, 1]


@pytest.mark.parametrize("seed", range(5))
def test_figures_of_sums_are_monais_of_pooled_findings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    task = task_of()
    truths = [random_boxes(int(rng.integers(0, 9)), rng) for _ in range(60)]
    found = [noisy_findings(boxes, rng) for boxes in truths]
    sites = rng.integers(0, 4, len(truths))
    summed = sum(
        task.tally([found[k]], padded(truths[k].tolist())[None])
        for site in range(4)
        for k in np.flatnonzero(sites == site)
    )
    figures = task.figures(summed)
    assert figures["num_examples"] == len(truths)

    matched = matching_batch(
        iou_fn=lambda one, other: box_iou(torch.tensor(one), torch.tensor(other)).numpy(),
        iou_thresholds=[0.5],
        pred_boxes=[each.boxes.numpy() for each in found],
        pred_classes=[each.classes.numpy() for each in found],
        pred_scores=[each.logits.sigmoid().numpy() for each in found],
        gt_boxes=[boxes[:, :4].numpy() for boxes in truths],
        gt_classes=[boxes[:, 4].long().numpy() for boxes in truths],
    )
    metric = COCOMetric(list(CLASSES), [0.5], iou_range=(0.5, 0.5, 0.05), max_detection=(100,))
    theirs = metric(matched)[0]
    assert figures["map50"] == pytest.approx(theirs["mAP_IoU_0.50_0.50_0.05_MaxDet_100"], abs=5e-3)
    for name, average in figures["ap50_by_class"].items():
        key = f"{name}_mAP_IoU_0.50_0.50_0.05_MaxDet_100"
        assert average == pytest.approx(theirs[key], abs=5e-3)

    scores = []
    for k in range(len(CLASSES)):
        right, wrong, num_true = [], [], 0
        for each, boxes in zip(found, truths, strict=True):
            hits, of_class = partners_of(each.as_boxes(), boxes) >= 0, each.classes == k
            right.append(each.logits[of_class & hits].sigmoid().numpy())
            wrong.append(each.logits[of_class & ~hits].sigmoid().numpy())
            num_true += int((boxes[:, 4] == k).sum())
        curve = compute_froc_curve_data(
            np.concatenate(wrong), np.concatenate(right), num_true, len(truths)
        )
        scores.append(compute_froc_score(*curve))
    assert figures["froc"] == pytest.approx(np.mean(scores), abs=5e-3)


def test_the_loss_of_an_image_does_not_depend_on_the_others() -> None:
    task, rng = task_of(class_weights=(1.0, 2.0, 3.0)), np.random.default_rng(1)
    outputs = torch.randn(3, len(CLASSES) + 4, ROWS, COLUMNS)
    targets = torch.stack([padded(random_boxes(n, rng).tolist()) for n in (0, 3, 7)])
    loss = task.local_loss(None)
    alone = [loss(outputs[k : k + 1], targets[k : k + 1]) for k in range(3)]
    assert torch.stack(alone).mean() == pytest.approx(loss(outputs, targets).item(), rel=1e-5)


def test_a_network_that_knows_the_boxes_loses_less() -> None:
    task, rng = task_of(), np.random.default_rng(2)
    targets = padded(random_boxes(4, rng).tolist())[None]
    loss, known = task.local_loss(None), perfect(targets)
    moved = known.clone()
    moved[:, len(CLASSES) :] += 0.3
    unsure = known.clone()
    unsure[:, : len(CLASSES)] /= 2
    assert loss(known, targets) < loss(moved, targets)
    assert loss(known, targets) < loss(unsure, targets)


def test_a_class_that_weighs_more_costs_more() -> None:
    targets = padded([[8, 8, 56, 40, 1]])[None]
    outputs = torch.zeros(1, len(CLASSES) + 4, ROWS, COLUMNS)
    plain, weighted = (
        task_of(**given).local_loss(None)(outputs, targets)
        for given in ({}, {"class_weights": (1.0, 5.0, 1.0)})
    )
    assert weighted > plain


def test_made_up_boxes_are_of_every_class_and_inside_the_image() -> None:
    boxes = task_of().made_up_targets(7)
    real = boxes[boxes[..., 4] >= 0]
    assert len(real) == 7
    assert set(real[:, 4].tolist()) == {0, 1, 2}
    assert (real[:, :2] >= 0).all()
    assert (real[:, 2:4] <= torch.tensor([SIZE[1], SIZE[0]])).all()


def test_the_detector_is_normalised_by_groups_and_answers_for_every_fourth_pixel(
    make_study: Callable[..., Study],
) -> None:
    task = {"kind": "detection", "classes": list(CLASSES)}
    loss = {"kind": "focal"}
    given = {"task": task, "model": {"name": "center-unet"}, "training.loss": loss}
    network = build_network(make_study({**given, "input": {"size": [64, 96], "channels": 3}}))
    assert round(network.schema.num_params, -3) == 517_000  # "as given"
    assert not [m for m in network.module.modules() if isinstance(m, _BatchNorm)]
    outputs = network(torch.randn(2, 3, 64, 96))
    assert outputs.shape == (2, len(CLASSES) + 4, 16, 24)
    first = outputs[:, : len(CLASSES)].sigmoid()
    assert 0.05 < first.mean() < 0.2  # nearly every place has no centre


def test_a_class_that_no_image_shows_has_no_precision() -> None:
    task = task_of()
    found = Found(torch.tensor([[0.0, 0, 9, 9]] * 2), torch.tensor([3.0, 3]), torch.tensor([0, 1]))
    figures = task.figures(task.tally([found], padded([[0, 0, 9, 9, 0]])[None]))
    assert figures["precision"] == figures["recall"] == figures["map50"] == 1
