"""A table that names images: rows in, cases out, and every fault by file and line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.config import CsvData, SiteConfig
from client.data_check import check_data
from client.dataset import load_site_data
from client.readers import Case, Wanted, read_cases
from client.readers.case import Split
from common.errors import DataError
from common.study import Study
from common.tasks.losses import OUTSIDE

GREY = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8))
THREE = Wanted("multiclass", ("mass", "fluid", "air"), channels=1, size=(8, 8))
LABELS = Wanted("multilabel", ("mass", "fluid", "air"), channels=1, size=(8, 8))
MASKS = Wanted("masks", ("background", "vessel"), channels=1, size=(8, 8))
TISSUES = Wanted("masks", ("background", "lung", "heart"), channels=1, size=(8, 8))

GREY_OF = {"a.png": 10, "b.png": 20, "c.png": 30}  # every image has one grey value
HALVES = np.repeat(np.array([[0, 1]], np.uint8), 4, axis=1).repeat(8, axis=0)  # left 0, right 1

Table = Callable[..., CsvData]


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Write a table beside the images a, b and c, and name it as a data set."""
    for name, value in GREY_OF.items():
        save(tmp_path / name, np.full((8, 8), value, np.uint8))

    def write(text: str | bytes, **more: Any) -> CsvData:
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "scans.csv").write_bytes(content)
        return CsvData(name="scans", format="csv", root=tmp_path, table="scans.csv", **more)

    return write


def seen(cases: list[Case]) -> list[tuple[str, int, Split | None, int]]:
    """What a binary table says, with the grey value that tells which image was opened."""
    return [(c.patient, int(c.target), c.split, int(c.load()[0, 0, 0])) for c in cases]


def test_a_class_is_given_by_its_name(table: Table) -> None:
    data = table("image,label\nb.png,lesion\na.png,no lesion\nc.png,lesion\n", target="label")
    cases = read_cases(data, GREY)
    assert [int(case.target) for case in cases] == [1, 0, 1]
    assert [int(case.load()[0, 0, 0]) for case in cases] == [20, 10, 30]  # in the table's order
    assert all(case.target.shape == () and case.target.dtype == np.int64 for case in cases)
    assert all(case.load_mask is None for case in cases)


def test_the_number_of_a_class_is_its_place_in_the_study(table: Table) -> None:
    data = table("image,label\na.png,air\nb.png,mass\nc.png,fluid\n", target="label")
    assert [int(case.target) for case in read_cases(data, THREE)] == [2, 0, 1]


def test_several_labels_stand_in_one_cell(table: Table) -> None:
    text = "image,labels\na.png,air|mass\nb.png,\nc.png, fluid | air |\n"
    cases = read_cases(table(text, target="labels"), LABELS)
    assert [case.target.tolist() for case in cases] == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]


def test_several_labels_have_a_column_each_in_any_order(table: Table) -> None:
    text = "air,image,fluid,age,mass\n1,a.png,0,61,0\n0,b.png,0,40,0\n1,c.png,1,17,1\n"
    cases = read_cases(table(text), LABELS)
    assert [case.target.tolist() for case in cases] == [[0, 0, 1], [0, 0, 0], [1, 1, 1]]
    assert cases[0].target.dtype == np.int64


def test_a_mask_and_its_valid_region_have_a_column_each(table: Table, tmp_path: Path) -> None:
    save(tmp_path / "masks" / "vessels.png", HALVES * 255)
    save(tmp_path / "fov.gif", HALVES.T)
    text = "image,drawn,inside\na.png,masks/vessels.png,fov.gif\n"
    (case,) = read_cases(table(text, target="drawn", valid="inside"), MASKS)
    assert case.target is None
    assert case.load()[0, 0, 0] == 10
    assert case.load_mask is not None
    assert np.array_equal(case.load_mask(), np.where(HALVES.T == 1, HALVES, OUTSIDE))


