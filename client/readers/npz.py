"""Read the MedMNIST layout: one npz file with images and labels of each split.

Source: Yang et al. (2023), MedMNIST v2.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from client.config import NpzData
from client.readers.case import Case, Split, Wanted
from common.errors import DataError

UNREADABLE = (
    *(OSError, ValueError, EOFError, AttributeError, TypeError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error),  # unknown compression is a RuntimeError
)


def read_npz(data: NpzData, wanted: Wanted) -> list[Case]:
    """Cases of ``{train,val,test}_images`` with ``_labels`` and, where declared, ``_patients``.

    Raises:
      DataError: The file is missing or broken, an array is missing or has another shape, or a
        label is not one of the study's classes.
    """
    if wanted.labels == "masks":
        raise DataError(f"data set {data.name}: npz files hold labels; masks need folder or csv")
    with open_npz(data.root) as (path, arrays):
        return [case for split in Split for case in _read_split(path, arrays, split, data, wanted)]


@contextmanager
def open_npz(root: Path) -> Iterator[tuple[Path, NpzFile]]:
    """The npz file at ``root``, or the only one in that folder.

    Raises:
      DataError: There is not exactly one, or it cannot be read; also while it is being read.
    """
    path = _file(root)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield path, arrays
    except UNREADABLE as error:
        raise DataError(f"{path.name}: not a readable npz file ({error})") from None


def _file(root: Path) -> Path:
    if root.is_file():
        return root
    found = sorted(root.glob("*.npz"))
    if len(found) != 1:
        raise DataError(f"{root}: expected one npz file there, found {len(found)}; set data.root")
    return found[0]


def _read_split(path: Path, arrays: Any, split: Split, data: NpzData, wanted: Wanted) -> list[Case]:
    if f"{split}_images" not in arrays:
        if split == Split.TRAIN:
            raise DataError(f"{path.name}: no array train_images; the MedMNIST layout has one")
        return []
    images = _with_channels_first(path, arrays[f"{split}_images"], wanted.channels)
    labels = _labels(path, arrays, split, wanted, len(images))
    patients = _patients(path, arrays, split, len(images)) if data.patients else None
    return [
        Case(
            name=f"{path.name}, {split} image {index}",
            patient=str(patients[index]) if patients is not None else f"{split}-{index}",
            split=split,
            target=label,
            load=partial(images.__getitem__, index),
        )
        for index, label in enumerate(labels)
    ]


def _with_channels_first(path: Path, images: NDArray[Any], channels: int) -> NDArray[Any]:
    """(N, H, W) or (N, H, W, C) to (N, C, H, W)."""
    if images.ndim == 3:  # noqa: PLR2004
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):  # noqa: PLR2004
        raise DataError(f"{path.name}: images of shape {images.shape}, expected (N, H, W[, 3])")
    if images.shape[-1] > channels:
        raise DataError(f"{path.name}: colour images; set input.channels = 3 in the study")
    return np.moveaxis(images, -1, 1)


def _labels(path: Path, arrays: Any, split: Split, wanted: Wanted, num: int) -> NDArray[np.int64]:
    key = f"{split}_labels"
    if key not in arrays or arrays[key].shape[:1] != (num,):
        raise DataError(f"{path.name}: {key} is missing or not as long as {split}_images")
    given = arrays[key]
    if not np.isfinite(given).all() or (given != np.trunc(given)).any():
        raise DataError(f"{path.name}: {key} must hold whole numbers")
    labels: NDArray[np.int64] = given.astype(np.int64)
    num_classes = len(wanted.classes)
    if wanted.labels == "multilabel":
        if labels.shape != (num, num_classes) or not np.isin(labels, (0, 1)).all():
            raise DataError(f"{path.name}: {key} must hold {num_classes} columns of 0 and 1")
        return labels
    labels = labels.reshape(num, -1 if num else 1)
    if labels.shape[1] != 1 or labels.min(initial=0) < 0 or labels.max(initial=0) >= num_classes:
        raise DataError(f"{path.name}: {key} must hold one class index below {num_classes} each")
    return labels[:, 0]


def _patients(path: Path, arrays: Any, split: Split, num: int) -> NDArray[Any]:
    key = f"{split}_patients"
    if key not in arrays or len(arrays[key]) != num:
        raise DataError(f"{path.name}: {key} is missing or not as long as {split}_images")
    return np.asarray(arrays[key]).reshape(num)
