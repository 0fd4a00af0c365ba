"""A model and a split in, summable counts out."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray

from client.dataset import Samples
from client.images import Batch, Images
from common.models.flat import FlatNetwork
from common.tasks import Task

BATCH = 256  # images scored at once; the counts do not depend on it
MAX_PIXELS = 2**22  # of one batch, so that large images are scored one by one
MAX_WINDOWS = 16  # of a scan, scored at once
OVERLAP = 0.25  # of neighbouring windows, where a scan is larger than one


def evaluate(
    model: NDArray[np.float32], samples: Samples, *, network: FlatNetwork, task: Task
) -> NDArray[np.int64]:
    """Counts of a model on one split, shape (num_counts,). Private until they are summed."""
    network.load(model)
    counts = np.zeros(task.num_counts, np.int64)
    for outputs, targets in predictions(samples, network):
        counts += task.counts(outputs, targets)
    return counts


def predictions(samples: Samples, network: FlatNetwork) -> Iterator[Batch]:
    """Outputs and targets, batch by batch, in the order of the samples; a scan is a batch."""
    network.module.eval()
    with torch.inference_mode():
        if isinstance(samples, Images):
            num = max(1, min(BATCH, MAX_PIXELS // max(1, samples.part(slice(1))[0].numel())))
            for low in range(0, len(samples), num):
                pixels, targets = samples.part(slice(low, low + num))
                yield network(pixels), targets
            return
        windows = MAX_PIXELS // math.prod(samples.patch)
        for pixels, target in samples.whole():
            # Windows have the size of the training patches: GroupNorm's statistics depend on it.
            outputs = sliding_window_inference(
                pixels,
                samples.patch,
                sw_batch_size=max(1, min(MAX_WINDOWS, windows)),
                predictor=network,
                overlap=OVERLAP,
                mode="gaussian",
            )
            yield outputs, target
