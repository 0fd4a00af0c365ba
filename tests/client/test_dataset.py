"""Who is in which split, and how pixels become the network's input: each image by itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from client.config import Data, FolderData, NpzData, PhantomData
from client.dataset import STACK, load_site_data
from client.images import Images
from client.prepare import load_pixels, prepare
from client.readers.case import Case, Split
from client.splits import split_cases
from common.errors import DataError
from common.study import Input, Study

Splits = dict[Split, list[Case]]


def case(patient: str, split: Split | None = None, name: str = "scan") -> Case:
    return Case(
        name, patient, split, np.asarray(0, np.int64), lambda: np.zeros((1, 8, 8), np.uint8)
    )


def data(**more: Any) -> PhantomData:
    return PhantomData(name="phantoms", format="phantom", **more)


def shares(validation: float, test: float, **more: Any) -> PhantomData:
    return data(splits={"validation": validation, "test": test}, **more)


def patients_of(splits: Splits) -> dict[Split, set[str]]:
    return {split: {member.patient for member in members} for split, members in splits.items()}


def names(num: int) -> list[str]:
    return [f"patient {k}" for k in range(num)]


def is_disjoint(sets: Sequence[set[str]]) -> bool:
    return len(set().union(*sets)) == sum(map(len, sets))


@settings(max_examples=50)
@given(
    st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=60),
    st.integers(0, 2**31),
    st.floats(0, 0.45),
    st.floats(0, 0.45),
)
def test_no_patient_is_in_two_splits_and_no_case_is_lost(
    patients: list[str], seed: int, validation: float, test: float
) -> None:
    cases = [case(patient, name=str(place)) for place, patient in enumerate(patients)]
    splits = split_cases(cases, shares(validation, test, split_seed=seed))
    assert is_disjoint(list(patients_of(splits).values()))
    found = [member.name for members in splits.values() for member in members]
    assert sorted(found) == sorted(member.name for member in cases)


def test_the_shares_are_those_of_the_patients() -> None:
    splits = split_cases([case(name) for name in names(4000)], shares(0.2, 0.3))
    share = {split: len(members) / 4000 for split, members in splits.items()}
    sd = (0.3 * 0.7 / 4000) ** 0.5
    assert share[Split.TEST] == pytest.approx(0.3, abs=4 * sd)
    assert share[Split.VALIDATION] == pytest.approx(0.2, abs=4 * sd)


def test_adding_patients_moves_nobody_else() -> None:
    few = patients_of(split_cases([case(name) for name in names(200)], data()))
    many = patients_of(split_cases([case(name) for name in reversed(names(400))], data()))
    for split in Split:
        assert few[split]
        assert few[split] == many[split] & set(names(200))


def test_adding_patients_to_official_splits_without_validation_moves_nobody_else() -> None:
    def split(num: int) -> dict[Split, set[str]]:
        return patients_of(split_cases([case(name, Split.TRAIN) for name in names(num)], data()))

    few, many = split(200), split(400)
    assert few[Split.VALIDATION] == many[Split.VALIDATION] & set(names(200))
    assert 200 * 0.03 < len(few[Split.VALIDATION]) < 200 * 0.17


def test_another_seed_gives_other_splits() -> None:
    cases = [case(name) for name in names(100)]
    one, other = (patients_of(split_cases(cases, data(split_seed=seed))) for seed in (0, 1))
    assert one != other


def test_official_splits_are_kept() -> None:
    cases = [case(name, list(Split)[place % 3]) for place, name in enumerate(names(30))]
    for seed in range(5):
        splits = split_cases(cases, data(split_seed=seed))
        assert all(member.split == split for split, part in splits.items() for member in part)


def test_validation_is_taken_from_training_where_it_is_missing() -> None:
    train = [case(name, Split.TRAIN) for name in names(40) for _ in range(2)]
    test = [case(f"other {name}", Split.TEST) for name in names(10)]
    splits = split_cases(train + test, data())
    patients = patients_of(splits)
    assert patients[Split.TEST] == {member.patient for member in test}
    assert patients[Split.TRAIN] | patients[Split.VALIDATION] == set(names(40))
    assert is_disjoint(list(patients.values()))
    assert patients[Split.VALIDATION]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("official", [Split.TRAIN, None])
def test_a_few_patients_leave_at_least_one_for_validation(
    official: Split | None, seed: int
) -> None:
    cases = [case(name, official) for name in names(12)]
    splits = split_cases(cases, shares(0, 0, split_seed=seed))
    assert splits[Split.VALIDATION]
    assert splits[Split.TRAIN]
    assert not splits[Split.TEST]


def test_a_single_patient_stays_in_training() -> None:
    splits = split_cases([case("only", Split.TRAIN)] * 3, data())
    assert patients_of(splits) == {
        Split.TRAIN: {"only"}, Split.VALIDATION: set(), Split.TEST: set()
    }  # fmt: skip


def random_images(
    rng: np.random.Generator, *shape: int, dtype: type[np.generic] = np.uint8
) -> NDArray[Any]:
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_values_are_scaled_by_the_range_of_their_type(
    dtype: type[np.generic], rng: np.random.Generator
) -> None:
    images = random_images(rng, 3, 1, 8, 8, dtype=dtype)
    images[0, 0, 0, :2] = 0, np.iinfo(dtype).max
    prepared = prepare(images, Input(size=(8, 8)))
    assert prepared.dtype == torch.float32
    wanted = images.astype(np.float64) / np.iinfo(dtype).max
    assert np.abs(prepared.numpy() - wanted).max() < 1e-6
    assert prepared[0, 0, 0, :2].tolist() == [0.0, 1.0]


def test_mean_and_std_of_the_study_are_applied_last(rng: np.random.Generator) -> None:
    images = random_images(rng, 2, 3, 12, 12)
    plain = prepare(images, Input(size=(8, 8), channels=3))
    moved = prepare(images, Input(size=(8, 8), channels=3, mean=0.5, std=0.25))
    assert torch.allclose(moved, (plain - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_each_image_gets_mean_0_and_standard_deviation_1_of_its_own(
    dtype: type[np.generic], rng: np.random.Generator
) -> None:
    scales = np.array([1, 10, 100]).reshape(3, 1, 1, 1)
    images = (rng.random((3, 1, 16, 16)) * scales + scales).astype(dtype)
    images[:, 0, 0, 0] *= 2  # never constant
    prepared = prepare(images, Input(size=(16, 16), intensity="image"))
    assert torch.allclose(prepared.mean((1, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(prepared.std((1, 2, 3), correction=0), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("intensity", ["dtype", "image"])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_image_stays_constant_and_finite(intensity: str, value: int) -> None:
    images = np.full((2, 1, 20, 12), value, np.uint8)
    prepared = prepare(images, Input(size=(8, 8), intensity=intensity))
    wanted = 0.0 if intensity == "image" else value / 255
    assert torch.allclose(prepared, torch.full((2, 1, 8, 8), wanted), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((8, 8), (8, 8)),
        ((16, 16), (8, 8)),
        ((8, 8), (20, 12)),
        ((30, 9), (8, 8)),
        ((5, 30), (9, 9)),
    ],
)
def test_images_get_the_studys_size_and_keep_their_brightness(
    size: tuple[int, int], wanted: tuple[int, int], rng: np.random.Generator
) -> None:
    images = random_images(rng, 4, 3, *size)
    prepared = prepare(images, Input(size=wanted, channels=3))
    assert prepared.shape == (4, 3, *wanted)
    assert prepared.min() >= 0
    assert prepared.max() <= 1
    assert np.allclose(prepared.mean((2, 3)), images.mean((2, 3)) / 255, atol=0.15)


def test_shrinking_averages_so_that_nothing_between_pixels_is_lost() -> None:
    images = np.zeros((1, 1, 32, 32), np.uint8)
    images[0, 0, 5, 9] = 255
    prepared = prepare(images, Input(size=(8, 8)))
    assert prepared[0, 0, 1, 2].item() == pytest.approx(1 / 16)
    assert prepared.sum().item() == pytest.approx(1 / 16)


def test_images_are_not_turned_or_mirrored_by_resizing() -> None:
    images = np.zeros((1, 1, 32, 16), np.uint8)
    images[0, 0, :16, :8] = 255  # upper left
    for size in ((16, 8), (64, 32)):
        quarters = prepare(images, Input(size=size)).reshape(2, size[0] // 2, 2, size[1] // 2)
        mean = quarters.mean((1, 3))
        assert mean[0, 0] > 0.9
        assert max(mean[0, 1], mean[1, 0], mean[1, 1]) < 0.1


def test_floating_point_files_have_no_range_of_their_own(rng: np.random.Generator) -> None:
    image = rng.random((1, 8, 8)).astype(np.float32)
    case = Case("scan.tif", "p", None, np.array(0), lambda: image)
    with pytest.raises(DataError, match=r'scan\.tif: .* set input\.intensity = "image"'):
        load_pixels(case, Input(size=(8, 8)))
    assert load_pixels(case, Input(size=(8, 8), intensity="image")) is image


@pytest.mark.parametrize("intensity", ["dtype", "image"])
@pytest.mark.parametrize("size", [(17, 13), (8, 8), (17, 9), (9, 13)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_is_prepared_alike_alone_and_among_others(
    dtype: type[np.generic],
    channels: int,
    size: tuple[int, int],
    intensity: str,
    rng: np.random.Generator,
) -> None:
    images = random_images(rng, 9, channels, 17, 13, dtype=dtype)
    images[4:] //= 200  # darker company
    config = Input(size=size, channels=channels, intensity=intensity, mean=0.1, std=0.3)
    together = prepare(images, config)
    alone = torch.cat([prepare(image[None], config) for image in images])
    assert torch.equal(together, alone)
    assert torch.equal(prepare(images[::-1].copy(), config), together.flip(0))


@pytest.fixture
def mixed_folder(tmp_path: Path, rng: np.random.Generator) -> FolderData:
    """Images of several sizes and number types, in turn."""
    shapes = [(8, 8), (8, 8), (20, 16), (8, 8), (16, 20)]
    for index in range(40):
        dtype = np.uint16 if index % 7 == 0 else np.uint8
        pixels = random_images(rng, *shapes[index % 5], dtype=dtype)
        path = tmp_path / "train" / ("lesion" if index % 3 else "no lesion") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return FolderData(name="mixed", format="folder", root=tmp_path)


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study({"input.size": [8, 8], "input.intensity": "dtype"})


def by_patient(*parts: Images) -> dict[str, tuple[torch.Tensor, int]]:
    return {
        patient: (part.pixels[place], int(part.targets[place]))
        for part in parts
        for place, patient in enumerate(part.patients)
    }


def test_stacks_of_mixed_sizes_keep_image_target_and_patient_together(
    mixed_folder: FolderData, study: Study
) -> None:
    loaded = load_site_data(mixed_folder, study)
    assert len(loaded.train.patients) == len(loaded.train.pixels) == len(loaded.train.targets)
    found = by_patient(loaded.train, loaded.validation)
    assert len(found) == 40
    for patient, (pixels, target) in found.items():
        with Image.open(mixed_folder.root / patient) as image:
            alone = prepare(np.array(image)[None, None], study.input)[0]
        assert torch.equal(pixels, alone)
        assert target == ("no lesion" not in patient)


def test_the_company_of_other_images_changes_no_bit(mixed_folder: FolderData, study: Study) -> None:
    whole = load_site_data(mixed_folder, study)
    before = by_patient(whole.train, whole.validation)
    for path in sorted(mixed_folder.root.rglob("*.png"))[::2]:
        path.unlink()
    rest = load_site_data(mixed_folder, study)
    after = by_patient(rest.train, rest.validation)
    assert len(after) == 20
    for patient, (pixels, _) in after.items():
        assert torch.equal(pixels, before[patient][0])


def test_more_images_than_one_stack_keep_their_order(
    study: Study, tmp_path: Path, rng: np.random.Generator
) -> None:
    num = 2 * STACK + 3
    arrays = {
        "train_images": random_images(rng, num, 8, 8),
        "val_images": np.zeros((1, 8, 8), np.uint8),
    }
    arrays["train_labels"] = rng.integers(0, 2, (num, 1))
    arrays["val_labels"] = np.zeros((1, 1), int)
    np.savez(tmp_path / "scans.npz", **arrays)
    loaded = load_site_data(NpzData(name="scans", format="npz", root=tmp_path), study)
    assert torch.equal(loaded.train.pixels, prepare(arrays["train_images"][:, None], study.input))
    assert loaded.train.targets.tolist() == arrays["train_labels"][:, 0].tolist()


def test_a_grey_image_in_a_colour_study_is_repeated(
    tmp_path: Path, make_study: Callable[..., Study], rng: np.random.Generator
) -> None:
    images = random_images(rng, 2, 8, 8)
    np.savez(tmp_path / "scans.npz", train_images=images, train_labels=np.zeros((2, 1), int))
    study = make_study({"input.size": [8, 8], "input.channels": 3})
    loaded = load_site_data(NpzData(name="scans", format="npz", root=tmp_path), study)
    pixels = torch.cat([loaded.train.pixels, loaded.validation.pixels])
    assert pixels.shape == (2, 3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_multi_label_targets_have_one_column_per_label(
    tmp_path: Path, make_study: Callable[..., Study], rng: np.random.Generator
) -> None:
    labels = rng.integers(0, 2, (6, 3))
    np.savez(tmp_path / "scans.npz", train_images=random_images(rng, 6, 8, 8), train_labels=labels,
             val_images=random_images(rng, 2, 8, 8), val_labels=labels[:2])  # fmt: skip
    study = make_study(
        {"input.size": [8, 8], "task.labels": "multilabel", "task.classes": list("abc")}
    )
    loaded = load_site_data(NpzData(name="scans", format="npz", root=tmp_path), study)
    assert loaded.train.targets.tolist() == labels.tolist()
    assert loaded.train.targets.dtype == torch.int64


def test_counts_of_patients_and_images_are_those_of_the_files(
    make_study: Callable[..., Study],
) -> None:
    loaded = load_site_data(data(num_patients=30, images_per_patient=2), make_study())
    parts = (loaded.train, loaded.validation, loaded.test)
    assert sum(map(len, parts)) == 60
    assert [len(part) for part in parts] == [2 * part.num_patients for part in parts]
    assert loaded.num_patients == 30
    assert is_disjoint([set(part.patients) for part in parts])


def test_a_data_set_without_training_images_is_refused(
    tmp_path: Path, study: Study, rng: np.random.Generator
) -> None:
    image = Image.fromarray(random_images(rng, 8, 8))
    for split in ("train", "test"):
        (tmp_path / split / "lesion").mkdir(parents=True)
    image.save(tmp_path / "test" / "lesion" / "1.png")
    scans: Data = FolderData(name="scans", format="folder", root=tmp_path)
    with pytest.raises(DataError, match="data set scans has no training image"):
        load_site_data(scans, study)
