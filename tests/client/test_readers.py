"""Files in, cases out: every format as hospitals really have it, and broken files by name."""

import gc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from client.config import Data, FolderData, NpzData, PhantomData
from client.dataset import load_site_data
from client.readers import Case, Wanted, read_cases
from client.readers.case import Split
from common.errors import DataError
from common.study import Study

GREY = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8))
COLOUR = Wanted("binary", ("no lesion", "lesion"), channels=3, size=(8, 8))
FIVE = Wanted("multiclass", tuple("abcde"), channels=1, size=(8, 8))
LABELS = Wanted("multilabel", ("mass", "fluid", "air"), channels=1, size=(8, 8))

Arrays = dict[str, NDArray[Any]]


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., NpzData]:
    """Write arrays to one npz file and name it as a data set."""

    def write(arrays: Arrays, **more: Any) -> NpzData:
        np.savez(tmp_path / "scans.npz", **arrays)
        return NpzData(name="scans", format="npz", root=tmp_path / "scans.npz", **more)

    return write


def medmnist(rng: np.random.Generator, *, colour: bool = False, num_labels: int = 1) -> Arrays:
    """The three splits of a MedMNIST file with 6, 4 and 2 images of 9 x 7 pixels."""
    arrays: Arrays = {}
    for split, num in (("train", 6), ("val", 4), ("test", 2)):
        shape = (num, 9, 7, 3) if colour else (num, 9, 7)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (num, num_labels), dtype=np.uint8)
    return arrays


def folder(root: Path, **more: Any) -> FolderData:
    return FolderData(name="scans", format="folder", root=root, **more)


def save(path: Path, pixels: NDArray[Any] | Image.Image, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **how)
    return path