def test_without_a_valid_column_every_pixel_counts(table: Table, tmp_path: Path) -> None:
    save(tmp_path / "m.png", 2 * HALVES)
    (case,) = read_cases(table("image,m\na.png,m.png\n", target="m"), TISSUES)
    assert case.load_mask is not None
    assert np.array_equal(case.load_mask(), 2 * HALVES)


def test_images_of_one_patient_share_its_id_and_without_a_column_every_row_is_a_patient(
    table: Table,
) -> None:
    text = "image,label,who\na.png,lesion,p7\nb.png,lesion,p9\nc.png,lesion,p7\n"
    cases = read_cases(table(text, target="label", patient="who"), GREY)
    assert [case.patient for case in cases] == ["p7", "p9", "p7"]
    alone = read_cases(table(text, target="label"), GREY)
    assert len({case.patient for case in alone}) == 3


@pytest.mark.parametrize(
    ("written", "split"),
    [
        *[("train", Split.TRAIN), ("val", Split.VALIDATION), ("test", Split.TEST)],
        *[("Training", Split.TRAIN), ("VALID", Split.VALIDATION), ("TEST", Split.TEST)],
        ("validation", Split.VALIDATION),
    ],
)
def test_a_split_may_be_written_in_several_ways(written: str, split: Split, table: Table) -> None:
    data = table(f"image,label,part\na.png,lesion,{written}\n", target="label", split="part")
    assert [case.split for case in read_cases(data, GREY)] == [split]


def test_without_a_split_column_the_table_decides_no_split(table: Table) -> None:
    data = table("image,label,split\na.png,lesion,test\n", target="label")
    assert [case.split for case in read_cases(data, GREY)] == [None]


PLAIN = (
    "image,label,who,part\n"
    "a.png,lesion,p1,train\n"
    "b.png,no lesion,p2,test\n"
    "c.png,lesion,p1,train\n"
)  # fmt: skip

# The same table as other programs write it.
WRITINGS: dict[str, bytes] = {
    "plain": PLAIN.encode(),
    "semicolons": PLAIN.replace(",", ";").encode(),
    "tabs": PLAIN.replace(",", "\t").encode(),
    "a byte order mark": PLAIN.encode("utf-8-sig"),
    "a byte order mark and semicolons": PLAIN.replace(",", ";").encode("utf-8-sig"),
    "a byte order mark and a quoted header": PLAIN.replace("image", '"image"').encode("utf-8-sig"),
    "line ends of Windows": PLAIN.replace("\n", "\r\n").encode(),
    "no line end after the last row": PLAIN.removesuffix("\n").encode(),
    "empty lines at the end": PLAIN.encode() + b"\n\n",
    "every cell in quotes": "\n".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) for line in PLAIN.splitlines()
    ).encode(),
    "spaces round the cells": PLAIN.replace("lesion,", " lesion , ").replace(
        "no  lesion", " no lesion"
    ).encode(),
    "one column more": PLAIN.replace("\n", ",Ødegård\n").encode(),
}  # fmt: skip


@pytest.mark.parametrize("title", WRITINGS)
def test_tables_of_many_programs_say_the_same(title: str, table: Table) -> None:
    data = table(WRITINGS[title], target="label", patient="who", split="part")
    assert seen(read_cases(data, GREY)) == [
        ("p1", 1, Split.TRAIN, 10),
        ("p2", 0, Split.TEST, 20),
        ("p1", 1, Split.TRAIN, 30),
    ]


