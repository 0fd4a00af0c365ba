"""A copy of a data set without what names a person: only fields that an image needs are kept.

Fields are kept by a list and everything else is left out, private fields and free text too: what
nobody thought of is then missing and not published. Ids become pseudonyms under a key that is
thrown away with the call. File names are replaced, since they often are names of people.

Source: DICOM PS3.15, annex E, basic profile with clean pixel data excluded: images with writing
burned in are not copied.
"""

from __future__ import annotations

import gzip
import hmac
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from pydicom import Dataset, FileDataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import generate_uid

from client.config import Data, DicomData, NiftiData
from client.readers.case import Split
from client.readers.dicom import is_dicom, stem_of
from client.readers.identifiers import BURNED_IN
from client.readers.image import SUFFIXES
from client.readers.nifti import SUFFIXES as NIFTI
from client.readers.nifti import TEXTS
from common.errors import ConfigError, DataError, FederationError

KEPT = (
    "SOPClassUID",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "ImagerPixelSpacing",
    "InstanceNumber",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "WindowCenter",
    "WindowWidth",
    "RescaleSlope",
    "RescaleIntercept",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "LUTDescriptor",
    "LUTData",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
)
GROUPS = (  # lists of groups, in which the same elements are kept
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
)
WORDS = {  # kept where they are one of these: people type into such fields
    "Modality": (
        "CR",
        "CT",
        "DX",
        "MG",
        "MR",
        "NM",
        "OP",
        "OPT",
        "OT",
        "PT",
        "RF",
        "SM",
        "US",
        "XA",
    ),
    "PatientSex": ("F", "M", "O"),
    "ImageLaterality": ("L", "R", "B", "U"),
    "Laterality": ("L", "R"),
    "ViewPosition": ("AP", "PA", "LL", "RL", "LLD", "RLD", "LLO", "RLO", "CC", "ML", "LM", "MLO"),
    "PatientPosition": ("HFS", "HFP", "HFDR", "HFDL", "FFS", "FFP", "FFDR", "FFDL"),
}
NUMBERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Copied:
    """What was done, in numbers."""

    files: int
    left_out: int  # with writing burned in


