"""What the simulation costs beyond the training itself.

The limit is a bare PyTorch loop: the same steps on the same decoded and augmented batches, the same
evaluations, a float average instead of the exact sum, nothing written. Needs FL_TEST_DATA.
"""

from __future__ import annotations

import copy
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from client.round import answer
from client.simulated import simulated_site
from client.site import Site
from client.train import batches
from common.models.build import build_network
from common.simulation import Simulation, plan_simulation
from common.study import Study
from common.throwaway import coordinator_credentials
from server.coordinator import run
from server.network import LoopbackNetwork
from server.progress import ConsoleObserver
from server.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
NUM_SITES = 4
REPEATS = 5
CASES = {
    "pneumonia": {"num_rounds": 3},
    "pneumonia-resnet18": {"num_rounds": 1},
}


class Silent(ConsoleObserver):
    """Says nothing: printing is not what is measured."""

    def started(self, *_: object) -> None:
        """Nothing."""

    def finished_round(self, *_: object) -> None:
        """Nothing."""


def rows() -> list[dict[str, Any]]:
    """Overhead of two studies, and the time until the first round starts."""
    data = os.environ.get("FL_TEST_DATA")
    if not data:
        sys.exit("FL_TEST_DATA is not set; it names the folder that holds pneumonia/")
    root = str(Path(data) / "pneumonia")
    return [*(overhead(name, root) for name in CASES), start_up(root)]


def overhead(name: str, root: str) -> dict[str, Any]:
    """Seconds of a whole run beside the bare loop, in alternating pairs."""
    study, simulation = plan_simulation(
        ROOT / "studies" / f"{name}.toml", num_sites=NUM_SITES, data_root=root
    )
    study = study.model_copy(update=CASES[name])
    ours, bare = [], []
    for _ in range(REPEATS):
        ours.append(federated_s(study, simulation))
        bare.append(bare_s(study, simulation))
    return {
        "case": name,
        "unit": "s",
        "ours": statistics.median(ours),
        "peers": {},
        "limit": {"bare PyTorch loop": statistics.median(bare)},
        "better": "lower",
        "settings": {
            "sites": NUM_SITES,
            "repeats": REPEATS,
            "threads": study.torch_threads,
            **CASES[name],
        },
    }


def federated_s(study: Study, simulation: Simulation) -> float:
    """One run through coordinator, sites, journal and run folder."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir.open(Path(folder) / "run", study, simulation, resume=False)
        sites = open_sites(study, simulation, Path(folder))
        for site in sites:
            assert len(site.data.train)  # noqa: S101 - decoding is not what is measured
        network = LoopbackNetwork({site.name: partial(answer, site=site) for site in sites})
        started = time.perf_counter()
        credentials = coordinator_credentials(Path(folder), study.site_names)
        run(study, network, run_dir, Silent(), credentials)
        return time.perf_counter() - started


def bare_s(study: Study, simulation: Simulation) -> float:
    """The same steps and evaluations with torch alone."""
    with tempfile.TemporaryDirectory() as folder:
        sites = open_sites(study, simulation, Path(folder))
    recorded = [
        [recorded_batches(site, study, r) for site in sites] for r in range(study.num_rounds)
    ]
    network = build_network(study).module
    for parameter in network.parameters():  # plain tensors, as anybody would have them
        parameter.data, parameter.grad = parameter.data.clone(), None
    weights = [site.weight / sum(s.weight for s in sites) for site in sites]
    started = time.perf_counter()
    state = copy.deepcopy(network.state_dict())
    for by_site in recorded:
        mean = {name: torch.zeros_like(value) for name, value in state.items()}
        for site, site_batches, weight in zip(sites, by_site, weights, strict=True):
            network.load_state_dict(state)
            score(network, site.data.validation)
            fit(network, site_batches, study)
            for name, value in network.state_dict().items():
                mean[name] += weight * value
        state = mean
    network.load_state_dict(state)
    for site in sites:
        score(network, site.data.validation)
        score(network, site.data.test)
    return time.perf_counter() - started


def recorded_batches(site: Site, study: Study, round_number: int) -> list[Any]:
    """The very batches the site trains on in a round."""
    rng = site.rng(round_number)
    torch.randint(2**62, (1,), generator=rng)  # the site seeds torch's own generator with this one
    return list(batches(site.data.train, study.training, rng))


def fit(network: torch.nn.Module, site_batches: list[Any], study: Study) -> None:
    """Plain local training."""
    network.train()
    training = study.training
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    for pixels, targets in site_batches:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(network(pixels)[:, 0], targets.float())
        loss.backward()
        optimizer.step()


def score(network: torch.nn.Module, images: Any) -> tuple[float, int]:
    """Loss and right answers of one split."""
    network.eval()
    loss, right = 0.0, 0
    with torch.inference_mode():
        for low in range(0, len(images), 256):
            targets = images.targets[low : low + 256]
            logits = network(images.pixels[low : low + 256])[:, 0]
            loss += float(F.binary_cross_entropy_with_logits(logits, targets.float()))
            right += int(((logits > 0) == targets.bool()).sum())
    return loss, right


def open_sites(study: Study, simulation: Simulation, folder: Path) -> list[Site]:
    """The sites with their images in memory."""
    return [
        simulated_site(study, simulation, k, run_dir=folder, device="cpu") for k in range(NUM_SITES)
    ]


def start_up(root: str) -> dict[str, Any]:
    """Seconds from the command to the first line of the run, ours and Flower's engine."""
    seconds: dict[str, list[float]] = {"simulate": [], "flwr-run": []}
    for _ in range(3):
        for script, times in seconds.items():
            times.append(until_first_round(script, root))
    return {
        "case": "start-up to the first round",
        "unit": "s",
        "ours": statistics.median(seconds["simulate"]),
        "peers": {"flwr run (scripts/flwr-run)": statistics.median(seconds["flwr-run"])},
        "limit": None,
        "better": "lower",
        "settings": {"sites": NUM_SITES, "repeats": 3, "study": "pneumonia", "num_rounds": 1},
    }


def until_first_round(script: str, root: str) -> float:
    """Start a script as a person does and wait for its line "study ..."."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / "scripts" / script, "--study", ROOT / "studies/pneumonia.toml"]
        command += ["--sites", NUM_SITES, "--data", root, "--set", "num_rounds=1"]
        command += ["--run-dir", Path(folder) / "run"]
        started = time.perf_counter()
        with subprocess.Popen(  # noqa: S603 - our own script
            list(map(str, command)), stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout or []:
                if re.match(r"study ", line):
                    elapsed = time.perf_counter() - started
        return elapsed
