"""What the files of a data set themselves hold, where no study says what to expect."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.config import CsvData, Data, FolderData, NpzData
from client.readers.case import Labels, Split, Wanted
from client.readers.csv import read_rows
from client.readers.image import AS_STORED, SUFFIXES
from client.readers.npz import open_npz
from common.errors import DataError

PHANTOM_CLASSES = ("no lesion", "lesion")
MASKS = Wanted("masks", ("background", "foreground"), channels=AS_STORED, size=())


def seen(data: Data) -> Wanted:
    """Classes and channels as they are stored.

    Raises:
      DataError: The files cannot be read; or only a study can say what the columns mean.
    """
    if isinstance(data, FolderData) and data.layout == "pairs":
        return MASKS
    if isinstance(data, CsvData):
        return _seen_csv(data)
    if isinstance(data, FolderData):
        return Wanted("multiclass", _class_folders(data.root), channels=AS_STORED, size=())
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
    rows = read_rows(data)
    if data.target is None:
        raise DataError(f"{data.table}: a column per label; the study names them, so give --study")
    found = {row[data.target] for _, row in rows}
    if all(Path(value).suffix.lower() in SUFFIXES for value in found):
        return MASKS
    classes = sorted({name.strip() for value in found for name in value.split("|")} - {""})
    labels: Labels = "multilabel" if any("|" in value for value in found) else "multiclass"
    return Wanted(labels, tuple(classes), channels=AS_STORED, size=())


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
