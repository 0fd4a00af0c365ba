"""Everything one site brings to a round."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from client.dataset import SiteData
from client.journal import Journal
from common.errors import ConfigError
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.study import Study
from common.tasks import Task, task_of


@dataclass(frozen=True)
class Site:
    """Private. One hospital: its study, its images, its network."""

    name: str
    study: Study
    data: SiteData
    weight: int  # declared patients: public, and not the true count
    network: FlatNetwork
    task: Task
    journal: Journal

    def randomness(self, sum_number: int) -> torch.Generator:
        """A reproducible stream for one sum: order of images and augmentation."""
        text = f"{self.study.seed}/{self.study.site_names.index(self.name)}/{sum_number}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return torch.Generator().manual_seed(seed % 2**63)


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def open_site(
    name: str, study: Study, data: SiteData, *, weight: int, state_dir: Path, device: torch.device
) -> Site:
    """Put a site together.

    Raises:
      ConfigError: The site is not a member of the study, or declares more patients than the
        study's weight cap.
    """
    if name not in study.site_names:
        raise ConfigError(f"{name} is not a member of study {study.name}")
    cap = study.aggregation.weight_cap
    if weight > cap:
        raise ConfigError(f"{name} declares {weight} patients, aggregation.weight_cap is {cap}")
    torch.set_num_threads(study.torch_threads)
    return Site(
        name=name,
        study=study,
        data=data.to(device),
        weight=weight,
        network=build_network(study, device),
        task=task_of(study),
        journal=Journal(state_dir / "journal.sqlite"),
    )
