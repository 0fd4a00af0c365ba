"""DICOM files: single images, frames, and series that make up a volume.

Grey values come with the modality's rescale slope and intercept (Hounsfield units in CT) and
always brighter upwards; colours come as RGB. A series is put in order by where its slices lie.

Source: DICOM PS3.3, sections C.7.6.3 (pixels) and C.11.1 (modality LUT).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import FileDataset, dcmread
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array

from client.readers.identifiers import identifiers_in
from client.readers.planes import affine_of, order_of, planes_of, rescaling_of
from client.readers.volume import Header, header_of, in_order
from common.errors import DataError

SUFFIXES = (".dcm", ".dicom", ".ima")  # many archives write none, or a number
PREAMBLE, MAGIC = 128, b"DICM"
BANDS = ("red", "green", "blue")
LARGE = 32  # bits, from which on whole numbers need more room
# Red, green and blue in what television calls luma, and Pillow too.
LUMA = (0.299, 0.587, 0.114)

UNREADABLE = (  # what the library raises where bytes make no sense
    InvalidDicomError,
    BytesLengthException,
    OSError,
    EOFError,
    ValueError,
    AttributeError,
    NotImplementedError,
    TypeError,
    KeyError,
)


@dataclass(frozen=True)
class Series:
    """Private. The files of one image: a slice, a file of several frames, or a whole series.

    Attributes:
      files: In no order yet.
      patient: The header's patient id; empty where it has none.
      frame: Which frame of a single file, where each is an image of its own.
      fault: Why the file cannot be read, where that is known before it is.
    """

    files: tuple[Path, ...]
    patient: str
    frame: int | None = None
    fault: str = ""


def is_dicom(path: Path) -> bool:
    """Whether a file is one, by its name or by how it begins."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            file.seek(PREAMBLE)
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def stem_of(path: Path) -> str:
    """A file's name without an ending that says that it is DICOM; numbers are no ending."""
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def at(path: Path) -> Series:
    """The image of one file that somebody names.

    Raises:
      DataError: The file cannot be read.
    """
    return Series((path,), _patient(_header(path)))


