"""What a private study costs a site of a given size, before anything runs.

Everything follows from the approved study and the site's declared number of patients: a public
constant, rounded, and never the true count.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from common.accounting import Event, epsilon_of, noise_multiplier_for
from common.study import DifferentialPrivacy, Study

MOST_ROUNDS = 10_000  # that anybody asks for
SITE_SIZES = (100, 300, 1000, 3000, 10_000)  # declared patients, to show what a study costs


@dataclass(frozen=True)
class PrivacyPlan:
    """How one site trains privately in every round, and what that costs.

    Attributes:
      event: The mechanism and steps of one round.
      num_public: Declared patients (or images) rounded to two figures.
      num_rounds: Rounds the study plans for.
      terms: The approved study's ``[privacy]``: unit, clip norm, images per patient, randomness.
    """

    event: Event
    num_public: int
    num_rounds: int
    terms: DifferentialPrivacy

    @property
    def batch_size(self) -> float:
        """Expected units in one step: sampling probability times public count."""
        return self.event.sampling_probability * self.num_public

    def epsilon_after(self, num_rounds: int) -> float:
        """Epsilon once so many rounds were trained."""
        return self.epsilon_of_steps(num_rounds * self.event.steps)

    def rounds_within(self, epsilon: float) -> int:
        """The most rounds that cost at most ``epsilon``; ``MOST_ROUNDS`` if so many do."""
        fits, too_many = 0, 1
        # By doubling: far above the budget the accountant would take minutes and gigabytes.
        while self.epsilon_after(too_many) <= epsilon:
            if too_many >= MOST_ROUNDS:
                return MOST_ROUNDS
            fits, too_many = too_many, min(2 * too_many, MOST_ROUNDS)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.epsilon_after(middle) <= epsilon:
                fits = middle
            else:
                too_many = middle
        return fits

    def epsilon_of_steps(self, steps: int) -> float:
        """Epsilon of so many steps at the study's delta."""
        return epsilon_of([replace(self.event, steps=steps)], self.terms.delta)


def plan_privacy(study: Study, declared: int) -> PrivacyPlan | None:
    """The plan for a site that declares so many patients; None for a study without privacy."""
    if not isinstance(study.privacy, DifferentialPrivacy):
        return None
    return _plan(study, study.privacy, round_to_two_figures(declared))


def steps_per_round(study: Study, num_units: int) -> int:
    """Optimizer steps of one round at a site with so many patients or images."""
    training = study.training
    per_epoch = math.ceil(num_units / training.batch_size)
    return training.local_steps or per_epoch * (training.local_epochs or 1)


def round_to_two_figures(number: int) -> int:
    """1,234 becomes 1,200: the public count says little about any one patient."""
    digits = max(0, len(str(number)) - 2)
    step: int = 10**digits
    return (2 * number + step) // (2 * step) * step


def _plan(study: Study, privacy: DifferentialPrivacy, num_public: int) -> PrivacyPlan:
    probability = min(1.0, study.training.batch_size / num_public)
    steps = steps_per_round(study, num_public)
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None  # noqa: S101 - the study was validated: one of the two
        noise = _calibrate(privacy.epsilon, privacy.delta, probability, study.num_rounds * steps)
    return PrivacyPlan(Event(noise, probability, steps), num_public, study.num_rounds, privacy)


@functools.lru_cache(maxsize=256)  # sites of one size share the answer; a search takes seconds
def _calibrate(epsilon: float, delta: float, probability: float, steps: int) -> float:
    return noise_multiplier_for(epsilon, delta, sampling_probability=probability, steps=steps)