def deidentify(data: Data, folder: Path) -> Copied:
    """Copy a data set of DICOM or NIfTI files, with its folders, masks and splits.

    Args:
      data: The ``[data]`` table; its root is only read.
      folder: A new one, or an empty one outside ``data.root``.

    Raises:
      ConfigError: Other files, or the folder is in use.
      DataError: A file cannot be read; what was copied so far is removed.
    """
    if not isinstance(data, DicomData | NiftiData):
        raise ConfigError(
            f"data.format {data.format}: such files have no header to clean; look at their names"
        )
    inside = folder.resolve().is_relative_to(data.root.resolve())
    if inside or (folder.exists() and any(folder.iterdir())):
        raise ConfigError(f"{folder}: give a new folder, outside of {data.root}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return _copy_all(data, folder, _Pseudonyms())
    except BaseException:
        shutil.rmtree(folder)
        raise


class _Pseudonyms:
    """Names that stand for others, the same one for the same, under a key nobody keeps."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def name(self, kind: str, value: str) -> str:
        """Twelve letters and digits."""
        return self._digest(kind, value).hex()[:12]

    def number(self, value: str) -> str:
        """A DICOM identifier."""
        return str(generate_uid(entropy_srcs=[self._digest("uid", value).hex()]))

    def _digest(self, kind: str, value: str) -> bytes:
        return hmac.digest(self._key, f"{kind}/{value}".encode(), "sha256")


def _needed(group: Dataset) -> Dataset:
    """Of a file, or of a group in it, what an image needs."""
    made = Dataset()
    for element in group:
        if element.keyword in KEPT:
            made.add(element)
        elif element.keyword in GROUPS:
            made.add_new(element.tag, "SQ", [_needed(item) for item in element.value])
        elif str(element.value) in WORDS.get(element.keyword, ()):
            made.add(element)
    return made


def _copy_all(data: DicomData | NiftiData, folder: Path, names: _Pseudonyms) -> Copied:
    copied = left_out = 0
    for path in sorted(path for path in data.root.rglob("*") if path.is_file()):
        target = _target(path, data, folder, names)
        if target is None:
            continue
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            is_copied = _copy(path, target, names)
        except FederationError:
            raise
        except Exception as error:  # noqa: BLE001 - files break in more ways than anybody lists
            name = type(error).__name__
            raise DataError(f"{path.name}: cannot be copied ({name}); take it out") from None
        copied, left_out = copied + is_copied, left_out + (not is_copied)
    return Copied(copied, left_out)


def _target(
    path: Path, data: DicomData | NiftiData, folder: Path, names: _Pseudonyms
) -> Path | None:
    """Where a copy goes: folders that mean something keep their names, others get new ones."""
    ending = next((e for e in (*NIFTI, *SUFFIXES) if path.name.lower().endswith(e)), None)
    if ending is None and not is_dicom(path):
        return None
    stem = path.name[: -len(ending)] if ending else stem_of(path)
    relative = path.relative_to(data.root)
    return folder.joinpath(
        *_folders(relative, data, names),
        names.name("stem", stem) + (ending or ".dcm"),
    )


def _folders(relative: Path, data: DicomData | NiftiData, names: _Pseudonyms) -> Iterator[str]:
    """Splits, classes and the folders of images and masks say nothing of a person."""
    known = {*Split, data.images, data.masks, data.valid}
    for place, part in enumerate(relative.parts[:-1]):
        is_class = data.layout == "classes" and all(p in set(Split) for p in relative.parts[:place])
        yield part if part in known or is_class else names.name("stem", part)


def _copy(path: Path, target: Path, names: _Pseudonyms) -> bool:
    """Whether it was copied."""
    if path.name.lower().endswith(NIFTI):
        _copy_nifti(path, target)
        return True
    if path.suffix.lower() in SUFFIXES:
        _copy_picture(path, target)
        return True
    return _copy_dicom(path, target, names)


def _copy_nifti(path: Path, target: Path) -> None:
    """The same bytes, with nothing in the header's texts and between header and voxels."""
    image = nibabel.load(path)
    header = image.header
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rb") as file:
        content = bytearray(file.read())
    for name in TEXTS:
        if name in header:
            kind, start = header.template_dtype.fields[name][:2]
            content[start : start + kind.itemsize] = bytes(kind.itemsize)
    start, end = int(header["sizeof_hdr"]), int(image.dataobj.offset)
    content[start:end] = bytes(end - start)  # extensions
    with opened(target, "wb") as file:
        file.write(bytes(content))


def _copy_picture(path: Path, target: Path) -> None:
    """A mask: its pixels alone."""
    with Image.open(path) as image:
        plain = Image.fromarray(np.array(image))
        if image.mode == "P":
            plain.putpalette(image.getpalette() or [])
        plain.save(target)


def _copy_dicom(path: Path, target: Path, names: _Pseudonyms) -> bool:
    """Whether it was copied: not if writing is burned into the pixels."""
    try:
        dataset = dcmread(path)
    except InvalidDicomError:
        raise DataError(f"{path.name}: not a readable DICOM file") from None
    if dataset.get(BURNED_IN) == "YES":
        return False
    cleaned(dataset, names.name("patient", str(dataset.get("PatientID"))), names).save_as(target)
    return True


def cleaned(dataset: FileDataset, patient: str, names: _Pseudonyms) -> FileDataset:
    """The same image with nothing but what it needs."""
    made = _needed(dataset)
    for name in NUMBERS:
        if dataset.get(name):
            setattr(made, name, names.number(str(dataset.get(name))))
    made.PatientID, made.PatientName = patient, ""
    made.PatientIdentityRemoved = "YES"
    made.DeidentificationMethod = "Consilium: kept by a list, all else left out"
    meta = Dataset()
    meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", "")
    meta.MediaStorageSOPInstanceUID = made.get("SOPInstanceUID", "")
    return FileDataset(None, made, file_meta=FileMetaDataset(meta), preamble=bytes(128))  # type: ignore[arg-type]
