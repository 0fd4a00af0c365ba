"""Both attacks on one study, and what they must not achieve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.attacks.inversion import LEAVING, STEPS, Recovered, attack_update
from client.attacks.membership import Membership, attack_membership
from client.images import Images
from common.errors import ConfigError
from common.study import DifferentialPrivacy, NoPrivacy, Study

SHARP = 2.0  # the bound without privacy must exceed this, or the attack is blind
RECOGNISED = 0.5  # SSIM of an image that everybody would recognise
MARGIN = 0.1  # SSIM by which the own image must be closer than any other to have leaked

Told = Callable[[str], None]


@dataclass(frozen=True)
class Audit:
    """What was tried on a study, and what came of it.

    Attributes:
      membership: Without privacy first, then at each epsilon.
      inversion: By row of the images; each ``plain``, ``noised`` and ``masked``.
      originals: The images that were trained on, (num_images, channels, *size).
    """

    membership: tuple[Membership, ...]
    inversion: tuple[tuple[Recovered, ...], ...]
    originals: NDArray[np.float32]

    def failures(self) -> Iterator[str]:
        """What a person must look into: an attack that succeeded, or one that sees nothing."""
        for one in self.membership:
            if one.epsilon is None and one.bound <= SHARP:
                yield (
                    f"membership: without privacy the bound is {one.bound:.2f}, not above "
                    f"{SHARP:g}: the attack is blind"
                )
            if one.epsilon is not None and one.bound > one.epsilon:
                yield (
                    f"membership: epsilon is at least {one.bound:.2f}, and {one.epsilon:.2f} was "
                    "stated: the guarantee does not hold"
                )
        for row, results in enumerate(self.inversion):
            for found in results:
                is_seen = found.to_own > RECOGNISED and has_leaked(found)
                if found.kind == "plain" and not is_seen:
                    yield f"inversion: image {row} was not recovered from a plain update"
                if found.kind != "plain" and has_leaked(found):
                    yield f"inversion: image {row} was recovered from a {found.kind} update"

    def as_table(self) -> dict[str, Any]:
        """Every figure, ready for JSON; no pixel."""
        return {
            "membership": [asdict(one) for one in self.membership],
            "inversion": [
                {
                    "image": row,
                    "kind": one.kind,
                    "likeness_to_own": one.to_own,
                    "likeness_to_others": list(one.to_others),
                    "leaked": has_leaked(one),
                }
                for row, results in enumerate(self.inversion)
                for one in results
            ],
            "limits": {"sharp": SHARP, "recognised": RECOGNISED, "margin": MARGIN},
            "failures": list(self.failures()),
        }


def has_leaked(one: Recovered) -> bool:
    """Whether what was found is clearly closer to the own image than to any other of the class."""
    return one.to_own > max(one.to_others, default=0.0) + MARGIN


def audit(
    study: Study,
    images: Images,
    epsilons: list[float],
    *,
    num_canaries: int,
    num_background: int,
    num_inverted: int,
    seed: int,
    steps: int = STEPS,
    told: Told = lambda _: None,
) -> Audit:
    """Attack a private study.

    Args:
      study: With ``[privacy]``, members filled in.
      images: Public or made-up; never a hospital's own: pictures of them leave this function.
      epsilons: Stated for the trainings that must withstand.
      num_canaries: Of each training.
      num_background: Other images of each training.
      num_inverted: Images that are looked for, all of one class.
      seed: Of canaries and searches.
      steps: Of each search.
      told: Gets a line for each result.

    Raises:
      ConfigError: The study has no differential privacy, or there are too few images.
    """
    if not isinstance(study.privacy, DifferentialPrivacy):
        raise ConfigError(f"study {study.name}: [privacy] is needed, to see what it withstands")
    if study.table is not None:
        raise ConfigError(f"study {study.name}: the attacks are on images, not on clinical columns")
    if study.task.kind != "classification":
        raise ConfigError(f"task {study.task.kind}: the attacks are on classification of images")
    classes = _classes(images)
    same_class = torch.nonzero(classes == classes[0]).flatten()[:num_inverted]
    if len(images) < num_background or len(same_class) < num_inverted:
        raise ConfigError(
            f"{len(images)} images, {len(same_class)} of one class; {num_background} and "
            f"{num_inverted} are needed: give --data with more, or ask for fewer"
        )
    background = _rows(images, torch.arange(num_background))
    plain = study.model_copy(update={"privacy": NoPrivacy(mode="none")})
    studies = [plain, *(_with_epsilon(study, epsilon) for epsilon in epsilons)]
    membership = []
    for one in studies:
        found = attack_membership(one, background, num_canaries=num_canaries, seed=seed)
        membership.append(found)
        told(membership_line(found))
    shown = _rows(images, same_class)
    inversion = []
    for row in range(num_inverted):
        results = tuple(
            attack_update(
                study, shown, row, kind=kind, declared=len(images), seed=seed + row, steps=steps
            )
            for kind in LEAVING
        )
        inversion.append(results)
        for result in results:
            told(inversion_line(row, result))
    return Audit(tuple(membership), tuple(inversion), shown.pixels.numpy())


def membership_line(found: Membership) -> str:
    """One result in words."""
    stated = "no privacy" if found.epsilon is None else f"epsilon {found.epsilon:.2f} stated"
    return (
        f"membership, {stated}: {found.num_right} of {found.num_guesses} guesses right; epsilon "
        f"is at least {found.bound:.2f}"
    )


def inversion_line(row: int, result: Recovered) -> str:
    """One result in words."""
    return (
        f"inversion, image {row}, {result.kind} update: likeness (SSIM) {result.to_own:.3f} to its "
        f"own image, at most {max(result.to_others, default=0.0):.3f} to another of its class"
    )


def _with_epsilon(study: Study, epsilon: float) -> Study:
    terms = study.privacy.model_copy(update={"epsilon": epsilon, "noise_multiplier": None})
    return study.model_copy(update={"privacy": terms})


def _classes(images: Images) -> torch.Tensor:
    """One number for each image that is equal where the target is."""
    flat = images.targets.flatten(1) if images.targets.ndim > 1 else images.targets[:, None]
    _, classes = torch.unique(flat, dim=0, return_inverse=True)
    return torch.as_tensor(classes)


def _rows(images: Images, rows: torch.Tensor) -> Images:
    patients = tuple(images.patients[row] for row in rows.tolist())
    return Images(images.pixels[rows], images.targets[rows], patients)
