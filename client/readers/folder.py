"""Read image, NIfTI or DICOM files from folders.

``layout = "classes"``: ``root/<class>/*.png``. ``layout = "pairs"``: ``root/images/*.png`` beside
``root/masks/`` and, where it is named, ``root/valid/``; the same stem is the same case, and of a
DICOM series the name of its folder. Either may lie in ``root/{train,val,test}/`` where the data has
splits.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from client.config import Files
from client.readers.case import Case, Split, Wanted, class_target
from client.readers.files import WHAT, Source, load_classes, sources_below
from client.readers.image import SUFFIXES
from client.readers.nifti import SUFFIXES as NIFTI
from common.errors import DataError


def read_folder(data: Files, wanted: Wanted) -> list[Case]:
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
        raise DataError(f"{data.root}: no {WHAT[data.format]} file in {where}")
    return cases


def _read_classes(data: Files, wanted: Wanted, split: Split | None) -> list[Case]:
    folder = data.root / split if split else data.root
    present = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    if unknown := sorted(present - set(wanted.classes)):
        raise DataError(f"{folder}: folder {unknown[0]!r} is not a class of the study")
    return [
        Case(
            name=str(source.path.relative_to(data.root)),
            patient=_patient(source, data),
            split=split,
            target=class_target(index, wanted),
            load=source.load,
            look=source.look,
        )
        for index, name in enumerate(wanted.classes)
        if (folder / name).is_dir()
        for source in sources_below(folder / name, data.format, wanted)
    ]


def _read_pairs(data: Files, wanted: Wanted, split: Split | None) -> list[Case]:
    folder = data.root / split if split else data.root
    masks = _by_stem(folder / data.masks)
    valid = _by_stem(folder / data.valid) if data.valid else None
    images = folder / data.images
    found = sources_below(images, data.format, wanted) if images.is_dir() else []
    _check_stems(found, images)
    cases = []
    for source in found:
        mask = _partner(source, masks, folder / data.masks)
        inside = _partner(source, valid, folder / str(data.valid)) if valid is not None else None
        cases.append(
            Case(
                name=str(source.path.relative_to(data.root)),
                patient=_patient(source, data),
                split=split,
                target=None,
                load=source.load,
                load_mask=partial(load_classes, mask, inside, source, wanted),
                look=source.look,
            )
        )
    return cases


def _check_stems(found: list[Source], folder: Path) -> None:
    by_stem: dict[str, Source] = {}
    for source in found:
        if source.stem in by_stem:
            one = by_stem[source.stem].path.name
            raise DataError(f"{folder}: {one} and {source.path.name} have one stem")
        by_stem[source.stem] = source


def _by_stem(folder: Path) -> dict[str, Path]:
    """Masks, which are pictures or NIfTI files."""
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; set data.masks and data.valid to what is there")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):  # file systems differ in their order
        name = path.name.lower()
        ending = next((each for each in (*NIFTI, *SUFFIXES) if name.endswith(each)), None)
        if ending is None:
            continue
        stem = path.name[: -len(ending)]
        if stem in found:
            raise DataError(f"{folder}: {found[stem].name} and {path.name} have one stem")
        found[stem] = path
    return found


def _partner(image: Source, others: dict[str, Path], folder: Path) -> Path:
    if image.stem not in others:
        raise DataError(f"{image.path.name}: no file with this stem in {folder}")
    return others[image.stem]


def _patient(source: Source, data: Files) -> str:
    if data.patient is None and data.format == "dicom":
        if not source.patient:
            raise DataError(
                f"{source.path.name}: its header has no PatientID; set data.patient to a pattern "
                "that finds the patient in the file's name"
            )
        return source.patient
    if data.patient is None:
        return str(source.path.relative_to(data.root))
    found = re.search(data.patient, source.path.name)
    if found is None or not found.group(1):
        raise DataError(f"{source.path.name}: data.patient does not match this file's name")
    return found.group(1)
