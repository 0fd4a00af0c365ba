"""Examples of a simulated detection run: a site's test image, its true boxes and the model's.

What ``server.reporting.overlays`` is for masks; the colours are the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from common.study.task import NUM_SIDES
from common.tasks import DetectionTask, task_of
from common.tasks.boxes import BOX, partners_of
from server.reporting.overlays import (
    LONGEST_SIDE,
    MEANINGS,
    OUTLINE,
    Agreement,
    Colour,
    Overlay,
    arrays_of,
    kept_examples,
    no_example,
    png,
)
from server.reporting.record import Record

Boxes = NDArray[np.float32]  # (num, 5): left, upper, right, lower side, class
LINE: Final = 2  # pixels of the picture


@dataclass(frozen=True)
class Kept:
    """Private. What a site kept of one image."""

    image: NDArray[np.uint8]  # (height, width) or (height, width, 3)
    boxes: Boxes
    found: Boxes  # the surest first


def draw_boxed(record: Record) -> list[Overlay]:
    """Pictures of up to four sites' test images with boxes; see ``draw_overlays``.

    Raises:
      FederationError: A file is not what a site writes; the message names it.
    """
    task = task_of(record.study)
    if not isinstance(task, DetectionTask):
        return []
    folder = record.run_dir.path
    return [_overlay(site, name, folder, task) for site, name in kept_examples(record)]


def _overlay(site: str, name: str, folder: Path, task: DetectionTask) -> Overlay:
    content = (folder / name).read_bytes()
    kept = _read(content, name, num_classes=len(task.classes))
    partners = partners_of(torch.from_numpy(kept.found), torch.from_numpy(kept.boxes)).numpy()
    agreement = [
        (Agreement.MISSED, np.delete(kept.boxes, partners[partners >= 0], axis=0)),
        (Agreement.FOUND, kept.found[partners >= 0]),
        (Agreement.EXTRA, kept.found[partners < 0]),
    ]
    return Overlay(
        image=png(drawn(kept.image, [])),
        truth=png(drawn(kept.image, [(OUTLINE, kept.boxes)])),
        agreement=png(drawn(kept.image, [(MEANINGS[kind][0], boxes) for kind, boxes in agreement])),
        facts={
            "site": site,
            "boxes": {kind.name.lower(): len(boxes) for kind, boxes in agreement},
            "file": name,
            "sha256": hashlib.sha256(content).hexdigest(),
        },
    )


def drawn(image: NDArray[np.uint8], outlines: list[tuple[str, Boxes]]) -> Colour:
    """The image, as large as pictures of a report are, with boxes in their colours."""
    picture = Image.fromarray(image).convert("RGB")
    factor = LONGEST_SIDE / max(picture.size)
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)))
    pen = ImageDraw.Draw(picture)
    for colour, boxes in outlines:
        for left, upper, right, lower in (factor * boxes[:, :NUM_SIDES]).round().tolist():
            pen.rectangle((left, upper, max(left, right), max(upper, lower)), None, colour, LINE)
    return np.asarray(picture)


def _read(content: bytes, name: str, *, num_classes: int) -> Kept:
    """The arrays of one file; ``client.examples`` wrote it."""
    kept, wrong = Kept(*arrays_of(content, name, "image", "boxes", "found")), no_example(name)
    is_picture = kept.image.ndim in (2, 3) and kept.image.shape[2:] in ((), (3,))
    if kept.image.dtype != np.uint8 or not kept.image.size or not is_picture:
        raise wrong
    for boxes in (kept.boxes, kept.found):
        if boxes.dtype != np.float32 or boxes.shape[1:] != (BOX,):
            raise wrong
        classes = boxes[:, NUM_SIDES]
        if not np.isfinite(boxes).all() or (classes < 0).any() or (classes >= num_classes).any():
            raise wrong
    return kept