def series_below(folder: Path, dims: int) -> list[Series]:
    """Images below a folder: whole series where a study takes volumes, else slices and frames.

    A file whose header cannot be read is an image whose reading fails: others may be used.

    Raises:
      DataError: One series has two patients.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and is_dicom(path))
    broken: list[Series] = []
    flat: list[Series] = []
    groups: dict[str, list[tuple[Path, str]]] = {}
    for path in files:
        try:
            header = _header(path)
        except DataError as error:
            broken.append(Series((path,), f"of {path}", fault=str(error)))
            continue
        if dims == 2:  # noqa: PLR2004
            flat += _frames(path, header)
            continue
        number = str(header.get("SeriesInstanceUID") or path.parent)
        groups.setdefault(number, []).append((path, _patient(header)))
    made = flat + broken
    for members in groups.values():
        patients = {patient for _, patient in members}
        if len(patients) > 1:
            name = members[0][0].name
            raise DataError(
                f"{name}: its series has files of {len(patients)} patients; export them again"
            )
        made.append(Series(tuple(path for path, _ in members), patients.pop()))
    return made


def read_series(series: Series, colour: str, window: str | None = None) -> NDArray[Any]:
    """Pixels, shape (channels, height, width) or (channels, depth, height, width).

    Args:
      series: What belongs together.
      colour: Which value of a colour file is its grey value, or ``rgb`` for all three.
      window: ``file`` for the file's own window, between 0 and 1.

    Raises:
      DataError: A file is cut off or compressed by what nobody here can read; slices are missing
        or of several sizes.
    """
    _check_readable(series)
    datasets = [_whole(path) for path in series.files]
    made = [_values(dataset, colour, window, series.frame) for dataset in datasets]
    if len(made) == 1 and made[0].ndim == 3:  # noqa: PLR2004
        return made[0]
    if len({str(each.get("PhotometricInterpretation")) for each in datasets}) > 1:
        name = series.files[0].name
        raise DataError(f"{name}: its series has grey and colour slices; export one kind")
    planes = [plane for dataset in datasets for plane in planes_of(dataset)]
    order = order_of(planes)
    affine = affine_of([planes[place] for place in order])
    slices = [one for each in made for one in _slices(each)]
    volume = np.stack([slices[place] for place in order])  # (slices, channels, rows, columns)
    moved = in_order(np.moveaxis(volume, 1, -1), affine)
    return np.ascontiguousarray(np.moveaxis(moved, -1, 0))


def _check_readable(series: Series) -> None:
    if series.fault:
        raise DataError(series.fault)


def _slices(values: NDArray[Any]) -> NDArray[Any]:
    """(channels, [frames,] height, width) to (frames, channels, height, width)."""
    return values[None] if values.ndim == 3 else values.swapaxes(0, 1)  # noqa: PLR2004


def look_at_series(series: Series) -> Header:
    """Spacing, orientation and identifiers; no pixel is read.

    Raises:
      DataError: A file cannot be read, or slices are missing.
    """
    _check_readable(series)
    headers = [_header(path, whole=True) for path in series.files]
    found = sorted({name for header in headers for name in identifiers_in(header)})
    planes = [plane for header in headers for plane in planes_of(header)]
    if len(planes) == 1 or series.frame is not None:
        return Header(planes[0].spacing, identifiers=tuple(found))
    planes = [planes[place] for place in order_of(planes)]
    header = header_of((len(planes), *planes[0].shape), affine_of(planes), tuple(found))
    if planes[0].spacing is None:
        return replace(header, spacing=None, place=None)
    return header


def _frames(path: Path, header: FileDataset) -> list[Series]:
    """A file, or each of its frames."""
    num_frames = int(header.get("NumberOfFrames") or 1)
    one = partial(Series, (path,), _patient(header))
    return [one(frame) for frame in range(num_frames)] if num_frames > 1 else [one()]


def _header(path: Path, *, whole: bool = False) -> FileDataset:
    """What stands before the pixels; only what tells what belongs together, if not ``whole``."""
    few = ["SeriesInstanceUID", "PatientID", "NumberOfFrames"]
    tags: Any = None if whole else few
    try:
        return dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except UNREADABLE as error:
        raise DataError(
            f"{path.name}: not a readable DICOM file ({type(error).__name__})"
        ) from None


def _whole(path: Path) -> FileDataset:
    try:
        return dcmread(path)
    except FileNotFoundError:
        raise DataError(f"{path.name}: there is no such file in {path.parent}") from None
    except UNREADABLE as error:
        raise DataError(
            f"{path.name}: not a readable DICOM file ({type(error).__name__})"
        ) from None


def _patient(header: FileDataset) -> str:
    return str(header.get("PatientID") or "").strip()


def _values(
    dataset: FileDataset, colour: str, window: str | None, frame: int | None
) -> NDArray[Any]:
    """One file's pixels, shape (channels, [frames,] height, width)."""
    path = Path(str(dataset.filename))
    stored = _stored(dataset, path, frame)
    kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if not kind.startswith("MONOCHROME"):
        bits = 8 * stored.itemsize if kind == "PALETTE COLOR" else int(dataset.BitsStored)
        return _coloured((stored >> max(0, bits - 8)).astype(np.uint8), colour)
    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    values = _rescaled(stored, dataset, frame)
    is_negative = kind == "MONOCHROME1"  # brighter is less: a film
    if window is not None:
        seen = _windowed(values, dataset, path)
        return (1 - seen if is_negative else seen)[None]
    if is_negative:
        values = _inverted(values, stored.dtype, bits, dataset)
    if values.dtype.kind == "f":
        return values.astype(np.float32)[None]
    whole = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}.get(bits)
    is_plain = whole == stored.dtype and "ModalityLUTSequence" not in dataset
    if is_plain:
        return values.astype(stored.dtype)[None]
    # Any other number of bits has no type of its own: 12 would be taken for 16, and be dark.
    return values.astype(np.int32 if bits < LARGE else np.int64)[None]


