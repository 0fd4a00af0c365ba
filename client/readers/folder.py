"""Read image files from folders.

``layout = "classes"``: ``root/<class>/*.png``. ``layout = "pairs"``: ``root/images/*.png`` beside
``root/masks/`` and, where it is named, ``root/valid/``; the same stem is the same case. Either may
lie in ``root/{train,val,test}/`` where the data has splits.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from client.config import FolderData
from client.readers.case import Case, Split, Wanted, class_target
from client.readers.image import SUFFIXES, read_image, read_mask
from common.errors import DataError


def read_folder(data: FolderData, wanted: Wanted) -> list[Case]:
    """Cases of every image file below the class folders, or with a mask beside it.

    Raises:
      DataError: The folder is missing, there is a folder that is no class and no split, an image
        has no mask or two, or a file's name does not give a patient. A site may have no image of a
        class.
    """
    if not data.root.is_dir():
        raise DataError(f"{data.root}: not a folder; set data.root")
    if (data.layout == "pairs") != (wanted.labels == "masks"):
        layout = "pairs" if wanted.labels == "masks" else "classes"
        raise DataError(f'data set {data.name}: this study needs data.layout = "{layout}"')
    splits: list[Split | None] = [split for split in Split if (data.root / split).is_dir()]
    beside = {entry.name for entry in data.root.iterdir() if entry.is_dir()} - set(Split)
    if splits and beside:
        raise DataError(f"{data.root}: folder {min(beside)!r} is none of {', '.join(Split)}")
    read = _read_pairs if data.layout == "pairs" else _read_classes
    cases = [case for split in splits or [None] for case in read(data, wanted, split)]
    if not cases:
        where = f"{data.images}/" if data.layout == "pairs" else "any class folder"
        raise DataError(f"{data.root}: no PNG, JPEG or TIFF file in {where}")
    return cases


def _read_classes(data: FolderData, wanted: Wanted, split: Split | None) -> list[Case]:
    folder = data.root / split if split else data.root
    present = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    if unknown := sorted(present - set(wanted.classes)):
        raise DataError(f"{folder}: folder {unknown[0]!r} is not a class of the study")
    return [
        Case(
            name=str(path.relative_to(data.root)),
            patient=_patient(path, data),
            split=split,
            target=class_target(index, wanted),
            load=partial(read_image, path, wanted.channels, wanted.colour),
        )
        for index, name in enumerate(wanted.classes)
        for path in _image_files(folder / name)
    ]


def _read_pairs(data: FolderData, wanted: Wanted, split: Split | None) -> list[Case]:
    folder = data.root / split if split else data.root
    masks = _by_stem(folder / data.masks)
    valid = _by_stem(folder / data.valid) if data.valid else None
    cases = []
    images = _by_stem(folder / data.images) if (folder / data.images).is_dir() else {}
    for path in images.values():
        mask = _partner(path, masks, folder / data.masks)
        inside = _partner(path, valid, folder / str(data.valid)) if valid is not None else None
        cases.append(
            Case(
                name=str(path.relative_to(data.root)),
                patient=_patient(path, data),
                split=split,
                target=None,
                load=partial(read_image, path, wanted.channels, wanted.colour),
                load_mask=partial(read_mask, mask, inside, len(wanted.classes)),
            )
        )
    return cases


def _image_files(folder: Path) -> list[Path]:
    """Every image below a folder; sorted, because file systems differ in their order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; set data.masks and data.valid to what is there")
    found: dict[str, Path] = {}
    for path in _image_files(folder):
        if path.stem in found:
            raise DataError(f"{folder}: {found[path.stem].name} and {path.name} have one stem")
        found[path.stem] = path
    return found


def _partner(image: Path, others: dict[str, Path], folder: Path) -> Path:
    if image.stem not in others:
        raise DataError(f"{image.name}: no file with this stem in {folder}")
    return others[image.stem]


def _patient(path: Path, data: FolderData) -> str:
    if data.patient is None:
        return str(path.relative_to(data.root))
    found = re.search(data.patient, path.name)
    if found is None or not found.group(1):
        raise DataError(f"{path.name}: data.patient does not match this file's name")
    return found.group(1)
