"""A scanner: writes DICOM and NIfTI files of made-up patients, whole or with one thing wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

NAME, BIRTH, PATIENT = "Grauer^Wilhelmina", "19320417", "MRN-4711-88"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_dicom(path: Path, pixels: NDArray[Any], **fields: Any) -> Path:
    """One file; fields by keyword replace what is usual, None leaves one out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = fields.pop("SOPInstanceUID", generate_uid())
    made = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    colours = pixels.ndim == 3 and pixels.shape[-1] == 3
    frames = pixels.ndim - 2 - colours
    usual: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "SeriesInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "Modality": "CT",
        "PatientName": NAME,
        "PatientID": PATIENT,
        "PatientBirthDate": BIRTH,
        "InstitutionName": "St. Elsewhere",
        "PhotometricInterpretation": "RGB" if colours else "MONOCHROME2",
        "SamplesPerPixel": 3 if colours else 1,
        "PlanarConfiguration": 0 if colours else None,
        "Rows": pixels.shape[frames],
        "Columns": pixels.shape[frames + 1],
        "BitsAllocated": 8 * pixels.dtype.itemsize,
        "BitsStored": 8 * pixels.dtype.itemsize,
        "HighBit": 8 * pixels.dtype.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "NumberOfFrames": pixels.shape[0] if frames else None,
        "PixelData": np.ascontiguousarray(pixels).tobytes(),
    }
    for name, value in {**usual, **fields}.items():
        if value is not None:
            setattr(made, name, value)
    made.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    volume: NDArray[Any],
    spacing: tuple[float, float, float] = (2.0, 0.5, 0.7),
    turned: tuple[float, ...] = AXIAL,
    **fields: Any,
) -> Path:
    """A series of one file per slice; file names say nothing of their order."""
    normal = np.cross(turned[:3], turned[3:])
    series = generate_uid()
    for place, pixels in enumerate(volume):
        write_dicom(
            folder / f"{(7 * place + 3) % 101:03d}.dcm",
            pixels,
            **{
                "SeriesInstanceUID": series,
                "InstanceNumber": place + 1,
                "ImagePositionPatient": [float(x) for x in place * spacing[0] * normal],
                "ImageOrientationPatient": list(turned),
                "PixelSpacing": list(spacing[1:]),
                "SliceThickness": spacing[0],
                **fields,
            },
        )
    return folder


def frames_dataset(**fields: Any) -> Dataset:
    """A group of attributes."""
    made = Dataset()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def write_nifti(
    path: Path,
    volume: NDArray[Any],
    affine: NDArray[Any] | None = None,
    texts: Mapping[str, bytes] | None = None,
) -> Path:
    """One file; shape (i, j, k) in the axes of the affine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine)
    for name, value in (texts or {}).items():
        image.header[name] = value
    nibabel.save(image, path)
    return path
