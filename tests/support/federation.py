"""A whole federation in one process, for tests: tiny phantoms, no sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from client.round import answer
from client.simulated import simulated_site
from client.site import Site
from common.config import validate
from common.messages import Message
from common.simulation import Simulation
from common.study import Study
from common.tasks import Figures
from common.throwaway import coordinator_credentials
from server.coordinator import Summary, run
from server.network import LoopbackNetwork
from server.run_dir import RunDir
from server.secure_sum import Void

TABLE: dict[str, Any] = {
    "name": "tiny",
    "num_rounds": 3,
    "task": {"kind": "classification", "classes": ["no lesion", "lesion"]},
    "model": {"name": "cnn", "width": 4},
    "input": {"size": [32, 32], "intensity": "image"},
    "training": {"learning_rate": 0.1, "batch_size": 8, "local_steps": 2},
    "privacy": {"mode": "none"},
}
PHANTOMS = {"name": "phantoms", "format": "phantom", "num_patients": 16, "images_per_patient": 1}


def tiny_study(num_sites: int = 4, **changes: Any) -> Study:
    """A study that trains in well under a second."""
    study = validate({**TABLE, **changes}, Study, source=Path("tiny.toml"))
    return study.with_members(tuple(f"site-{k + 1}" for k in range(num_sites)))


def tiny_simulation(study: Study) -> Simulation:
    return Simulation(num_sites=len(study.members), data=dict(PHANTOMS))


class Watcher:
    """Collects what a run reports."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.uploads: list[str] = []
        self.voids: list[Void] = []
        self.epochs: list[list[str]] = []

    def started(self, study: Study, round_number: int, sites: Sequence[str]) -> None:
        self.resumed_after = round_number

    def counted(self, figures: Figures) -> None: ...

    def uploaded(self, site: str, num_uploads: int, num_sites: int) -> None:
        self.uploads.append(site)

    def finished_round(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def renewed(self, number: int, sites: Sequence[str]) -> None:
        self.epochs.append(list(sites))

    def voided(self, void: Void) -> None:
        self.voids.append(void)


def open_sites(study: Study, folder: Path) -> dict[str, Site]:
    simulation = tiny_simulation(study)
    sites = [
        simulated_site(study, simulation, k, run_dir=folder, device="cpu")
        for k in range(len(study.members))
    ]
    return {site.name: site for site in sites}


def answers_of(sites: Mapping[str, Site]) -> dict[str, Callable[[Message], Message]]:
    return {name: partial(answer, site=site) for name, site in sites.items()}


def federate(
    study: Study,
    folder: Path,
    *,
    network: LoopbackNetwork | None = None,
    watcher: Watcher | None = None,
    resume: bool = False,
    sites_in: Path | None = None,
) -> Summary:
    """Run a study over tiny phantom sites in ``folder``, or those that ``network`` reaches.

    ``sites_in`` is where the sites of ``network`` were opened; their certificates lie there.
    """
    run_dir = RunDir.open(folder, study, tiny_simulation(study), resume=resume)
    network = network or LoopbackNetwork(answers_of(open_sites(study, folder)))
    credentials = coordinator_credentials(sites_in or folder, study.site_names)
    return run(study, network, run_dir, watcher or Watcher(), credentials)