def test_spaces_round_the_names_of_columns_mean_nothing(table: Table) -> None:
    text = PLAIN.replace("image,label,who,part", "image, label ,who , part")
    data = table(text, target="label", patient="who", split="part")
    assert [case.patient for case in read_cases(data, GREY)] == ["p1", "p2", "p1"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_separator_in_quotes_belongs_to_the_cell(
    separator: str, table: Table, tmp_path: Path
) -> None:
    name = f"scan{separator} left.png"
    save(tmp_path / name, np.full((8, 8), 99, np.uint8))
    text = separator.join(["image", "label", "who"]) + "\n"
    text += separator.join([f'"{name}"', "lesion", '"Åse ""the second"""']) + "\n"
    cases = read_cases(table(text, target="label", patient="who"), GREY)
    assert seen(cases) == [('Åse "the second"', 1, None, 99)]


def test_a_case_keeps_every_column_of_its_row(table: Table) -> None:
    data = table("image,label,ward\na.png,lesion,east\nb.png,lesion, west \n", target="label")
    assert [case.columns["ward"] for case in read_cases(data, GREY)] == ["east", "west"]


def test_paths_are_relative_to_the_root_and_may_lie_deeper(table: Table, tmp_path: Path) -> None:
    save(tmp_path / "2024" / "may" / "a.png", np.full((8, 8), 77, np.uint8))
    data = table("image,label\n2024/may/a.png,lesion\n", target="label")
    assert [int(case.load()[0, 0, 0]) for case in read_cases(data, GREY)] == [77]


# Title: what the study wants, settings, the table, where the fault is, what the message says.
FAULTS: dict[str, tuple[Wanted, dict[str, Any], str, str, str]] = {
    "no column with the image": (
        GREY, {"target": "label"}, "file,label\na.png,lesion\n",
        "scans.csv", "no column 'image' in its first line, which has 2 cells",
    ),
    "no column with the class": (
        GREY, {"target": "class"}, "image,label\na.png,lesion\n",
        "scans.csv", "no column 'class' in its first line, which has 2 cells",
    ),
    "no column with the patient": (
        GREY, {"target": "label", "patient": "who"}, "image,label\na.png,lesion\n",
        "scans.csv", "no column 'who'",
    ),
    "no column with the split": (
        GREY, {"target": "label", "split": "part"}, "image,label\na.png,lesion\n",
        "scans.csv", "no column 'part'",
    ),
    "no column with the valid region": (
        MASKS, {"target": "m", "valid": "fov"}, "image,m\na.png,m.png\n",
        "scans.csv", "no column 'fov'",
    ),
    "a header alone": (GREY, {"target": "label"}, "image,label\n", "scans.csv", "no row"),
    "nothing at all": (GREY, {"target": "label"}, "", "scans.csv", "no column 'image'"),
    "a class the study does not know": (
        GREY, {"target": "label"}, "image,label\na.png,lesion\nb.png,fracture\n",
        "scans.csv, line 3", "column 'label' holds no class of the study: no lesion, lesion",
    ),
    "a class in other letters": (
        GREY, {"target": "label"}, "image,label\na.png,Lesion\n",
        "scans.csv, line 2", "holds no class",
    ),
    "no class": (
        THREE, {"target": "label"}, "image,label\na.png,air\nb.png,\n",
        "scans.csv, line 3", "holds no class of the study",
    ),
    "one unknown of several labels": (
        LABELS, {"target": "label"}, "image,label\na.png,air\nb.png,air|water\n",
        "scans.csv, line 3", "holds no class",
    ),
    "no image": (
        GREY, {"target": "label"}, "image,label\na.png,lesion\n,lesion\nc.png,lesion\n",
        "scans.csv, line 3", "column 'image' is empty",
    ),
    "an image of blanks": (
        GREY, {"target": "label"}, "image,label\n  ,lesion\n",
        "scans.csv, line 2", "column 'image' is empty",
    ),
    "no patient": (
        GREY, {"target": "label", "patient": "who"}, "image,label,who\na.png,lesion,\n",
        "scans.csv, line 2", "column 'who' is empty",
    ),
    "a row that ends early": (
        GREY, {"target": "label", "patient": "who"}, "image,label,who\na.png,lesion\n",
        "scans.csv, line 2", "not 3 cells as in the header",
    ),
    "a row with a cell too many, which would shift the patient": (
        GREY, {"target": "label", "patient": "who"}, "image,label,who\na.png,lesion,extra,p1\n",
        "scans.csv, line 2", "not 3 cells as in the header",
    ),
    "no split": (
        GREY, {"target": "label", "split": "part"}, "image,label,part\na.png,lesion,\n",
        "scans.csv, line 2", "column 'part' is empty",
    ),
    "an unknown split": (
        GREY, {"target": "label", "split": "part"},
        "image,label,part\na.png,lesion,train\nb.png,lesion,holdout\n",
        "scans.csv, line 3", "is none of train, val, test",
    ),
    "no mask": (
        MASKS, {"target": "m"}, "image,m\na.png,\n", "scans.csv, line 2", "column 'm' is empty",
    ),
    "no valid region": (
        MASKS, {"target": "m", "valid": "fov"}, "image,m,fov\na.png,m.png,\n",
        "scans.csv, line 2", "column 'fov' is empty",
    ),
    "masks without a column that names them": (
        MASKS, {}, "image,m\na.png,m.png\n", "scans.csv", "data.target must name the column",
    ),
    "one class without a column that names it": (
        GREY, {}, "image,lesion\na.png,1\n", "scans.csv, line 2", "data.target must name",
    ),
    "a label's column is missing": (
        LABELS, {}, "image,mass,air\na.png,1,0\n",
        "scans.csv, line 2", "column 'fluid' must be there and hold 0 or 1",
    ),
    "a label's cell is empty": (
        LABELS, {}, "image,mass,fluid,air\na.png,1,0,1\nb.png,1,0,\n",
        "scans.csv, line 3", "column 'air' must be there and hold 0 or 1",
    ),
    "a label that is a share": (
        LABELS, {}, "image,mass,fluid,air\na.png,0.5,0,1\n",
        "scans.csv, line 2", "column 'mass' must be there and hold 0 or 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", FAULTS)
def test_a_fault_in_the_table_stops_the_site_by_file_and_line(title: str, table: Table) -> None:
    wanted, settings, text, where, sentence = FAULTS[title]
    with pytest.raises(DataError) as refused:
        read_cases(table(text, **settings), wanted)
    assert str(refused.value).startswith(f"{where}: ")
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "image,label,note\na.png,lesion,\n\nb.png,fracture,\n",
        'image,label,note\na.png,lesion,"seen\ntwice"\nb.png,fracture,\n',
    ],
    ids=["an empty line", "a cell of two lines"],
)
def test_a_fault_is_found_at_its_line_after_anything(text: str, table: Table) -> None:
    with pytest.raises(DataError, match=r"^scans\.csv, line 4: column 'label' holds no class"):
        read_cases(table(text, target="label"), GREY)


