"""One test image with its mask or boxes and what the returned model says of it, kept at the site.

It never leaves the site. A report of a simulation shows it, since there the sites lie in the run
folder. Which image it is was fixed before the model was asked: the first of the test split.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.dataset import Samples
from client.evaluate import predictions
from client.images import Images
from common.models.flat import FlatNetwork
from common.simulation import EXAMPLE
from common.tasks import DetectionTask, SegmentationTask
from common.tasks.boxes import Found
from common.tasks.losses import OUTSIDE


def keep_example(
    model: NDArray[np.float32],
    samples: Samples,
    folder: Path,
    *,
    network: FlatNetwork,
    task: SegmentationTask | DetectionTask,
) -> None:
    """Write ``example.npz``; without a test image nothing is written.

    Of a volume, the slice with the most pixels that are not background is kept.
    """
    if not len(samples):
        return
    network.load(model)
    outputs, targets = next(predictions(_first(samples), network))
    pixels = samples.pixels[0]
    if isinstance(task, DetectionTask):
        kept = _with_boxes(pixels, targets[0], task.decide(outputs[0]), task)
    else:
        kept = _with_masks(pixels[0], targets[0], task.decide(outputs)[0])
    beside = folder / f".{EXAMPLE}"
    with beside.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        np.savez_compressed(file, allow_pickle=False, **kept)
    beside.replace(folder / EXAMPLE)


def _with_masks(image: Tensor, mask: Tensor, predicted: Tensor) -> dict[str, NDArray[Any]]:
    if mask.ndim == 3:  # noqa: PLR2004
        known = ((mask > 0) & (mask != OUTSIDE)).flatten(1).sum(dim=1)
        depth = int(known.argmax())
        image, mask, predicted = image[depth], mask[depth], predicted[depth]
    return {
        "image": _grey(image),
        "mask": mask.cpu().numpy(),
        "predicted": predicted.cpu().numpy(),
    }


def _with_boxes(
    pixels: Tensor, boxes: Tensor, found: Found, task: DetectionTask
) -> dict[str, NDArray[Any]]:
    """True boxes (num_boxes, 5) and shown findings (num_found, 5), with sides and class each."""
    shown = found.logits >= task.threshold
    image = _grey(pixels)
    return {
        "image": image[0] if len(image) == 1 else np.moveaxis(image, 0, -1),
        "boxes": boxes[boxes[:, 4] >= 0].cpu().numpy(),
        "found": found.as_boxes()[shown].float().cpu().numpy(),
    }


def _first(samples: Samples) -> Samples:
    patients = samples.patients[:1]
    if isinstance(samples, Images):
        pixels, targets = samples.pixels[:1], samples.targets[:1]
        return replace(samples, pixels=pixels, targets=targets, patients=patients)
    scan, mask = samples.pixels[:1], samples.targets[:1]
    return replace(samples, pixels=scan, targets=mask, patients=patients)


def _grey(image: Tensor) -> NDArray[np.uint8]:
    """From the darkest to the brightest value, for people to look at."""
    low, high = image.min(), image.max()
    grey = 255 * (image - low) / torch.clamp(high - low, min=1e-6)
    return grey.round().to(torch.uint8).cpu().numpy()
