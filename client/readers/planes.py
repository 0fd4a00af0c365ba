"""Where the planes of a DICOM image lie: slices of a series, or frames of one file.

Source: DICOM PS3.3, sections C.7.6.2 (image plane) and C.7.6.16 (functional groups of frames).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset

from common.errors import DataError

GAP = 0.05  # by how much slices of one series may differ in distance, as a share of it
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # directions of a row and of a column
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Plane:
    """Private. One slice.

    Attributes:
      name: Of its file, for messages.
      number: Its place in the series, by the scanner's count.
      start: Of its first pixel, in millimetres left, posterior and superior; None if not said.
      turned: Directions along a row and along a column, shape (6,).
      spacing: Millimetres between rows and between columns; None if not said.
      step: Millimetres to the next slice, as the header has it; None if not said.
      shape: Rows and columns.
    """

    name: str
    number: int
    start: Vector | None
    turned: Vector
    spacing: tuple[float, float] | None
    step: float | None
    shape: tuple[int, int]

    @property
    def normal(self) -> Vector:
        """Across the slice."""
        return np.cross(self.turned[:3], self.turned[3:])


def planes_of(header: FileDataset) -> list[Plane]:
    """The slice of a file, or one for each of its frames."""
    num_frames = int(header.get("NumberOfFrames") or 1)
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    own = [*frames, *[None] * (num_frames - len(frames))]
    return [_plane(header, frame, place) for place, frame in enumerate(own[:num_frames])]


def rescaling_of(header: FileDataset, place: int) -> tuple[float, float] | None:
    """Slope and intercept of one frame, where they stand with the frames."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    frame = frames[place] if place < len(frames) else None
    group = _group(header, frame, "PixelValueTransformationSequence")
    if group is None or "RescaleSlope" not in group:
        return None
    return float(group.RescaleSlope), float(group.get("RescaleIntercept") or 0)


def order_of(planes: Sequence[Plane]) -> list[int]:
    """From one end of the patient to the other; by number where they do not say where they lie."""
    if any(plane.start is None for plane in planes):
        return sorted(range(len(planes)), key=lambda k: planes[k].number)
    normal = planes[0].normal
    return sorted(range(len(planes)), key=lambda k: float(normal @ planes[k].start))  # type: ignore[operator]


def affine_of(planes: Sequence[Plane]) -> NDArray[np.float64]:
    """From slice, row and column to millimetres right, anterior and superior.

    Args:
      planes: In order.

    Raises:
      DataError: They are of several sizes or turned differently, or one is missing or there twice.
    """
    first = planes[0]
    if len({plane.shape for plane in planes}) > 1:
        raise DataError(f"{first.name}: its series has slices of several sizes; export one of them")
    down, across = first.spacing or (1.0, 1.0)
    start = first.start if first.start is not None else np.zeros(3)
    step = first.normal * (first.step or 1.0)
    last = planes[-1].start
    if len(planes) > 1 and first.start is not None and last is not None:
        _check_distances(planes)
        step = (last - first.start) / (len(planes) - 1)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([step, first.turned[3:] * down, first.turned[:3] * across])
    affine[:3, 3] = start
    # DICOM counts left and posterior upwards, the affine right and anterior.
    made: NDArray[np.float64] = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return made


def _check_distances(planes: Sequence[Plane]) -> None:
    name, normal = planes[0].name, planes[0].normal
    if any(plane.start is None for plane in planes):
        raise DataError(f"{name}: some slices of its series do not say where they lie")
    if any(abs(float(plane.normal @ normal) - 1) > GAP for plane in planes):
        raise DataError(f"{name}: slices of its series are turned differently; export one plane")
    places = [float(normal @ plane.start) for plane in planes]  # type: ignore[operator]
    steps = [after - before for before, after in itertools.pairwise(places)]
    usual = float(np.median(steps))
    if usual <= 0 or any(abs(step - usual) > GAP * usual for step in steps):
        raise DataError(
            f"{name}: slices of its series are {min(steps):.2f} to {max(steps):.2f} mm apart; one "
            "is missing or there twice: export the series again"
        )


def _plane(header: FileDataset, frame: Dataset | None, place: int) -> Plane:
    has_frames = int(header.get("NumberOfFrames") or 1) > 1
    position = _group(header, frame, "PlanePositionSequence") or header
    orientation = _group(header, frame, "PlaneOrientationSequence") or header
    measures = _group(header, frame, "PixelMeasuresSequence") or header
    start = position.get("ImagePositionPatient") if frame is not None or place == 0 else None
    spacing = measures.get("PixelSpacing") or measures.get("ImagerPixelSpacing")
    step = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness")
    return Plane(
        Path(str(header.filename)).name,
        place if has_frames else int(header.get("InstanceNumber") or 0),
        None if start is None else np.array(start, np.float64),
        np.array(orientation.get("ImageOrientationPatient") or AXIAL, np.float64),
        (float(spacing[0]), float(spacing[1])) if spacing else None,
        float(step) if step else None,
        (int(header.Rows), int(header.Columns)),
    )


def _group(header: FileDataset, frame: Dataset | None, name: str) -> Dataset | None:
    """A group of attributes: the frame's own, or what all frames share."""
    shared = header.get("SharedFunctionalGroupsSequence") or [None]
    for where in (frame, shared[0]):
        found: Any = where.get(name) if where is not None else None
        if found:
            group: Dataset = found[0]
            return group
    return None
