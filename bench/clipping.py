"""One private training step beside a plain one, and beside Opacus' engines; and peak memory.

A step is what a site does with a batch: forward, backward, clipped sum and noise where it is
private, optimizer. Every unit has one image. The plain step is the one that a site takes in a study
without privacy. Programs take turns; figures are medians. Where a step of Opacus takes seconds,
ours and the plain one come several times for each of its own. Peak memory is that of a process of
its own for each, beyond what it has before the first step; the median of a few, which differ by a
tenth. ``clipping.py peak CASE 1 WHO`` prints one.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.resnet import ResNetBlock
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.func import vmap

from client.bookkeeping import BookKeepingEngine
from client.noise import Keystream
from client.units import Units
from common.config import validate
from common.memory import keep_freed
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.study import Study
from common.tasks import Loss, task_of

HERE = Path(__file__).resolve()
CLIP_NORM, NOISE, RATE = 0.3, 1.0, 0.1
WARM, REPEATS = 2, 7
PROCESSES = 3  # whose peaks are looked at
THREADS = (1, 2)
LABELS = {"kind": "classification", "classes": ["no lesion", "lesion"]}
MASKS = {"kind": "segmentation", "classes": ["background", "lesion"]}
OURS, PLAIN = "ours", "plain step"


@dataclass(frozen=True)
class Case:
    """One network and batch."""

    task: dict[str, Any]
    model: dict[str, Any]
    size: tuple[int, ...]
    batch: int
    promised: float  # of the plain step
    repeats: int = REPEATS
    pairs: int = 1  # steps of ours and plain ones for each of Opacus'

    def study(self) -> Study:
        """What a site would train."""
        table = {
            "name": "bench",
            "num_rounds": 1,
            "task": self.task,
            "model": self.model,
            "input": {"size": list(self.size), "intensity": "image"},
            "training": {"learning_rate": RATE, "batch_size": self.batch, "local_steps": 1},
            "privacy": {"noise_multiplier": NOISE, "delta": 1e-5, "example_clip_norm": CLIP_NORM},
        }
        return validate(table, Study, source=Path("bench.toml"))


CASES = {
    "CNN 28x28, batch 64": Case(LABELS, {"name": "cnn"}, (28, 28), 64, 1.35, 41),
    "CNN 28x28, batch 256": Case(LABELS, {"name": "cnn"}, (28, 28), 256, 1.60, 21),
    "ResNet-18 64x64, batch 64": Case(
        LABELS, {"name": "resnet18", "stem_stride": 2}, (64, 64), 64, 1.30, 4, pairs=6
    ),
    "U-Net 96x96, batch 16": Case(MASKS, {"name": "unet"}, (96, 96), 16, 1.20, 21),
    "U-Net 48x48x48, batch 4": Case(MASKS, {"name": "unet"}, (48, 48, 48), 4, 1.20),
}


class Problem:
    """The network, the loss and one batch of a case."""

    def __init__(self, case: Case) -> None:
        study = case.study()
        task = task_of(study)
        self.network = build_network(study)
        self.loss: Loss = task.local_loss(None)
        rng = torch.Generator().manual_seed(1)
        self.pixels = torch.randn((case.batch, 1, *case.size), generator=rng)
        self.targets = task.made_up_targets(case.batch)
        self.network.module.train()


Step = Callable[[], None]


def plain(problem: Problem) -> Step:
    """A site's step without privacy."""
    network = problem.network
    network.values.grad = network.gradients
    optimizer = torch.optim.SGD([network.values], lr=RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        problem.loss(network(problem.pixels), problem.targets).backward()
        optimizer.step()

    return step


def ours(problem: Problem) -> Step:
    """A site's step with privacy."""
    network, secrets = problem.network, Keystream.from_os()
    optimizer = torch.optim.SGD([network.values], lr=RATE, fused=True)
    engine = BookKeepingEngine(network)
    units = Units(problem.pixels, problem.targets, (1,) * len(problem.pixels))

    def step() -> None:
        total = engine.clipped_sum(units, problem.loss, CLIP_NORM)
        network.values.grad = secrets.add_noise(total, NOISE * CLIP_NORM, len(units.sizes))
        optimizer.step()

    return step


def opacus_hooks(problem: Problem, *, functorch: bool = False) -> Step:
    """Opacus, with per-sample gradients from hooks, or from functorch."""
    module = GradSampleModule(bare(problem.network), force_functorch=functorch)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=RATE),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=len(problem.pixels),
    )

    def step() -> None:
        optimizer.zero_grad()
        problem.loss(module(problem.pixels), problem.targets).backward()
        optimizer.step()

    return step


