"""Generated patients: a data set for the demo, for tests and for studies without data.

Films of two dimensions or volumes of three, by the study's ``input.size``, or records alone. Their
classes are those of a mask (background, lung, heart, lesion), or whether there is a lesion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.config import PhantomData
from client.readers.case import Case, Wanted, class_target
from common.errors import DataError
from common.phantom import (
    LESION,
    MIN_SIZE,
    Scanner,
    draw_patient,
    has_lesions,
    scanner_of_site,
)
from common.phantom_record import draw_record
from common.phantom_volume import draw_volume

TISSUES = ("background", "lung", "heart", "lesion")  # by their value in a phantom's mask
_SKEW = 7  # a stream of its own for the class shares

NO_BOXES = np.empty((0, 4), np.float32)


class Film(NamedTuple):
    """One view of a generated patient: a film, or a volume."""

    image: NDArray[np.float32]  # grey values 0..1
    mask: NDArray[np.uint8]
    has_lesion: int
    boxes: NDArray[np.float32]  # (num_lesions, 4) left, upper, right and lower side


def read_phantoms(data: PhantomData, wanted: Wanted) -> list[Case]:
    """Cases of ``num_patients`` generated patients; the site's index chooses its scanner.

    Raises:
      DataError: The study's classes or input are not what phantoms have.
    """
    if wanted.channels != 1 or wanted.labels not in ("binary", "masks", "boxes"):
        raise DataError("phantoms are grey images of two classes: without and with a lesion")
    if wanted.images and (len(set(wanted.size)) != 1 or wanted.size[0] < MIN_SIZE):
        raise DataError(
            f"phantoms have equal sides of {MIN_SIZE} pixels or more; input.size is "
            f"{list(wanted.size)}"
        )
    if wanted.labels == "masks" and not set(wanted.classes[1:]) <= set(TISSUES[1:]):
        raise DataError(f"after the background, the classes of phantoms are {TISSUES[1:]}")
    if wanted.labels == "boxes" and wanted.classes != ("lesion",):
        raise DataError('boxes in phantoms are around lesions; set task.classes = ["lesion"]')
    scanner = scanner_of_site(data.seed, data.site_index)
    if data.label_skew is not None:
        scanner = replace(scanner, prevalence=_skewed(data, data.label_skew))
    return [
        case
        for patient in range(data.num_patients)
        for case in _cases(data, wanted, scanner, patient)
    ]


def _skewed(data: PhantomData, concentration: float) -> float:
    """The site's share of patients with lesions, from a symmetric Dirichlet over both classes.

    Source:
      Hsu, Qi and Brown (2019), Measuring the Effects of Non-Identical Data Distribution.
    """
    rng = np.random.default_rng([data.seed, data.site_index, _SKEW])
    return float(rng.dirichlet([concentration] * 2)[0])


def _cases(data: PhantomData, wanted: Wanted, scanner: Scanner, patient: int) -> Iterator[Case]:
    who = (data.seed, data.site_index, patient)
    record = draw_record(*who, prevalence=scanner.prevalence)
    if not wanted.images:
        ill = has_lesions(*who, scanner.prevalence)
        yield Case(
            name=f"phantom {patient}",
            patient=str(patient),
            split=None,
            target=class_target(int(ill), wanted),
            load=partial(np.empty, 0, np.float32),
            columns=record,
        )
        return
    for view, film in enumerate(_films(data, wanted, scanner, patient)):
        has_label = wanted.labels == "binary"
        yield Case(
            name=f"phantom {patient}, view {view}",
            patient=str(patient),
            split=None,
            target=class_target(film.has_lesion, wanted) if has_label else None,
            load=partial(_pixels, film.image),
            load_mask=_classes(film.mask, wanted).copy if wanted.labels == "masks" else None,
            load_boxes=partial(_boxes, film.boxes) if wanted.labels == "boxes" else None,
            columns=record,
        )


def _films(data: PhantomData, wanted: Wanted, scanner: Scanner, patient: int) -> Iterator[Film]:
    size, who = wanted.size[0], (data.seed, data.site_index, patient)
    if len(wanted.size) == 3:  # noqa: PLR2004
        volume = draw_volume(*who, scanner=scanner, size=size)
        has_lesion = int((volume.mask == LESION).any())
        yield Film(volume.volume, volume.mask, has_lesion, NO_BOXES)
        return
    num_images = data.images_per_patient
    for phantom in draw_patient(*who, scanner=scanner, size=size, num_images=num_images):
        yield Film(phantom.image, phantom.mask, phantom.label, phantom.boxes)


def _classes(mask: NDArray[np.uint8], wanted: Wanted) -> NDArray[np.uint8]:
    """A phantom's mask in the study's classes; a tissue the study does not name is background."""
    numbers = [
        wanted.classes.index(tissue) if tissue in wanted.classes[1:] else 0 for tissue in TISSUES
    ]
    classes: NDArray[np.uint8] = np.array(numbers, np.uint8)[mask]
    return classes


def _boxes(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """With the number of their class, which is lesion."""
    return np.pad(boxes.astype(np.float64), ((0, 0), (0, 1)))


def _pixels(image: NDArray[np.float32]) -> NDArray[Any]:
    """8-bit grey values, as a scanner would store them, shape (1, *size)."""
    return np.rint(image * 255).astype(np.uint8)[None]
