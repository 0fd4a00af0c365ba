"""Figures from summed counts against scikit-learn on the pooled predictions."""

import json
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from torch import Tensor

from common.study import Classification, TrainingLoss
from common.tasks.base import MAX_LOSS
from common.tasks.classification import ClassificationTask
from common.tasks.scores import NUM_BINS, auroc, roc_curve

NUM_IMAGES = 3000
KINDS = {"binary": 2, "multiclass": 5, "multilabel": 4}
CASES = [
    pytest.param(labels, spread, skew, id=f"{labels}, logits of sd {spread}, {title}")
    for labels in KINDS
    for spread in (0.3, 2.0, 5.0 if labels == "multiclass" else 8.0)
    for skew, title in ((0.0, "balanced"), (2.5, "heavily skewed"))
]


def task_of(labels: str, *, adjust_logits: bool = False) -> ClassificationTask:
    classes = tuple(f"class {k}" for k in range(KINDS[labels]))
    config = Classification(kind="classification", labels=labels, classes=classes)
    return ClassificationTask(config, TrainingLoss(), adjust_logits=adjust_logits)


def predictions(
    labels: str, spread: float, skew: float, rng: np.random.Generator, num: int = NUM_IMAGES
) -> tuple[Tensor, Tensor]:
    """Logits that know something about the targets; ``skew`` makes later classes rare."""
    num_classes = KINDS[labels]
    odds = np.exp(-skew * np.arange(num_classes))
    if labels == "multilabel":
        targets = rng.random((num, num_classes)) < 0.5 * odds
        signal = 2.0 * targets - 1
    else:
        targets = rng.choice(num_classes, num, p=odds / odds.sum())
        signal = np.eye(num_classes)[targets] if num_classes > 2 else 2.0 * targets[:, None] - 1
    noise = rng.normal(size=(num, 1 if labels == "binary" else num_classes))
    logits = spread * (noise + 0.8 * signal)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(targets.astype(np.int64))


