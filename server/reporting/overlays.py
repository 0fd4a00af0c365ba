"""Examples of a simulated segmentation run: a site's test image, its mask and the model's.

Every site keeps one such image on its own disk (``client.examples``). Only a simulation has the
sites' disks in the run folder; in a deployment nothing under ``sites/`` is ever opened here.

Colours: three of Okabe and Ito (2008), Color Universal Design, and a purple that is darker than
theirs; a test holds them apart, and from grey, for readers without red or without green cones.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from common.errors import FederationError
from common.simulation import EXAMPLE
from common.tasks import SegmentationTask, task_of
from common.tasks.losses import OUTSIDE
from server.reporting.record import Facts, Record

Grey: TypeAlias = NDArray[np.uint8]  # (height, width): grey values or class numbers
Colour: TypeAlias = NDArray[np.uint8]  # (height, width, 3)

UNREADABLE: Final = (
    *(AttributeError, EOFError, KeyError, OSError, TypeError, ValueError),
    *(zipfile.BadZipFile, zlib.error),
)
MOST_SITES: Final = 4
LONGEST_SIDE: Final = 480  # pixels of a picture; in 256 colours it stays below 300 kB
OUTLINE: Final = "#ffb000"


class Agreement(IntEnum):
    """What truth and model say of one pixel, taken together."""

    BACKGROUND = 0  # both: no class but the background
    FOUND = 1
    MISSED = 2
    EXTRA = 3
    CONFUSED = 4
    OUTSIDE = 5  # nobody knows the class: not counted


MEANINGS: Final = {  # colour, opacity over the image, words of the legend
    Agreement.FOUND: ("#56b4e9", 0.85, "found: truth and model agree"),
    Agreement.MISSED: ("#f0e442", 0.85, "missed: only in the truth"),
    Agreement.EXTRA: ("#d55e00", 0.85, "extra: only by the model"),
    Agreement.CONFUSED: ("#7b3294", 0.85, "confused: the model named another class"),
    Agreement.OUTSIDE: ("#d3dae1", 0.9, "outside the valid region: not counted"),
}


@dataclass(frozen=True)
class Kept:
    """Private. What a site kept: arrays of one shape, (height, width)."""

    image: Grey
    mask: Grey  # class numbers, and OUTSIDE
    predicted: Grey


@dataclass(frozen=True)
class Overlay:
    """Private. The pictures of one simulated site's test image, as data URIs of PNG files."""

    image: str
    truth: str
    agreement: str
    facts: Facts  # site, Dice, pixels or boxes by agreement, the file and its SHA-256


def draw_overlays(record: Record) -> list[Overlay]:
    """Pictures of up to four sites' test images, in the study's order.

    Returns:
      One entry per site that kept an image; empty in a deployed run and in other tasks.

    Guarantees:
      Equal files give equal pictures. In a deployed run no site's folder is looked at.

    Raises:
      FederationError: A file is not what a site writes; the message names it.
    """
    task = task_of(record.study)
    if not isinstance(task, SegmentationTask):
        return []
    folder = record.run_dir.path
    return [_overlay(site, name, folder, task) for site, name in kept_examples(record)]


def kept_examples(record: Record) -> list[tuple[str, str]]:
    """Up to four sites of a simulation and the files they kept, by their place in the run folder.

    In a deployed run there is none, and no site's folder is looked at.
    """
    if record.simulation is None:
        return []
    names = [f"sites/{site}/{EXAMPLE}" for site in record.study.site_names]
    kept = [
        (site, name)
        for site, name in zip(record.study.site_names, names, strict=True)
        if (record.run_dir.path / name).is_file()
    ]
    return kept[:MOST_SITES]


def arrays_of(content: bytes, name: str, *keys: str) -> list[NDArray[Any]]:
    """Arrays of the content of a file that a site kept.

    Raises:
      FederationError: They cannot be read; the message has the file's name.
    """
    try:
        with np.load(io.BytesIO(content)) as file:
            return [file[key] for key in keys]
    except UNREADABLE:
        raise no_example(name) from None


def no_example(name: str) -> FederationError:
    """What is said of a file that a site has not written, or not in this study."""
    return FederationError(f"{name} is not an example of this study; move it away or restore it")


def legend(overlays: Sequence[Overlay]) -> list[tuple[str, str]]:
    """Colour and words of everything that the pictures show."""
    shown = {
        name
        for overlay in overlays
        for name, num in (overlay.facts.get("pixels") or overlay.facts["boxes"]).items()
        if num
    }
    return [
        (colour, words)
        for agreement, (colour, _, words) in MEANINGS.items()
        if agreement.name.lower() in shown
    ]


