"""A model that never looks: what it says, and what its figures are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client import blind
from client.blind import blind_answer, blind_counts
from client.images import Images, Scans
from common.config import validate
from common.study import Study
from common.tasks import task_of
from common.tasks.losses import OUTSIDE


def study(**task: Any) -> Study:
    kinds = {
        "classification": ("cnn", [8, 8]),
        "segmentation": ("unet", [8, 8]),
        "detection": ("center-unet", [64, 64]),
    }
    model, size = kinds[task["kind"]]
    table = {
        "name": "blind",
        "num_rounds": 1,
        "task": task,
        "model": {"name": model},
        "input": {"size": size, "intensity": "image"},
        "training": {"learning_rate": 0.1, "batch_size": 4, "local_steps": 1},
        "privacy": {"mode": "none"},
    }
    if model == "center-unet":
        table["training"]["loss"] = {"kind": "focal"}  # type: ignore[index]
    return validate(table, Study, source=Path("blind.toml"))


def images(targets: Tensor) -> Images:
    """Whose pixels nobody may look at."""
    return Images(torch.full((len(targets), 1, 1, 1), torch.nan), targets, ("p",) * len(targets))


def figures(study: Study, train: Images | Scans, test: Images | Scans) -> dict[str, Any]:
    task = task_of(study)
    return task.figures(blind_counts(blind_answer(study, train), test, task))


def test_one_answer_for_all_tells_nobody_apart():
    binary = study(kind="classification", classes=["well", "ill"])
    train, test = torch.tensor([1] * 30 + [0] * 10), torch.tensor([1] * 8 + [0] * 4)
    found = figures(binary, images(train), images(test))
    assert found["auroc"] == 0.5
    assert found["accuracy"] == pytest.approx(8 / 12)
    share = torch.sigmoid(blind_answer(binary, images(train))).item()
    assert share == pytest.approx(30.5 / 41)


def test_of_several_classes_the_most_common_is_named():
    several = study(kind="classification", classes=["a", "b", "c"], labels="multiclass")
    train = torch.tensor([2] * 5 + [0] * 3)
    shares = blind_answer(several, images(train)).softmax(dim=0)
    assert torch.allclose(shares, torch.tensor([3.5, 0.5, 5.5]) / 9.5)
    assert figures(several, images(train), images(torch.tensor([0, 2, 2, 1])))["accuracy"] == 0.5


def test_of_several_labels_each_is_as_likely_as_it_is_common():
    several = study(kind="classification", classes=["a", "b"], labels="multilabel")
    train = torch.tensor([[1, 0], [1, 1], [1, 0]])
    shares = torch.sigmoid(blind_answer(several, images(train)))
    assert torch.allclose(shares, torch.tensor([3.5, 1.5]) / 4)


def organ(place: int, *, edge: int = 0) -> Tensor:
    mask = torch.zeros((1, 8, 8), dtype=torch.uint8)
    mask[:, 2:6, place : place + 3] = 1
    mask[:, :edge] = OUTSIDE
    return mask


def test_what_is_always_in_one_place_is_found_without_a_look():
    organs = study(kind="segmentation", classes=["background", "organ"])
    train = torch.cat([organ(2), organ(2, edge=1), organ(2)])
    assert figures(organs, images(train), images(organ(2)))["dice"] == 1


def test_what_is_rare_everywhere_is_suspected_everywhere_where_that_does_better():
    lesions = study(kind="segmentation", classes=["background", "lesion"])
    train = torch.stack([torch.eye(8).roll(k, 1) for k in range(8)]).to(torch.uint8)
    assert train.float().mean() == 1 / 8
    assert figures(lesions, images(train), images(train))["dice"] == pytest.approx(2 / 9)


@pytest.mark.parametrize("classes", [["background", "organ"], ["background", "organ", "never"]])
def test_scans_of_several_sizes_are_laid_over_each_other(classes):
    organs = study(kind="segmentation", classes=classes)
    small = organ(2)[0]
    large = small.repeat_interleave(2, 0).repeat_interleave(2, 1)
    train = Scans((), (small, large, large), ("a", "b", "c"), (8, 8))
    assert figures(organs, train, Scans((), (large,), ("d",), (8, 8)))["dice"] == 1


def boxes(*own: tuple[float, ...]) -> Tensor:
    padded = torch.full((1, 64, 5), -1.0)
    padded[0, : len(own)] = torch.tensor(own).reshape(-1, 5)
    return padded


def test_boxes_that_are_always_there_are_found_without_a_look():
    cells = study(kind="detection", classes=["red", "white"])
    always = boxes((8, 8, 24, 24, 0), (40, 32, 60, 60, 1))
    train = torch.cat([always] * 3)
    assert figures(cells, images(train), images(always))["map50"] == pytest.approx(1)
    elsewhere = boxes((40, 8, 56, 24, 0), (2, 32, 22, 60, 1))
    assert figures(cells, images(train), images(elsewhere))["map50"] < 0.05


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        ({"kind": "classification", "classes": ["well", "ill"]}, torch.tensor([0, 1])),
        ({"kind": "segmentation", "classes": ["background", "organ"]}, organ(2)),
        ({"kind": "detection", "classes": ["red", "white"]}, boxes((8, 8, 24, 24, 0))),
    ],
)
def test_a_split_without_an_image_counts_nothing(task, targets):
    of = study(**task)
    nothing = Images(torch.empty(0, 1, 1, 1), torch.empty(0), ())
    counts = blind_counts(blind_answer(of, images(targets)), nothing, task_of(of))
    assert not counts.any()


def test_how_many_images_are_looked_at_together_changes_nothing(monkeypatch):
    cells = study(kind="detection", classes=["red", "white"])
    train = torch.cat([boxes((8, 8, 24, 24, 0)), boxes((40, 32, 60, 60, 1)), boxes()])
    together = figures(cells, images(train), images(train))
    monkeypatch.setattr(blind, "MAX_ENTRIES", 1)
    assert figures(cells, images(train), images(train)) == together


def test_a_class_without_a_box_is_not_found():
    cells = study(kind="detection", classes=["red", "white"])
    answer = blind_answer(cells, images(boxes((8, 8, 24, 24, 0))))
    assert answer[1].max() < -5
    assert all(math.isfinite(value) for value in answer.flatten().tolist())
