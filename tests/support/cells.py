"""Made-up blood smears in the Pascal VOC layout: bright squares and dark ones, each in a box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("bright", "dark")
BOX = "<object><name>{name}</name><bndbox>{sides}</bndbox></object>"
NAMES = ("xmin", "ymin", "xmax", "ymax")


def smear(
    number: int, size: tuple[int, int] = (48, 64)
) -> tuple[NDArray[np.uint8], list[list[Any]]]:
    """Grey values and boxes: a class's name, and sides as the layout counts them, from 1."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(118, 138, size, dtype=np.uint8)
    boxes: list[list[Any]] = []
    for cell in rng.permutation(6)[: 1 + number % 4]:
        side = int(rng.integers(8, 15))
        x, y = 21 * (int(cell) % 3) + 2, 24 * (int(cell) // 3) + 4
        kind = int(rng.integers(2))
        pixels[y : y + side, x : x + side] = (230, 25)[kind]
        boxes.append([CLASSES[kind], x + 1, y + 1, x + side, y + side])
    return pixels, boxes


def annotation(boxes: list[list[Any]]) -> str:
    """The XML file of one image."""
    objects = (
        BOX.format(
            name=name,
            sides="".join(f"<{n}>{v}</{n}>" for n, v in zip(NAMES, sides, strict=True)),
        )
        for name, *sides in boxes
    )
    return f"<annotation>{''.join(objects)}</annotation>"


def write_smears(root: Path, num: int) -> None:
    """``num`` images with their annotations; a list of each split."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number in range(num):
        pixels, boxes = smear(number)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"s{number:02d}.png")
        (root / "Annotations" / f"s{number:02d}.xml").write_text(annotation(boxes))
    stems = [f"s{number:02d}\n" for number in range(num)]
    parts = {
        "train": stems[num // 2 :],
        "val": stems[: num // 4],
        "test": stems[num // 4 : num // 2],
    }
    for split, some in parts.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(some))