def _overlay(site: str, name: str, folder: Path, task: SegmentationTask) -> Overlay:
    content = (folder / name).read_bytes()
    kept = _read(content, name, num_classes=len(task.classes))
    agreement = compare(kept.mask, kept.predicted)
    return Overlay(
        image=png(_enlarged(kept.image)),
        truth=png(outlined(kept.image, kept.mask)),
        agreement=png(coloured(kept.image, agreement)),
        facts={
            "site": site,
            "dice": _dice(kept, task),
            "pixels": {
                kind.name.lower(): int((agreement == kind).sum())
                for kind in Agreement
                if kind != Agreement.BACKGROUND
            },
            "file": name,
            "sha256": hashlib.sha256(content).hexdigest(),
        },
    )


def _read(content: bytes, name: str, *, num_classes: int) -> Kept:
    """The arrays of one file; ``client.examples`` wrote it."""
    arrays, wrong = arrays_of(content, name, "image", "mask", "predicted"), no_example(name)
    kept = Kept(*arrays)
    if any(a.dtype != np.uint8 or a.ndim != 2 or not a.size for a in arrays):  # noqa: PLR2004
        raise wrong
    if len({array.shape for array in arrays}) != 1:
        raise wrong
    if (
        kept.predicted.max() >= num_classes
        or (kept.mask[kept.mask != OUTSIDE] >= num_classes).any()
    ):
        raise wrong
    return kept


def _dice(kept: Kept, task: SegmentationTask) -> float | None:
    """Dice of this image alone, by the same counts as the test figures."""
    given, truth = torch.from_numpy(kept.predicted[None]), torch.from_numpy(kept.mask[None])
    dice: float | None = task.figures(task.tally(given, truth))["dice"]
    return dice


# Drawing


def compare(mask: Grey, predicted: Grey) -> NDArray[np.uint8]:
    """The ``Agreement`` of every pixel, shape (height, width)."""
    true, given = mask != 0, predicted != 0
    kinds = np.select(
        [mask == OUTSIDE, true & given & (mask == predicted), true & given, true, given],
        [
            Agreement.OUTSIDE,
            Agreement.FOUND,
            Agreement.CONFUSED,
            Agreement.MISSED,
            Agreement.EXTRA,
        ],
        Agreement.BACKGROUND,
    )
    return kinds.astype(np.uint8)


def coloured(image: Grey, agreement: NDArray[np.uint8]) -> Colour:
    """The image with a colour over every pixel that is not background."""
    colours = np.zeros((len(Agreement), 3))
    opacity = np.zeros((len(Agreement), 1))
    for kind, (colour, strength, _) in MEANINGS.items():
        colours[kind], opacity[kind] = _rgb(colour), strength
    return _blended(_enlarged(image), colours[_enlarged(agreement)], opacity[_enlarged(agreement)])


def outlined(image: Grey, mask: Grey) -> Colour:
    """The image with the border of every class but the background."""
    classes = _enlarged(np.where(mask == OUTSIDE, np.uint8(0), mask))
    border = _border(classes, width=max(1, _factor(mask) // 2))
    opacity = np.where(border, 0.9, 0.0)[..., None]
    return _blended(_enlarged(image), _rgb(OUTLINE), opacity)


def _border(classes: Grey, width: int) -> NDArray[np.bool_]:
    """Pixels with one of an earlier class within ``width``, up, down, left or right.

    Between two classes the border lies in the later one, so that it is never drawn twice.
    """
    height, breadth = classes.shape
    around = np.pad(classes, width, mode="edge")
    border = np.zeros(classes.shape, np.bool_)
    rows, columns = slice(width, width + height), slice(width, width + breadth)
    for step in range(-width, width + 1):
        moved_rows = slice(width + step, width + step + height)
        moved_columns = slice(width + step, width + step + breadth)
        border |= around[moved_rows, columns] < classes
        border |= around[rows, moved_columns] < classes
    return border


def _blended(image: Grey, colour: NDArray[np.float64], opacity: NDArray[np.float64]) -> Colour:
    mixed = (1 - opacity) * image[..., None] + opacity * colour
    return np.rint(mixed).astype(np.uint8)


def _rgb(colour: str) -> NDArray[np.float64]:
    return np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)], np.float64)


def _factor(image: Grey) -> int:
    return max(1, LONGEST_SIDE // int(max(image.shape)))


def _enlarged(image: Grey) -> Grey:
    """Every pixel of a small image as a square, so that nothing is shown that is not there."""
    factor = _factor(image)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def png(pixels: Grey | Colour) -> str:
    """A data URI; shrunk where a side is too long, and in at most 256 colours."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    if picture.mode == "RGB":
        picture = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
