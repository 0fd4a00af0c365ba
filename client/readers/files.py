"""Files of every kind as images: which lie in a folder, and how each is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from client.config import FileFormat
from client.readers import dicom, nifti
from client.readers.case import Wanted
from client.readers.image import AS_STORED, SUFFIXES, cut_to_valid, read_image, read_mask
from client.readers.volume import Header, lies_elsewhere
from common.errors import DataError, FederationError
from common.tasks.losses import OUTSIDE

Look = Callable[[], Header]
Found = TypeVar("Found")
WHAT = {"folder": "PNG, JPEG or TIFF", "nifti": "NIfTI (.nii, .nii.gz)", "dicom": "DICOM"}


@dataclass(frozen=True)
class Source:
    """Private. One image, before its pixels are read.

    Attributes:
      path: Its file, or the folder of its series.
      stem: Name without ending; a mask of the same name belongs to it.
      patient: The patient's id in its header; empty where it has none.
      load: Reads the pixels, shape (channels, *size).
      look: Reads the header; None where such a file has none.
    """

    path: Path
    stem: str
    patient: str
    load: Callable[[], NDArray[Any]]
    look: Look | None = None


def sources_below(folder: Path, kind: FileFormat, wanted: Wanted) -> list[Source]:
    """Every image below a folder, in an order that depends on names alone.

    Raises:
      DataError: A DICOM file's header cannot be read.
    """
    dims = len(wanted.size) or (2 if kind == "folder" else 3)
    if kind == "dicom":
        found = dicom.series_below(folder, dims)
        return [_dicom(series, wanted, _path_of(series)) for series in found]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind == "nifti":
        return [_nifti(p, dims) for p in files if p.name.lower().endswith(nifti.SUFFIXES)]
    return [_picture(path, wanted) for path in files if path.suffix.lower() in SUFFIXES]


def source_at(path: Path, wanted: Wanted) -> Source:
    """One image that a table or a list names: a file, or the folder of a series.

    Raises:
      DataError: It is not there, or the folder does not hold exactly one series.
    """
    if path.is_dir():
        found = dicom.series_below(path, 3)
        if len(found) != 1:
            raise DataError(f"{path.name}: {len(found)} DICOM series in this folder, one expected")
        return _dicom(found[0], wanted, path)
    if path.name.lower().endswith(nifti.SUFFIXES):
        return _nifti(path, len(wanted.size) or 3)
    if path.exists() and path.suffix.lower() not in SUFFIXES and dicom.is_dicom(path):
        return _dicom(dicom.at(path), wanted, path)
    return _picture(path, wanted)


def load_classes(
    mask: Path, valid: Path | None, image: Source, wanted: Wanted
) -> NDArray[np.uint8]:
    """Classes of every pixel of an image, shape (*size); ``OUTSIDE`` where ``valid`` is 0.

    Raises:
      DataError: A file cannot be read, holds no classes, or lies elsewhere in the patient.
    """
    if not mask.name.lower().endswith(nifti.SUFFIXES):
        return read_mask(mask, valid, len(wanted.classes))
    dims = len(wanted.size) or 3
    values = nifti.read_nifti_mask(mask, dims)
    if image.look is not None and lies_elsewhere(nifti.look_at_nifti(mask), image.look()):
        raise DataError(
            f"{mask.name}: lies elsewhere in the patient than {image.path.name} (their headers' "
            "positions differ); resample the mask to the image"
        )
    classes = _checked(values, mask.name, len(wanted.classes))
    if valid is None:
        return classes
    return cut_to_valid(classes, nifti.read_nifti_mask(valid, dims) != 0, valid.name)


def _checked(values: NDArray[Any], name: str, num_classes: int) -> NDArray[np.uint8]:
    present = np.unique(values)
    if present.size and (present[0] < 0 or present[-1] >= OUTSIDE):
        raise DataError(f"{name}: a mask's values are classes, from 0 to {num_classes - 1}")
    if num_classes == 2 and list(present) in ([0, 255], [255]):  # noqa: PLR2004
        values = values != 0
    classes: NDArray[np.uint8] = values.astype(np.uint8)
    return classes


def _picture(path: Path, wanted: Wanted) -> Source:
    load = partial(read_image, path, wanted.channels, wanted.colour)
    return Source(path, path.stem, "", load)


def _nifti(path: Path, dims: int) -> Source:
    ending = next(each for each in nifti.SUFFIXES if path.name.lower().endswith(each))
    stem = path.name[: -len(ending)]
    load = partial(_named, path, partial(nifti.read_nifti, path, dims))
    look = partial(_named, path, partial(nifti.look_at_nifti, path))
    return Source(path, stem, "", load, look)


def _dicom(series: dicom.Series, wanted: Wanted, path: Path) -> Source:
    colour = "rgb" if wanted.channels in (AS_STORED, 3) else wanted.colour
    window = "file" if wanted.window_of_file else None
    stem = path.name if path.is_dir() else dicom.stem_of(path)
    if series.frame is not None:
        path = path.with_name(f"{path.name}, frame {series.frame + 1}")
    return Source(
        path,
        stem,
        series.patient,
        partial(_named, path, partial(dicom.read_series, series, colour, window)),
        partial(_named, path, partial(dicom.look_at_series, series)),
    )


def _named(path: Path, read: Callable[[], Found]) -> Found:
    """What a reader finds; what it stumbles over is a fault of this file, and named so.

    Raises:
      DataError: Of the reader itself; or any other error. The library's text is left out, since it
        may hold a field's value.
    """
    try:
        return read()
    except FederationError:
        raise
    except Exception as error:  # noqa: BLE001 - headers break in more ways than anybody lists
        raise DataError(
            f"{path.name}: a field of its header cannot be used ({type(error).__name__}); export "
            "it again"
        ) from None


def _path_of(series: dicom.Series) -> Path:
    first, *others = series.files
    return first.parent if others else first