def square(value: int, dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
    return np.full((8, 8), value, dtype)


def only(data: Data, wanted: Wanted = GREY) -> Case:
    (case,) = read_cases(data, wanted)
    return case


def test_a_grey_medmnist_file_gives_every_image_with_its_split_and_label(
    npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    arrays = medmnist(rng)
    cases = read_cases(npz(arrays), GREY)
    assert [case.split for case in cases] == [*["train"] * 6, *["val"] * 4, *["test"] * 2]
    assert len({case.patient for case in cases}) == 12  # without ids, every image is a patient
    for split in Split:
        members = [case for case in cases if case.split == split]
        pixels = np.stack([case.load() for case in members])
        assert np.array_equal(pixels, arrays[f"{split}_images"][:, None])
        assert [int(case.target) for case in members] == arrays[f"{split}_labels"][:, 0].tolist()
        assert all(case.target.shape == () and case.target.dtype == np.int64 for case in members)


def test_a_colour_file_gives_channels_first(
    npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    arrays = medmnist(rng, colour=True)
    first = read_cases(npz(arrays), COLOUR)[0].load()
    assert np.array_equal(first, arrays["train_images"][0].transpose(2, 0, 1))


def test_a_multi_label_file_gives_one_entry_per_label(
    npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    arrays = medmnist(rng, num_labels=3)
    cases = read_cases(npz(arrays), LABELS)
    assert np.array_equal([case.target for case in cases[:6]], arrays["train_labels"])


def test_labels_without_a_second_axis_are_read_too(
    npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    arrays = medmnist(rng)
    arrays["train_labels"] = arrays["train_labels"][:, 0]
    assert len(read_cases(npz(arrays), GREY)) == 12


def test_splits_but_training_may_be_missing(
    npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    arrays = {name: array for name, array in medmnist(rng).items() if name.startswith("train")}
    assert {case.split for case in read_cases(npz(arrays), GREY)} == {Split.TRAIN}


def test_a_patients_array_names_the_patients(
    npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    arrays = medmnist(rng)
    arrays |= {f"{split}_patients": np.array(ids) for split, ids in PATIENTS.items()}
    cases = read_cases(npz(arrays, patients=True), GREY)
    assert [case.patient for case in cases] == [name for ids in PATIENTS.values() for name in ids]


PATIENTS = {"train": list("aabbbc"), "val": list("dddd"), "test": list("ef")}


def test_patient_numbers_are_names_too(
    npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    arrays = {name: array for name, array in medmnist(rng).items() if name.startswith("train")}
    arrays["train_patients"] = np.array([[7], [7], [8], [9], [10], [10]])
    cases = read_cases(npz(arrays, patients=True), GREY)
    assert [case.patient for case in cases] == ["7", "7", "8", "9", "10", "10"]


def changed(**arrays: Any) -> Callable[[Arrays], Arrays]:
    """An npz file with other arrays; None leaves one out."""
    return lambda good: {k: v for k, v in {**good, **arrays}.items() if v is not None}


WRONG_ARRAYS = {
    "no training images": (GREY, changed(train_images=None), "train_images"),
    "no training labels": (GREY, changed(train_labels=None), "train_labels is missing"),
    "validation without labels": (GREY, changed(val_labels=None), "val_labels is missing"),
    "fewer labels than images": (
        GREY, changed(test_labels=np.zeros((1, 1), int)), "test_labels is missing or not as long"
    ),
    "a label beyond the classes": (
        GREY, changed(train_labels=np.full((6, 1), 2)), "train_labels must hold one class index"
    ),
    "a negative label": (
        FIVE, changed(train_labels=np.full((6, 1), -1)), "one class index below 5"
    ),
    "several labels for a binary study": (
        GREY, changed(train_labels=np.zeros((6, 3), int)), "one class index below 2"
    ),
    "one label for a multi-label study": (
        LABELS, changed(), "train_labels must hold 3 columns of 0 and 1"
    ),
    "a label of 2 for a multi-label study": (
        LABELS, changed(train_labels=np.full((6, 3), 2)), "3 columns of 0 and 1"
    ),
    "labels that are words": (
        GREY, changed(train_labels=np.full((6, 1), "ill")), "not a readable npz file"
    ),
    "labels that are pickled": (
        GREY, changed(train_labels=np.full((6, 1), "ill", object)), "not a readable npz file"
    ),
    "colour images for a grey study": (
        GREY, changed(train_images=np.zeros((6, 8, 8, 3), np.uint8)), "set input.channels = 3"
    ),
    "images with four channels": (
        COLOUR, changed(train_images=np.zeros((6, 8, 8, 4), np.uint8)), "images of shape"
    ),
    "volumes": (GREY, changed(train_images=np.zeros((6, 8, 8, 8, 1), np.uint8)), "of shape"),
    "images without pixels": (GREY, changed(train_images=np.zeros(6)), "images of shape"),
}  # fmt: skip


@pytest.mark.parametrize("title", WRONG_ARRAYS)
def test_wrong_arrays_stop_the_site_and_name_file_and_array(
    title: str, npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    wanted, change, sentence = WRONG_ARRAYS[title]
    with pytest.raises(DataError, match=r"^scans\.npz: ") as refused:
        read_cases(npz(change(medmnist(rng))), wanted)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("ids", [None, np.arange(5)])
def test_declared_patients_must_be_there_for_every_image(
    ids: NDArray[Any] | None, npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    arrays = medmnist(rng) | ({} if ids is None else {"train_patients": ids})
    with pytest.raises(DataError, match=r"scans\.npz: train_patients is missing or not as long"):
        read_cases(npz(arrays, patients=True), GREY)


def spoil_middle(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes(64) + content[half + 64 :]


BROKEN_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"see the other folder",
    "overwritten in the middle": spoil_middle,
    "something else with the same beginning": lambda content: content[:4] + b"and no more",
    "half copied": lambda content: content[: len(content) // 2],
}


# numpy forgets to close a zip archive without an end; the collector says so, here and not later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("title", BROKEN_FILES)
def test_a_broken_npz_file_stops_the_site_by_name(
    title: str, npz: Callable[..., NpzData], rng: np.random.Generator
) -> None:
    data = npz(medmnist(rng))
    data.root.write_bytes(BROKEN_FILES[title](data.root.read_bytes()))
    with pytest.raises(DataError, match=r"scans\.npz: not a readable npz file"):
        read_cases(data, GREY)
    gc.collect()


def test_a_root_with_one_file_is_read_and_with_two_or_none_is_refused(
    npz: Callable[..., NpzData], rng: np.random.Generator, tmp_path: Path
) -> None:
    data = npz(medmnist(rng)).model_copy(update={"root": tmp_path})
    assert len(read_cases(data, GREY)) == 12
    (tmp_path / "copy.npz").write_bytes((tmp_path / "scans.npz").read_bytes())
    with pytest.raises(DataError, match=r"expected one npz file there, found 2; set data\.root"):
        read_cases(data, GREY)
    with pytest.raises(DataError, match="found 0"):
        read_cases(data.model_copy(update={"root": tmp_path / "absent"}), GREY)


def test_the_pneumonia_file_is_read_whole(real_data: Path) -> None:
    data = NpzData(name="pneumonia", format="npz", root=real_data / "pneumonia")
    cases = read_cases(data, GREY)
    counts = [sum(case.split == split for case in cases) for split in Split]
    assert counts == [4708, 524, 624]
    assert sum(int(case.target) for case in cases if case.split == Split.TEST) == 390
    assert cases[0].load().shape == (1, 28, 28)


def test_class_folders_give_the_class_and_every_image_is_a_patient(tmp_path: Path) -> None:
    for number, name in enumerate(GREY.classes):
        for index in range(3):
            save(tmp_path / name / f"{index}.png", square(10 * number + index))
    cases = read_cases(folder(tmp_path), GREY)
    assert [int(case.target) for case in cases] == [0, 0, 0, 1, 1, 1]
    assert [int(case.load()[0, 0, 0]) for case in cases] == [0, 1, 2, 10, 11, 12]
    assert len({case.patient for case in cases}) == 6
    assert {case.split for case in cases} == {None}


def test_the_order_of_cases_does_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    for name in ("b", "10", "a", "9"):
        save(tmp_path / "lesion" / f"{name}.png", square(0))
    names = [case.name for case in read_cases(folder(tmp_path), GREY)]
    assert names == [f"lesion/{name}.png" for name in ("10", "9", "a", "b")]


def test_class_folders_of_a_multi_label_study_give_one_label_each(tmp_path: Path) -> None:
    for name in LABELS.classes:
        save(tmp_path / name / "1.png", square(0))
    targets = [case.target.tolist() for case in read_cases(folder(tmp_path), LABELS)]
    assert targets == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


GRADIENT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
WIDE = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040 + 7
RGB = np.stack([GRADIENT, GRADIENT.T, 255 - GRADIENT], axis=-1)
RGBA = np.concatenate([RGB, np.full((8, 8, 1), 17, np.uint8)], axis=-1)


@pytest.mark.parametrize("suffix", ["png", "PNG", "tif", "tiff"])
@pytest.mark.parametrize("pixels", [GRADIENT, WIDE], ids=["8 bit", "16 bit"])
def test_grey_pixels_are_read_as_they_were_written(
    suffix: str, pixels: NDArray[Any], tmp_path: Path
) -> None:
    save(tmp_path / "lesion" / f"scan.{suffix}", pixels)
    read = only(folder(tmp_path)).load()
    assert (read.shape, read.dtype) == ((1, 8, 8), pixels.dtype)
    assert np.array_equal(read[0], pixels)


def test_a_16_bit_tiff_of_the_other_byte_order_has_the_same_values(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (8, 8), WIDE.astype(">u2").tobytes())
    save(tmp_path / "lesion" / "scan.tif", image)
    assert np.array_equal(only(folder(tmp_path)).load()[0], WIDE)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_a_jpeg_is_read_within_its_loss(suffix: str, tmp_path: Path) -> None:
    save(tmp_path / "lesion" / f"scan.{suffix}", GRADIENT, quality=95)
    read = only(folder(tmp_path)).load()
    assert (read.shape, read.dtype) == ((1, 8, 8), np.uint8)
    assert np.abs(read[0].astype(int) - GRADIENT).max() < 12


@pytest.mark.parametrize("pixels", [RGB, RGBA], ids=["RGB", "RGBA"])
def test_colour_is_kept_for_a_colour_study_and_becomes_luminance_for_a_grey_one(
    pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    save(tmp_path / "lesion" / "scan.png", pixels)
    assert np.array_equal(only(folder(tmp_path), COLOUR).load(), np.moveaxis(RGB, -1, 0))
    grey = only(folder(tmp_path)).load()[0]
    assert np.abs(grey - RGB @ [0.299, 0.587, 0.114]).max() <= 1


def test_a_grey_file_in_a_colour_study_has_three_equal_channels(tmp_path: Path) -> None:
    save(tmp_path / "lesion" / "scan.png", GRADIENT)
    assert np.array_equal(only(folder(tmp_path), COLOUR).load(), np.stack([GRADIENT] * 3))


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
    palette.putpalette([255, 0, 0, 0, 0, 200])
    save(tmp_path / "lesion" / "scan.png", palette)
    colour = only(folder(tmp_path), COLOUR).load()
    assert colour[:, 0, 0].tolist() == [255, 0, 0]
    assert colour[:, 0, 1].tolist() == [0, 0, 200]
    assert only(folder(tmp_path)).load().tolist() == [[[76, 23], [23, 76]]]


def test_black_and_white_becomes_the_ends_of_the_range(tmp_path: Path) -> None:
    save(tmp_path / "lesion" / "scan.png", np.eye(8) > 0)
    assert np.array_equal(only(folder(tmp_path)).load()[0], 255 * np.eye(8, dtype=np.uint8))


@pytest.mark.parametrize(
    "name",
    ["two words.png", "scan [1].png", "Ødegård år.png", "肺.png", "a.b.c.png", "100%.png"],
)
def test_any_file_name_will_do(name: str, tmp_path: Path) -> None:
    save(tmp_path / "no lesion" / name, GRADIENT)
    case = only(folder(tmp_path))
    assert case.name == f"no lesion/{name}"
    assert case.load().shape == (1, 8, 8)


def test_files_may_lie_deeper_and_other_files_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path / "lesion" / "2024" / "may" / "scan.png", GRADIENT)
    (tmp_path / "lesion" / "notes.txt").write_text("seen by two readers")
    (tmp_path / "labels.csv").write_text("scan,lesion")
    assert only(folder(tmp_path)).name == "lesion/2024/may/scan.png"


def test_folders_named_train_val_and_test_are_splits(tmp_path: Path) -> None:
    for split, num in (("train", 3), ("val", 2), ("test", 1)):
        for index in range(num):
            save(tmp_path / split / "lesion" / f"{index}.png", GRADIENT)
        save(tmp_path / split / "no lesion" / "0.png", GRADIENT)
    cases = read_cases(folder(tmp_path), GREY)
    assert [sum(case.split == split for case in cases) for split in Split] == [4, 3, 2]
    assert len({case.patient for case in cases}) == 9  # equal names in two splits are two images


def test_a_test_folder_may_be_missing(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path / split / "lesion" / "0.png", GRADIENT)
    assert [case.split for case in read_cases(folder(tmp_path), GREY)] == ["train", "val"]


@pytest.mark.parametrize("above", [".", "train"])
def test_a_folder_that_is_no_class_stops_the_site(above: str, tmp_path: Path) -> None:
    save(tmp_path / above / "lesion" / "0.png", GRADIENT)
    save(tmp_path / above / "unclear cases" / "0.png", GRADIENT)
    with pytest.raises(DataError, match="'unclear cases' is not a class of the study"):
        read_cases(folder(tmp_path), GREY)


def test_a_missing_root_and_a_root_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: not a folder; set data\.root"):
        read_cases(folder(tmp_path / "absent"), GREY)
    (tmp_path / "lesion").mkdir()
    with pytest.raises(DataError, match="no PNG, JPEG or TIFF file"):
        read_cases(folder(tmp_path), GREY)


def test_a_pattern_finds_the_patient_in_the_files_name(tmp_path: Path) -> None:
    for name in ("p7_left.png", "p7_right.png", "p12_left.png"):
        save(tmp_path / "lesion" / name, GRADIENT)
    cases = read_cases(folder(tmp_path, patient=r"^p(\d+)_"), GREY)
    assert sorted(case.patient for case in cases) == ["12", "7", "7"]


@pytest.mark.parametrize("pattern", [r"^p(\d+)_", r"_(x*)\.png"])
def test_a_file_whose_name_gives_no_patient_stops_the_site(pattern: str, tmp_path: Path) -> None:
    save(tmp_path / "lesion" / "unknown_.png", GRADIENT)
    with pytest.raises(DataError, match=r"unknown_\.png: data\.patient does not match"):
        read_cases(folder(tmp_path, patient=pattern), GREY)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


BROKEN_IMAGES: dict[str, Callable[[Path], Any]] = {
    "half copied": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("moved to the archive"),
    "spoilt in the middle": lambda path: path.write_bytes(spoil_middle(path.read_bytes())),
}


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study({"input.size": [8, 8]})


@pytest.fixture
def folder_with_a_broken_file(tmp_path: Path, rng: np.random.Generator) -> Path:
    for index in range(20):
        noise = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        save(tmp_path / GREY.classes[index % 2] / f"scan{index}.png", noise)
    return tmp_path / "lesion" / "scan7.png"


@pytest.mark.parametrize("title", BROKEN_IMAGES)
def test_a_broken_image_stops_the_site_by_name(
    title: str, folder_with_a_broken_file: Path, study: Study
) -> None:
    BROKEN_IMAGES[title](folder_with_a_broken_file)
    root = folder_with_a_broken_file.parent.parent
    with pytest.raises(DataError, match=r"scan7\.png: not a readable image"):
        load_site_data(folder(root), study)


@pytest.mark.parametrize("title", BROKEN_IMAGES)
def test_a_broken_image_is_skipped_and_counted_where_the_site_says_so(
    title: str, folder_with_a_broken_file: Path, study: Study
) -> None:
    root = folder_with_a_broken_file.parent.parent
    whole = load_site_data(folder(root), study)
    BROKEN_IMAGES[title](folder_with_a_broken_file)
    rest = load_site_data(folder(root, on_broken="skip"), study)
    assert (whole.num_skipped, rest.num_skipped) == (0, 1)
    assert rest.num_patients == whole.num_patients - 1 == 19
    left = {*rest.train.patients, *rest.validation.patients, *rest.test.patients}
    assert "lesion/scan7.png" not in left


def phantoms(**more: Any) -> PhantomData:
    return PhantomData(name="phantoms", format="phantom", **{"num_patients": 6} | more)


def test_phantoms_are_8_bit_grey_images_grouped_by_patient() -> None:
    cases = read_cases(phantoms(images_per_patient=3), wanted_phantoms())
    assert [case.patient for case in cases] == [str(k) for k in range(6) for _ in range(3)]
    for one, other in pairwise(cases):
        if one.patient == other.patient:
            assert one.target == other.target
            assert not np.array_equal(one.load(), other.load())
    assert {int(case.target) for case in cases} <= {0, 1}
    assert (cases[0].load().shape, cases[0].load().dtype) == ((1, 32, 32), np.uint8)
    assert {case.split for case in cases} == {None}


def wanted_phantoms(**changes: Any) -> Wanted:
    return Wanted(**{
        "labels": "binary", "classes": ("no lesion", "lesion"), "channels": 1, "size": (32, 32)
    } | changes)  # fmt: skip


def pixels_of(data: PhantomData) -> NDArray[np.uint8]:
    return np.stack([case.load() for case in read_cases(data, wanted_phantoms())])


def test_phantoms_depend_on_seed_and_site_alone() -> None:
    assert np.array_equal(pixels_of(phantoms()), pixels_of(phantoms()))
    assert not np.array_equal(pixels_of(phantoms()), pixels_of(phantoms(seed=1)))
    assert not np.array_equal(pixels_of(phantoms()), pixels_of(phantoms(site_index=1)))
    more = pixels_of(phantoms(num_patients=8))
    assert np.array_equal(more[: len(pixels_of(phantoms()))], pixels_of(phantoms()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": "multiclass", "classes": tuple("abc")}, "two classes"),
        ({"channels": 3}, "grey images"),
        ({"size": (32, 48)}, r"equal sides .* input\.size is \[32, 48\]"),
    ],
)
def test_a_study_that_phantoms_do_not_fit_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_cases(phantoms(), wanted_phantoms(**change))
