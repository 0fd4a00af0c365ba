"""Local training: one global model in, one update out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.augment import augment
from client.clipping import PerImageEngine, Units
from client.dataset import Images
from client.noise import Keystream
from common.models.flat import FlatNetwork
from common.plan import PrivacyPlan
from common.study import Augmentation, Training
from common.tasks import Task
from common.update import LocalUpdate

Batch = tuple[Tensor, Tensor]  # pixels (batch, channels, ...), targets (batch, ...)


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
    made = batches(images, training, rng)
    if torch.get_num_threads() == 1:  # beside a team of threads a second team costs more
        made = _ahead(made)
    for pixels, targets in made:
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
            [network.values], lr=rate, momentum=training.momentum, weight_decay=decay, fused=True
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind([network.values], lr=rate, weight_decay=decay, fused=True)


def batches(images: Images, training: Training, rng: torch.Generator) -> Iterator[Batch]:
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


def _ahead(made: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches in the same order, each made while the one before is trained on."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        coming = worker.submit(next, made, None)
        while (batch := coming.result()) is not None:
            coming = worker.submit(next, made, None)
            yield batch


def train_privately(
    model: NDArray[np.float32],
    images: Images,
    training: Training,
    plan: PrivacyPlan,
    *,
    network: FlatNetwork,
    task: Task,
    progress: float,
    secrets: Keystream,
) -> LocalUpdate:
    """Train by DP-SGD: what the noise covers is each unit's whole record.

    Args:
      model: The global model, shape (num_params,).
      images: The site's training split.
      training: The approved study's ``[training]``.
      plan: Noise, sampling probability, steps and the study's terms for this site.
      network: A network of the study's model; its weights are overwritten.
      task: Gives the loss.
      progress: Share of the run that is over, 0 to 1; drives the schedule.
      secrets: The draw of units, their images, augmentation and noise.

    Returns:
      Local minus global model, noise included.

    Source:
      Abadi et al. (2016), Deep Learning with Differential Privacy, algorithm 1.
    """
    network.load(model)
    network.module.train()
    torch.manual_seed(int(secrets.integers(1)[0] >> np.uint64(1)))
    optimizer = _optimizer(network, training, progress)
    loss_of = task.local_loss(None)
    engine = PerImageEngine(network)
    members = _members(images, plan.terms.unit)
    clip_norm = plan.terms.example_clip_norm
    scale = plan.event.noise_multiplier * clip_norm
    for _ in range(plan.event.steps):
        units = draw_units(images, members, training.augmentation, plan, secrets)
        total = engine.clipped_sum(units, loss_of, clip_norm)
        noise = torch.from_numpy(secrets.gaussians(len(total))).to(total.device)
        # An empty draw is noised and stepped like any other: skipping it would tell that it was.
        network.gradients.copy_((total + scale * noise) / plan.batch_size)
        optimizer.step()
    return LocalUpdate(network.vector() - model)


def draw_units(
    images: Images,
    members: list[NDArray[np.int64]],
    augmentation: Augmentation,
    plan: PrivacyPlan,
    secrets: Keystream,
) -> Units:
    """Each unit with the sampling probability, and at most K of the images of each."""
    drawn = np.flatnonzero(secrets.uniforms(len(members)) < plan.event.sampling_probability)
    chosen = [_some(members[unit], plan.terms.max_images_per_patient, secrets) for unit in drawn]
    rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *chosen]))
    rng = torch.Generator().manual_seed(int(secrets.integers(1)[0] >> np.uint64(1)))
    pixels = images.pixels[rows]
    if len(rows):
        pixels = augment(pixels, augmentation, rng)
    return Units(pixels, images.targets[rows], tuple(len(unit) for unit in chosen))


def _members(images: Images, unit: str) -> list[NDArray[np.int64]]:
    """Rows of each privacy unit's images."""
    if unit == "image":
        return [np.array([row]) for row in range(len(images))]
    rows: dict[str, list[int]] = {}
    for row, patient in enumerate(images.patients):
        rows.setdefault(patient, []).append(row)
    return [np.array(own) for own in rows.values()]


def _some(rows: NDArray[np.int64], most: int, secrets: Keystream) -> NDArray[np.int64]:
    """At most ``most`` of a unit's images; which ones depends on that unit and the draw alone."""
    if len(rows) <= most:
        return rows
    return np.sort(rows[np.argsort(secrets.integers(len(rows)))[:most]])
