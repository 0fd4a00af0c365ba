"""A copy of a data set in which nobody can be found, and which is read as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nibabel import load
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from scanner import BIRTH, NAME, PATIENT, frames_dataset, write_dicom, write_nifti, write_series

from client.config import DicomData, FolderData, NiftiData
from client.deidentify import deidentify
from client.readers import Wanted, read_cases
from common.errors import ConfigError, DataError

FLAT = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8))
VOLUMES = Wanted("masks", ("background", "lesion"), channels=1, size=(8, 8, 8))
SECRETS = (NAME, NAME.split("^", maxsplit=1)[0], BIRTH, PATIENT, "Elsewhere", "Wilhelmina")

Volume = NDArray[Any]


@pytest.fixture
def volume(rng: np.random.Generator) -> Volume:
    return rng.integers(0, 4000, (6, 9, 7), dtype=np.int16)


def dicom(root: Path, **more: Any) -> DicomData:
    return DicomData(name="scans", format="dicom", root=root, **more)


def everything(folder: Path) -> bytes:
    """All bytes of all files and their names."""
    return b"".join(
        str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    )


def hide(folder: Path, volume: Volume) -> None:
    """Identifiers in every place that a file has for them."""
    private = frames_dataset(PatientName=NAME, ReferringPhysicianName=NAME)
    write_series(
        folder / "train" / "lesion" / "Grauer_Wilhelmina",
        volume,
        StudyDescription=f"for {NAME}",
        WindowCenterWidthExplanation=f"as {NAME} likes it",
        WindowCenter=40,
        WindowWidth=400,
        RequestAttributesSequence=[private],
        AccessionNumber=PATIENT,
        StudyDate=BIRTH,
    )
    path = write_dicom(folder / "test" / "lesion" / f"{PATIENT}.dcm", volume[0])
    header = dcmread(path)
    header.add_new(0x00111001, "LO", NAME)
    header.save_as(path)
    write_dicom(folder / "train" / "lesion" / "burned.dcm", volume[1], BurnedInAnnotation="YES")


def test_no_identifier_is_left_in_a_copy(tmp_path: Path, volume: Volume) -> None:
    hide(tmp_path / "scans", volume)
    before = everything(tmp_path / "scans")
    assert all(secret.encode() in before for secret in SECRETS)
    copied = deidentify(dicom(tmp_path / "scans"), tmp_path / "copy")
    assert (copied.files, copied.left_out) == (7, 1)
    after = everything(tmp_path / "copy")
    assert [secret for secret in SECRETS if secret.encode() in after] == []
    assert everything(tmp_path / "scans") == before


def test_a_copy_is_read_like_the_original(tmp_path: Path, volume: Volume) -> None:
    hide(tmp_path / "scans", volume)
    wanted = Wanted("multiclass", ("lesion", "a", "b"), channels=1, size=(8, 8, 8))
    deidentify(dicom(tmp_path / "scans"), tmp_path / "copy")
    old = [c for c in read_cases(dicom(tmp_path / "scans"), wanted) if "burned" not in c.name]
    new = read_cases(dicom(tmp_path / "copy"), wanted)
    assert [case.split for case in new] == [case.split for case in old]
    for one, other in zip(old, new, strict=True):
        assert np.array_equal(one.load(), other.load())
        assert one.look is not None
        assert other.look is not None
        assert one.look().spacing == other.look().spacing
        assert other.look().identifiers == ()
    # One person is one person in the copy, under another name.
    assert len({case.patient for case in new}) == 1
    assert new[0].patient != PATIENT


def test_frames_keep_their_places_and_lose_their_texts(tmp_path: Path, volume: Volume) -> None:
    frames = [
        frames_dataset(
            PlanePositionSequence=[frames_dataset(ImagePositionPatient=[0, 0, 3.0 * place])],
            FrameContentSequence=[frames_dataset(FrameComments=NAME)],
        )
        for place in range(6)
    ]
    shared = frames_dataset(
        PixelMeasuresSequence=[frames_dataset(PixelSpacing=[0.5, 0.7], SliceThickness=3)]
    )
    groups = {
        "PerFrameFunctionalGroupsSequence": frames,
        "SharedFunctionalGroupsSequence": [shared],
    }
    write_dicom(tmp_path / "scans" / "lesion" / "ct.dcm", volume, **groups)
    deidentify(dicom(tmp_path / "scans"), tmp_path / "copy")
    assert NAME.encode() not in everything(tmp_path / "copy")
    wanted = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8, 8))
    (case,) = read_cases(dicom(tmp_path / "copy"), wanted)
    assert case.look is not None
    assert case.look().spacing == pytest.approx((3.0, 0.5, 0.7))
    assert np.array_equal(case.load()[0], volume)


def test_nifti_texts_go_and_pairs_stay_pairs(tmp_path: Path, volume: Volume) -> None:
    root, name = tmp_path / "scans", f"{NAME}.nii.gz"
    write_nifti(root / "images" / name, volume, texts={"descrip": b"of Wilhelmina Grauer"})
    write_nifti(root / "masks" / name, (volume > 9).astype(np.uint8))
    data = NiftiData(name="scans", format="nifti", layout="pairs", root=root)
    assert deidentify(data, tmp_path / "copy").files == 2
    (case,) = read_cases(data.model_copy(update={"root": tmp_path / "copy"}), VOLUMES)
    (old,) = read_cases(data, VOLUMES)
    assert case.load_mask is not None
    assert np.array_equal(case.load(), old.load())
    assert np.array_equal(case.load_mask(), (case.load()[0] > 9).astype(np.uint8))
    image = load(tmp_path / "copy" / case.name)
    assert not bytes(image.header["descrip"].tobytes()).strip(b"\0")


def test_a_masks_own_texts_go_too(tmp_path: Path, volume: Volume) -> None:
    write_dicom(tmp_path / "scans" / "images" / "a.dcm", volume[0])
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("Author", NAME)
    path = tmp_path / "scans" / "masks" / "a.png"
    path.parent.mkdir()
    Image.fromarray((volume[0] > 2000).astype(np.uint8)).save(path, pnginfo=texts)
    deidentify(dicom(tmp_path / "scans", layout="pairs"), tmp_path / "copy")
    assert NAME.encode() not in everything(tmp_path / "copy")
    wanted = Wanted("masks", ("background", "lesion"), channels=1, size=(8, 8))
    (case,) = read_cases(dicom(tmp_path / "copy", layout="pairs"), wanted)
    assert case.load_mask is not None
    assert np.array_equal(case.load_mask(), volume[0] > 2000)


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path: Path, volume: Volume) -> None:
    scans = tmp_path / "scans"
    write_dicom(scans / "lesion" / "a.dcm", volume[0])
    with pytest.raises(ConfigError, match="give a new folder, outside of"):
        deidentify(dicom(scans), scans / "copy")
    with pytest.raises(ConfigError, match="give a new folder, outside of"):
        deidentify(dicom(scans), tmp_path)
    (scans / "lesion" / "b.dcm").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.dcm: not a readable DICOM file"):
        deidentify(dicom(scans), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    pictures = FolderData(name="scans", format="folder", root=scans)
    with pytest.raises(ConfigError, match="such files have no header to clean"):
        deidentify(pictures, tmp_path / "copy")


def test_nothing_hides_in_a_group_or_in_a_field_of_words(tmp_path: Path, volume: Volume) -> None:
    group = frames_dataset(PixelSpacing=[1, 1])
    group.add_new(0x00291010, "OB", NAME.encode())
    path = write_dicom(
        tmp_path / "scans" / "lesion" / "a.dcm",
        volume,
        SharedFunctionalGroupsSequence=[frames_dataset(PixelMeasuresSequence=[group])],
        BodyPartExamined="WILHELMINA",
        ImageType=["ORIGINAL", "WILHELMINA"],
        ViewPosition="WILHELMINA",
        PixelDataProviderURL=f"http://pacs/{PATIENT}",
    )
    assert b"WILHELMINA" in path.read_bytes()
    deidentify(dicom(tmp_path / "scans"), tmp_path / "copy")
    after = everything(tmp_path / "copy")
    assert [s for s in (*SECRETS, "WILHELMINA") if s.encode() in after] == []


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_voxels_of_a_copy_are_the_same_bytes(ending: str, tmp_path: Path, volume: Volume) -> None:
    import nibabel

    path = tmp_path / "scans" / "lesion" / f"a{ending}"
    path.parent.mkdir(parents=True)
    image = nibabel.Nifti1Image(volume, np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", NAME.encode()))
    image.header["data_type"] = b"Grauer"
    image.header.set_slope_inter(2.5, -7.3)
    nibabel.save(image, path)
    data = NiftiData(name="scans", format="nifti", root=tmp_path / "scans")
    deidentify(data, tmp_path / "copy")
    (copy,) = [p for p in (tmp_path / "copy").rglob("*") if p.is_file()]
    one, other = load(path), load(copy)
    assert np.array_equal(one.dataobj.get_unscaled(), other.dataobj.get_unscaled())
    assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
    assert not bytes(other.header["data_type"].tobytes()).strip(b"\0")
    assert len(one.header.extensions) == 1
    assert len(other.header.extensions) == 0


def test_an_ending_in_capitals_does_not_part_a_pair(tmp_path: Path, volume: Volume) -> None:
    write_dicom(tmp_path / "scans" / "images" / "S.DCM", volume[0])
    path = tmp_path / "scans" / "masks" / "S.png"
    path.parent.mkdir()
    Image.fromarray((volume[0] > 2000).astype(np.uint8)).save(path)
    deidentify(dicom(tmp_path / "scans", layout="pairs"), tmp_path / "copy")
    wanted = Wanted("masks", ("background", "lesion"), channels=1, size=(8, 8))
    assert len(read_cases(dicom(tmp_path / "copy", layout="pairs"), wanted)) == 1


def test_what_cannot_be_copied_is_named(tmp_path: Path, volume: Volume) -> None:
    write_dicom(tmp_path / "scans" / "images" / "a.dcm", volume[0])
    (tmp_path / "scans" / "masks").mkdir()
    (tmp_path / "scans" / "masks" / "a.png").write_text("no picture")
    with pytest.raises(DataError, match=r"a\.png: cannot be copied .*take it out"):
        deidentify(dicom(tmp_path / "scans", layout="pairs"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