def opacus_ghost(problem: Problem) -> Step:
    """Opacus, with ghost clipping: two backward passes."""
    module = GradSampleModuleFastGradientClipping(
        bare(problem.network), max_grad_norm=CLIP_NORM, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=RATE),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=len(problem.pixels),
    )
    criterion = DPLossFastGradientClipping(module, optimizer, EachLoss(problem.loss))

    def step() -> None:
        optimizer.zero_grad()
        criterion(module(problem.pixels), problem.targets).backward()
        optimizer.step()

    return step


class EachLoss:
    """A loss of each image, as Opacus asks for one."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.reduction = "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Shape (num_images,)."""
        losses: Tensor = vmap(self._loss)(outputs.unsqueeze(1), targets.unsqueeze(1))
        return losses


def bare(network: FlatNetwork) -> nn.Module:
    """The network without its flat vector, and without operations in place, as Opacus needs it."""
    module = copy.deepcopy(network.module)
    for child in module.modules():
        if hasattr(child, "inplace"):
            child.inplace = False
        if isinstance(child, ResNetBlock):
            child.forward = partial(_block, child)
    return module


def _block(block: ResNetBlock, images: Tensor) -> Tensor:
    """What MONAI's block does, but for one addition in place."""
    kept = images if block.downsample is None else block.downsample(images)
    made = block.act(block.bn1(block.conv1(images)))
    outputs: Tensor = block.act(block.bn2(block.conv2(made)) + kept)
    return outputs


WHO: dict[str, Callable[[Problem], Step]] = {
    PLAIN: plain,
    OURS: ours,
    "Opacus hooks": opacus_hooks,
    "Opacus ghost": opacus_ghost,
    "Opacus functorch": lambda problem: opacus_hooks(problem, functorch=True),
}


def rows() -> list[dict[str, Any]]:
    """Seconds and megabytes of each case with one thread and with two."""
    made = []
    for name in CASES:
        made += [row(name, "s", num, asked("seconds", name, num)) for num in THREADS]
        peaks = {who: median_peak(name, who) for who in WHO}
        made.append(row(name, "MB", 1, peaks))
    return made


def median_peak(name: str, who: str) -> float:
    """Megabytes."""
    return statistics.median(asked("peak", name, 1, who)[who] for _ in range(PROCESSES))


def row(name: str, unit: str, threads: int, seen: dict[str, float]) -> dict[str, Any]:
    """One line of the results."""
    ratio = seen[OURS] / seen[PLAIN]
    case = CASES[name]
    what = f"{name}, {threads} thread{'s' * (threads > 1)}" if unit == "s" else f"{name}, memory"
    print(f"{what}: {ratio:.2f} of plain, {seen}", file=sys.stderr, flush=True)
    return {
        "case": what,
        "unit": unit,
        "ours": seen[OURS],
        "peers": {who: taken for who, taken in seen.items() if who not in (OURS, PLAIN)},
        "limit": {PLAIN: seen[PLAIN]},
        "better": "lower",
        "settings": {
            "promised_of_plain": case.promised if unit == "s" else 1.3,
            "batch": case.batch,
            "threads": threads,
            "model": case.model,
        },
    }


def asked(what: str, name: str, threads: int, who: str = "") -> dict[str, float]:
    """What a process of its own finds out."""
    command = [sys.executable, str(HERE), what, name, str(threads), who]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)  # noqa: S603
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def seconds(name: str) -> dict[str, float]:
    """Medians of all, taking turns; with one thread of the time that it computes."""
    case = CASES[name]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    steps = {who: make(Problem(case)) for who, make in WHO.items()}
    taken: dict[str, list[float]] = {who: [] for who in WHO}
    peers = [who for who in WHO if who not in (PLAIN, OURS)]
    for number in range(WARM + case.repeats):
        for who in [PLAIN, OURS] * case.pairs + peers:
            before = clock()
            steps[who]()
            if number >= WARM:
                taken[who].append(clock() - before)
    return {who: statistics.median(times) for who, times in taken.items()}


def peak(name: str, who: str) -> dict[str, float]:
    """Megabytes of the largest step beyond what was taken before the first."""
    problem = Problem(CASES[name])
    before = memory_bytes("VmRSS")
    step = WHO[who](problem)
    for _ in range(1 + WARM):
        step()
    return {who: (memory_bytes("VmHWM") - before) / 1e6}


def memory_bytes(what: str) -> int:
    """Of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise RuntimeError(what)


if __name__ == "__main__":
    what, case_name, threads_text, who_name = sys.argv[1:]
    torch.set_num_threads(int(threads_text))
    keep_freed()  # as every site does
    print(json.dumps(seconds(case_name) if what == "seconds" else peak(case_name, who_name)))
