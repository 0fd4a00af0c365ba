"""One NIfTI file: a volume, or the classes of its voxels.

Grey values come with the file's slope and intercept. Axes are put in the common order of
``client.readers.volume``; a fourth one holds channels.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.data import NibabelReader
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from client.readers.volume import Header, header_of, in_order
from common.errors import DataError

SUFFIXES = (".nii.gz", ".nii")
# Free text, in which converters leave names and dates.
TEXTS = ("descrip", "aux_file", "db_name", "intent_name", "data_type")


def read_nifti(path: Path, dims: int) -> NDArray[Any]:
    """A volume, shape (channels, depth, height, width); with two dimensions (channels, h, w).

    Raises:
      DataError: The file cannot be read, or has another number of dimensions.
    """
    image = _opened(path)
    try:
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error) as error:
        name = type(error).__name__
        raise DataError(f"{path.name}: cut off or damaged ({name}); copy it again") from None
    if values.dtype.kind not in "uif":
        raise DataError(
            f"{path.name}: voxels of type {values.dtype}; grey values or classes are whole or real "
            "numbers"
        )
    while values.ndim > 3 and values.shape[-1] == 1:  # noqa: PLR2004 - axes that hold nothing
        values = values[..., 0]
    if values.ndim not in (3, 4):
        raise DataError(f"{path.name}: {values.ndim} dimensions; a volume with channels has 4")
    moved = in_order(values, _affine(image))
    channels = moved[None] if moved.ndim == 3 else np.moveaxis(moved, -1, 0)  # noqa: PLR2004
    flat = [axis for axis in (1, 2, 3) if channels.shape[axis] == 1]
    if dims == 2 and flat:  # noqa: PLR2004
        channels = channels.squeeze(flat[0])
    return np.ascontiguousarray(channels.astype(channels.dtype.newbyteorder("="), copy=False))


def read_nifti_mask(path: Path, dims: int) -> NDArray[Any]:
    """What a mask holds, one number for each voxel, in the same order of axes as its image.

    Raises:
      DataError: The file cannot be read, has channels, or holds fractions.
    """
    values = read_nifti(path, dims)
    if len(values) != 1:
        raise DataError(f"{path.name}: {len(values)} channels; a mask has one class per voxel")
    if values.dtype.kind == "f" and not (values == np.trunc(values)).all():
        raise DataError(f"{path.name}: a mask holds classes; this file has fractions or NaN")
    mask: NDArray[Any] = values[0]
    return mask


def look_at_nifti(path: Path) -> Header:
    """Spacing, orientation and texts; no voxel is read.

    Raises:
      DataError: The file cannot be read.
    """
    image = _opened(path)
    if len(image.shape) < 3:  # noqa: PLR2004
        raise DataError(f"{path.name}: {len(image.shape)} dimensions; a volume has 3")
    texts = [
        name
        for name in TEXTS
        if name in image.header and bytes(image.header[name].tobytes()).strip(b"\0 ")
    ]
    extensions = ["extension"] if len(getattr(image.header, "extensions", [])) else []
    return header_of(image.shape, _affine(image), tuple(texts + extensions))


def _opened(path: Path) -> SpatialImage:
    try:
        image = NibabelReader().read(path)
    except FileNotFoundError:
        raise DataError(f"{path.name}: there is no such file in {path.parent}") from None
    except (
        ImageFileError,
        HeaderDataError,
        WrapStructError,
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        zlib.error,
    ) as error:
        raise DataError(f"{path.name}: not a readable NIfTI file ({error})") from None
    if not isinstance(image, nibabel.nifti1.Nifti1Pair):
        raise DataError(f"{path.name}: not a NIfTI file; save it as .nii.gz")
    return image


def _affine(image: SpatialImage) -> NDArray[np.float64]:
    """To millimetres.

    Raises:
      DataError: The file does not say where it lies.
    """
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:  # noqa: PLR2004
        name = Path(image.get_filename() or "").name
        raise DataError(f"{name}: its header gives no usable place and spacing; export it again")
    return affine
