"""Privacy arithmetic: the event of a round, epsilon after a list of events, calibration.

One step is a Poisson-sampled Gaussian mechanism on the site's patients (or images), add or remove
one. Two independent accountants are at hand: Opacus' PRV for what is reported, dp-accounting's
privacy loss distributions for lists of different events and for checking the first.

Source: Gopi, Lee and Wutschitz (2021), Numerical Composition of Differential Privacy (PRV);
Koskela, Jälkö and Honkela (2020) (PLD).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Accountant = Literal["prv", "pld", "rdp"]

MAX_NOISE_MULTIPLIER = 1e4
COARSE_BELOW, FINE_ERROR = 1.5, 5e-4
BEYOND_REASON = 50.0  # an epsilon that promises nobody anything
AGREEMENT = 0.01  # of the two accountants, relative
CALIBRATION_TOLERANCE = 1e-3  # relative, in epsilon, always on the safe side


@dataclass(frozen=True)
class Event:
    """Steps of one mechanism."""

    noise_multiplier: float  # noise standard deviation / clip norm
    sampling_probability: float  # chance that one privacy unit is in one step
    steps: int


def epsilon_of(events: Iterable[Event], delta: float, accountant: Accountant = "prv") -> float:
    """Epsilon at ``delta`` of all events together.

    Args:
      events: What happened, in any order; equal mechanisms are added up.
      delta: Probability that the guarantee may fail, in (0, 1).
      accountant: ``prv`` (reported; a list of different mechanisms goes to ``pld``), ``pld``, or
        ``rdp`` (fast, an upper bound some percent above).

    Returns:
      Epsilon; 0 for no steps, infinity for a step without noise.
    """
    return _epsilon_of(tuple(_merge(events)), delta, accountant)


def second_opinion(events: Iterable[Event], delta: float) -> float | None:
    """The same by the other library than ``epsilon_of`` asks.

    Returns:
      Epsilon by dp-accounting's PLD where ``epsilon_of`` took Opacus' PRV, and the other way round;
      None beyond ``BEYOND_REASON``, where it would take minutes and gigabytes.
    """
    merged = tuple(_merge(events))
    if _epsilon_of(merged, delta, "prv") > BEYOND_REASON:
        return None
    return _second_opinion(merged, delta)


@functools.lru_cache(maxsize=256)  # sites of one size share the answer
def _second_opinion(merged: tuple[Event, ...], delta: float) -> float:
    if not merged:
        return 0.0
    if len(merged) == 1:
        return _pld_epsilon(merged, delta)
    return _opacus_epsilon(merged, delta, "prv")


@functools.lru_cache(maxsize=256)  # a site states the same sum of events with every upload
def _epsilon_of(merged: tuple[Event, ...], delta: float, accountant: Accountant) -> float:
    if not merged:
        return 0.0
    if any(event.noise_multiplier == 0 for event in merged):
        return math.inf
    if accountant == "pld" or (accountant == "prv" and len(merged) > 1):
        return _pld_epsilon(merged, delta)
    return _opacus_epsilon(merged, delta, accountant)


def noise_multiplier_for(
    epsilon: float, delta: float, *, sampling_probability: float, steps: int
) -> float:
    """The smallest noise multiplier that keeps ``steps`` within ``epsilon`` at ``delta``.

    Returns:
      A value whose PRV epsilon is at most ``epsilon`` and within 0.1 % of it.

    Raises:
      ValueError: No noise multiplier up to 10,000 suffices.
    """

    def cost(noise: float) -> float:
        return epsilon_of([Event(noise, sampling_probability, steps)], delta)

    low, high = 0.0, 1.0
    while cost(high) > epsilon:
        low, high = high, 2 * high
        if high > MAX_NOISE_MULTIPLIER:
            raise ValueError(f"epsilon {epsilon} cannot be reached in {steps} steps")
    while cost(high) < (1 - CALIBRATION_TOLERANCE) * epsilon and high - low > 1e-6 * high:
        middle = (low + high) / 2
        if cost(middle) > epsilon:
            low = middle
        else:
            high = middle
    return high


def _merge(events: Iterable[Event]) -> list[Event]:
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sampling_probability)
        steps[key] = steps.get(key, 0) + event.steps
    return [Event(*key, total) for key, total in sorted(steps.items()) if total]


def _opacus_epsilon(events: Sequence[Event], delta: float, name: Accountant) -> float:
    from opacus.accountants import create_accountant

    accountant = create_accountant(name)
    accountant.history = [(e.noise_multiplier, e.sampling_probability, e.steps) for e in events]
    with warnings.catch_warnings():
        # RDP says when its best order is at the edge of its list: the bound is still a bound.
        warnings.simplefilter("ignore")
        epsilon = float(accountant.get_epsilon(delta=delta))
        if name == "prv" and epsilon < COARSE_BELOW:
            # PRV adds its own error bound, 0.01 by default: too much for a small epsilon.
            epsilon = float(accountant.get_epsilon(delta=delta, eps_error=FINE_ERROR))
        return epsilon


def _pld_epsilon(events: Sequence[Event], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for event in events:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        sampled = PoissonSampledDpEvent(event.sampling_probability, gaussian)
        accountant.compose(SelfComposedDpEvent(sampled, event.steps))
    return float(accountant.get_epsilon(delta))
