"""Read a task of the Medical Segmentation Decathlon: what its ``dataset.json`` lists.

Source: Antonelli et al. (2022), The Medical Segmentation Decathlon.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from client.config import MsdData
from client.readers.case import Case, Wanted
from client.readers.files import load_classes, source_at
from common.errors import DataError

INDEX = "dataset.json"


def read_msd(data: MsdData, wanted: Wanted) -> list[Case]:
    """A case for every volume with a mask; the test volumes have none and are left out.

    Raises:
      DataError: The list is missing or damaged, names a file outside the folder, or has other
        classes than the study.
    """
    if wanted.labels != "masks":
        raise DataError(f"{INDEX}: lists masks, this study has labels; use another data.format")
    classes = classes_of(data)
    if len(classes) != len(wanted.classes):
        raise DataError(
            f"{INDEX}: {len(classes)} labels ({', '.join(classes)}), the study has "
            f"{len(wanted.classes)} ({', '.join(wanted.classes)})"
        )
    listed = _index(data).get("training")
    if not isinstance(listed, list) or not listed:
        raise DataError(f'{data.root / INDEX}: "training" lists no volume')
    cases = []
    for place, entry in enumerate(listed):
        image, mask = (_path(data, entry, key, place) for key in ("image", "label"))
        source = source_at(image, wanted)
        cases.append(
            Case(
                name=str(image.relative_to(data.root)),
                patient=source.stem,
                split=None,
                target=None,
                load=source.load,
                load_mask=partial(load_classes, mask, None, source, wanted),
                look=source.look,
            )
        )
    return cases


def classes_of(data: MsdData) -> tuple[str, ...]:
    """Names of the labels, from 0.

    Raises:
      DataError: They are missing, or their numbers have gaps.
    """
    labels = _index(data).get("labels")
    if not isinstance(labels, dict):
        raise DataError(f'{data.root / INDEX}: "labels" is missing')
    numbers = [str(number) for number in range(len(labels))]
    if sorted(labels) != sorted(numbers):
        raise DataError(f'{data.root / INDEX}: "labels" must be numbered from 0 without gaps')
    return tuple(str(labels[number]) for number in numbers)


def _index(data: MsdData) -> dict[str, Any]:
    path = data.root / INDEX
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable list ({error}); set data.root") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a Decathlon list")
    return found


def _path(data: MsdData, entry: Any, key: str, place: int) -> Path:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        raise DataError(f'{data.root / INDEX}: entry {place + 1} of "training" has no {key!r}')
    if not (data.root / value).resolve().is_relative_to(data.root.resolve()):
        where = f'{data.root / INDEX}: entry {place + 1} of "training"'
        raise DataError(f"{where} leads out of data.root")
    return data.root / value
