"""Intervals from sums: how often they hold the true value; calibration against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from sklearn.calibration import calibration_curve as sk_calibration_curve

from common.study import Classification, Segmentation, TrainingLoss
from common.tasks import ClassificationTask, SegmentationTask
from common.tasks.intervals import of_auroc, of_ratio, of_share
from common.tasks.losses import OUTSIDE
from common.tasks.scores import (
    NUM_BINS,
    bins_of,
    calibration_curve,
    calibration_error,
    probabilities,
)

DRAWS = 1200
Rng = np.random.Generator


@given(st.integers(0, 300), st.integers(1, 300))
def test_the_interval_of_a_share_is_wilsons(part: int, more: int) -> None:
    whole = part + more
    expected = binomtest(part, whole).proportion_ci(0.95, "wilson")
    assert of_share(part, whole) == pytest.approx([expected.low, expected.high], abs=1e-6)


def histograms(rng: Rng, num: int, apart: float, share: float) -> NDArray[np.int64]:
    having = rng.random(num) < share
    bins = bins_of(rng.normal(size=num) + apart * having)
    return np.stack([np.bincount(bins[having == k], minlength=NUM_BINS) for k in (False, True)])


def auroc_case(apart: float, num: int, share: float) -> Callable[[Rng], tuple[float, list[float]]]:
    def draw(rng: Rng) -> tuple[float, list[float]]:
        interval = of_auroc(*histograms(rng, num, apart, share))
        assert interval is not None
        return float(norm.cdf(apart / np.sqrt(2))), interval

    return draw


def share_case(share: float, num: int) -> Callable[[Rng], tuple[float, list[float]]]:
    def draw(rng: Rng) -> tuple[float, list[float]]:
        interval = of_share(int(rng.binomial(num, share)), num)
        assert interval is not None
        return share, interval

    return draw


def dice_case(num: int) -> Callable[[Rng], tuple[float, list[float]]]:
    """Images of different sizes of lesion, found better or worse, through the task's own counts."""
    config = Segmentation(kind="segmentation", classes=("background", "lesion"))
    task = SegmentationTask(config, TrainingLoss(), (8, 8))

    def masks(rng: Rng, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        odds = rng.beta(2, 4, (num, 1, 1))
        truth = rng.random((num, 8, 8)) < odds
        seen = np.where(rng.random((num, 8, 8)) < rng.beta(8, 2, (num, 1, 1)), truth, ~truth)
        known = truth.astype(np.uint8)
        known[:, 0, :2] = OUTSIDE
        return torch.tensor(seen.astype(np.uint8)), torch.tensor(known)

    pooled = task.figures(task.tally(*masks(np.random.default_rng(0), 40_000)))["dice"]

    def draw(rng: Rng) -> tuple[float, list[float]]:
        counts = np.zeros(task.num_counts, np.int64)
        for part in np.array_split(np.arange(num), 4):  # four sites
            counts += task.tally(*masks(rng, len(part)))
        interval = task.figures(counts)["intervals"]["dice"]
        return pooled, interval

    return draw


COVERAGE = {
    "AUROC 0.76, 200 images": auroc_case(1.0, 200, 0.5),
    "AUROC 0.92, 300 images, one in five ill": auroc_case(2.0, 300, 0.2),
    "AUROC 0.5": auroc_case(0.0, 150, 0.4),
    "accuracy 0.8 of 120": share_case(0.8, 120),
    "recall 0.93 of 60": share_case(0.93, 60),
    "Dice of 60 images": dice_case(60),
    "Dice of 200 images": dice_case(200),
}


@pytest.mark.parametrize("title", COVERAGE)
def test_about_95_of_100_intervals_hold_the_true_value(title: str) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(DRAWS):
        true, (low, high) = COVERAGE[title](rng)
        held += low <= true <= high
    assert 0.92 <= held / DRAWS <= 0.98, held


def test_classes_that_are_wholly_apart_have_an_interval_that_is_not_a_point() -> None:
    without, having = np.zeros((2, NUM_BINS), np.int64)
    without[100], having[900] = 30, 20
    interval = of_auroc(without, having)
    assert interval is not None
    assert interval[1] == 1
    assert 0.8 < interval[0] < 0.99
    assert of_auroc(without, 0 * having) is None


def test_the_interval_of_a_ratio_is_a_point_where_all_images_agree() -> None:
    assert of_ratio(30, 60, (90, 180, 360), 10) == pytest.approx([0.5, 0.5])


def test_sums_of_sites_give_the_interval_of_the_pooled_images() -> None:
    rng = np.random.default_rng(3)
    config = Classification(kind="classification", classes=("no", "yes"))
    task = ClassificationTask(config, TrainingLoss(), adjust_logits=False)
    targets = torch.tensor(rng.integers(0, 2, 90))
    logits = torch.tensor(rng.normal(size=(90, 1))) + targets[:, None]
    pooled = task.figures(task.counts(logits, targets))
    parts = [task.counts(logits[k::3], targets[k::3]) for k in range(3)]
    summed = task.figures(np.sum(parts, axis=0))
    assert summed["intervals"] == pooled["intervals"]
    for name in ("auroc", "accuracy", "precision", "recall"):
        low, high = summed["intervals"][name]
        assert low < summed[name] < high


# Calibration


def test_a_score_lies_in_the_bin_with_its_probability() -> None:
    middle = probabilities()
    logits = np.linspace(-9, 9, 400)
    expected = 1 / (1 + np.exp(-logits))
    assert np.abs(middle[bins_of(logits)] - expected).max() < 5e-3


def test_the_calibration_curve_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, 20_000)
    truth = rng.random(20_000) < 1 / (1 + np.exp(-0.6 * logits))
    bins = bins_of(logits)
    without, having = (np.bincount(bins[truth == k], minlength=NUM_BINS) for k in (False, True))
    said, true, num = calibration_curve(without, having)
    their_true, their_said = sk_calibration_curve(truth, 1 / (1 + np.exp(-logits)), n_bins=10)
    assert num.sum() == 20_000
    assert said == pytest.approx(their_said, abs=5e-3)
    assert true == pytest.approx(their_true, abs=2e-2)
    error = calibration_error(without, having)
    assert error == pytest.approx((num * np.abs(their_said - their_true)).sum() / 20_000, abs=5e-3)


def test_a_model_that_says_what_is_true_has_no_calibration_error() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, 50_000)
    truth = rng.random(50_000) < 1 / (1 + np.exp(-logits))
    counts = [np.bincount(bins_of(logits[truth == k]), minlength=NUM_BINS) for k in (False, True)]
    error = calibration_error(*counts)
    assert error is not None
    assert error < 0.01
    assert calibration_error(*np.zeros((2, NUM_BINS), np.int64)) is None
