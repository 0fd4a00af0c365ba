"""Scans keep their size: patches come from everywhere, and image and mask never part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import chisquare
from torch import Tensor

from client.config import FolderData
from client.dataset import load_site_data
from client.images import Images, Scans
from client.noise import Keystream
from client.prepare import prepare, prepare_masks
from client.train import batches, draw_units, train
from common.accounting import Event
from common.models.build import build_network
from common.plan import PrivacyPlan
from common.study import Augmentation, DifferentialPrivacy, Input, Study
from common.tasks import task_of
from common.tasks.losses import OUTSIDE

FLAT_SIZES = [(12, 10), (8, 15), (9, 9)]
DEEP_SIZES = [(9, 11, 8), (8, 8, 8)]

by_dimensions = pytest.mark.parametrize("sizes", [FLAT_SIZES, DEEP_SIZES], ids=["2D", "3D"])


def stream(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(size: tuple[int, ...]) -> Tensor:
    """Where every pixel lies, shape (dimensions, *size)."""
    return torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"))


def mask_at(where: Tensor) -> Tensor:
    """A number below 251 that follows from a pixel's place, shape (*size)."""
    factors = torch.tensor([1, 16, 89])[: len(where)].reshape(-1, *[1] * (where.ndim - 1))
    return ((where * factors).sum(0) % 251).to(torch.uint8)


def charted(sizes: list[tuple[int, ...]], patients: str = "") -> Scans:
    """Scans whose pixels say where they lie and, in the last channel, in which scan."""
    pixels, targets = [], []
    for number, size in enumerate(sizes):
        where = places(size)
        pixels.append(torch.cat([where, torch.full((1, *size), number)]).float())
        targets.append(mask_at(where))
    ids = tuple(patients or "abcdefgh"[: len(sizes)])
    return Scans(tuple(pixels), tuple(targets), ids, (8,) * len(sizes[0]))


def corners(patches: Tensor) -> NDArray[np.int64]:
    """The place of each patch's first pixel, shape (num, dimensions)."""
    num_dims = patches.ndim - 2
    return patches[:, :num_dims].flatten(2)[..., 0].numpy().astype(np.int64)


@by_dimensions
def test_a_patch_is_one_piece_of_its_scan_and_of_the_mask_at_the_same_place(
    sizes: list[tuple[int, ...]],
) -> None:
    scans, rows = charted(sizes), torch.arange(60) % len(sizes)
    pixels, targets = scans.draw(rows, stream())
    assert pixels.shape == (60, len(sizes[0]) + 1, *scans.patch)
    assert targets.shape == (60, *scans.patch)
    assert targets.dtype == torch.uint8
    for patch, target, corner, row in zip(pixels, targets, corners(pixels), rows, strict=True):
        where = places(scans.patch) + torch.from_numpy(corner).reshape(-1, *[1] * target.ndim)
        assert torch.equal(patch[:-1], where.float())
        assert torch.equal(target, mask_at(where))
        assert (patch[-1] == row).all()


@by_dimensions
def test_patches_come_from_everywhere_in_a_scan(sizes: list[tuple[int, ...]]) -> None:
    scans = charted(sizes)
    for row, size in enumerate(sizes):
        pixels, _ = scans.draw(torch.full((600,), row), stream())
        found = set(map(tuple, corners(pixels).tolist()))
        assert found == set(np.ndindex(*(side - 7 for side in size)))


def test_every_place_is_as_likely() -> None:
    scans = charted([(12, 10)])
    pixels, _ = scans.draw(torch.zeros(3000, dtype=torch.int64), stream())
    counts = np.zeros((5, 3))
    np.add.at(counts, tuple(corners(pixels).T), 1)
    assert chisquare(counts.reshape(-1)).pvalue > 1e-3
    counts[0, 0], counts[2, 1] = counts[0, 0] * 2 / 3, counts[2, 1] + counts[0, 0] / 3
    assert chisquare(counts.reshape(-1)).pvalue < 1e-3  # a corner drawn more rarely would be seen


