"""Generated patients: a data set for the demo, for tests and for studies without data."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.config import PhantomData
from client.readers.case import Case, Wanted, class_target
from common.errors import DataError
from common.phantom import MIN_SIZE, Phantom, draw_patient, scanner_of_site


def read_phantoms(data: PhantomData, wanted: Wanted) -> list[Case]:
    """Cases of ``num_patients`` generated patients; the site's index chooses its scanner.

    Raises:
      DataError: The study's classes or input are not what phantoms have.
    """
    if wanted.labels != "binary" or wanted.channels != 1:
        raise DataError("phantoms are grey images of two classes: without and with a lesion")
    if len(set(wanted.size)) != 1 or wanted.size[0] < MIN_SIZE:
        raise DataError(
            f"phantoms are square, {MIN_SIZE} pixels or more; input.size is {list(wanted.size)}"
        )
    return [case for index in range(data.num_patients) for case in _cases(data, wanted, index)]


def _cases(data: PhantomData, wanted: Wanted, index: int) -> list[Case]:
    scanner = scanner_of_site(data.seed, data.site_index)
    phantoms: list[Phantom] = draw_patient(
        data.seed,
        data.site_index,
        index,
        scanner=scanner,
        size=wanted.size[0],
        num_images=data.images_per_patient,
    )
    return [
        Case(
            name=f"phantom {index}, view {view}",
            patient=str(index),
            split=None,
            target=class_target(phantom.label, wanted),
            load=partial(_pixels, phantom),
        )
        for view, phantom in enumerate(phantoms)
    ]


def _pixels(phantom: Phantom) -> NDArray[Any]:
    """8-bit grey values, as a scanner would store them, shape (1, size, size)."""
    return np.rint(phantom.image * 255).astype(np.uint8)[None]
