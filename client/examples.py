"""One test image with its mask and what the returned model says of it, kept at the site.

It never leaves the site. A report of a simulation shows it, since there the sites lie in the run
folder. Which image it is was fixed before the model was asked: the first of the test split.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.dataset import Samples
from client.evaluate import predictions
from client.images import Images
from common.models.flat import FlatNetwork
from common.simulation import EXAMPLE
from common.tasks import SegmentationTask
from common.tasks.losses import OUTSIDE


def keep_example(
    model: NDArray[np.float32],
    samples: Samples,
    folder: Path,
    *,
    network: FlatNetwork,
    task: SegmentationTask,
) -> None:
    """Write ``example.npz``; without a test image nothing is written.

    Of a volume, the slice with the most pixels that are not background is kept.
    """
    if not len(samples):
        return
    network.load(model)
    outputs, masks = next(predictions(_first(samples), network))
    image, mask, predicted = samples.pixels[0][0], masks[0], task.decide(outputs)[0]
    if mask.ndim == 3:  # noqa: PLR2004
        known = ((mask > 0) & (mask != OUTSIDE)).flatten(1).sum(dim=1)
        depth = int(known.argmax())
        image, mask, predicted = image[depth], mask[depth], predicted[depth]
    beside = folder / f".{EXAMPLE}"
    with beside.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        np.savez_compressed(
            file,
            image=_grey(image),
            mask=mask.cpu().numpy(),
            predicted=predicted.cpu().numpy(),
        )
    beside.replace(folder / EXAMPLE)


def _first(samples: Samples) -> Samples:
    if isinstance(samples, Images):
        return Images(samples.pixels[:1], samples.targets[:1], samples.patients[:1])
    return type(samples)(
        samples.pixels[:1], samples.targets[:1], samples.patients[:1], samples.patch
    )


def _grey(image: Tensor) -> NDArray[np.uint8]:
    """From the darkest to the brightest value, for people to look at."""
    low, high = image.min(), image.max()
    grey = 255 * (image - low) / torch.clamp(high - low, min=1e-6)
    return grey.round().to(torch.uint8).cpu().numpy()
