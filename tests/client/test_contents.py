"""One person's privacy is paid for out of one budget, whatever the files are called."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import tiny_study
from PIL import Image

from client.config import Budget, DataTable
from client.contents import KEY, PATIENTS, Intake
from client.dataset import load_site_data
from client.ledger import Ledger
from common.accounting import Event, epsilon_of
from common.charges import LEDGERS, WITHOUT_PRIVACY
from common.config import validate
from common.errors import BudgetExhausted, DataError

EVENT = Event(1.0, 0.05, 50)
CLASSES = ("no lesion", "lesion")


class Hospital:
    """A folder of images and a state folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.home = folder / "images", folder / "state"
        self.study = tiny_study()
        rng = np.random.default_rng(0)
        for patient in range(8):
            self.add(patient, rng.integers(0, 255, (32, 32), np.uint8))

    def add(self, patient: int, pixels: np.ndarray, name: str = "") -> None:
        folder = self.root / CLASSES[patient % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name or f'P{patient:02d}_0'}.png")

    def ledger(self, name: str = "xrays") -> Ledger:
        return Ledger(self.home / LEDGERS / f"{name}.jsonl", name, Budget(epsilon=20, delta=1e-5))

    def train(self, run: str, name: str = "xrays", **data: Any) -> None:
        """Charge, read, and record what was read, as a site does."""
        table = {"name": name, "format": "folder", "root": str(self.root), **data}
        config = validate({"data": table}, DataTable, source=Path("site.toml")).data
        ledger = self.ledger(name)
        ledger.debit(run, 0, EVENT, num_rounds=1)
        ledger.opened(load_site_data(config, self.study).contents)

    def digests(self) -> list[str]:
        lines = (self.home / LEDGERS / "xrays.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return [entry["digest"] for entry in entries if entry["event"] == "data"]


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path)


PATIENT = {"patient": "^(P[0-9]+)_"}


def test_files_that_are_added_keep_what_was_spent(hospital: Hospital) -> None:
    hospital.train("first", **PATIENT)
    hospital.add(8, np.full((32, 32), 7, np.uint8))
    hospital.train("second", **PATIENT)
    assert hospital.ledger().spent(1e-5) == epsilon_of([EVENT, EVENT], 1e-5)
    first, second = hospital.digests()
    assert first != second


def test_files_that_are_renamed_keep_what_was_spent_and_their_digest(hospital: Hospital) -> None:
    hospital.train("first", **PATIENT)
    for path in list(hospital.root.rglob("*.png")):
        path.rename(path.with_name(f"{path.stem}-again.png"))
    hospital.root = hospital.root.rename(hospital.root.with_name("elsewhere"))
    hospital.train("second", **PATIENT)
    assert hospital.ledger().spent(1e-5) == epsilon_of([EVENT, EVENT], 1e-5)
    assert len(hospital.digests()) == 1


def test_files_that_are_exported_again_keep_what_was_spent(hospital: Hospital) -> None:
    hospital.train("first", **PATIENT)
    for path in list(hospital.root.rglob("*.png")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".tiff"), compression="tiff_lzw")
        path.unlink()
    hospital.train("second", **PATIENT)
    assert hospital.ledger().spent(1e-5) == epsilon_of([EVENT, EVENT], 1e-5)
    assert len(hospital.digests()) == 1  # the same pixels


def test_a_second_name_for_the_same_patients_is_refused(hospital: Hospital) -> None:
    hospital.train("first", **PATIENT)
    shutil.rmtree(hospital.root / "lesion")
    hospital.add(6, np.full((32, 32), 9, np.uint8), name="P06_9")  # another image of patient 6
    with pytest.raises(DataError, match=r"'?holds patients of another.*xrays \(4\).*one data.name"):
        hospital.train("second", "a-new-name", **PATIENT)


def test_where_no_patient_is_named_the_images_tell(hospital: Hospital) -> None:
    hospital.train("first")
    for path in list(hospital.root.rglob("*.png")):
        path.rename(path.with_name(f"renamed-{path.name}"))
    with pytest.raises(DataError, match=r"xrays \(8\)"):
        hospital.train("second", "a-new-name")


def test_other_people_may_have_a_ledger_of_their_own(hospital: Hospital, tmp_path: Path) -> None:
    hospital.train("first", **PATIENT)
    for path in list(hospital.root.rglob("*.png")):
        path.rename(path.with_name(path.name.replace("P", "P1")))
    hospital.train("second", "others", **PATIENT)
    assert hospital.ledger("others").spent(1e-5) == epsilon_of([EVENT], 1e-5)


def test_no_id_of_a_patient_is_kept(hospital: Hospital) -> None:
    hospital.train("first", **PATIENT)
    for path in (hospital.home / LEDGERS).iterdir():
        assert b"P03" not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["no key", "no hashes", "neither", "rubbish"])
def test_patients_that_nobody_can_recognise_any_more_stop_the_site(
    damage: str, hospital: Hospital
) -> None:
    hospital.train("first", **PATIENT)
    folder = hospital.home / LEDGERS
    if damage == "rubbish":
        (folder / PATIENTS).write_bytes(b"rubbish" * 1000)
    if damage in ("no key", "neither"):
        (folder / KEY).unlink()
    if damage in ("no hashes", "neither"):
        (folder / PATIENTS).unlink()
    with pytest.raises(DataError, match="restore it from a backup"):
        hospital.train("second", **PATIENT)


def test_a_study_without_privacy_leaves_no_budget_at_all(hospital: Hospital) -> None:
    unbounded = Ledger(hospital.home / LEDGERS / "xrays.jsonl", "xrays", None)
    unbounded.debit("run", 0, WITHOUT_PRIVACY, num_rounds=1)
    assert unbounded.spent(1e-5) == np.inf
    with pytest.raises(BudgetExhausted, match="would bring epsilon to inf"):
        hospital.train("first", **PATIENT)


def test_changed_pixels_are_other_contents(hospital: Hospital) -> None:
    contents = []
    for value in (1, 2):
        hospital.add(0, np.full((32, 32), value, np.uint8))
        table = {"name": "x", "format": "folder", "root": str(hospital.root), **PATIENT}
        config = validate({"data": table}, DataTable, source=Path("site.toml")).data
        contents.append(load_site_data(config, hospital.study).contents)
    assert contents[0].digest != contents[1].digest
    assert contents[0].units == contents[1].units
    assert replace(contents[0], digest="") == replace(contents[1], digest="")


def test_an_image_is_the_same_in_a_study_that_repeats_its_grey_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 255, (1, 8, 8), np.uint8)
    colour = np.repeat(grey, 3, axis=0)
    units = []
    for pixels in (grey, colour):
        intake = Intake(names_patients=False)
        intake.note(pixels, np.array(1), "one")
        units.append(intake.contents().units)
    assert units[0] == units[1]
