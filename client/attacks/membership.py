"""Who was trained on? One run, many canaries, and a lower bound on epsilon from guessing.

Canaries are images of noise with random labels, so that only memory can tell them apart. A coin
decides for each whether it is trained on. The attacker sees the last model and guesses; so many
right guesses are possible only if epsilon is at least the bound. With differential privacy the
bound must stay below what is stated; without it the bound must be high, or the attack is blind.

Source: Steinke, Nasr and Jagielski (2023), Privacy Auditing with One (1) Training Run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

from client.images import Images
from client.noise import Keystream
from client.train import learning_rate, train, train_privately
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.plan import plan_privacy
from common.study import Augmentation, DifferentialPrivacy, Study, Training
from common.tasks import Task, task_of

GUESSED = 0.5  # share of the canaries that the attacker is sure enough about
CONFIDENCE = 0.95
CONTROL_ROUNDS = 30
CONTROL_DELTA = 1e-5
# Whoever trains like this remembers what it saw: the attack must find it.
CONTROL = {
    "optimizer": "adam",
    "learning_rate": 5e-3,
    "momentum": 0.0,
    "schedule": "cosine",
    "warmup_rounds": 0,
    "batch_size": 50,
    "local_steps": 100,
    "local_epochs": None,
    "weight_decay": 0.0,
    "proximal": 0.0,
    "augmentation": Augmentation(),
}


@dataclass(frozen=True)
class Membership:
    """What an attacker got right.

    Attributes:
      epsilon: Stated for this training; None where it was trained without privacy.
      delta: At which.
      num_canaries: Each of them in or out by a coin.
      num_guesses: The surest half, a quarter in, a quarter out; chosen before looking.
      num_right: Of those.
      bound: Epsilon is at least this, with 95 % confidence.
    """

    epsilon: float | None
    delta: float
    num_canaries: int
    num_guesses: int
    num_right: int
    bound: float


def attack_membership(
    study: Study, background: Images, *, num_canaries: int, seed: int
) -> Membership:
    """Train on a background and on random canaries, by the study's own terms, and guess.

    Args:
      study: Its ``[privacy]`` decides how it is trained; without privacy, as ``CONTROL`` says.
      background: Images of patients; all of them are trained on.
      num_canaries: More make the bound tighter.
      seed: Of the canaries and the coins. The noise comes from where the study says.
    """
    canaries, is_in = make_canaries(study, num_canaries, seed)
    chosen = torch.from_numpy(np.flatnonzero(is_in))
    targets = canaries.targets[chosen].to(background.targets.dtype)
    trained_on = Images(
        torch.cat([background.pixels, canaries.pixels[chosen]]),
        torch.cat([background.targets, targets]),
        tuple(map(str, range(len(background) + len(chosen)))),  # each canary is one person
    )
    network, task = build_network(study), task_of(study)
    terms = study.privacy
    is_private = isinstance(terms, DifferentialPrivacy)
    declared = len(background) + num_canaries // 2
    train_once = _privately if is_private else _plainly
    epsilon = train_once(study, trained_on, declared, network, task, seed)
    scores = -_losses(network, task, canaries)
    order = np.argsort(scores, kind="stable")
    quarter = round(GUESSED * num_canaries / 2)
    num_right = int((~is_in[order[:quarter]]).sum() + is_in[order[-quarter:]].sum())
    delta = terms.delta if isinstance(terms, DifferentialPrivacy) else CONTROL_DELTA
    return Membership(
        epsilon=epsilon,
        delta=delta,
        num_canaries=num_canaries,
        num_guesses=2 * quarter,
        num_right=num_right,
        bound=lower_bound(num_canaries, 2 * quarter, num_right, delta),
    )


def make_canaries(study: Study, num: int, seed: int) -> tuple[Images, NDArray[np.bool_]]:
    """Images of noise with random labels, and which of them are to be trained on."""
    rng = np.random.default_rng(seed)
    shape = (num, study.input.channels, *study.input.size)
    pixels = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    order = torch.from_numpy(rng.permutation(num))
    targets = task_of(study).made_up_targets(num)[order]
    return Images(pixels, targets, tuple(map(str, range(num)))), rng.random(num) < 0.5  # noqa: PLR2004 - a fair coin


def lower_bound(num_canaries: int, num_guesses: int, num_right: int, delta: float) -> float:
    """The smallest epsilon at which so many right guesses are not a surprise; 0 for chance.

    Guarantees:
      Training with (epsilon, delta)-differential privacy exceeds it in at most 5 % of all runs.
    """
    surprise = 1 - CONFIDENCE

    def is_surprising(epsilon: float) -> bool:
        return p_value(num_canaries, num_guesses, num_right, epsilon, delta) < surprise

    if not is_surprising(0):
        return 0.0
    low, high = 0.0, 1.0
    while is_surprising(high):
        low, high = high, 2 * high
    while high - low > 1e-4:  # noqa: PLR2004 - digits that anybody reads
        middle = (low + high) / 2
        low, high = (middle, high) if is_surprising(middle) else (low, middle)
    return low


def p_value(
    num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float
) -> float:
    """Most likely chance of so many right guesses under (epsilon, delta)-differential privacy.

    With delta = 0 no guess is right with more than e^epsilon / (1 + e^epsilon); delta lets a few
    more be, and the worst way to spend it is looked for.

    Source:
      Steinke, Nasr and Jagielski (2023), theorem 5.2.
    """
    chance = 1 / (1 + np.exp(-epsilon))
    tail = binom.sf(num_right - 1, num_guesses, chance)
    # sums[k - 1]: chance that num_right - k up to num_right - 1 guesses are right.
    fewer = np.arange(1, num_right + 1)
    sums = np.cumsum(binom.pmf(num_right - fewer, num_guesses, chance))
    worst = float(np.max(sums / fewer, initial=0.0))
    return min(1.0, float(tail) + 2 * num_canaries * delta * worst)


def _plainly(
    study: Study, images: Images, _: int, network: FlatNetwork, task: Task, seed: int
) -> None:
    training = Training(**{**dict(study.training), **CONTROL})
    model = network.vector()
    for number in range(CONTROL_ROUNDS):
        rng = torch.Generator().manual_seed(seed + number)
        rate = training.learning_rate
        model = (
            model
            + train(model, images, training, network=network, task=task, rate=rate, rng=rng).values
        )
    network.load(model)


def _privately(
    study: Study, images: Images, declared: int, network: FlatNetwork, task: Task, seed: int
) -> float:
    training = study.training
    plan = plan_privacy(study, declared)
    assert plan is not None  # noqa: S101 - the study is private
    model = network.vector()
    is_seeded = plan.terms.randomness == "seeded"
    secrets = Keystream.from_seed("attack", seed) if is_seeded else Keystream.from_os()
    for number in range(1, study.num_rounds + 1):
        rate = learning_rate(training, number, study.num_rounds)
        update = train_privately(
            model, images, training, plan, network=network, task=task, rate=rate, secrets=secrets
        )
        model = model + update.values
    network.load(model)
    return plan.epsilon_after(study.num_rounds)


@torch.no_grad()
def _losses(network: FlatNetwork, task: Task, images: Images) -> NDArray[np.float64]:
    """Loss of every image for itself."""
    network.module.eval()
    loss = task.local_loss(None)
    outputs: Tensor = network(images.pixels)
    each = [
        loss(output[None], target[None])
        for output, target in zip(outputs, images.targets, strict=True)
    ]
    losses: NDArray[np.float64] = torch.stack(each).double().numpy()
    return losses