def test_a_fault_does_not_tell_who_the_patient_is(table: Table) -> None:
    text = "image,label,who,part\nkari.png,lesion,kari-nordmann,\n"
    with pytest.raises(DataError, match=r"^scans\.csv, line 2: ") as refused:
        read_cases(table(text, target="label", patient="who", split="part"), GREY)
    assert "kari" not in str(refused.value)


UNREADABLE = {
    "another encoding": "image,label\nÅse.png,lesion\n".encode("latin-1"),
    "a quote that never ends": b'image,label\n"a.png,lesion\n',
    "a spreadsheet": b"PK\x03\x04\x00\x00\xff\xfe\x00\x00",
}


@pytest.mark.parametrize("title", UNREADABLE)
def test_a_table_that_cannot_be_read_stops_the_site_by_name(title: str, table: Table) -> None:
    with pytest.raises(
        DataError,
        match=r"scans\.csv: (byte \d+ is not UTF-8 .*save|not a readable table .*set data\.root)",
    ):
        read_cases(table(UNREADABLE[title], target="label"), GREY)


def test_a_missing_table_is_named(table: Table) -> None:
    data = table(PLAIN, target="label").model_copy(update={"table": "absent.csv"})
    with pytest.raises(
        DataError, match=r"absent\.csv: not a readable table .*set data\.root and data\.table"
    ):
        read_cases(data, GREY)


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ("x.png,m.png,m.png", r"x\.png"),
        ("a.png,y.png,m.png", r"y\.png"),
        ("a.png,m.png,z.png", r"z\.png"),
    ],
    ids=["image", "mask", "valid region"],
)
def test_a_file_that_the_table_names_and_the_folder_lacks_stops_the_site_by_name(
    row: str, missing: str, table: Table, tmp_path: Path, make_study: Callable[..., Study]
) -> None:
    save(tmp_path / "m.png", HALVES)
    data = table(f"image,m,fov\na.png,m.png,m.png\n{row}\n", target="m", valid="fov")
    with pytest.raises(DataError, match=rf"{missing}: there is no such file in"):
        load_site_data(data, masks_study(make_study))


