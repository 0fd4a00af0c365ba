"""Images beside masks of the same name: every way a mask is stored, and faults by file."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation

from client.config import FolderData, SiteConfig
from client.data_check import check_data
from client.dataset import load_site_data
from client.images import Scans
from client.readers import Case, Wanted, read_cases
from client.readers.case import Split
from client.readers.image import read_image, read_mask
from common.errors import DataError
from common.study import Study
from common.tasks.losses import OUTSIDE

VESSELS = Wanted("masks", ("background", "vessel"), channels=1, size=(8, 8))
TISSUES = Wanted("masks", ("background", "lung", "heart", "lesion"), channels=1, size=(8, 8))
FINDINGS = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8))

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
SHAPE = np.zeros((8, 8), np.uint8)
SHAPE[1:3, 2:7] = 1  # neither symmetric nor in the middle
FOUR = np.arange(64, dtype=np.uint8).reshape(8, 8) // 5 % 4
ROUND = np.hypot(*np.mgrid[-3.5:4, -3.5:4]) < 4  # a valid region


def save(path: Path, pixels: NDArray[Any] | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path)
    return path


def pairs(root: Path, **more: Any) -> FolderData:
    return FolderData(name="eyes", format="folder", root=root, layout="pairs", **more)


def one(root: Path, wanted: Wanted = VESSELS, **more: Any) -> Case:
    (case,) = read_cases(pairs(root, **more), wanted)
    return case


def mask_of(case: Case) -> NDArray[np.uint8]:
    assert case.load_mask is not None
    mask = case.load_mask()
    assert mask.dtype == np.uint8
    return mask


def palette(classes: NDArray[np.uint8]) -> Image.Image:
    """The file of a labelling tool: numbers of classes that look like colours."""
    image = Image.fromarray(classes, mode="P")
    image.putpalette([0, 0, 0, 200, 30, 30, 30, 200, 30, 30, 30, 200])
    return image


def as_colour(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([grey] * 3, axis=-1)


def study_of(make_study: Callable[..., Study], classes: int = 2, **changes: Any) -> Study:
    task = {"kind": "segmentation", "classes": list("abcdefgh"[:classes])}
    model = {"name": "unet", "channels": [4, 8]}
    values = {"input.size": [8, 8], "input.intensity": "dtype", **changes}
    return make_study({"task": task, "model": model, **values})


def test_image_and_mask_of_one_stem_are_one_case(tmp_path: Path) -> None:
    names = ["10", "9", "a b"]
    for place, name in enumerate(names):
        save(tmp_path / "images" / f"{name}.png", np.full((8, 8), 10 + place, np.uint8))
        mask = np.zeros((8, 8), np.uint8)
        mask[place] = 1
        save(tmp_path / "masks" / f"{name}.gif", mask)
    save(tmp_path / "masks" / "of nobody.gif", SHAPE)
    cases = read_cases(pairs(tmp_path), VESSELS)
    assert [case.name for case in cases] == [f"images/{name}.png" for name in names]
    for place, case in enumerate(cases):
        assert (case.load() == 10 + place).all()
        assert mask_of(case).sum() == mask_of(case)[place].sum() == 8
        assert case.target is None
    assert len({case.patient for case in cases}) == 3
    assert {case.split for case in cases} == {None}


def test_the_site_names_its_folders(tmp_path: Path) -> None:
    save(tmp_path / "fundus" / "1.png", GREY)
    save(tmp_path / "drawn" / "1.png", SHAPE)
    save(tmp_path / "fov" / "1.png", ROUND)
    case = one(tmp_path, images="fundus", masks="drawn", valid="fov")
    assert np.array_equal(mask_of(case), np.where(ROUND, SHAPE, OUTSIDE))


TWO_CLASSES: dict[str, NDArray[Any] | Image.Image] = {
    "0 and 1": SHAPE,
    "0 and 255": 255 * SHAPE,
    "0 and 128": 128 * SHAPE,
    "1 bit": SHAPE > 0,
    "16 bits": SHAPE.astype(np.uint16) * 65535,
    "a palette": palette(SHAPE),
    "grey, saved as RGB": as_colour(255 * SHAPE),
    "grey, saved as RGBA": np.dstack([as_colour(SHAPE), np.full((8, 8), 255, np.uint8)]),
}
FOUR_CLASSES: dict[str, NDArray[Any] | Image.Image] = {
    "numbers of classes": FOUR,
    "16 bits": FOUR.astype(np.uint16),
    "a palette": palette(FOUR),
    "grey, saved as RGB": as_colour(FOUR),
}


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("title", TWO_CLASSES)
def test_with_two_classes_everything_but_0_is_the_second(
    title: str, suffix: str, tmp_path: Path
) -> None:
    save(tmp_path / "images" / "1.png", GREY)
    save(tmp_path / "masks" / f"1.{suffix}", TWO_CLASSES[title])
    assert np.array_equal(mask_of(one(tmp_path)), SHAPE)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("title", FOUR_CLASSES)
def test_with_more_classes_a_value_is_a_class(title: str, suffix: str, tmp_path: Path) -> None:
    save(tmp_path / "images" / "1.png", GREY)
    save(tmp_path / "masks" / f"1.{suffix}", FOUR_CLASSES[title])
    assert np.array_equal(mask_of(one(tmp_path, TISSUES)), FOUR)


def test_a_mask_of_1_bit_has_the_first_two_of_many_classes(tmp_path: Path) -> None:
    save(tmp_path / "images" / "1.png", GREY)
    save(tmp_path / "masks" / "1.png", SHAPE > 0)
    assert np.array_equal(mask_of(one(tmp_path, TISSUES)), SHAPE)


@pytest.mark.parametrize(
    "valid",
    [ROUND, ROUND.astype(np.uint8), 255 * ROUND.astype(np.uint8), as_colour(ROUND * np.uint8(9))],
    ids=["1 bit", "0 and 1", "0 and 255", "grey, saved as RGB"],
)
@pytest.mark.parametrize(("wanted", "mask"), [(VESSELS, SHAPE), (TISSUES, FOUR)])
def test_beyond_the_valid_region_a_mask_is_outside(
    wanted: Wanted, mask: NDArray[np.uint8], valid: NDArray[Any], tmp_path: Path
) -> None:
    save(tmp_path / "images" / "1.png", GREY)
    save(tmp_path / "masks" / "1.png", mask)
    save(tmp_path / "valid" / "1.png", valid)
    read = mask_of(one(tmp_path, wanted, valid="valid"))
    assert OUTSIDE == 255
    assert np.array_equal(read, np.where(ROUND, mask, 255))


def test_without_a_valid_folder_every_pixel_counts(tmp_path: Path) -> None:
    save(tmp_path / "images" / "1.png", GREY)
    save(tmp_path / "masks" / "1.png", 255 * SHAPE)
    save(tmp_path / "valid" / "1.png", ROUND)
    assert mask_of(one(tmp_path)).max() == 1


def test_splits_are_subfolders_each_with_its_own_pairs(tmp_path: Path) -> None:
    values = {}
    for value, (split, stem) in enumerate([("train", "1"), ("train", "2"), ("test", "1")]):
        save(tmp_path / split / "images" / f"{stem}.png", np.full((8, 8), value, np.uint8))
        mask = np.zeros((8, 8), np.uint8)
        mask[value] = 1
        save(tmp_path / split / "masks" / f"{stem}.png", mask)
        values[f"{split}/images/{stem}.png"] = value
    cases = read_cases(pairs(tmp_path), VESSELS)
    assert {case.name: case.split for case in cases} == {
        name: Split(name.split("/")[0]) for name in values
    }
    for case in cases:
        assert case.load().max() == values[case.name]
        assert mask_of(case)[values[case.name]].all()  # of its own split, not of the equal stem
    assert len({case.patient for case in cases}) == 3


def test_a_pattern_finds_the_patient_of_a_pair(tmp_path: Path) -> None:
    for name in ("p7_left", "p7_right", "p12_left"):
        save(tmp_path / "images" / f"{name}.png", GREY)
        save(tmp_path / "masks" / f"{name}.png", SHAPE)
    cases = read_cases(pairs(tmp_path, patient=r"^p(\d+)_"), VESSELS)
    assert sorted(case.patient for case in cases) == ["12", "7", "7"]


def no_mask(root: Path) -> None:
    (root / "masks" / "2.png").unlink()


def no_valid(root: Path) -> None:
    (root / "valid" / "2.png").unlink()


def two_masks(root: Path) -> None:
    save(root / "masks" / "2.tif", SHAPE)


def two_valid(root: Path) -> None:
    save(root / "valid" / "2.tif", ROUND)


def two_images(root: Path) -> None:
    save(root / "images" / "2.tif", GREY)


def mask_of_other_size(root: Path) -> None:
    save(root / "masks" / "2.png", np.zeros((8, 9), np.uint8))
    save(root / "valid" / "2.png", np.ones((8, 9), np.uint8))


def valid_of_other_size(root: Path) -> None:
    save(root / "valid" / "2.png", np.ones((9, 8), np.uint8))


def number_too_high(root: Path) -> None:
    save(root / "masks" / "2.png", FOUR + np.uint8(1))


def white(root: Path) -> None:
    save(root / "masks" / "2.png", 255 * SHAPE)


def wide_number(root: Path) -> None:
    save(root / "masks" / "2.png", 257 * SHAPE.astype(np.uint16))


def colours(root: Path) -> None:
    painted = as_colour(FOUR)
    painted[0, 0] = 3, 0, 0
    save(root / "masks" / "2.png", painted)


def broken_mask(root: Path) -> None:
    (root / "masks" / "2.png").write_bytes(b"\x89PNG and no more")


def broken_valid(root: Path) -> None:
    (root / "valid" / "2.png").write_text("later")


# Title: what is spoilt, and the message; the pair 2 of three is the wrong one.
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an image without a mask": (no_mask, r"^2\.png: no file with this stem in .*masks"),
    "an image without a valid region": (no_valid, r"^2\.png: no file with this stem in .*valid"),
    "two masks of one stem": (two_masks, r"masks: 2\.png and 2\.tif have one stem"),
    "two valid regions of one stem": (two_valid, r"valid: 2\.png and 2\.tif have one stem"),
    "a mask of another size": (
        mask_of_other_size, r"2\.png: its mask has 8x9 pixels, the image 8x8"
    ),
    "a valid region of another size": (
        valid_of_other_size, r"^2\.png: the valid region and the mask differ in size"
    ),
    "a number that is no class": (
        number_too_high, r"2\.png: its mask holds 4, the study's classes are 0 to 3"
    ),
    "white in a mask of many classes": (
        white, r"^2\.png: a mask's values are classes, below 4"
    ),
    "a number of 16 bits that would wrap to a class": (
        wide_number, r"^2\.png: a mask's values are classes, below 4"
    ),
    "a mask in colours": (colours, r"^2\.png: a mask holds one class per pixel"),
    "a broken mask": (broken_mask, r"^2\.png: not a readable image"),
    "a broken valid region": (broken_valid, r"^2\.png: not a readable image"),
}  # fmt: skip


def three_pairs(root: Path) -> Path:
    for stem in "123":
        save(root / "images" / f"{stem}.png", GREY)
        save(root / "masks" / f"{stem}.png", FOUR)
        save(root / "valid" / f"{stem}.png", ROUND)
    return root


@pytest.mark.parametrize("title", FAULTS)
def test_a_wrong_pair_stops_the_site_by_file(
    title: str, tmp_path: Path, make_study: Callable[..., Study]
) -> None:
    spoil, sentence = FAULTS[title]
    study = study_of(make_study, classes=4)
    data = pairs(three_pairs(tmp_path), valid="valid")
    assert load_site_data(data, study).num_patients == 3
    spoil(tmp_path)
    with pytest.raises(DataError, match=sentence):
        load_site_data(data, study)


def test_two_images_of_one_stem_stop_the_site(tmp_path: Path) -> None:
    two_images(three_pairs(tmp_path))
    with pytest.raises(DataError, match=r"images: 2\.png and 2\.tif have one stem"):
        read_cases(pairs(tmp_path), TISSUES)


@pytest.mark.parametrize("folder", ["masks", "valid"])
def test_a_missing_folder_is_refused_with_the_fix(folder: str, tmp_path: Path) -> None:
    three_pairs(tmp_path).joinpath(folder).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{folder}: not a folder; set data\.masks and data\.val"):
        read_cases(pairs(tmp_path, valid="valid"), TISSUES)


def test_a_root_without_images_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "masks" / "1.png", SHAPE)
    with pytest.raises(DataError, match="no PNG, JPEG or TIFF file in images/"):
        read_cases(pairs(tmp_path), VESSELS)


def test_a_folder_beside_the_splits_stops_the_site(tmp_path: Path) -> None:
    three_pairs(tmp_path / "train")
    save(tmp_path / "more" / "images" / "1.png", GREY)
    with pytest.raises(DataError, match="folder 'more' is none of train, val, test"):
        read_cases(pairs(tmp_path), TISSUES)


def test_the_layout_that_the_task_cannot_use_is_refused_with_the_fix(tmp_path: Path) -> None:
    three_pairs(tmp_path)
    with pytest.raises(DataError, match=r'data set eyes: .* needs data\.layout = "classes"'):
        read_cases(pairs(tmp_path), FINDINGS)
    classes = pairs(tmp_path).model_copy(update={"layout": "classes"})
    with pytest.raises(DataError, match=r'data set eyes: .* needs data\.layout = "pairs"'):
        read_cases(classes, TISSUES)


RGB = np.stack([GREY, 2 * GREY, 255 - GREY], axis=-1)
RGBA = np.dstack([RGB, np.full((8, 8), 100, np.uint8)])


@pytest.mark.parametrize("pixels", [RGB, RGBA], ids=["RGB", "RGBA"])
@pytest.mark.parametrize(("colour", "band"), [("red", 0), ("green", 1), ("blue", 2)])
def test_the_study_picks_the_band_of_a_colour_image(
    colour: str, band: int, pixels: NDArray[np.uint8], tmp_path: Path,
    make_study: Callable[..., Study],
) -> None:  # fmt: skip
    save(tmp_path / "train" / "images" / "1.png", pixels)
    save(tmp_path / "train" / "masks" / "1.png", SHAPE)
    study = study_of(make_study, **{"input.colour": colour})
    loaded = load_site_data(pairs(tmp_path), study)
    wanted = torch.from_numpy(RGB[..., band] / np.float32(255))
    assert torch.allclose(loaded.train.pixels[0, 0], wanted)


@pytest.mark.parametrize("colour", ["luminance", "red", "green", "blue"])
def test_a_grey_image_is_the_same_in_every_band(colour: str, tmp_path: Path) -> None:
    save(tmp_path / "images" / "1.png", GREY)
    save(tmp_path / "masks" / "1.png", SHAPE)
    wanted = Wanted("masks", ("background", "vessel"), channels=1, size=(8, 8), colour=colour)
    assert np.array_equal(one(tmp_path, wanted).load(), GREY[None])


def test_a_grey_value_is_that_of_all_bands_where_the_study_picks_none(tmp_path: Path) -> None:
    save(tmp_path / "images" / "1.png", RGB)
    save(tmp_path / "masks" / "1.png", SHAPE)
    assert np.abs(one(tmp_path).load()[0] - RGB @ [0.299, 0.587, 0.114]).max() <= 1


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("folder", ["images", "masks", "valid"])
def test_a_broken_file_of_a_pair_is_skipped_and_counted_where_the_site_says_so(
    folder: str, patches: bool, tmp_path: Path, make_study: Callable[..., Study]
) -> None:
    length = {"training.local_epochs": None, "training.local_steps": 1}
    study = study_of(make_study, 4, **({"input.patches": True} | length if patches else {}))
    truncated(three_pairs(tmp_path / "train") / folder / "2.png")
    with pytest.raises(DataError, match=r"2\.png: not a readable image"):
        load_site_data(pairs(tmp_path, valid="valid"), study)
    loaded = load_site_data(pairs(tmp_path, valid="valid", on_broken="skip"), study)
    assert isinstance(loaded.train, Scans) == patches
    left = {*loaded.train.patients, *loaded.validation.patients, *loaded.test.patients}
    assert loaded.num_skipped == 1
    assert left == {"train/images/1.png", "train/images/3.png"}


def test_the_preflight_reads_masks_too_where_it_knows_the_study(
    tmp_path: Path, make_study: Callable[..., Study]
) -> None:
    three_pairs(tmp_path / "data")
    config = SiteConfig(name="site-1", state_dir=tmp_path / "s", data=pairs(tmp_path / "data"))
    study = study_of(make_study, classes=4)
    said = "\n".join(map(str, check_data(config, study)))
    assert "3 readable images, 8x8 grey uint8 (3)" in said
    assert "each with a mask" in said
    assert "3 readable images" in "\n".join(map(str, check_data(config, None)))
    number_too_high(tmp_path / "data")
    (broken, *_) = check_data(config, study)
    assert (broken.level, broken.exit_code) == ("FAULT", DataError.exit_code)
    assert re.search(r"1 unreadable: .*2\.png: its mask holds 4", broken.text)


def test_retina_photographs_are_read_with_vessels_and_field_of_view(real_data: Path) -> None:
    data = pairs(real_data / "drive", masks="vessels", valid="fov")
    wanted = Wanted("masks", ("background", "vessel"), channels=1, size=(96, 96), colour="green")
    cases = read_cases(data, wanted)
    assert [sum(case.split == split for case in cases) for split in Split] == [20, 0, 20]
    for case in cases[::13]:
        pixels, mask = case.load(), mask_of(case)
        assert pixels.shape == (1, 584, 565)
        assert mask.shape == (584, 565)
        assert np.unique(mask).tolist() == [0, 1, OUTSIDE]
        assert 0.6 < np.mean(mask != OUTSIDE) < 0.75  # the field of view is round
        assert 0.08 < np.mean(mask[mask != OUTSIDE]) < 0.18  # vessels are rare in it
        assert pixels[0][mask == OUTSIDE].mean() < 10 < pixels[0][mask == 0].mean()  # it is dark
        beside = (mask == 0) & binary_dilation(mask == 1, iterations=5)
        assert pixels[0][mask == 1].mean() < pixels[0][beside].mean() - 5  # so are vessels in green


def test_black_is_the_background_whatever_its_place_in_a_palette(tmp_path: Path) -> None:
    plain = np.full((8, 8), 255, np.uint8)
    plain[:2] = 0
    Image.fromarray(plain).save(tmp_path / "plain.png")
    swapped = Image.fromarray((plain == 0).astype(np.uint8), mode="P")
    swapped.putpalette([255, 255, 255, 0, 0, 0])
    swapped.save(tmp_path / "swapped.png")
    one, other = (read_mask(tmp_path / f"{name}.png", None, 2) for name in ("plain", "swapped"))
    assert one.sum() == 48
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("title", "sentence"),
    [("fractions", "this file has fractions"), ("pages", "2 pages; save each")],
)
def test_a_mask_that_would_be_read_wrongly_is_refused(
    title: str, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "mask.tif"
    page = Image.fromarray(np.full((8, 8), 1.5 if title == "fractions" else 1.0, np.float32))
    page.save(path, **({"save_all": True, "append_images": [page]} if title == "pages" else {}))
    with pytest.raises(DataError, match=sentence):
        read_mask(path, None, 3)


def test_wide_grey_values_have_the_machines_byte_order(tmp_path: Path) -> None:
    values = (np.arange(64).reshape(8, 8) * 500).astype(">u2")
    Image.frombytes("I;16B", (8, 8), values.tobytes()).save(tmp_path / "wide.tif")
    pixels = read_image(tmp_path / "wide.tif", 1)
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels[0], values)
