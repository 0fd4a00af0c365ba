"""Boxes on their way in: read, brought to the input's size, moved with the image, trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import CLASSES, annotation, smear, write_smears
from PIL import Image
from scipy.ndimage import find_objects, label
from torch import Tensor

from client.augment import augment
from client.config import PhantomData, VocData
from client.dataset import load_site_data
from client.readers import read_cases
from client.readers.case import Split, Wanted
from client.readers.voc import read_boxes
from common.config import validate
from common.errors import DataError
from common.study import Augmentation, Study
from common.tasks.boxes import NO_BOX

DETECTS = {
    "task": {"kind": "detection", "classes": list(CLASSES), "max_boxes": 6},
    "model": {"name": "center-unet", "channels": [8, 16]},
    "input": {"size": [96, 64], "intensity": "dtype"},
    "training.loss": {"kind": "focal"},
}


def voc(root: Path, **keys: Any) -> VocData:
    table = {"name": "smears", "format": "voc", "root": str(root), **keys}
    return validate(table, VocData, source=root / "site.toml")


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study(DETECTS)


def test_the_layout_counts_pixels_from_one_and_boxes_here_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(annotation([["dark", 1, 1, 64, 48], ["bright", 3, 5, 3, 6]]))
    assert read_boxes(path, CLASSES).tolist() == [[0, 0, 64, 48, 1], [2, 4, 3, 6, 0]]


def test_an_annotation_without_objects_is_an_image_without_boxes(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(annotation([]))
    assert read_boxes(path, CLASSES).shape == (0, 5)


def test_splits_are_those_of_the_lists_and_images_in_none_are_left_out(
    tmp_path: Path, study: Study
) -> None:
    write_smears(tmp_path, 8)
    with (tmp_path / "ImageSets/Main/train.txt").open("w") as file:
        file.write("s07\n\ns05\n")
    cases = read_cases(voc(tmp_path), Wanted.by(study))
    found = {case.name: case.split for case in cases}
    assert found["JPEGImages/s05.png"] == found["JPEGImages/s07.png"] == Split.TRAIN
    assert len(found) == 6
    cases = read_cases(voc(tmp_path, lists="nowhere"), Wanted.by(study))
    assert [case.split for case in cases] == [None] * 8


def test_boxes_lie_on_what_they_are_around_in_the_inputs_size(tmp_path: Path, study: Study) -> None:
    write_smears(tmp_path, 12)
    train = load_site_data(voc(tmp_path), study).train
    assert train.targets.shape == (len(train), 6, 5)
    for pixels, boxes in zip(train.pixels, train.targets, strict=True):
        for left, upper, right, lower, kind in boxes[boxes[:, 4] >= 0].tolist():
            inside = pixels[0, int(upper) + 2 : int(lower) - 2, int(left) + 1 : int(right) - 1]
            assert (inside > 0.7).all() if kind == 0 else (inside < 0.3).all()


def test_a_patients_smears_share_a_split(tmp_path: Path, study: Study) -> None:
    write_smears(tmp_path, 12)
    cases = read_cases(voc(tmp_path, patient="s(.)", lists="none"), Wanted.by(study))
    assert {case.patient for case in cases} == {"0", "1"}
    with pytest.raises(DataError, match=r"data\.patient does not match"):
        read_cases(voc(tmp_path, patient="t(.)"), Wanted.by(study))


def test_boxes_are_for_a_study_that_asks_for_them(
    tmp_path: Path, make_study: Callable[..., Study]
) -> None:
    write_smears(tmp_path, 4)
    with pytest.raises(DataError, match="holds boxes, which this study does not ask for"):
        read_cases(voc(tmp_path), Wanted.by(make_study()))


def test_boxes_of_phantoms_are_around_their_lesions() -> None:
    data = PhantomData(name="made", format="phantom", num_patients=30, images_per_patient=1)
    wanted = Wanted("boxes", ("lesion",), 1, (64, 64))
    masks = Wanted("masks", ("background", "lesion"), 1, (64, 64))
    num = 0
    for case, masked in zip(read_cases(data, wanted), read_cases(data, masks), strict=True):
        assert case.load_boxes is not None
        assert masked.load_mask is not None
        boxes, mask = case.load_boxes(), masked.load_mask()
        covered = np.zeros_like(mask)
        for left, upper, right, lower, _ in boxes.astype(int):
            covered[upper:lower, left:right] = 1
        assert not (mask.astype(bool) & ~covered.astype(bool)).any()
        num += len(boxes)
    assert num > 5


# Moving


def scene(size: tuple[int, int] = (60, 80)) -> tuple[Tensor, Tensor]:
    """A grey block of its own value for each class, and its box."""
    image = torch.zeros(1, 1, *size)
    image[0, 0, 20:32, 16:40] = 1.0
    image[0, 0, 40:50, 50:60] = 2.0
    boxes = torch.tensor([[16, 20, 40, 32, 0], [50, 40, 60, 50, 1], [0, 0, 0, 0, NO_BOX]])
    boxes[2] = NO_BOX
    return image, boxes[None]


@pytest.mark.parametrize(
    "changes",
    [
        {"flip": 1.0},
        {"flip_vertical": 1.0},
        {"flip": 1.0, "flip_vertical": 1.0},
        {"shift": 0.1},
        {"zoom": 0.2},
        {"flip": 0.5, "shift": 0.1, "zoom": 0.2},
    ],
)
def test_boxes_move_with_what_they_are_around(changes: dict[str, float]) -> None:
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        image, boxes = augment(*scene(), Augmentation(**changes), rng)
        for value, box in zip((1, 2), boxes[0], strict=False):
            block = (image[0, 0] - value).abs() < 0.5
            parts, num = label(block.numpy())
            sizes = [(parts == k + 1).sum() for k in range(num)]
            rows, columns = find_objects(parts)[int(np.argmax(sizes))]
            found = [columns.start, rows.start, columns.stop, rows.stop]
            assert box[:4].tolist() == pytest.approx(found, abs=2), changes
        assert (boxes[0, 2] == NO_BOX).all()


def test_quarter_turns_keep_boxes_on_square_images() -> None:
    image, boxes = scene((80, 80))
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        turned, moved = augment(image, boxes, Augmentation(quarter_turns=True), rng)
        left, upper, right, lower = moved[0, 1, :4].round().int().tolist()
        assert (turned[0, 0, upper + 1 : lower - 1, left + 1 : right - 1] > 1.5).all()


def test_a_box_that_is_moved_out_is_cut_and_then_left_out() -> None:
    image = torch.zeros(64, 1, 40, 40)
    boxes = torch.tensor([[0.0, 10, 20, 30, 0]]).expand(64, 1, 5)
    rng = torch.Generator().manual_seed(0)
    _, moved = augment(image, boxes, Augmentation(shift=0.5), rng)
    there = moved[:, 0, 4] >= 0
    assert there.any()
    assert not there.all()
    sides = moved[there, 0, :4]
    assert (sides >= 0).all()
    assert (sides <= 40).all()
    assert (moved[~there] == NO_BOX).all()
    areas = (sides[:, 2:] - sides[:, :2]).prod(dim=1)
    assert areas.min() >= 0.25 * 400 - 1e-3
    assert areas.min() < 300 < areas.max()


def test_labels_and_masks_are_no_boxes() -> None:
    image, _ = scene()
    labels = torch.tensor([1])
    assert augment(image, labels, Augmentation(flip=1.0), torch.Generator())[1] is labels


def test_smears_are_what_the_tests_say() -> None:
    pixels, boxes = smear(3)
    assert len(boxes) == 4
    for name, xmin, ymin, xmax, ymax in boxes:
        inside = pixels[ymin - 1 : ymax, xmin - 1 : xmax]
        assert set(np.unique(inside)) == {230 if name == "bright" else 25}
    Image.fromarray(pixels)
