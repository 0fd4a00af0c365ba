"""Where an image lies in the patient: one order of axes for every format, and its spacing.

A volume's axes are depth towards the head, rows towards the back and columns towards the patient's
left, whatever its file has: (depth, height, width), as radiologists look at axial slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from numpy.typing import NDArray

AXES = ("S", "P", "L")
PLACE_TOLERANCE_MM = 0.1  # by which a mask may lie beside its image


@dataclass(frozen=True)
class Header:
    """Private. What a file says beside its pixels.

    Attributes:
      spacing: Millimetres between pixels along each axis of the image as it is loaded.
      orientation: Letters of the file's own axes, such as ``RAS``; empty for a flat image.
      place: Affine of the image as it is loaded, to millimetres; None for a flat image.
      shape: (depth, height, width) of the image as it is loaded; empty for a flat image.
      identifiers: Names of header fields that hold something about the person; never the values.
    """

    spacing: tuple[float, ...] | None
    orientation: str = ""
    place: NDArray[np.float64] | None = None
    shape: tuple[int, ...] = ()
    identifiers: tuple[str, ...] = ()


def in_order(volume: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """A volume with its axes in the common order; only its first three are moved.

    Args:
      volume: Any number type, shape (i, j, k, ...).
      affine: From i, j, k to millimetres right, anterior and superior, as NIfTI has it.
    """
    moved: NDArray[Any] = apply_orientation(volume, _to_common(affine))
    return moved


def header_of(
    shape: tuple[int, ...], affine: NDArray[np.float64], identifiers: tuple[str, ...] = ()
) -> Header:
    """Spacing and place of a volume after ``in_order``.

    Args:
      shape: (i, j, k) of the volume as the file has it.
      affine: As for ``in_order``.
      identifiers: See ``Header``.
    """
    # The transform's affine goes from the new axes to the old ones.
    moves = _to_common(affine)
    place = affine @ inv_ornt_aff(moves, shape[:3])
    spacing = tuple(float(side) for side in voxel_sizes(place))
    moved = tuple(shape[axis] for axis in np.argsort(moves[:, 0]))
    return Header(spacing, "".join(map(str, aff2axcodes(affine))), place, moved, identifiers)


def lies_elsewhere(one: Header, other: Header) -> bool:
    """Whether two images of equal size are not of the same place in the patient."""
    if one.place is None or other.place is None or one.shape != other.shape:
        return False  # another size is another fault
    return float(np.abs(one.place - other.place).max()) > PLACE_TOLERANCE_MM


def _to_common(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = ornt_transform(io_orientation(affine), axcodes2ornt(AXES))
    return found
