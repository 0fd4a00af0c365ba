"""Generated patients: a data set for the demo, for tests and for studies without data.

Films of two dimensions or volumes of three, by the study's ``input.size``. Their classes are those
of a mask (background, lung, heart, lesion), or whether there is a lesion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.config import PhantomData
from client.readers.case import Case, Wanted, class_target
from common.errors import DataError
from common.phantom import LESION, MIN_SIZE, Scanner, draw_patient, scanner_of_site
from common.phantom_volume import draw_volume

TISSUES = ("background", "lung", "heart", "lesion")  # by their value in a phantom's mask
_SKEW = 7  # a stream of its own for the class shares

Film = tuple[NDArray[np.float32], NDArray[np.uint8], int]  # grey values 0..1, mask, has a lesion


def read_phantoms(data: PhantomData, wanted: Wanted) -> list[Case]:
    """Cases of ``num_patients`` generated patients; the site's index chooses its scanner.

    Raises:
      DataError: The study's classes or input are not what phantoms have.
    """
    if wanted.channels != 1 or wanted.labels not in ("binary", "masks"):
        raise DataError("phantoms are grey images of two classes: without and with a lesion")
    if len(set(wanted.size)) != 1 or wanted.size[0] < MIN_SIZE:
        raise DataError(
            f"phantoms have equal sides of {MIN_SIZE} pixels or more; input.size is "
            f"{list(wanted.size)}"
        )
    if wanted.labels == "masks" and not set(wanted.classes[1:]) <= set(TISSUES[1:]):
        raise DataError(f"after the background, the classes of phantoms are {TISSUES[1:]}")
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
    for view, (image, mask, label) in enumerate(_films(data, wanted, scanner, patient)):
        classes = _classes(mask, wanted) if wanted.labels == "masks" else None
        yield Case(
            name=f"phantom {patient}, view {view}",
            patient=str(patient),
            split=None,
            target=class_target(label, wanted) if classes is None else None,
            load=partial(_pixels, image),
            load_mask=None if classes is None else classes.copy,
        )


def _films(data: PhantomData, wanted: Wanted, scanner: Scanner, patient: int) -> Iterator[Film]:
    size, who = wanted.size[0], (data.seed, data.site_index, patient)
    if len(wanted.size) == 3:  # noqa: PLR2004
        volume = draw_volume(*who, scanner=scanner, size=size)
        yield volume.volume, volume.mask, int((volume.mask == LESION).any())
        return
    num_images = data.images_per_patient
    for phantom in draw_patient(*who, scanner=scanner, size=size, num_images=num_images):
        yield phantom.image, phantom.mask, phantom.label


def _classes(mask: NDArray[np.uint8], wanted: Wanted) -> NDArray[np.uint8]:
    """A phantom's mask in the study's classes; a tissue the study does not name is background."""
    numbers = [
        wanted.classes.index(tissue) if tissue in wanted.classes[1:] else 0 for tissue in TISSUES
    ]
    classes: NDArray[np.uint8] = np.array(numbers, np.uint8)[mask]
    return classes


def _pixels(image: NDArray[np.float32]) -> NDArray[Any]:
    """8-bit grey values, as a scanner would store them, shape (1, *size)."""
    return np.rint(image * 255).astype(np.uint8)[None]