@by_dimensions
def test_equal_streams_give_equal_patches(sizes: list[tuple[int, ...]]) -> None:
    scans, rows = charted(sizes), torch.zeros(20, dtype=torch.int64)
    one, same, other = (scans.draw(rows, stream(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1], same[1])
    assert not torch.equal(one[0], other[0])
    assert len(np.unique(corners(one[0]), axis=0)) > 1  # each patch of a scan has its own draw


@by_dimensions
def test_an_empty_draw_has_the_shape_of_patches(sizes: list[tuple[int, ...]]) -> None:
    scans = charted(sizes)
    pixels, targets = scans.draw(torch.zeros(0, dtype=torch.int64), stream())
    assert pixels.shape == (0, len(sizes[0]) + 1, *scans.patch)
    assert targets.shape == (0, *scans.patch)
    assert (pixels.dtype, targets.dtype) == (torch.float32, torch.uint8)


def test_scans_count_their_patients_and_move_whole() -> None:
    scans = charted(FLAT_SIZES, "aab")
    assert (len(scans), scans.num_patients) == (3, 2)
    moved = scans.to(torch.device("meta"))
    assert [tuple(each.shape[1:]) for each in moved.pixels] == FLAT_SIZES
    assert {each.device.type for each in (*moved.pixels, *moved.targets)} == {"meta"}


def grey(size: tuple[int, ...]) -> NDArray[np.uint8]:
    """A grey value for each place, none of them twice in a row or column."""
    return (mask_at(places(size)) + 1).numpy()


@pytest.mark.parametrize(
    "size", [(5, 8), (8, 3), (5, 3), (12, 7), (8, 8), (11, 9), (5, 8, 9), (3, 12, 7)]
)
def test_an_image_smaller_than_a_patch_grows_by_its_edge_and_its_mask_by_outside(
    size: tuple[int, ...],
) -> None:
    config = Input(size=(8,) * len(size), patches=True)
    mask = (grey(size) % 3).astype(np.uint8)
    pixels = prepare(grey(size)[None, None], config)[0, 0]
    grown = prepare_masks(mask[None], config)[0]
    assert pixels.shape == grown.shape == tuple(max(side, 8) for side in size)
    known = np.argwhere((grown != OUTSIDE).numpy())
    low, high = known.min(0), known.max(0) + 1
    assert tuple(high - low) == size  # the image itself, in one piece
    box = tuple(map(slice, low, high))
    assert np.array_equal(grown[box], mask)
    assert np.allclose(pixels[box], grey(size) / 255)
    around = list(zip(low, np.array(grown.shape) - high, strict=True))
    assert np.allclose(pixels, np.pad(grey(size) / 255, around, mode="edge"))
    assert int((grown == OUTSIDE).sum()) == grown.numel() - mask.size


def test_the_edge_of_a_normalised_image_is_normalised_too() -> None:
    config = Input(size=(8, 8), patches=True, intensity="image", mean=1.0, std=2.0)
    pixels = prepare(grey((5, 6))[None, None], config)[0, 0].numpy()
    inner = pixels[1:6, 1:7]
    assert inner.mean() == pytest.approx(-0.5, abs=1e-5)
    assert inner.std() == pytest.approx(0.5, abs=1e-5)
    assert np.array_equal(pixels[0, 1:7], inner[0])
    assert np.array_equal(pixels[6:, 7], [inner[-1, -1]] * 2)


def block(size: tuple[int, ...]) -> NDArray[np.uint8]:
    """A mask with a box of class 3 that lies to one side, and a corner that is outside."""
    mask = np.zeros(size, np.uint8)
    mask[tuple(slice(side // 8, side // 2) for side in size)] = 3
    mask[tuple(slice(side - side // 6, None) for side in size)] = OUTSIDE
    return mask


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((64, 64), (32, 32)),
        ((70, 51), (32, 32)),
        ((24, 20), (48, 48)),
        ((20, 60), (40, 40)),
        ((48, 32), (48, 32)),
        ((32, 40, 48), (24, 24, 24)),
        ((16, 16, 16), (24, 32, 24)),
    ],
)
def test_resized_masks_hold_classes_only_and_stay_with_the_image(
    size: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    mask, config = block(size), Input(size=wanted)
    resized = prepare_masks(mask[None], config)
    assert resized.shape == (1, *wanted)
    assert resized.dtype == torch.uint8
    assert np.unique(resized).tolist() == [0, 3, OUTSIDE]
    bright = prepare(255 * (mask == 3)[None, None].astype(np.uint8), config)[0] > 0.5
    drawn = resized == 3
    assert int((bright & drawn).sum()) / int((bright | drawn).sum()) > 0.85
    for axis, (have, want) in enumerate(zip(size, wanted, strict=True), start=1):
        assert abs(centre(bright, axis) - centre(drawn, axis)) < 0.35  # of a pixel
        num_outside = int((resized == OUTSIDE).any(0).amax(other_axes(axis, len(size))).sum())
        assert abs(num_outside - have // 6 * want / have) <= 0.5


def other_axes(axis: int, num_dims: int) -> tuple[int, ...]:
    """Axes of a single mask but this one, which is counted with the batch."""
    return tuple(other for other in range(num_dims) if other != axis - 1)


def centre(shape: Tensor, axis: int) -> float:
    return float(torch.nonzero(shape)[:, axis].double().mean())


def test_many_masks_are_resized_each_for_itself() -> None:
    masks = np.stack([block((40, 40)), block((40, 40)).T, np.zeros((40, 40), np.uint8)])
    together = prepare_masks(masks, Input(size=(24, 24)))
    for mask, resized in zip(masks, together, strict=True):
        assert torch.equal(prepare_masks(mask[None], Input(size=(24, 24)))[0], resized)


SEGMENTATION = {
    "task": {"kind": "segmentation", "classes": ["background", "vessel"]},
    "model": {"name": "unet", "channels": [4, 8], "residual_units": 0},
    "input": {"size": [8, 8], "patches": True, "intensity": "dtype"},
    "training.local_epochs": None,
    "training.local_steps": 3,
}


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study(SEGMENTATION)


def test_a_site_loads_every_image_in_its_own_size(tmp_path: Path, study: Study) -> None:
    sizes = {"1": (20, 9), "2": (9, 30), "3": (8, 8), "4": (40, 40)}
    for stem, (height, width) in sizes.items():
        for folder in ("images", "masks"):
            (tmp_path / "train" / folder).mkdir(parents=True, exist_ok=True)
        pixels = grey((height, width))
        Image.fromarray(pixels).save(tmp_path / "train" / "images" / f"{stem}.png")
        mask = (pixels % 2 * 255).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "train" / "masks" / f"{stem}.png")
    data = FolderData(name="eyes", format="folder", root=tmp_path, layout="pairs")
    loaded = load_site_data(data, study)
    assert isinstance(loaded.train, Scans)
    assert loaded.train.patch == (8, 8)
    assert len(loaded.train) + len(loaded.validation) == 4
    for part in (loaded.train, loaded.validation):
        for pixels, mask, patient in zip(part.pixels, part.targets, part.patients, strict=True):
            assert tuple(mask.shape) == sizes[Path(patient).stem]
            assert torch.equal(mask, ((255 * pixels[0]).round().int() % 2).to(torch.uint8))
    assert len(loaded.test) == 0


@pytest.mark.parametrize(("batch_size", "num_steps"), [(5, 3), (1, 4), (16, 2)])
def test_few_scans_fill_every_batch_with_patches(
    batch_size: int, num_steps: int, study: Study
) -> None:
    changes = {"batch_size": batch_size, "local_steps": num_steps}
    training = study.training.model_copy(update=changes)
    made = list(batches(charted(FLAT_SIZES), training, stream()))
    assert [len(pixels) for pixels, _ in made] == [batch_size] * num_steps
    assert all(targets.shape == (batch_size, 8, 8) for _, targets in made)
    every = torch.cat([pixels for pixels, _ in made])
    if len(every) > 10:
        assert set(every[:, -1, 0, 0].tolist()) == {0, 1, 2}
        assert len(np.unique(corners(every), axis=0)) > 5


def test_scans_are_drawn_alike_however_large_they_are(study: Study) -> None:
    training = study.training.model_copy(update={"batch_size": 600, "local_steps": 1})
    ((pixels, _),) = batches(charted([(8, 8), (60, 60), (9, 9)]), training, stream())
    counts = np.bincount(pixels[:, -1, 0, 0].int())
    assert chisquare(counts).pvalue > 1e-3


def noisy(sizes: list[tuple[int, ...]], seed: int = 3) -> Scans:
    """Scans of noise whose mask is where they are bright."""
    pixels = tuple(
        torch.randn(1, *size, generator=stream(seed + k)) for k, size in enumerate(sizes)
    )
    targets = tuple((each[0] > 0.5).to(torch.uint8) for each in pixels)
    return Scans(pixels, targets, tuple("abcdefgh"[: len(sizes)]), (8,) * len(sizes[0]))


def test_training_on_patches_depends_on_model_scans_and_stream_alone(study: Study) -> None:
    network, task = build_network(study), task_of(study)
    model = network.vector()

    def update(seed: int) -> NDArray[np.float32]:
        return train(model, noisy(FLAT_SIZES), study.training, network=network, task=task,
                     rate=0.05, rng=stream(seed)).values  # fmt: skip

    first = update(1)
    assert np.isfinite(first).all()
    assert first.any()
    assert np.array_equal(update(1), first)
    assert not np.array_equal(update(2), first)


def plan(unit: str = "patient", most: int = 1, probability: float = 1.0) -> PrivacyPlan:
    terms = DifferentialPrivacy(
        unit=unit, noise_multiplier=1.0, delta=1e-5, example_clip_norm=1.0,
        max_images_per_patient=most,
    )  # fmt: skip
    return PrivacyPlan(Event(1.0, probability, 1), 10, 1, terms)


PATIENTS = {"a": [0, 1], "b": [2], "c": [3, 4, 5]}  # scans of each


def drawn_units(drawing: PrivacyPlan, seed: int) -> list[Any]:
    """The numbers of the scans that each unit's patches were cut from."""
    scans = charted([(12, 10), (8, 15), (9, 9), (10, 10), (8, 8), (20, 8)], "aabccc")
    members = [np.array(rows) for rows in PATIENTS.values()]
    if drawing.terms.unit == "image":
        members = [np.array([row]) for row in range(6)]
    units = draw_units(scans, members, Augmentation(), drawing, Keystream.from_seed(seed))
    assert len(units.pixels) == len(units.targets) == sum(units.sizes)
    for patch, target, corner in zip(
        units.pixels, units.targets, corners(units.pixels), strict=True
    ):
        where = places((8, 8)) + torch.from_numpy(corner).reshape(-1, 1, 1)
        assert torch.equal(patch[:-1], where.float())
        assert torch.equal(target, mask_at(where))
    return [part[:, -1, 0, 0].int().tolist() for part in units.pixels.split(list(units.sizes))]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_each_drawn_patient_gives_exactly_so_many_patches_of_its_own_scans(most: int) -> None:
    seen: dict[str, set[int]] = {patient: set() for patient in PATIENTS}
    for seed in range(30):
        units = drawn_units(plan(most=most), seed)
        assert [len(unit) for unit in units] == [most] * 3
        for own, found in zip(PATIENTS, units, strict=True):
            seen[own] |= set(found)
    assert seen == {patient: set(rows) for patient, rows in PATIENTS.items()}


def test_a_patients_scans_are_as_likely_as_each_other() -> None:
    found = [row for seed in range(40) for row in drawn_units(plan(most=15), seed)[2]]
    assert chisquare(np.bincount(found)[3:]).pvalue > 1e-3


def test_where_the_image_is_the_unit_each_scan_gives_one_patch() -> None:
    assert drawn_units(plan(unit="image"), 1) == [[0], [1], [2], [3], [4], [5]]


def test_a_patient_that_was_not_drawn_gives_nothing() -> None:
    sizes = [len(drawn_units(plan(most=3, probability=0.4), seed)) for seed in range(100)]
    assert set(sizes) == {0, 1, 2, 3}
    assert np.mean(sizes) == pytest.approx(3 * 0.4, abs=4 * (3 * 0.4 * 0.6 / 100) ** 0.5)


def test_images_of_one_size_are_not_cut() -> None:
    masks = torch.arange(4 * 256).reshape(4, 16, 16).to(torch.uint8)
    data = Images(torch.rand(4, 1, 16, 16), masks, tuple("abcd"))
    pixels, targets = data.draw(torch.tensor([2, 0]), stream())
    assert torch.equal(pixels, data.pixels[[2, 0]])
    assert torch.equal(targets, masks[[2, 0]])
