"""Local training: one global model in, one update out."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.augment import augment
from client.dataset import Images
from common.models.flat import FlatNetwork
from common.study import Training
from common.tasks import Task
from common.update import LocalUpdate


def train(
    model: NDArray[np.float32],
    images: Images,
    training: Training,
    *,
    network: FlatNetwork,
    task: Task,
    progress: float,
    rng: torch.Generator,
) -> LocalUpdate:
    """Train on local images and return what changed.

    Args:
      model: The global model, shape (num_params,).
      images: The site's training split.
      training: The approved study's ``[training]``.
      network: A network of the study's model; its weights are overwritten.
      task: Gives the loss.
      progress: Share of the run that is over, 0 to 1; drives the schedule.
      rng: Order of images and augmentation.

    Returns:
      Local minus global model. Private: it must pass the secure sum before it leaves.
    """
    network.load(model)
    network.module.train()
    # Dropout draws from torch's own generator: it too must depend on site and sum alone.
    torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
    optimizer = _optimizer(network, training, progress)
    loss_of = task.local_loss(images.targets)
    for pixels, targets in batches(images, training, rng):
        network.gradients.zero_()
        loss = loss_of(network(pixels), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return LocalUpdate(network.vector() - model)


def _optimizer(network: FlatNetwork, training: Training, progress: float) -> torch.optim.Optimizer:
    """An optimizer over the flat vector: one tensor, and so one update per step."""
    network.values.grad = network.gradients
    rate = training.learning_rate
    if training.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * progress))
    decay = training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            [network.values], lr=rate, momentum=training.momentum, weight_decay=decay
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind([network.values], lr=rate, weight_decay=decay)


def batches(
    images: Images, training: Training, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches: whole epochs, or as many steps as the study says."""
    num_per_epoch = math.ceil(len(images) / training.batch_size)
    num_steps = training.local_steps or num_per_epoch * (training.local_epochs or 1)
    order: list[Tensor] = []
    for _ in range(num_steps):
        if not order:
            shuffled = torch.randperm(len(images), generator=rng)
            order = list(torch.split(shuffled, training.batch_size))
        chosen = order.pop(0)
        pixels = augment(images.pixels[chosen], training.augmentation, rng)
        yield pixels, images.targets[chosen]