def masks_study(make_study: Callable[..., Study]) -> Study:
    task = {"kind": "segmentation", "classes": ["background", "vessel"]}
    model = {"name": "unet", "channels": [4, 8]}
    return make_study({"task": task, "model": model, "input.size": [8, 8]})


def test_a_row_whose_file_is_missing_is_skipped_and_counted_where_the_site_says_so(
    table: Table, tmp_path: Path, make_study: Callable[..., Study]
) -> None:
    save(tmp_path / "m.png", HALVES)
    text = "image,m\na.png,m.png\nb.png,y.png\nx.png,m.png\nc.png,m.png\n"
    loaded = load_site_data(table(text, target="m", on_broken="skip"), masks_study(make_study))
    assert loaded.num_skipped == 2
    assert loaded.num_patients == 2


def test_a_table_is_loaded_with_its_own_splits_and_patients(
    table: Table, make_study: Callable[..., Study]
) -> None:
    text = PLAIN + "b.png,no lesion,p3,val\n"
    data = table(text, target="label", patient="who", split="part")
    loaded = load_site_data(data, make_study({"input.size": [8, 8], "input.intensity": "dtype"}))
    assert loaded.train.patients == ("p1", "p1")
    assert loaded.train.targets.tolist() == [1, 1]
    assert loaded.train.pixels[:, 0, 0, 0].tolist() == pytest.approx([10 / 255, 30 / 255])
    assert (loaded.validation.patients, loaded.test.patients) == (("p3",), ("p2",))


def test_a_patient_in_two_of_the_tables_splits_is_refused(
    table: Table, make_study: Callable[..., Study]
) -> None:
    data = table(PLAIN.replace("p2", "p1"), target="label", patient="who", split="part")
    with pytest.raises(DataError, match=r"1 patient\(s\) are in two"):
        load_site_data(data, make_study({"input.size": [8, 8]}))


SEEN_WITHOUT_A_STUDY = {
    "classes": ("image,label\na.png,mass\nb.png,air\nc.png,mass\n", "air 0, mass 2"),
    "labels": ("image,label\na.png,mass|air\nb.png,\nc.png,mass|air\n", "air 2, mass 2"),
    "masks": ("image,label\na.png,m.png\nb.png,m.png\nc.png,m.png\n", "each with a mask"),
}


@pytest.mark.parametrize("title", SEEN_WITHOUT_A_STUDY)
def test_the_preflight_finds_out_what_the_table_holds(
    title: str, table: Table, tmp_path: Path
) -> None:
    text, support = SEEN_WITHOUT_A_STUDY[title]
    save(tmp_path / "m.png", HALVES)
    parts = ("split", "train", "val", "train")  # of the header and of each row
    lines = [f"{line},{part}" for line, part in zip(text.splitlines(), parts, strict=True)]
    data = table("\n".join(lines), target="label", split="split")
    config = SiteConfig(name="site-1", state_dir=tmp_path / "state", data=data)
    said = [finding.text for finding in check_data(config, None)]
    assert any("3 readable images, 8x8 grey uint8 (3)" in line for line in said)
    assert any(line.startswith("train: ") and support in line for line in said)
