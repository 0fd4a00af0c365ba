"""Read images with boxes in the Pascal VOC layout: one XML file per image.

``root/Annotations/*.xml`` beside ``root/JPEGImages/``; ``root/ImageSets/Main/{train,val,test}.txt``
list the stems of each split, where there are such lists.

Source: Everingham et al. (2010), The Pascal Visual Object Classes Challenge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from client.config import VocData
from client.readers.case import Case, Split, Wanted
from client.readers.files import source_at
from client.readers.image import SUFFIXES
from common.errors import DataError

SIDES = ("xmin", "ymin", "xmax", "ymax")
MAX_BYTES = 1 << 22  # of one annotation; thousands of boxes take one


def read_voc(data: VocData, wanted: Wanted) -> list[Case]:
    """A case for every annotation, in the order of their names.

    Raises:
      DataError: A folder is missing, an annotation has no image or an image no annotation, or a
        list of a split names what is not there.
    """
    if wanted.labels != "boxes":
        raise DataError(
            f"data set {data.name}: holds boxes, which this study does not ask for; use another "
            "data.format"
        )
    annotations = _by_stem(data.root / data.annotations, (".xml",), "data.annotations")
    images = _by_stem(data.root / data.images, tuple(sorted(SUFFIXES)), "data.images")
    if alone := sorted(annotations.keys() - images.keys()):
        raise DataError(f"{annotations[alone[0]].name}: no image with this stem in {data.images}")
    if alone := sorted(images.keys() - annotations.keys()):
        raise DataError(
            f"{images[alone[0]].name}: no annotation in {data.annotations}; an image without boxes "
            "has one without objects"
        )
    splits = _splits(data, annotations)
    return [
        _case(data, wanted, images[stem], path, splits.get(stem) if splits else None)
        for stem, path in annotations.items()
        if splits is None or stem in splits
    ]


def _case(data: VocData, wanted: Wanted, image: Path, path: Path, split: Split | None) -> Case:
    return Case(
        name=str(image.relative_to(data.root)),
        patient=_patient(image, data),
        split=split,
        target=None,
        load=source_at(image, wanted).load,
        load_boxes=partial(read_boxes, path, wanted.classes),
    )


def read_boxes(path: Path, classes: tuple[str, ...]) -> NDArray[np.float64]:
    """The boxes of one annotation, shape (num_boxes, 5): sides in pixels of the file, and class.

    The layout counts pixels from 1 and includes the last one; here a box from 0 to 1 is one pixel.

    Raises:
      DataError: The file is no annotation, or a box has no side or a class that is not the study's.
    """
    objects = _root_of(path).findall("object")
    boxes = np.array([_box(each, classes, path) for each in objects], np.float64).reshape(-1, 5)
    boxes[:, :2] -= 1
    return boxes


def classes_in(data: VocData) -> tuple[str, ...]:
    """Names of all classes that the annotations use, in the order of the alphabet.

    Raises:
      DataError: An annotation cannot be read.
    """
    paths = _by_stem(data.root / data.annotations, (".xml",), "data.annotations").values()
    objects = ((path, each) for path in paths for each in _root_of(path).findall("object"))
    return tuple(sorted({_text(each, "name", path) for path, each in objects}))


def _root_of(path: Path) -> ET.Element:
    try:
        content = path.read_bytes()
        odd = (b"<!DOCTYPE", b"<!ENTITY", b"\0")  # entities; another encoding would hide them
        if len(content) > MAX_BYTES or any(part in content for part in odd):
            raise DataError(f"{path.name}: not a Pascal VOC annotation; export it again")
        return ET.fromstring(content)  # noqa: S314 - entities were refused
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path.name}: not a readable annotation ({error})") from None


def _box(found: ET.Element, classes: tuple[str, ...], path: Path) -> list[float]:
    name = _text(found, "name", path)
    if name not in classes:
        known = ", ".join(classes)
        raise DataError(f"{path.name}: {name!r} is not a class of the study: {known}")
    try:
        sides = [float(_text(found, f"bndbox/{side}", path)) for side in SIDES]
    except ValueError:
        raise DataError(f"{path.name}: a side of a box is no number") from None
    if not np.isfinite(sides).all():
        raise DataError(f"{path.name}: a side of a box is no number")
    return [*sides, float(classes.index(name))]


def _text(found: ET.Element, tag: str, path: Path) -> str:
    text = (found.findtext(tag) or "").strip()
    if not text:
        raise DataError(f"{path.name}: an object without {tag}")
    return text


def _by_stem(folder: Path, suffixes: tuple[str, ...], key: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; set data.root and {key}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not paths:
        raise DataError(f"{folder}: no {' or '.join(suffixes)} file; set data.root and {key}")
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise DataError(f"{folder}: {found[path.stem].name} and {path.name} have one stem")
        found[path.stem] = path
    return found


def _splits(data: VocData, annotations: Mapping[str, Path]) -> dict[str, Split] | None:
    """The split of each stem that a list names; None where there is no list."""
    folder = data.root / data.lists
    lists = {split: folder / f"{split}.txt" for split in Split}
    found: dict[str, Split] = {}
    for split, path in lists.items():
        if not path.is_file():
            continue
        for line, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if not (stem := text.strip()):
                continue
            if stem not in annotations:
                raise DataError(f"{path.name}, line {line}: no annotation with this stem")
            if found.get(stem, split) != split:
                raise DataError(f"{path.name}, line {line}: this image is in two splits")
            found[stem] = split
    return found or None


def _patient(image: Path, data: VocData) -> str:
    if data.patient is None:
        return image.stem
    found = re.search(data.patient, image.name)
    if found is None or not found.group(1):
        raise DataError(f"{image.name}: data.patient does not match this file's name")
    return found.group(1)