def summed_counts(
    task: ClassificationTask, logits: Tensor, targets: Tensor, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Counts over three sites, each in batches of random size."""
    total = np.zeros(task.num_counts, np.int64)
    site_of = rng.integers(3, size=len(targets))
    for site in range(3):
        mine = np.flatnonzero(site_of == site)
        cuts = np.unique(rng.integers(1, len(mine), 6))
        for batch in np.split(mine, cuts):
            total += task.counts(logits[batch], targets[batch])
    return total


def decided(labels: str, logits: Tensor) -> NDArray[np.int64]:
    if labels == "multiclass":
        return logits.argmax(dim=1).numpy()
    return (logits > 0).numpy().astype(np.int64).squeeze()


def expected(labels: str, logits: Tensor, targets: Tensor) -> dict[str, Any]:
    truth, predicted = targets.numpy(), decided(labels, logits)
    average = "binary" if labels == "binary" else "macro"
    settings = {"average": average, "zero_division": np.nan}
    confusion = sk.multilabel_confusion_matrix if labels == "multilabel" else sk.confusion_matrix
    scores, has_class = logits.double(), truth.reshape(len(truth), -1)
    if labels == "multiclass":
        scores, has_class = logit_of(scores), np.eye(KINDS[labels])[truth]
    columns = zip(has_class.T, scores.numpy().T, strict=True)
    return {
        "num_examples": len(truth),
        "auroc": np.mean([sk.roc_auc_score(*pair) for pair in columns if pair[0].any()]),
        "accuracy": sk.accuracy_score(truth, predicted),
        "precision": sk.precision_score(truth, predicted, **settings),
        "recall": sk.recall_score(truth, predicted, **settings),
        "f1": sk.f1_score(truth, predicted, **settings),
        "confusion": confusion(truth, predicted).tolist(),
    }


def logit_of(scores: Tensor) -> Tensor:
    """The logit of each class's probability: a monotone score that does not saturate."""
    rest = [torch.cat([scores[:, :k], scores[:, k + 1 :]], 1).logsumexp(1) for k in range(5)]
    return scores - torch.stack(rest, dim=1)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize(("labels", "spread", "skew"), CASES)
def test_figures_of_the_summed_counts_are_those_of_the_pooled_images(
    labels: str, spread: float, skew: float, rng: np.random.Generator
) -> None:
    task = task_of(labels)
    logits, targets = predictions(labels, spread, skew, rng)
    figures = task.figures(summed_counts(task, logits, targets, rng))
    wanted = expected(labels, logits, targets)
    assert abs(figures["auroc"] - wanted.pop("auroc")) < 0.002
    assert figures["confusion"] == wanted.pop("confusion")
    for name, value in wanted.items():
        assert figures[name] == pytest.approx(value, abs=1e-12, rel=0), name


@pytest.mark.parametrize("labels", KINDS)
def test_the_loss_is_torchs_own(labels: str, rng: np.random.Generator) -> None:
    task = task_of(labels)
    logits, targets = predictions(labels, 3.0, 1.0, rng)
    wanted = plain_loss(labels, logits.double(), targets)
    figures = task.figures(summed_counts(task, logits, targets, rng))
    assert figures["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    assert task.local_loss(None)(logits.double(), targets).item() == pytest.approx(wanted.item())
    # Without the study's word for it, a site's class shares change nothing.
    assert torch.equal(
        task.local_loss(targets)(logits, targets), task.local_loss(None)(logits, targets)
    )


def plain_loss(labels: str, logits: Tensor, targets: Tensor) -> Tensor:
    if labels == "multiclass":
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets.reshape(logits.shape).double())


@pytest.mark.parametrize(
    ("labels", "targets", "shift"),
    [
        ("binary", [1, 1, 0, 1], [np.log(4 / 2)]),
        ("binary", [0, 0, 0], [np.log(1 / 4)]),
        ("multiclass", [0, 0, 4, 1], np.log(np.array([3, 2, 1, 1, 2]) / 9)),
        ("multilabel", [[1, 0, 0, 1], [1, 0, 1, 0]], np.log([3 / 1, 1 / 3, 2 / 2, 2 / 2])),
    ],
)
def test_logit_adjustment_adds_the_log_shares_counted_by_hand(
    labels: str, targets: list[Any], shift: list[float], rng: np.random.Generator
) -> None:
    task = task_of(labels, adjust_logits=True)
    of_site = torch.tensor(targets)
    logits, batch = predictions(labels, 2.0, 0.0, rng, num=6)
    wanted = plain_loss(labels, logits.double() + torch.tensor(np.array(shift)), batch)
    assert task.local_loss(of_site)(logits, batch).item() == pytest.approx(wanted.item(), rel=1e-6)
    plain = plain_loss(labels, logits.double(), batch)
    assert task.local_loss(None)(logits, batch).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("labels", KINDS)
def test_without_images_every_figure_is_undefined(labels: str) -> None:
    task = task_of(labels)
    figures = task.figures(np.zeros(task.num_counts, np.int64))
    assert not np.any(figures.pop("confusion"))
    assert figures.pop("num_examples") == 0
    assert set(figures.pop("intervals").values()) == {None}
    assert set(figures.values()) == {None}


def test_figures_that_divide_by_zero_are_undefined_and_not_zero() -> None:
    task = task_of("binary")
    figures = task.figures(task.counts(torch.tensor([[-1.0], [-2.0]]), torch.tensor([0, 0])))
    assert (figures["accuracy"], figures["confusion"]) == (1.0, [[2, 0], [0, 0]])
    assert [figures[name] for name in ("auroc", "precision", "recall", "f1")] == [None] * 4
    missed = task.figures(task.counts(torch.tensor([[-1.0], [-2.0]]), torch.tensor([0, 1])))
    assert (missed["precision"], missed["recall"], missed["f1"]) == (None, 0.0, 0.0)


def test_macro_figures_leave_out_classes_for_which_they_are_undefined() -> None:
    task = task_of("multiclass")
    outputs = torch.eye(5)[[0, 1, 1]] * 4
    figures = task.figures(task.counts(outputs, torch.tensor([0, 1, 0])))
    assert figures["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert figures["precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert figures["auroc"] == pytest.approx((0.75 + 1) / 2, abs=0.26)


@pytest.mark.parametrize("labels", KINDS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e38])
def test_a_diverged_network_is_counted_and_cannot_overflow_the_loss(
    labels: str, wrong: float
) -> None:
    task = task_of(labels)
    outputs = torch.full((4, task.num_outputs), wrong)
    outputs[:, 0] = -wrong
    targets = (
        torch.ones(4, 4, dtype=torch.int64) if labels == "multilabel" else torch.ones(4).long()
    )
    counts = task.counts(outputs, targets)
    figures = task.figures(counts)
    assert figures["num_examples"] == np.sum(figures["confusion"]) / (
        4 if labels == "multilabel" else 1
    )
    assert 0 <= figures["loss"] <= MAX_LOSS
    if np.isnan(wrong):
        assert figures["loss"] == MAX_LOSS  # the worst, not the best
    assert task.view(counts).scores.sum() == 4 * task.num_outputs


@pytest.mark.parametrize("labels", KINDS)
def test_counts_do_not_depend_on_how_images_are_batched(
    labels: str, rng: np.random.Generator
) -> None:
    task = task_of(labels)
    logits, targets = predictions(labels, 4.0, 1.0, rng, num=500)
    whole = task.counts(logits, targets)
    one_by_one = sum(task.counts(logits[k : k + 1], targets[k : k + 1]) for k in range(500))
    loss_at = 1
    rest = np.arange(task.num_counts) != loss_at
    assert np.array_equal(whole[rest], one_by_one[rest])
    assert whole[loss_at] == pytest.approx(one_by_one[loss_at], rel=1e-6)
    order = rng.permutation(500)
    again = task.counts(logits[order], targets[order])
    assert np.array_equal(whole[rest], again[rest])


def test_figures_are_ready_for_json(rng: np.random.Generator) -> None:
    for labels in KINDS:
        task = task_of(labels)
        figures = task.figures(task.counts(*predictions(labels, 1.0, 0.0, rng, num=20)))
        assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize("labels", KINDS)
def test_a_view_names_every_count_exactly_once(labels: str) -> None:
    task = task_of(labels)
    vector = np.zeros(task.num_counts, np.int64)
    view = task.view(vector)
    for part in vars(view).values():
        np.add(part, 1, out=part)
    assert (vector == 1).all()


def histogram(**at: int) -> NDArray[np.int64]:
    counts = np.zeros(NUM_BINS, np.int64)
    for name, num in at.items():
        counts[int(name.removeprefix("bin"))] = num
    return counts


def test_auroc_counts_ties_as_one_half() -> None:
    assert auroc(histogram(bin7=13), histogram(bin7=4)) == 0.5
    assert auroc(histogram(bin7=2), histogram(bin6=1, bin8=1)) == 0.5
    assert auroc(histogram(bin7=2, bin9=2), histogram(bin7=1, bin9=3)) == (1 + 3 * 3) / 16 + 0.0


def test_auroc_is_one_for_separated_zero_for_reversed_and_none_without_a_class() -> None:
    low, high, nobody = histogram(bin1=3, bin5=9), histogram(bin6=2), histogram()
    assert (auroc(low, high), auroc(high, low)) == (1.0, 0.0)
    assert auroc(low, nobody) is auroc(nobody, high) is None


def test_auroc_is_the_area_under_the_curve(rng: np.random.Generator) -> None:
    without, having = rng.integers(0, 50, (2, NUM_BINS))
    false_rate, true_rate = roc_curve(without, having)
    assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)
    assert (np.diff(false_rate) >= 0).all()
    assert (np.diff(true_rate) >= 0).all()
    assert np.trapezoid(true_rate, false_rate) == pytest.approx(auroc(without, having))


def test_auroc_of_a_hundred_million_images_does_not_overflow() -> None:
    half = np.full(NUM_BINS, 50_000_000 // NUM_BINS, np.int64)
    assert auroc(half, half) == pytest.approx(0.5)
