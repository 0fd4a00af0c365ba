"""A model of this hospital's own: the common one, trained on here alone after the run.

Nothing of it leaves the hospital, and no budget is charged: what never leaves reveals nothing
elsewhere. It was trained without differential privacy here, so it must stay.

Source: Wang et al. (2019), Federated Evaluation of On-device Personalization.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save

from client.config import SiteConfig
from client.dataset import SiteData, load_site_data
from client.evaluate import evaluate
from client.returned import RETURNED, fill, tensors_of
from client.site import pick_device
from client.train import train
from common.disk import replace_file
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.study import Study, Training
from common.tasks import Figures, Task, task_of

OWN = "own-model.safetensors"  # in a study's folder
LEAST = 1e-4  # of the validation loss: a smaller gain is none


@dataclass(frozen=True)
class Tuned:
    """Private. What came of it, on this hospital's own test images.

    Attributes:
      path: The model that is better on validation: the tuned one, or the common one again.
      epochs: After how many it was best; 0 where no epoch helped.
      before: Figures of the common model.
      after: Of the one that was kept.
    """

    path: Path
    epochs: int
    before: Figures
    after: Figures


def finetune(
    config: SiteConfig, study: Study, folder: Path, *, epochs: int, rate: float
) -> Iterator[tuple[int, Figures] | Tuned]:
    """Train the returned model further on this hospital's own images.

    Args:
      config: The site's.
      study: Says how; whoever takes part in it has its model.
      folder: Of the study, at this site.
      epochs: At most so many; the best by validation loss is kept.
      rate: Learning rate.

    Yields:
      After each epoch its number and validation figures, from 0; in the end what came of it.

    Raises:
      DataError: There is no returned model here, or it is another study's.
    """
    device = pick_device(config.device)
    network, task = build_network(study, device), task_of(study)
    fill(network, folder / RETURNED)
    data = load_site_data(config.data, study, folder=config.state_dir).to(device)
    score = partial(_figures, data, network=network, task=task)
    best, kept = 0, tensors_of(network)
    before = score("test")
    figures = score("validation")
    least = figures["loss"]
    yield 0, figures
    for epoch in range(1, epochs + 1):
        train(
            network.vector(),
            data.train,
            _one_epoch(study.training),
            network=network,
            task=task,
            rate=rate,
            rng=torch.Generator().manual_seed(study.seed + epoch),
        )
        figures = score("validation")
        yield epoch, figures
        if least is None or (figures["loss"] or 0) < least - LEAST:
            best, least, kept = epoch, figures["loss"], tensors_of(network)
    replace_file(folder / OWN, save(kept))
    fill(network, folder / OWN)
    yield Tuned(folder / OWN, best, before, score("test"))


def _one_epoch(training: Training) -> Training:
    """The study's way of training, once over the images, without what pulls sites together."""
    length: dict[str, Any] = {} if training.local_steps else {"local_epochs": 1}
    return training.model_copy(update={"proximal": 0.0, "control_variates": False, **length})


def _figures(data: SiteData, split: str, *, network: FlatNetwork, task: Task) -> Figures:
    samples = data.test if split == "test" else data.validation
    return task.figures(evaluate(network.vector(), samples, network=network, task=task))