def _inverted(
    values: NDArray[Any], stored: np.dtype[Any], bits: int, dataset: FileDataset
) -> NDArray[Any]:
    """The brightest in the place of the darkest that the file could hold, and so on."""
    low, high = (
        (-(1 << bits - 1), (1 << bits - 1) - 1) if stored.kind == "i" else (0, (1 << bits) - 1)
    )
    ends = _rescaled(np.array([[low, high]], stored), dataset, 0)
    total = ends.astype(np.float64 if values.dtype.kind == "f" else np.int64).sum()
    inverted: NDArray[Any] = total - values.astype(
        ends.dtype if values.dtype.kind == "f" else np.int64
    )
    return inverted


def _rescaled(stored: NDArray[Any], dataset: FileDataset, frame: int | None) -> NDArray[Any]:
    """With the modality's slope and intercept, which several frames may have each for itself."""
    if rescaling_of(dataset, frame or 0) is None:
        for name, usual in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
            if name not in dataset and ("RescaleSlope" in dataset or "RescaleIntercept" in dataset):
                setattr(dataset, name, usual)  # without both, the library does nothing
        plain: NDArray[Any] = apply_modality_lut(stored, dataset)
        return plain
    places = [frame] if frame is not None else range(len(stored) if stored.ndim > 2 else 1)  # noqa: PLR2004
    stack = stored if stored.ndim > 2 else stored[None]  # noqa: PLR2004
    found = [rescaling_of(dataset, place) or (1.0, 0.0) for place in places]
    made = np.stack([s * each + i for each, (s, i) in zip(stack, found, strict=True)])
    return made.reshape(stored.shape)


def _stored(dataset: FileDataset, path: Path, frame: int | None) -> NDArray[Any]:
    """Pixels as they are stored; colours as RGB."""
    if "PixelData" not in dataset and "FloatPixelData" not in dataset:
        raise DataError(f"{path.name}: no image in this file (a report or a plan?); take it out")
    try:
        found: NDArray[Any] = pixel_array(dataset, index=frame)
    except (RuntimeError, NotImplementedError) as error:
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise DataError(
            f"{path.name}: compressed as {syntax}, which cannot be read here ({_first(error)}); "
            "export it uncompressed"
        ) from None
    except UNREADABLE as error:
        text = f"cut off or damaged ({_first(error)})"
        raise DataError(f"{path.name}: {text}; copy it again") from None
    return found


def _first(error: Exception) -> str:
    """The first sentence of a library's explanation, on one line."""
    return " ".join(str(error).split(". ")[0].split())[:160]


def _coloured(stored: NDArray[Any], colour: str) -> NDArray[Any]:
    """(..., 3) to (channels, ...)."""
    channels: NDArray[Any] = np.moveaxis(stored[..., :3], -1, 0)
    if colour == "rgb":
        return channels
    if colour in BANDS:
        channel = BANDS.index(colour)
        return channels[channel : channel + 1]
    grey: NDArray[Any] = np.tensordot(LUMA, channels, axes=1).round().astype(stored.dtype)[None]
    return grey


def _windowed(values: NDArray[Any], dataset: FileDataset, path: Path) -> NDArray[np.float32]:
    """From 0 at the lower edge of the file's first window to 1 at the upper."""
    centers, widths = (
        np.atleast_1d(dataset.get(name) or []) for name in ("WindowCenter", "WindowWidth")
    )
    if not len(centers) or not len(widths):
        raise DataError(
            f"{path.name}: names no window; give input.window = [low, high] in the study"
        )
    width = max(float(widths[0]), 1e-6)
    low = float(centers[0]) - width / 2
    return np.clip((values - low) / width, 0, 1).astype(np.float32)
