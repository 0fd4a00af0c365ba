"""DICOM and NIfTI as hospitals have them: values, order of axes, spacing, and broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.testing import data_path
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.data import get_testdata_file
from scanner import PATIENT, frames_dataset, write_dicom, write_nifti, write_series

from client.config import CsvData, Data, DicomData, MsdData, NiftiData
from client.dataset import load_site_data
from client.readers import Case, Wanted, read_cases
from client.readers.dicom import Series, look_at_series, read_series
from client.readers.nifti import look_at_nifti, read_nifti
from common.errors import DataError
from common.study import Study

FLAT = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8))
VOLUMES = Wanted("masks", ("background", "lesion"), channels=1, size=(8, 8, 8))
THREE = Wanted("masks", ("background", "liver", "cancer"), channels=1, size=(8, 8, 8))
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)  # rows towards the back, columns towards the feet

Volume = NDArray[Any]


@pytest.fixture
def volume(rng: np.random.Generator) -> Volume:
    """Six slices of 9 x 7 pixels, no two alike."""
    return rng.integers(0, 4000, (6, 9, 7), dtype=np.int16)


def series(folder: Path) -> Series:
    return Series(tuple(sorted(folder.iterdir())), PATIENT)


def test_a_series_is_put_in_order_by_where_its_slices_lie(tmp_path: Path, volume: Volume) -> None:
    write_series(tmp_path / "ct", volume)
    assert np.array_equal(read_series(series(tmp_path / "ct"), "luminance")[0], volume)
    header = look_at_series(series(tmp_path / "ct"))
    assert header.spacing == pytest.approx((2.0, 0.5, 0.7))
    assert header.orientation == "SPL"


def test_a_sagittal_series_is_turned_like_every_other(tmp_path: Path, volume: Volume) -> None:
    write_series(tmp_path / "ct", volume, turned=SAGITTAL)
    found = read_series(series(tmp_path / "ct"), "luminance")[0]
    # Slices go towards the patient's left or right; rows from head to feet.
    assert found.shape == (9, 7, 6)
    normal = np.cross(SAGITTAL[:3], SAGITTAL[3:])
    expected = volume.transpose(1, 2, 0)[::-1]
    assert np.array_equal(found, expected if normal[0] > 0 else expected[..., ::-1])
    assert look_at_series(series(tmp_path / "ct")).spacing == pytest.approx((0.5, 0.7, 2.0))


def test_the_same_volume_as_dicom_and_as_nifti_is_the_same(tmp_path: Path, volume: Volume) -> None:
    write_series(tmp_path / "ct", volume)
    # NIfTI counts x to the right, y to the front: the other way round than rows and columns.
    affine = np.diag([-0.7, -0.5, 2.0, 1.0])
    path = write_nifti(tmp_path / "ct.nii.gz", volume.transpose(2, 1, 0), affine)
    one, other = read_series(series(tmp_path / "ct"), "luminance"), read_nifti(path, 3)
    assert np.array_equal(one, other)
    here, there = look_at_series(series(tmp_path / "ct")), look_at_nifti(path)
    assert here.spacing == pytest.approx(there.spacing)
    assert np.allclose(here.place, there.place)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "ASL", "SPL", "IRP"])
def test_every_order_of_axes_gives_one_volume(axes: str, tmp_path: Path, volume: Volume) -> None:
    usual = nibabel.Nifti1Image(volume.transpose(2, 1, 0), np.diag([0.7, 0.5, 2.0, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    nibabel.save(usual.as_reoriented(turn), tmp_path / "turned.nii")
    assert np.array_equal(read_nifti(tmp_path / "turned.nii", 3)[0], volume[:, ::-1, ::-1])
    header = look_at_nifti(tmp_path / "turned.nii")
    assert header.orientation == axes
    assert header.spacing == pytest.approx((2.0, 0.5, 0.7))


def test_real_files_are_read() -> None:
    path = Path(str(get_testdata_file("CT_small.dcm")))
    pixels = read_series(Series((path,), ""), "luminance")
    header = dcmread(path)
    expected = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    assert np.array_equal(pixels[0], expected)
    assert look_at_series(Series((path,), "")).spacing == pytest.approx((0.661468, 0.661468))
    brain = Path(data_path) / "example4d.nii.gz"
    found = read_nifti(brain, 3)
    assert found.shape == (2, 24, 96, 128)
    assert found.sum() == pytest.approx(np.asarray(nibabel.load(brain).dataobj).sum())


def read_one(path: Path, colour: str = "luminance", window: str | None = None) -> Volume:
    return read_series(Series((path,), ""), colour, window)


def test_values_are_hounsfield_units_and_bright_is_up(tmp_path: Path) -> None:
    stored = np.array([[0, 100], [1000, 4095]], np.uint16)
    ct = write_dicom(tmp_path / "ct", stored, RescaleSlope=1, RescaleIntercept=-1024)
    assert np.array_equal(read_one(ct)[0], stored - 1024.0)
    film = write_dicom(
        tmp_path / "film", stored, PhotometricInterpretation="MONOCHROME1", BitsStored=12
    )
    assert np.array_equal(read_one(film)[0], 4095 - stored.astype(int))
    twelve = write_dicom(tmp_path / "twelve", stored, BitsStored=12)
    assert read_one(twelve).dtype == np.int32  # no type of 12 bits: "dtype" will refuse it
    assert read_one(write_dicom(tmp_path / "eight", stored.astype(np.uint8))).dtype == np.uint8


def test_the_window_of_a_file_is_used_where_the_study_says_so(tmp_path: Path) -> None:
    stored = np.array([[0, 984], [1024, 1184]], np.uint16)
    how = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 160}
    path = write_dicom(tmp_path / "ct", stored, **how)
    assert np.allclose(read_one(path, window="file")[0], [[0, 0], [0.25, 1]])
    bare = write_dicom(tmp_path / "bare", stored)
    with pytest.raises(DataError, match=r"bare: names no window; give input\.window"):
        read_one(bare, window="file")


def test_colours_are_rgb_or_one_grey_value(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    path = write_dicom(tmp_path / "skin.dcm", pixels)
    assert np.array_equal(read_one(path, "rgb"), np.moveaxis(pixels, -1, 0))
    assert np.array_equal(read_one(path, "green")[0], pixels[..., 1])
    expected = np.rint(pixels @ np.array([0.299, 0.587, 0.114]))
    assert np.abs(read_one(path)[0] - expected).max() <= 1


def test_frames_lie_where_their_groups_say(tmp_path: Path, volume: Volume) -> None:
    order = [3, 0, 5, 1, 4, 2]
    frames = [
        frames_dataset(
            PlanePositionSequence=[frames_dataset(ImagePositionPatient=[0, 0, 3.0 * place])]
        )
        for place in order
    ]
    shared = frames_dataset(
        PixelMeasuresSequence=[frames_dataset(PixelSpacing=[0.5, 0.7], SliceThickness=3)],
        PlaneOrientationSequence=[frames_dataset(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelValueTransformationSequence=[
            frames_dataset(RescaleSlope=2, RescaleIntercept=-1024, RescaleType="HU")
        ],
    )
    path = write_dicom(
        tmp_path / "enhanced.dcm",
        volume[order],
        PerFrameFunctionalGroupsSequence=frames,
        SharedFunctionalGroupsSequence=[shared],
    )
    assert np.array_equal(read_one(path)[0], 2.0 * volume - 1024)
    assert look_at_series(Series((path,), "")).spacing == pytest.approx((3.0, 0.5, 0.7))


def dicom(root: Path, **more: Any) -> DicomData:
    return DicomData(name="scans", format="dicom", root=root, **more)


def test_each_frame_is_an_image_where_a_study_takes_flat_ones(
    tmp_path: Path, volume: Volume
) -> None:
    write_dicom(tmp_path / "lesion" / "cine.dcm", volume)
    write_dicom(tmp_path / "no lesion" / "still", volume[0], PatientID="another")
    (tmp_path / "lesion" / "DICOMDIR.txt").write_text("not an image")
    cases = read_cases(dicom(tmp_path), FLAT)
    assert len(cases) == 7
    assert np.array_equal(cases[3].load()[0], volume[2])
    assert cases[3].name == "lesion/cine.dcm, frame 3"
    assert {case.patient for case in cases} == {PATIENT, "another"}


def test_a_dicom_without_a_patient_is_named_and_a_pattern_helps(
    tmp_path: Path, volume: Volume
) -> None:
    write_dicom(tmp_path / "lesion" / "p17-a.dcm", volume[0], PatientID="")
    with pytest.raises(DataError, match=r"p17-a\.dcm: its header has no PatientID; set data\.pat"):
        read_cases(dicom(tmp_path), FLAT)
    (case,) = read_cases(dicom(tmp_path, patient=r"^(p\d+)"), FLAT)
    assert case.patient == "p17"


def pairs(root: Path, volume: Volume, mask: Volume, affine: Volume | None = None) -> NiftiData:
    write_nifti(root / "images" / "case-1.nii.gz", volume)
    write_nifti(root / "masks" / "case-1.nii.gz", mask, affine)
    return NiftiData(name="scans", format="nifti", layout="pairs", root=root)


def test_a_volume_and_its_mask_are_turned_together(tmp_path: Path, volume: Volume) -> None:
    (case,) = read_cases(pairs(tmp_path, volume, (volume > 2000).astype(np.uint8)), VOLUMES)
    assert case.load_mask is not None
    assert np.array_equal(case.load_mask(), (case.load()[0] > 2000).astype(np.uint8))


def test_a_series_belongs_to_the_mask_with_its_folders_name(tmp_path: Path, volume: Volume) -> None:
    write_series(tmp_path / "images" / "case-1", volume)
    mask = (volume > 2000).astype(np.uint8)
    affine = np.diag([-0.7, -0.5, 2.0, 1.0])
    write_nifti(tmp_path / "masks" / "case-1.nii.gz", mask.transpose(2, 1, 0), affine)
    (case,) = read_cases(dicom(tmp_path, layout="pairs"), VOLUMES)
    assert case.load_mask is not None
    assert np.array_equal(case.load_mask(), mask)
    assert np.array_equal(case.load()[0], volume)


def test_a_table_may_name_any_kind_of_file(tmp_path: Path, volume: Volume) -> None:
    write_series(tmp_path / "ct-1", volume)
    write_nifti(tmp_path / "ct-2.nii", volume)
    table = "image,label,who\nct-1,lesion,a\nct-2.nii,no lesion,b\n"
    (tmp_path / "scans.csv").write_text(table)
    data = CsvData(
        name="s", format="csv", root=tmp_path, table="scans.csv", target="label", patient="who"
    )
    wanted = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8, 8))
    one, other = read_cases(data, wanted)
    assert np.array_equal(one.load()[0], volume)
    assert other.load().shape == (1, 7, 9, 6)


def decathlon(root: Path, volume: Volume, **changes: Any) -> MsdData:
    labels = {"0": "background", "1": "liver", "2": "cancer"}
    listed = []
    for number in range(3):
        write_nifti(root / "imagesTr" / f"liver_{number}.nii.gz", volume + number)
        mask = (volume % 3).astype(np.uint8)
        write_nifti(root / "labelsTr" / f"liver_{number}.nii.gz", mask)
        name = f"liver_{number}.nii.gz"
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    index = {"labels": labels, "training": listed, "test": ["./imagesTs/liver_9.nii.gz"]}
    (root / "dataset.json").write_text(json.dumps({**index, **changes}))
    return MsdData(name="liver", format="msd", root=root)


def test_a_decathlon_task_is_read_by_its_list(tmp_path: Path, volume: Volume) -> None:
    cases = read_cases(decathlon(tmp_path, volume), THREE)
    assert [case.patient for case in cases] == ["liver_0", "liver_1", "liver_2"]
    assert cases[2].load_mask is not None
    assert set(np.unique(cases[2].load_mask())) == {0, 1, 2}


def study_of(make_study: Callable[..., Study], **more: Any) -> Study:
    return make_study(
        task={"kind": "segmentation", "classes": ["background", "lesion"]},
        model={"name": "unet", "channels": [4, 8], "residual_units": 0},
        input={"size": [8, 8, 8], "intensity": "window", "window": [1000, 3000], **more},
        training={"learning_rate": 0.1, "batch_size": 2, "local_steps": 1},
    )


def test_volumes_are_windowed_and_resampled_by_the_studys_constants(
    tmp_path: Path, make_study: Callable[..., Study], volume: Volume
) -> None:
    for number in range(4):
        mask = (volume > 2000).astype(np.uint8)
        affine = np.diag([2.0, 1.0, 1.0 + number, 1.0])
        write_nifti(tmp_path / "images" / f"c{number}.nii.gz", volume, affine)
        write_nifti(tmp_path / "masks" / f"c{number}.nii.gz", mask, affine)
    data: Data = NiftiData(name="scans", format="nifti", layout="pairs", root=tmp_path)
    study = study_of(make_study, spacing=[1.0, 1.0, 1.0], patches=True)
    site = load_site_data(data, study)
    parts = (site.train, site.validation, site.test)
    sizes = sorted(tuple(target.shape) for part in parts for target in part.targets)
    # Every axis is as long as it is in millimetres; what is smaller than a patch is made as large.
    assert sizes == [(8, 9, 12), (14, 9, 12), (21, 9, 12), (28, 9, 12)]
    values = np.concatenate([each.numpy().ravel() for part in parts for each in part.pixels])
    assert values.min() == 0
    assert values.max() == 1


def load_all(data: Data, wanted: Wanted) -> None:
    for case in read_cases(data, wanted):
        case.load()


def plant(name: str) -> Callable[[Callable[[Path, Volume], None]], Callable[[Path, Volume], None]]:
    def keep(function: Callable[[Path, Volume], None]) -> Callable[[Path, Volume], None]:
        PLANTED[name] = function
        return function

    return keep


PLANTED: dict[str, Callable[[Path, Volume], None]] = {}


@plant("001.dcm: cut off or damaged")
def _truncated(root: Path, volume: Volume) -> None:
    path = write_dicom(root / "lesion" / "001.dcm", volume[0])
    path.write_bytes(path.read_bytes()[:-40])


@plant("001.dcm: not a readable DICOM file")
def _no_dicom(root: Path, volume: Volume) -> None:
    path = write_dicom(root / "lesion" / "001.dcm", volume[0])
    path.write_bytes(b"PK" + path.read_bytes()[40:300])


@plant("001.dcm: no image in this file")
def _report(root: Path, volume: Volume) -> None:
    write_dicom(root / "lesion" / "001.dcm", volume[0], PixelData=None)


@plant("001.dcm: compressed as MPEG2 Main Profile / Main Level")
def _compressed(root: Path, volume: Volume) -> None:
    from pydicom.encaps import encapsulate

    path = write_dicom(root / "lesion" / "001.dcm", volume[0])
    header = dcmread(path)
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
    header.PixelData = encapsulate([bytes(40)])
    header["PixelData"].VR = "OB"
    header.save_as(path)


@pytest.mark.parametrize("expected", PLANTED)
def test_a_broken_image_is_named_with_what_is_wrong(
    expected: str, tmp_path: Path, volume: Volume
) -> None:
    PLANTED[expected](tmp_path, volume)
    with pytest.raises(DataError) as caught:
        load_all(dicom(tmp_path, patient=r"^(\d+)"), FLAT)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"ImagePositionPatient": [0.0, 0.0, 5.0]}, "one is missing or there twice"),
        ({"ImagePositionPatient": [0.0, 0.0, 33.0]}, "one is missing or there twice"),
        ({"ImageOrientationPatient": list(SAGITTAL)}, "are turned differently"),
        ({"Rows": 7, "Columns": 9}, "has slices of several sizes"),
        ({"PatientID": "another"}, "files of 2 patients"),
        ({"ImagePositionPatient": None}, "do not say where they lie"),
    ],
)
def test_a_series_with_one_wrong_slice_is_refused(
    fields: dict[str, Any], expected: str, tmp_path: Path, volume: Volume
) -> None:
    folder = write_series(tmp_path / "lesion" / "ct", volume)
    path = sorted(folder.iterdir())[2]
    header = dcmread(path)
    for name, value in fields.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    header.save_as(path)
    wanted = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8, 8))
    with pytest.raises(DataError, match=expected):
        load_all(dicom(tmp_path), wanted)


def load_mask(case: Case) -> None:
    assert case.load_mask is not None
    case.load_mask()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda mask: mask + 0.5, r"case-1\.nii\.gz: a mask holds classes; this file has fract"),
        (lambda mask: mask - 2.0, r"case-1\.nii\.gz: a mask's values are classes, from 0 to 1"),
        (lambda mask: np.stack([mask, mask], -1), r"case-1\.nii\.gz: 2 channels; a mask has one"),
        (lambda mask: np.where(mask, np.nan, 0), r"case-1\.nii\.gz: a mask holds classes"),
    ],
)
def test_a_mask_that_holds_no_classes_is_refused(
    change: Callable[[Volume], Volume], expected: str, tmp_path: Path, volume: Volume
) -> None:
    mask = change((volume > 2000).astype(np.float32)).astype(np.float32)
    (case,) = read_cases(pairs(tmp_path, volume, mask), VOLUMES)
    with pytest.raises(DataError, match=expected):
        load_mask(case)


def test_a_mask_of_another_place_in_the_patient_is_refused(tmp_path: Path, volume: Volume) -> None:
    moved = np.eye(4)
    moved[2, 3] = 30.0
    (case,) = read_cases(pairs(tmp_path, volume, volume * 0, moved), VOLUMES)
    with pytest.raises(DataError, match="lies elsewhere in the patient than"):
        load_mask(case)


def test_a_cut_off_nifti_file_is_named(tmp_path: Path, volume: Volume) -> None:
    path = write_nifti(tmp_path / "cut.nii.gz", volume)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut\.nii\.gz: (cut off or damaged|not a readable)"):
        read_nifti(path, 3)
    with pytest.raises(DataError, match=r"none\.nii: there is no such file"):
        read_nifti(tmp_path / "none.nii", 3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": {"0": "background", "1": "liver"}}, "2 labels .*, the study has 3"),
        ({"labels": {"0": "a", "2": "b", "3": "c"}}, "numbered from 0 without gaps"),
        ({"training": []}, '"training" lists no volume'),
        ({"training": [{"image": "a.nii"}]}, "entry 1 of \"training\" has no 'label'"),
        ({"training": [{"image": "../a.nii", "label": "b"}]}, r"leads out of data\.root"),
    ],
)
def test_a_wrong_decathlon_list_is_refused(
    changes: dict[str, Any], expected: str, tmp_path: Path, volume: Volume
) -> None:
    with pytest.raises(DataError, match=expected):
        read_cases(decathlon(tmp_path, volume, **changes), THREE)


def test_series_numbers_may_be_missing(tmp_path: Path, volume: Volume) -> None:
    """Then the folder says what belongs together."""
    for name in ("a", "b"):
        write_series(tmp_path / "lesion" / name, volume, SeriesInstanceUID=None)
    wanted = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8, 8))
    assert len(read_cases(dicom(tmp_path), wanted)) == 2


def test_frames_without_places_stay_in_their_order(tmp_path: Path, volume: Volume) -> None:
    path = write_dicom(tmp_path / "ct.dcm", volume, InstanceNumber=5)
    assert np.array_equal(read_one(path)[0], volume)


def test_a_window_of_a_film_is_one_of_what_is_stored(tmp_path: Path) -> None:
    stored = np.array([[500, 1000], [1250, 3095]], np.uint16)
    how = {"BitsStored": 12, "WindowCenter": 1000, "WindowWidth": 1000}
    path = write_dicom(tmp_path / "film", stored, PhotometricInterpretation="MONOCHROME1", **how)
    assert np.allclose(read_one(path, window="file")[0], [[1, 0.5], [0.25, 0]])


def test_a_slope_or_an_intercept_may_stand_alone(tmp_path: Path) -> None:
    stored = np.array([[0, 100]], np.uint16)
    slope = write_dicom(tmp_path / "slope", stored, RescaleSlope=2)
    assert read_one(slope)[0].tolist() == [[0, 200]]
    intercept = write_dicom(tmp_path / "intercept", stored, RescaleIntercept=-5)
    assert read_one(intercept)[0].tolist() == [[-5, 95]]


def test_a_film_with_a_slope_is_inverted_over_what_it_could_hold(tmp_path: Path) -> None:
    stored = np.array([[0, 255]], np.uint8)
    how = {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": 2, "RescaleIntercept": 10}
    path = write_dicom(tmp_path / "film", stored, **how)
    assert read_one(path)[0].tolist() == [[520, 10]]


def test_many_bits_keep_their_values(tmp_path: Path) -> None:
    stored = np.array([[2**31, 2**32 - 1]], np.uint32)
    assert read_one(write_dicom(tmp_path / "wide", stored))[0].tolist() == stored.tolist()
    colours = np.full((2, 2, 3), 300, np.uint16)
    path = write_dicom(tmp_path / "colours", colours, BitsStored=12)
    assert read_one(path, "rgb").max() == 300 >> 4


def test_files_named_by_numbers_are_found(tmp_path: Path, volume: Volume) -> None:
    write_dicom(tmp_path / "lesion" / "1.2.840.5", volume[0])
    (tmp_path / "lesion" / "notes.1").write_text("no image")
    (case,) = read_cases(dicom(tmp_path), FLAT)
    assert case.name == "lesion/1.2.840.5"


@pytest.mark.parametrize("kind", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_voxels_that_are_no_grey_values_are_refused(kind: Any, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "odd.nii", np.zeros((4, 4, 4), kind))
    with pytest.raises(DataError, match=r"odd\.nii: voxels of type"):
        read_nifti(path, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"PixelSpacing": [0.5]},
        {"ImagePositionPatient": [0.0, 1.0]},
        {"ImageOrientationPatient": [1.0, 0.0, 0.0]},
        {"PixelSpacing": [0.0, 0.0]},
        {"Rows": None},
    ],
)
def test_a_header_that_makes_no_sense_is_one_line_without_its_values(
    fields: dict[str, Any], tmp_path: Path, volume: Volume
) -> None:
    folder = write_series(tmp_path / "lesion" / "ct", volume, **fields)
    wanted = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8, 8, 8))
    (case,) = read_cases(dicom(tmp_path), wanted)
    assert case.look is not None
    with pytest.raises(DataError, match=r"ct: a field of its header cannot be used .*export it"):
        case.look()
    assert folder.is_dir()


def test_a_patient_of_a_header_counts_in_a_table_too(tmp_path: Path, volume: Volume) -> None:
    for name in ("a.dcm", "b.dcm"):
        write_dicom(tmp_path / name, volume[0], PatientID="one")
    (tmp_path / "scans.csv").write_text("image,label\na.dcm,lesion\nb.dcm,lesion\n")
    data = CsvData(name="s", format="csv", root=tmp_path, table="scans.csv", target="label")
    assert [case.patient for case in read_cases(data, FLAT)] == ["one", "one"]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_broken_header_is_one_image_that_may_be_skipped(
    dims: int, tmp_path: Path, volume: Volume
) -> None:
    for number in range(3):
        write_dicom(tmp_path / "lesion" / f"{number}.dcm", volume[number], PatientID=f"p{number}")
    (tmp_path / "lesion" / "1.dcm").write_bytes(b"no image")
    wanted = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(8,) * dims)
    cases = read_cases(dicom(tmp_path), wanted)
    assert len(cases) == len({case.patient for case in cases}) == 3
    faults = []
    for case in cases:
        try:
            case.load()
        except DataError as error:
            faults.append(str(error))
    assert len(faults) == 1
    assert faults[0].startswith("1.dcm: not a readable DICOM file")
