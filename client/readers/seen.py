"""What the files of a data set themselves hold, where no study says what to expect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from client.config import CsvData, Data, Files, MsdData, NpzData, VocData
from client.readers.case import Labels, Split, Wanted
from client.readers.csv import read_rows
from client.readers.image import AS_STORED, SUFFIXES
from client.readers.msd import classes_of
from client.readers.nifti import SUFFIXES as NIFTI
from client.readers.npz import open_npz
from client.readers.voc import classes_in
from common.errors import DataError

PHANTOM_CLASSES = ("no lesion", "lesion")
VOLUME = (0, 0, 0)  # of any size
NO_SIZE = {"folder": (), "nifti": VOLUME, "dicom": ()}
MASKS = Wanted("masks", ("background", "foreground"), channels=AS_STORED, size=())


def seen(data: Data) -> Wanted:  # noqa: PLR0911 - one for each format
    """Classes and channels as they are stored.

    Raises:
      DataError: The files cannot be read; or only a study can say what the columns mean.
    """
    if isinstance(data, Files) and data.layout == "pairs":
        return replace(MASKS, size=NO_SIZE[data.format])
    if isinstance(data, MsdData):
        return Wanted("masks", classes_of(data), channels=AS_STORED, size=VOLUME)
    if isinstance(data, VocData):
        return Wanted("boxes", classes_in(data), channels=AS_STORED, size=())
    if isinstance(data, CsvData):
        return _seen_csv(data)
    if isinstance(data, Files):
        size = NO_SIZE[data.format]
        return Wanted("multiclass", _class_folders(data.root), channels=AS_STORED, size=size)
    if isinstance(data, NpzData):
        return _seen_npz(data)
    return Wanted("binary", PHANTOM_CLASSES, channels=1, size=(64, 64))


def _class_folders(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; set data.root")
    splits = [root / split for split in Split if (root / split).is_dir()]
    found = {p.name for folder in splits or [root] for p in folder.iterdir() if p.is_dir()}
    return tuple(sorted(found))


def _seen_csv(data: CsvData) -> Wanted:
    rows = read_rows(data, images=False)
    images = data.image in rows[0][1]
    if data.target is None:
        raise DataError(f"{data.table}: a column per label; the study names them, so give --study")
    found = {row[data.target] for _, row in rows}
    if all(value.lower().endswith((*SUFFIXES, *NIFTI)) for value in found):
        return MASKS
    classes = sorted({name.strip() for value in found for name in value.split("|")} - {""})
    labels: Labels = "multilabel" if any("|" in value for value in found) else "multiclass"
    return Wanted(labels, tuple(classes), channels=AS_STORED, size=(), images=images)


def _seen_npz(data: NpzData) -> Wanted:
    with open_npz(data.root) as (_, arrays):
        labels = arrays.get("train_labels", np.zeros((0, 1)))
    if labels.ndim == 2 and labels.shape[1] > 1:  # noqa: PLR2004
        names = tuple(f"label {k}" for k in range(labels.shape[1]))
        return Wanted("multilabel", names, channels=3, size=())
    num_classes = int(labels.max(initial=0)) + 1
    return Wanted(
        "multiclass", tuple(f"class {k}" for k in range(num_classes)), channels=3, size=()
    )
