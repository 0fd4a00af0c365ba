"""Epsilon against published settings and against a second accountant."""

from __future__ import annotations

import math
import os
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from federation import tiny_study
from opacus.accountants import create_accountant

from client.ledger import Ledger
from common.accounting import Event, epsilon_of, noise_multiplier_for
from common.plan import plan_privacy, round_to_two_figures

KNOWN = [
    (Event(1.0, 0.01, 1000), 1.83, 1.84),
    (Event(1.0, 0.05, 500), 7.52, 7.54),
    (Event(1.5, 0.1, 100), 3.53, 3.55),
]


@pytest.mark.parametrize(("event", "low", "high"), KNOWN, ids=str)
def test_epsilon_at_delta_1e_5_is_the_known_one(event: Event, low: float, high: float) -> None:
    assert low <= epsilon_of([event], 1e-5, "prv") <= high
    assert 0.99 * low <= epsilon_of([event], 1e-5, "pld") <= 1.01 * high


def _random_events(num: int) -> list[Event]:
    rng = np.random.default_rng(7)
    return [
        Event(
            float(rng.uniform(0.7, 5)), float(rng.uniform(0.005, 0.5)), int(rng.integers(10, 800))
        )
        for _ in range(num)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_accountants_agree_within_one_percent_on_random_settings() -> None:
    """A quarter of those that ``RANDOM_SETTINGS=200`` tries."""
    for event in _random_events(int(os.environ.get("RANDOM_SETTINGS", "50"))):
        one, other = (epsilon_of([event], 1e-5, name) for name in ("prv", "pld"))
        assert one == pytest.approx(other, rel=0.01), event


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
def test_a_ledger_of_50_different_rounds_is_what_two_libraries_make_of_it(tmp_path: Path) -> None:
    """The ledger adds up by one of them; what it writes and reads back must change nothing."""
    rounds = [Event(2 + e.noise_multiplier, e.sampling_probability, 8) for e in _random_events(50)]
    ledger = Ledger(tmp_path / "xrays.jsonl", "xrays", None)
    for number, event in enumerate(rounds):
        ledger.debit(f"run {number}", number, event, num_rounds=50)
    spent = ledger.spent(1e-5)
    second = PLDAccountant()
    for event in rounds:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        sampled = PoissonSampledDpEvent(event.sampling_probability, gaussian)
        second.compose(sampled, count=event.steps)
    assert spent == pytest.approx(second.get_epsilon(1e-5), rel=0.01)
    third = create_accountant("prv")
    third.history = [astuple(event) for event in rounds]
    assert spent == pytest.approx(third.get_epsilon(delta=1e-5), rel=0.01)


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_the_noise_that_is_solved_for_costs_what_was_asked_and_not_more(epsilon: float) -> None:
    noise = noise_multiplier_for(epsilon, 1e-4, sampling_probability=0.25, steps=200)
    cost = epsilon_of([Event(noise, 0.25, 200)], 1e-4)
    assert 0.998 * epsilon <= cost <= epsilon


def test_equal_events_add_up_and_nothing_costs_nothing() -> None:
    event = Event(2.0, 0.1, 50)
    twice = Event(2.0, 0.1, 100)
    assert epsilon_of([event, event], 1e-5) == epsilon_of([twice], 1e-5)
    assert epsilon_of([], 1e-5) == 0.0
    assert math.isinf(epsilon_of([Event(0.0, 0.1, 1)], 1e-5))


def test_more_steps_and_less_noise_cost_more() -> None:
    base = epsilon_of([Event(2.0, 0.1, 50)], 1e-5)
    assert epsilon_of([Event(2.0, 0.1, 51)], 1e-5) > base
    assert epsilon_of([Event(1.9, 0.1, 50)], 1e-5) > base
    assert epsilon_of([Event(2.0, 0.1, 50), Event(3.0, 0.2, 10)], 1e-5) > base


@pytest.mark.parametrize(
    ("true", "public"), [(7, 7), (94, 94), (937, 940), (945, 950), (1234, 1200), (98_765, 99_000)]
)
def test_the_declared_number_has_two_figures(true: int, public: int) -> None:
    assert round_to_two_figures(true) == public


def test_the_plan_of_a_site_follows_from_the_study_and_its_public_number() -> None:
    privacy = {"epsilon": 4.0, "delta": 1e-5, "example_clip_norm": 0.5}
    study = tiny_study(num_rounds=5, privacy=privacy)
    plan = plan_privacy(study, 103)
    assert plan is not None
    assert plan.num_public == 100
    assert plan.event.sampling_probability == 8 / 100
    assert plan.event.steps == 2
    assert 3.99 <= plan.epsilon_after(5) <= 4.0
    assert plan.epsilon_after(1) < plan.epsilon_after(4)
    assert plan_privacy(tiny_study(), 103) is None


def test_the_rounds_that_a_budget_pays_for_fit_and_one_more_does_not() -> None:
    privacy = {"noise_multiplier": 2.0, "delta": 1e-5, "example_clip_norm": 0.5}
    plan = plan_privacy(tiny_study(num_rounds=5, privacy=privacy), 100)
    assert plan is not None
    rounds = plan.rounds_within(3.0)
    assert 5 < rounds < 1000
    assert plan.epsilon_after(rounds) <= 3.0 < plan.epsilon_after(rounds + 1)
    assert plan.rounds_within(plan.epsilon_after(1) / 2) == 0
