"""A model and a split in, summable counts out."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from client.dataset import Images
from common.models.flat import FlatNetwork
from common.tasks import Task

BATCH = 256  # images scored at once; the counts do not depend on it


def evaluate(
    model: NDArray[np.float32], images: Images, *, network: FlatNetwork, task: Task
) -> NDArray[np.int64]:
    """Counts of a model on one split, shape (num_counts,). Private until they are summed."""
    network.load(model)
    network.module.eval()
    counts = np.zeros(task.num_counts, np.int64)
    with torch.inference_mode():
        for low in range(0, len(images), BATCH):
            part = slice(low, low + BATCH)
            counts += task.counts(network(images.pixels[part]), images.targets[part])
    return counts
