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
from client.clipping import ENGINES
from client.dataset import Samples
from client.images import Batch, Scans
from client.noise import Keystream
from client.units import Units
from common.memory import give_back, keep_freed, let_go
from common.models.flat import FlatNetwork
from common.plan import PrivacyPlan
from common.study import Augmentation, Training
from common.tasks import Task
from common.update import LocalUpdate


def train(
    model: NDArray[np.float32],
    images: Samples,
    training: Training,
    *,
    network: FlatNetwork,
    task: Task,
    rate: float,
    rng: torch.Generator,
    correction: NDArray[np.float32] | None = None,
) -> LocalUpdate:
    """Train on local images and return what changed.

    Args:
      model: The global model, shape (num_params,).
      images: The site's training split.
      training: The approved study's ``[training]``.
      network: A network of the study's model; its weights are overwritten.
      task: Gives the loss.
      rate: This round's learning rate.
      rng: Order of images and augmentation.
      correction: Is added to every gradient of the travelling parameters, shape (num_own,).

    Returns:
      Local minus global model. Private: it must pass the secure sum before it leaves.
    """
    network.load(model)
    let_go(model)  # until the update is made
    keep_freed()
    network.module.train()
    # Dropout draws from torch's own generator: it too must depend on site and sum alone.
    torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
    optimizer = _optimizer(network, training, rate)
    # Only labels of whole images say how common a class is at the site; other tasks leave them.
    labels = None if isinstance(images, Scans) else images.targets
    loss_of = task.local_loss(labels)
    network.values.grad = network.gradients
    start = _start(network, training)
    corrected = None if correction is None else network.spread(correction)
    made = batches(images, training, rng)
    if torch.get_num_threads() == 1:  # beside a team of threads a second team costs more
        made = _ahead(made)
    for pixels, targets in made:
        network.gradients.zero_()
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=training.mixed_precision):
            outputs = network(pixels)
        loss = loss_of(outputs.float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        _pull_back(network, start, training)
        if corrected is not None:
            network.gradients.add_(corrected)
        optimizer.step()
    del start, corrected
    _forget(network, optimizer)  # the update comes in its place
    return LocalUpdate(network.minus(model))


def _optimizer(network: FlatNetwork, training: Training, rate: float) -> torch.optim.Optimizer:
    """An optimizer over the flat vector: one tensor, and so one update per step."""
    decay = training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            [network.values], lr=rate, momentum=training.momentum, weight_decay=decay, fused=True
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind([network.values], lr=rate, weight_decay=decay, fused=True)


def _forget(network: FlatNetwork, optimizer: torch.optim.Optimizer) -> None:
    """Free what only training needs: an optimizer that is dropped keeps its moments for a while."""
    optimizer.state.clear()
    network.drop_gradients()
    give_back()


def _start(network: FlatNetwork, training: Training) -> Tensor | None:
    """Where training begins; None where nothing pulls back to it."""
    return network.values.clone() if training.proximal else None


def _pull_back(network: FlatNetwork, start: Tensor | None, training: Training) -> None:
    """Add the gradient of FedProx's term, proximal / 2 times the squared distance from the start.

    Source:
      Li et al. (2020), Federated Optimization in Heterogeneous Networks.
    """
    if start is not None:
        assert network.values.grad is not None  # noqa: S101 - the gradient that it is added to
        network.values.grad.add_(network.values.detach() - start, alpha=training.proximal)


def learning_rate(training: Training, round_number: int, num_rounds: int) -> float:
    """The rate of one round, 1 to num_rounds: warm-up first, then the schedule over the rest."""
    if round_number <= training.warmup_rounds:
        return training.learning_rate * round_number / (training.warmup_rounds + 1)
    passed = round_number - 1 - training.warmup_rounds
    progress = passed / max(1, num_rounds - training.warmup_rounds)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[training.schedule]
    return training.learning_rate * factor


def batches(images: Samples, training: Training, rng: torch.Generator) -> Iterator[Batch]:
    """Shuffled batches: whole epochs, or as many steps as the study says.

    Patches are drawn from any scan each time, so that few scans still fill a batch.
    """
    num_steps = count_steps(images, training)
    order: list[Tensor] = []
    for _ in range(num_steps):
        if isinstance(images, Scans):
            order = [torch.randint(len(images), (training.batch_size,), generator=rng)]
        elif not order:
            shuffled = torch.randperm(len(images), generator=rng)
            order = list(torch.split(shuffled, training.batch_size))
        chosen = order.pop(0)
        pixels, targets = augment(*images.draw(chosen, rng), training.augmentation, rng)
        yield images.packed(pixels, chosen), targets


def count_steps(images: Samples, training: Training) -> int:
    """Steps of one round."""
    num_per_epoch = math.ceil(len(images) / training.batch_size)
    return training.local_steps or num_per_epoch * (training.local_epochs or 1)


def _ahead(made: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches in the same order, each made while the one before is trained on."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        coming = worker.submit(next, made, None)
        while (batch := coming.result()) is not None:
            coming = worker.submit(next, made, None)
            yield batch


def train_privately(
    model: NDArray[np.float32],
    images: Samples,
    training: Training,
    plan: PrivacyPlan,
    *,
    network: FlatNetwork,
    task: Task,
    rate: float,
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
      rate: This round's learning rate.
      secrets: The draw of units, their images, augmentation and noise.

    Returns:
      Local minus global model, noise included.

    Source:
      Abadi et al. (2016), Deep Learning with Differential Privacy, algorithm 1.
    """
    network.load(model)
    let_go(model)  # until the update is made
    keep_freed()
    network.module.train()
    torch.manual_seed(int(secrets.integers(1)[0] >> np.uint64(1)))
    optimizer = _optimizer(network, training, rate)
    loss_of = task.local_loss(None)
    start = _start(network, training)
    engine = ENGINES[plan.terms.engine](network)
    members = _members(images, plan.terms.unit)
    clip_norm = plan.terms.example_clip_norm
    scale = plan.event.noise_multiplier * clip_norm
    for _ in range(plan.event.steps):
        units = draw_units(images, members, training.augmentation, plan, secrets)
        # An empty draw is noised and stepped like any other: skipping it would tell that it was.
        total = engine.clipped_sum(units, loss_of, clip_norm)
        network.values.grad = secrets.add_noise(total, scale, plan.batch_size)
        # After the noise: the term depends on the weights alone, and clipping must not see it.
        _pull_back(network, start, training)
        optimizer.step()
    del start, engine
    _forget(network, optimizer)
    return LocalUpdate(network.minus(model))


def draw_units(
    images: Samples,
    members: list[NDArray[np.int64]],
    augmentation: Augmentation,
    plan: PrivacyPlan,
    secrets: Keystream,
) -> Units:
    """Each unit with the sampling probability, and of each at most K images, or K patches."""
    drawn = np.flatnonzero(secrets.uniforms(len(members)) < plan.event.sampling_probability)
    most = plan.terms.max_images_per_patient
    some = _patches if isinstance(images, Scans) else _some
    chosen = [some(members[unit], most, secrets) for unit in drawn]
    rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *chosen]))
    rng = torch.Generator().manual_seed(int(secrets.integers(1)[0] >> np.uint64(1)))
    pixels, targets = augment(*images.draw(rows, rng), augmentation, rng)
    return Units(images.packed(pixels, rows), targets, tuple(len(unit) for unit in chosen))


def _members(images: Samples, unit: str) -> list[NDArray[np.int64]]:
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


def _patches(rows: NDArray[np.int64], num: int, secrets: Keystream) -> NDArray[np.int64]:
    """The scan of each of ``num`` patches: any of the unit's, each time anew."""
    chosen: NDArray[np.int64] = rows[secrets.integers(num) % np.uint64(len(rows))]
    return chosen
