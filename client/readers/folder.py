"""Read image files from folders named after the study's classes.

``root/<class>/*.png``, or ``root/{train,val,test}/<class>/*.png`` where the data has splits.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.config import FolderData
from client.readers.case import Case, Split, Wanted, class_target
from common.errors import DataError

AS_STORED = 0  # channels as the file has them
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I", "F")  # grey with more than 8 bits


def read_folder(data: FolderData, wanted: Wanted) -> list[Case]:
    """Cases of every image file below the class folders.

    Raises:
      DataError: The folder is missing, there is a folder that is no class and no split, or a file's
        name does not give a patient. A site may have no image of a class.
    """
    if not data.root.is_dir():
        raise DataError(f"{data.root}: not a folder; set data.root")
    splits: list[Split | None] = [split for split in Split if (data.root / split).is_dir()]
    beside = {entry.name for entry in data.root.iterdir() if entry.is_dir()} - set(Split)
    if splits and beside:
        raise DataError(f"{data.root}: folder {min(beside)!r} is none of {', '.join(Split)}")
    cases: list[Case] = []
    for split in splits or [None]:
        cases += _read_split(data, wanted, split)
    if not cases:
        raise DataError(f"{data.root}: no PNG, JPEG or TIFF file in any class folder")
    return cases


def _read_split(data: FolderData, wanted: Wanted, split: Split | None) -> list[Case]:
    folder = data.root / split if split else data.root
    present = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    if unknown := sorted(present - set(wanted.classes)):
        raise DataError(f"{folder}: folder {unknown[0]!r} is not a class of the study")
    cases = []
    for index, name in enumerate(wanted.classes):
        # Sorted, because the file system's order differs from machine to machine.
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                patient = _patient(path, data)
                target = class_target(index, wanted)
                cases.append(
                    Case(
                        name=str(path.relative_to(data.root)),
                        patient=patient,
                        split=split,
                        target=target,
                        load=partial(read_image, path, wanted.channels),
                    )
                )
    return cases


def _patient(path: Path, data: FolderData) -> str:
    if data.patient is None:
        return str(path.relative_to(data.root))
    found = re.search(data.patient, path.name)
    if found is None or not found.group(1):
        raise DataError(f"{path.name}: data.patient does not match this file's name")
    return found.group(1)


def read_image(path: Path, channels: int) -> NDArray[Any]:
    """Pixels of one file, shape (channels, height, width), in the file's number type.

    ``channels`` is 1 (grey), 3 (colour) or ``AS_STORED``. Grey with more than 8 bits stays grey.

    Raises:
      DataError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in WIDE_MODES:
                return np.asarray(image)[None]  # converting would clip to 8 bits
            grey = channels == 1 or (channels == AS_STORED and image.mode in ("1", "L", "LA"))
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path.name}: not a readable image ({error})") from None
    return pixels[None] if grey else np.moveaxis(pixels, -1, 0)
