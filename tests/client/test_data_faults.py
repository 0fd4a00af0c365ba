"""Planted faults in a site's data: each is one line that names the file and what helps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import CLASSES as CELLS
from cells import annotation, write_smears
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate
from scanner import BIRTH, NAME, PATIENT, write_dicom, write_nifti, write_series

from client.check import check
from client.config import SiteConfig
from client.data_check import check_data
from client.finding import Finding
from common.config import validate
from common.study import Study

CLASSES = {"classes": ["no lesion", "lesion"]}
MASKS = {"kind": "segmentation", "classes": ["background", "liver", "cancer"]}
NUM = 40  # images or tables' rows; a volume costs more
SECRETS = (NAME, NAME.split("^", maxsplit=1)[0], BIRTH, PATIENT)


@dataclass
class World:
    """A sound data set of one kind, and what reads it."""

    root: Path
    data: dict[str, Any]
    task: dict[str, Any]
    size: tuple[int, ...]
    spacing: list[float] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: {"name": "unet", "channels": [4, 8]})
    training: dict[str, Any] = field(default_factory=dict)
    table: dict[str, Any] = field(default_factory=dict)

    def config(self) -> SiteConfig:
        data = {"name": "scans", "root": str(self.root), "declared_patients": 20, **self.data}
        table = {"name": "north", "state_dir": str(self.root.parent / "state"), "data": data}
        return validate(table, SiteConfig, source=self.root.parent / "site.toml")

    def study(self) -> Study:
        is_flat = "kind" not in self.task
        table = {
            "name": "planned",
            "num_rounds": 2,
            "task": {"kind": "classification", **self.task} if is_flat else self.task,
            "model": {"name": "cnn"} if is_flat and not self.table else self.model,
            **({"table": self.table} if self.table else {}),
            "input": {
                "size": list(self.size),
                "intensity": "image",
                **({"spacing": self.spacing} if self.spacing else {}),
                **self.more,
            },
            "training": {"learning_rate": 0.1, "batch_size": 4, "local_epochs": 1, **self.training},
            "privacy": {"mode": "none"},
        }
        return validate(table, Study, source=Path("planned.toml"))

    def findings(self) -> list[Finding]:
        return list(check_data(self.config(), self.study()))


def pixels_of(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (12, 10), dtype=np.uint8)


def dicom_world(root: Path) -> World:
    for number in range(NUM):
        name = CLASSES["classes"][number % 2]
        write_dicom(
            root / name / f"i{number:02d}.dcm",
            pixels_of(number),
            PatientID=f"p{number}",
            PixelSpacing=[0.5, 0.5],
        )
    return World(root, {"format": "dicom"}, CLASSES, (12, 10))


def volume_of(number: int) -> NDArray[np.int16]:
    return np.random.default_rng(number).integers(0, 999, (10, 9, 8)).astype(np.int16)


def mask_of(number: int) -> NDArray[np.uint8]:
    return (volume_of(number) % 3).astype(np.uint8)


def nifti_world(root: Path) -> World:
    for number in range(NUM):
        write_nifti(root / "images" / f"c{number:02d}.nii", volume_of(number))
        write_nifti(root / "masks" / f"c{number:02d}.nii", mask_of(number))
    return World(root, {"format": "nifti", "layout": "pairs"}, MASKS, (8, 8, 8))


def csv_world(root: Path) -> World:
    root.mkdir(parents=True)
    rows = ["image,label,who,part"]
    for number in range(NUM):
        Image.fromarray(pixels_of(number)).save(root / f"i{number:02d}.png")
        label = CLASSES["classes"][number % 2]
        part = "test" if number < 10 else "val" if number < 16 else "train"
        rows.append(f"i{number:02d}.png,{label},p{number},{part}")
    (root / "scans.csv").write_text("\n".join(rows) + "\n")
    columns = {"target": "label", "patient": "who", "split": "part"}
    return World(root, {"format": "csv", "table": "scans.csv", **columns}, CLASSES, (12, 10))


def msd_world(root: Path) -> World:
    listed = []
    for number in range(NUM):
        write_nifti(root / "imagesTr" / f"c{number:02d}.nii", volume_of(number))
        write_nifti(root / "labelsTr" / f"c{number:02d}.nii", mask_of(number))
        listed.append({key: f"{key}sTr/c{number:02d}.nii" for key in ("image", "label")})
    labels = dict(enumerate(MASKS["classes"]))
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": listed}))
    return World(root, {"format": "msd"}, MASKS, (8, 8, 8))


def npz_world(root: Path) -> World:
    root.mkdir(parents=True)
    arrays: dict[str, NDArray[Any]] = {}
    for split, low, num in (("train", 0, 24), ("val", 24, 8), ("test", 32, 8)):
        arrays[f"{split}_images"] = np.stack([pixels_of(k) for k in range(low, low + num)])
        arrays[f"{split}_labels"] = (np.arange(num) % 2)[:, None].astype(np.uint8)
    np.savez(root / "scans.npz", **arrays)
    return World(root, {"format": "npz"}, CLASSES, (12, 10))


def voc_world(root: Path) -> World:
    write_smears(root, NUM)
    return World(
        root,
        {"format": "voc"},
        {"kind": "detection", "classes": list(CELLS), "max_boxes": 4},
        (48, 64),
        model={"name": "center-unet"},
        training={"loss": {"kind": "focal"}},
    )


def clinical_world(root: Path) -> World:
    root.mkdir(parents=True)
    rows = ["age,sex,crp,seen,label,part"]
    for number in range(NUM):
        label = CLASSES["classes"][number % 2]
        part = "test" if number < 10 else "val" if number < 16 else "train"
        day = f"2021-{1 + number % 12:02d}-{1 + number % 28:02d}"
        rows.append(f"{40 + number},{'fm'[number % 3 // 2]},{number / 2},{day},{label},{part}")
    (root / "scans.csv").write_text("\n".join(rows) + "\n")
    columns = [
        {"name": "age", "kind": "number", "low": 0, "high": 120},
        {"name": "sex", "kind": "category", "values": ["f", "m"]},
        {"name": "crp", "kind": "number"},
        {"name": "seen", "kind": "date", "origin": "2020-01-01"},
    ]
    data = {"format": "csv", "table": "scans.csv", "target": "label", "split": "part"}
    table = {"columns": columns, "missing": "indicator"}
    return World(root, data, CLASSES, (), model={"name": "logistic"}, table=table)


WORLDS = {
    "clinical": clinical_world,
    "dicom": dicom_world,
    "nifti": nifti_world,
    "csv": csv_world,
    "msd": msd_world,
    "npz": npz_world,
    "voc": voc_world,
}
Plant = Callable[[World], None]


def lines(world: World) -> list[str]:
    return (world.root / "scans.csv").read_text().splitlines()


def rewrite(world: World, text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    (world.root / "scans.csv").write_bytes(content)


def change(world: World, old: str, new: str) -> None:
    text = (world.root / "scans.csv").read_text()
    assert old in text
    rewrite(world, text.replace(old, new, 1))


def edit(name: str, **fields: Any) -> Plant:
    def do(world: World) -> None:
        path = world.root / name
        header = dcmread(path)
        for keyword, value in fields.items():
            setattr(header, keyword, value)
        header.save_as(path)

    return do


def cut(name: str, keep: float = 0.6) -> Plant:
    def do(world: World) -> None:
        path = world.root / name
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])

    return do


def put(name: str, values: NDArray[Any], affine: NDArray[Any] | None = None) -> Plant:
    return lambda world: void(write_nifti(world.root / name, values, affine))


def void(_: object) -> None:
    """Nothing."""


def remove(name: str) -> Plant:
    def do(world: World) -> None:
        path = world.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def compress(world: World) -> None:
    path = world.root / "lesion" / "i05.dcm"
    header = dcmread(path)
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
    header.PixelData = encapsulate([bytes(40)])
    header["PixelData"].VR = "OB"
    header.save_as(path)


def with_nan(world: World) -> None:
    volume = volume_of(3).astype(np.float32)
    volume[2, 2, 2] = np.nan
    write_nifti(world.root / "images" / "c03.nii", volume)


def flatten(world: World) -> None:
    """The third row of the affine, bytes 312 to 328 of the header, says nothing."""
    path = world.root / "images" / "c03.nii"
    content = path.read_bytes()
    path.write_bytes(content[:312] + bytes(16) + content[328:])


def both(world: World, affine: NDArray[np.float64]) -> None:
    write_nifti(world.root / "images" / "c03.nii", volume_of(3), affine)
    write_nifti(world.root / "masks" / "c03.nii", mask_of(3), affine)


def turn(world: World) -> None:
    both(world, np.diag([-1.0, -1.0, 1.0, 1.0]))


def resample(world: World) -> None:
    world.spacing = [1.0, 1.0, 1.0]
    both(world, np.diag([2.0, 1.0, 1.0, 1.0]))


def annotate(*boxes: list[Any]) -> Plant:
    return lambda world: void(
        (world.root / "Annotations" / "s20.xml").write_text(annotation(list(boxes)))
    )


def forget_crp(world: World) -> None:
    header, *rows = [line.split(",") for line in lines(world)]
    rows = [[*row[:2], "" if k % 4 else row[2], *row[3:]] for k, row in enumerate(rows)]
    rewrite(world, "\n".join(",".join(row) for row in [header, *rows]))


def three_dates(world: World) -> None:
    change(world, "2021-08-08", "08.08.2021")
    change(world, "2021-09-09", "9/9/2021")


def list_twice(world: World) -> None:
    with (world.root / "ImageSets/Main/test.txt").open("a") as file:
        file.write("s20\n")


def empty(world: World) -> None:
    for path in world.root.iterdir():
        shutil.rmtree(path)


def without_lesions(world: World) -> None:
    for number in range(17, NUM, 2):
        change(world, f"i{number:02d}.png,lesion", f"i{number:02d}.png,no lesion")


def copy_across(world: World) -> None:
    shutil.copy(world.root / "i00.png", world.root / "i30.png")


def index(world: World, **changes: Any) -> None:
    path = world.root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def arrays(world: World, **changes: Any) -> None:
    path = world.root / "scans.npz"
    with np.load(path) as file:
        kept = dict(file)
    for name, value in changes.items():
        kept[name] = value(kept[name])
    np.savez(path, **kept)


FAULTS: dict[str, tuple[str, Plant, str]] = {
    # DICOM
    "a truncated image": (
        "dicom",
        cut("lesion/i05.dcm", 0.97),
        r"FAULT .*i05\.dcm: (cut off or damaged|not a readable DICOM).*(repair|remove)",
    ),
    "an empty file": ("dicom", cut("lesion/i05.dcm", 0), r"FAULT .*i05\.dcm: not a readable DICOM"),
    "a codec that nobody has": (
        "dicom",
        compress,
        r"FAULT .*i05\.dcm: compressed as MPEG2 .* export it uncompressed",
    ),
    "a report among the images": (
        "dicom",
        lambda world: void(
            write_dicom(world.root / "lesion" / "r.dcm", pixels_of(1), PixelData=None)
        ),
        r"FAULT .*r\.dcm: no image in this file.*take it out",
    ),
    "no patient in a header": (
        "dicom",
        edit("lesion/i05.dcm", PatientID=""),
        r"FAULT .*i05\.dcm: its header has no PatientID; set data\.patient",
    ),
    "two spacings": (
        "dicom",
        edit("lesion/i05.dcm", PixelSpacing=[0.9, 0.9]),
        r"warning .*spacing: 0\.5 x 0\.5 mm \(39\), 0\.9 x 0\.9 mm \(1\).*input\.spacing",
    ),
    "no image of a class": (
        "dicom",
        remove("lesion"),
        r"FAULT .*no image of class 'lesion'.*correct the labels or data\.root",
    ),
    "a folder that is no class": (
        "dicom",
        lambda world: (world.root / "unsure").mkdir(),
        r"FAULT .*folder 'unsure' is not a class of the study",
    ),
    "colours in a grey study": (
        "dicom",
        lambda world: void(
            write_dicom(
                world.root / "lesion" / "i05.dcm",
                np.zeros((12, 10, 3), np.uint8),
                PatientID="p5",
                BurnedInAnnotation="YES",
            )
        ),
        r"warning .*BurnedInAnnotation \(1\)",
    ),
    "fields that name people": (
        "dicom",
        edit("lesion/i05.dcm", OtherPatientIDs="1234", PatientComments="calls every day"),
        (
            r"warning .*OtherPatientIDs \(1\), PatientBirthDate \(40\), PatientComments \(1\)"
            r".*--deidentified"
        ),
    ),
    "an empty data folder": (
        "dicom",
        empty,
        r"FAULT .*no DICOM file in any class folder",
    ),
    "no data folder": ("dicom", remove(""), r"FAULT .*not a folder; set data\.root"),
    # NIfTI
    "a voxel that is no number": (
        "nifti",
        with_nan,
        r"FAULT .*c03\.nii: some grey values are not finite",
    ),
    "a mask of another size": (
        "nifti",
        put("masks/c03.nii", mask_of(3)[:-1]),
        r"FAULT .*c03\.nii: its mask has 8x9x9 pixels, the image 8x9x10",
    ),
    "label 7 of 3": (
        "nifti",
        put("masks/c03.nii", np.where(mask_of(3) == 2, 7, mask_of(3)).astype(np.uint8)),
        r"FAULT .*c03\.nii: its mask holds 7, the study's classes are 0 to 2",
    ),
    "a negative label": (
        "nifti",
        put("masks/c03.nii", mask_of(3).astype(np.int16) - 1),
        r"FAULT .*c03\.nii: a mask's values are classes, from 0 to 2",
    ),
    "half a label": (
        "nifti",
        put("masks/c03.nii", mask_of(3).astype(np.float32) / 2),
        r"FAULT .*c03\.nii: a mask holds classes; this file has fractions",
    ),
    "a mask of another place": (
        "nifti",
        put("masks/c03.nii", mask_of(3), np.diag([1.0, 1.0, 1.0, 1.0]) + 9 * np.eye(4, k=3)),
        r"FAULT .*c03\.nii: lies elsewhere in the patient.*resample the mask",
    ),
    "no mask": ("nifti", remove("masks/c03.nii"), r"FAULT .*c03\.nii: no file with this stem in"),
    "no masks at all": ("nifti", remove("masks"), r"FAULT .*masks: not a folder; set data\.masks"),
    "two files with one stem": (
        "nifti",
        put("masks/more/c03.nii.gz", mask_of(3)),
        r"FAULT .*c03\.nii and c03\.nii\.gz have one stem",
    ),
    "a cut-off volume": (
        "nifti",
        cut("images/c03.nii"),
        r"FAULT .*c03\.nii: cut off or damaged.*copy it again",
    ),
    "a volume that is none": (
        "nifti",
        lambda world: void((world.root / "images" / "c03.nii").write_text("<html>no access")),
        r"FAULT .*c03\.nii: not a readable NIfTI file",
    ),
    "a header without a place": (
        "nifti",
        flatten,
        r"FAULT .*c03\.nii: its header gives no usable place and spacing; export it again",
    ),
    "several orientations": (
        "nifti",
        turn,
        r"ok .*orientation of the files' axes: RAS \(39\), LPS \(1\); all are turned the same way",
    ),
    "spacings in a study that resamples": (
        "nifti",
        resample,
        r"ok .*spacing: 1 x 1 x 1 mm \(39\), 1 x 1 x 2 mm \(1\); the study resamples to 1 x 1 x 1",
    ),
    # Tables
    "a table in Latin-1": (
        "csv",
        lambda world: rewrite(
            world, "\n".join(lines(world)).replace("who", "wär").encode("latin-1")
        ),
        r"FAULT .*scans\.csv: byte \d+ is not UTF-8.*CSV UTF-8",
    ),
    "a column that is gone": (
        "csv",
        lambda world: change(world, "who", "whom"),
        r"FAULT .*scans\.csv: no column 'who' in its first line, which has 4 cells; is it 'whom'\?",
    ),
    "a label outside the schema": (
        "csv",
        lambda world: change(world, "i05.png,lesion", "i05.png,tumour"),
        r"FAULT .*scans\.csv, line 7: column 'label' holds no class of the study: no",
    ),
    "an image that is not there": (
        "csv",
        remove("i05.png"),
        r"FAULT .*i05\.png: there is no such file in",
    ),
    "an image cut off": ("csv", cut("i05.png", 0.5), r"FAULT .*i05\.png: not a readable image"),
    "an empty cell": (
        "csv",
        lambda world: change(world, ",p5,", ",,"),
        r"FAULT .*scans\.csv, line 7: column 'who' is empty",
    ),
    "a row too short": (
        "csv",
        lambda world: change(world, ",p5,test", ",p5"),
        r"FAULT .*scans\.csv, line 7: not 4 cells as in the header",
    ),
    "one patient in train and test": (
        "csv",
        lambda world: change(world, "p30,train", "p0,train"),
        r"FAULT .*1 patient\(s\) are in two of the data set's own splits; mend them",
    ),
    "one image in train and test": (
        "csv",
        copy_across,
        r"warning .*1 images are in two splits under two names: .*line 2 = .*line 32; .*take one",
    ),
    "a split that is none": (
        "csv",
        lambda world: change(world, "p5,test", "p5,later"),
        r"FAULT .*scans\.csv, line 7: column 'part' is none of train, val, test",
    ),
    "few of a class": (
        "csv",
        without_lesions,
        r"warning .*train: fewer than 10 images of lesion 0",
    ),
    # Decathlon
    "other classes than the study's": (
        "msd",
        lambda world: index(world, labels={"0": "background", "1": "liver"}),
        r"FAULT .*2 labels \(background, liver\), the study has 3",
    ),
    "a list that leads elsewhere": (
        "msd",
        lambda world: index(world, training=[{"image": "/etc/passwd", "label": "x"}]),
        r'FAULT .*entry 1 of "training" leads out of data\.root',
    ),
    "a list that is broken": (
        "msd",
        cut("dataset.json"),
        r"FAULT .*dataset\.json: not a readable list",
    ),
    # npz
    "labels for other images": (
        "npz",
        lambda world: arrays(world, train_labels=lambda labels: labels[:-1]),
        r"FAULT .*scans\.npz: train_labels is missing or not as long as train_images; correct",
    ),
    "a class that the study has not": (
        "npz",
        lambda world: arrays(world, train_labels=lambda labels: labels + 1),
        r"FAULT .*label",
    ),
    "an archive cut off": ("npz", cut("scans.npz"), r"FAULT .*scans\.npz"),
    # clinical columns
    "dates in three forms": (
        "clinical",
        three_dates,
        r"FAULT .*2 unreadable: scans\.csv, line 9: column 'seen' holds no date of the form",
    ),
    "numbers with a comma": (
        "clinical",
        lambda world: change(world, "47,f,3.5,", '47,f,"3,5",'),
        r"FAULT .*line 9: column 'crp' holds no number; .* set data\.decimal",
    ),
    "months where years were meant": (
        "clinical",
        lambda world: change(world, "47,f,", "564,f,"),
        r"FAULT .*line 9: column 'age' is outside the study's range, .* another unit",
    ),
    "a value that the study has not": (
        "clinical",
        lambda world: change(world, "47,f,", "47,female,"),
        r"FAULT .*line 9: column 'sex' holds none of the study's values: f, m",
    ),
    "a clinical column that is gone": (
        "clinical",
        lambda world: change(world, "age,sex,crp", "age,sex,CRP"),
        r"FAULT .*no column 'crp', which the study reads; add it",
    ),
    "a column that is mostly empty": (
        "clinical",
        forget_crp,
        r"warning +column 'crp': 30 of 40 cells are empty; is it the right column\?",
    ),
    # voc
    "an annotation cut off": (
        "voc",
        cut("Annotations/s20.xml"),
        r"FAULT .*s20\.xml: not a readable annotation",
    ),
    "an annotation with entities": (
        "voc",
        lambda world: void(
            (world.root / "Annotations/s20.xml").write_text("<!DOCTYPE a [<!ENTITY b 'c'>]><a/>")
        ),
        r"FAULT .*s20\.xml: not a Pascal VOC annotation; export it again",
    ),
    "an image without an annotation": (
        "voc",
        remove("Annotations/s20.xml"),
        r"FAULT .*s20\.png: no annotation in Annotations",
    ),
    "an annotation without an image": (
        "voc",
        remove("JPEGImages/s20.png"),
        r"FAULT .*s20\.xml: no image with this stem in JPEGImages",
    ),
    "a class of boxes that the study has not": (
        "voc",
        annotate(["nucleus", 3, 3, 20, 20]),
        r"FAULT .*s20\.xml: 'nucleus' is not a class of the study: bright, dark",
    ),
    "a box beyond the image": (
        "voc",
        annotate(["dark", 3, 3, 70, 20]),
        r"FAULT .*s20\.png: a box reaches beyond the image's 64x48 pixels",
    ),
    "a box of no size": (
        "voc",
        annotate(["dark", 3, 3, 20, 20], ["dark", 30, 3, 30, 3]),
        r"warning +boxes at most one pixel wide or high: 1; they are left out",
    ),
    "more boxes than the study takes": (
        "voc",
        annotate(*[["dark", 3, 3, 20 + k, 20] for k in range(5)]),
        r"FAULT .*s20\.png: 5 boxes, task\.max_boxes in the study is 4",
    ),
    "a side that is no number": (
        "voc",
        annotate(["dark", "a few", 3, 30, 20]),
        r"FAULT .*s20\.xml: a side of a box is no number",
    ),
    "a box without a side": (
        "voc",
        annotate(["dark", "", 3, 30, 20]),
        r"FAULT .*s20\.xml: an object without bndbox/xmin",
    ),
    "an image in two lists": (
        "voc",
        list_twice,
        r"FAULT .*(train|test)\.txt, line \d+: this image is in two splits",
    ),
    "a list of what is not there": (
        "voc",
        lambda world: void((world.root / "ImageSets/Main/val.txt").write_text("s99\n")),
        r"FAULT .*val\.txt, line 1: no annotation with this stem",
    ),
}


@pytest.mark.parametrize("kind", WORLDS)
def test_sound_data_have_no_fault(kind: str, tmp_path: Path) -> None:
    found = WORLDS[kind](tmp_path / "scans").findings()
    assert [str(finding) for finding in found if finding.level == "FAULT"] == []


@pytest.mark.parametrize("title", FAULTS)
def test_a_planted_fault_is_one_line_with_file_and_remedy(title: str, tmp_path: Path) -> None:
    kind, plant, expected = FAULTS[title]
    world = WORLDS[kind](tmp_path / "scans")
    before = {str(finding) for finding in world.findings()}
    plant(world)
    after = [str(finding) for finding in world.findings()]
    new = [line for line in after if line not in before]
    matching = [line for line in new if re.search(f"^{expected}", line)]
    assert len(matching) == 1, after
    assert "\n" not in matching[0]
    assert not [line for line in new if line.startswith("FAULT") and line != matching[0]], new
    assert not [line for line in after if any(secret in line for secret in SECRETS)]


def test_there_are_forty_of_them() -> None:
    assert len(FAULTS) >= 40


def test_no_identifier_is_in_what_the_check_says_and_writes(tmp_path: Path) -> None:
    world = dicom_world(tmp_path / "scans")
    for path in sorted(world.root.rglob("*.dcm")):
        header = dcmread(path)
        header.PatientID, header.StudyDescription = PATIENT, f"for {NAME}"
        header.save_as(path)
    write_series(world.root / "lesion" / "more", np.stack([pixels_of(90), pixels_of(91)]))
    config = world.config()
    said = [str(finding) for finding in check(config, offline=True)]
    card = (config.state_dir / "data-card.md").read_text()
    assert "PatientName (41)" in card
    written = b"".join(p.read_bytes() for p in config.state_dir.rglob("*") if p.is_file())
    everything = "\n".join(said).encode() + written
    assert [secret for secret in SECRETS if secret.encode() in everything] == []
