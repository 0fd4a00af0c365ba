"""Each server optimizer against its paper's rule, worked out by hand on three numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import federate, tiny_study
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from common.models.build import build_network
from common.study import FedAdagrad, FedAdaptive, FedAvg, FedAvgM, Study
from server.global_model import (
    apply_mean_update,
    averaged_model,
    initial_optimizer_state,
    moving_average,
)
from server.run_dir import FINAL, RunDir
from server.state import State, best_of, best_round, returned_model

MODEL = np.array([1.0, 2.0, -1.0], np.float32)
UPDATES = [np.array([0.5, -1.0, 0.0], np.float32), np.array([0.25, 0.5, -1.0], np.float32)]


def _two_steps(config):  # type: ignore[no-untyped-def]
    model, state = MODEL, initial_optimizer_state(config, MODEL)
    for update in UPDATES:
        model, state = apply_mean_update(model, update.copy(), state, config)
    return model


def test_fedavg_adds_the_mean_update() -> None:
    assert _two_steps(FedAvg()).tolist() == [1.75, 1.5, -2.0]


def test_fedavg_scales_by_the_server_learning_rate() -> None:
    assert _two_steps(FedAvg(learning_rate=0.5)).tolist() == [1.375, 1.75, -1.5]


def test_fedavgm_keeps_half_of_the_last_step() -> None:
    # momentum after round 2: 0.5 * [0.5, -1, 0] + [0.25, 0.5, -1] = [0.5, 0, -1]
    config = FedAvgM(name="fedavgm", learning_rate=1.0, momentum=0.5)
    assert _two_steps(config).tolist() == [2.0, 1.0, -2.0]


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_rules_follow_algorithm_2_of_reddi_et_al(name: str) -> None:
    config = FedAdaptive(name=name, learning_rate=0.1, beta1=0.5, beta2=0.75, tau=0.5)  # type: ignore[arg-type]
    # Round 1, first entry: m = 0.5 * 0.5 = 0.25; v = 0.25 either way, because the first square
    # equals tau squared; step 0.1 * 0.25 / (0.5 + 0.5) = 0.025.
    # Round 2: m = 0.5 * 0.25 + 0.5 * 0.25 = 0.25; square 0.0625;
    # Adam: v = 0.75 * 0.25 + 0.25 * 0.0625 = 0.203125; Yogi: v = 0.25 - 0.25 * 0.0625 = 0.234375.
    second = {"fedadam": 0.203125, "fedyogi": 0.234375}[name]
    expected = 1.0 + 0.025 + 0.1 * 0.25 / (np.sqrt(second) + 0.5)
    assert _two_steps(config)[0] == pytest.approx(expected, rel=1e-6)


def test_adagrad_adds_up_all_squares() -> None:
    config = FedAdagrad(name="fedadagrad", learning_rate=0.1, beta1=0.5, tau=0.5)
    # Round 1: m = 0.25, v = 0.25 + 0.25; round 2: m = 0.25, v = 0.5 + 0.0625.
    first = 0.1 * 0.25 / (np.sqrt(0.5) + 0.5)
    second = 0.1 * 0.25 / (np.sqrt(0.5625) + 0.5)
    assert _two_steps(config)[0] == pytest.approx(1.0 + first + second, rel=1e-6)


def test_yogi_forgets_slower_than_adam_when_updates_shrink() -> None:
    by_name = {}
    for name in ("fedadam", "fedyogi"):
        config = FedAdaptive(name=name, beta2=0.5)  # type: ignore[arg-type]
        state = initial_optimizer_state(config, MODEL)
        for size in (1.0, 0.01, 0.01):
            update = np.full(3, size, np.float32)
            _, state = apply_mean_update(MODEL, update, state, config)
        by_name[name] = float(state["second"][0])
    assert by_name["fedyogi"] > 2 * by_name["fedadam"]


# The average of the models, and which of them is returned

THIRD = np.array([-0.75, 0.5, 3.0], np.float32)
EVERY_RULE: dict[str, Any] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdaptive,
    "fedyogi": FedAdaptive,
}


def after_three_rounds(config):  # type: ignore[no-untyped-def]
    """The models after rounds 1 to 3, and the optimizer's arrays."""
    models, model, state = [], MODEL, initial_optimizer_state(config, MODEL)
    for update in (*UPDATES, THIRD):
        model, state = apply_mean_update(model, update.copy(), state, config)
        models.append(model)
    return models, state


def test_the_average_of_three_rounds_weighs_them_one_two_and_four_sevenths() -> None:
    config = FedAvg(ema=0.5)
    models, state = after_three_rounds(config)
    assert [model.tolist() for model in models] == [[1.5, 1, -1], [1.75, 1.5, -2], [1, 2, 1]]
    # 0.5 * (0.5 * 0.5 * m1 + 0.5 * m2) + 0.5 * m3, of which an eighth is still the start at zero.
    average = averaged_model(state, config, 3)
    assert average.tolist() == pytest.approx([9 / 7, 12 / 7, -1 / 7], rel=1e-6)
    assert average.dtype == np.float32


def test_the_average_of_two_rounds_with_another_decay_by_hand() -> None:
    # Weights 0.8 * 0.2 and 0.2 over their sum, 0.36: four and five ninths.
    config = FedAvg(ema=0.8)
    state = initial_optimizer_state(config, MODEL)
    assert state["ema"].tolist() == [0, 0, 0]
    model = MODEL
    for update in UPDATES:
        model, state = apply_mean_update(model, update.copy(), state, config)
    expected = [(4 * 1.5 + 5 * 1.75) / 9, (4 * 1 + 5 * 1.5) / 9, (4 * -1 + 5 * -2) / 9]
    assert averaged_model(state, config, 2).tolist() == pytest.approx(expected, rel=1e-6)


@given(
    st.floats(0.01, 0.999),
    st.integers(1, 60),
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4),
)
def test_the_average_of_equal_models_is_that_model(
    decay: float, num_rounds: int, entries: list[float]
) -> None:
    model, config = np.array(entries, np.float32), FedAvg(ema=decay)
    state = initial_optimizer_state(config, model)
    for _ in range(num_rounds):
        state = {"ema": moving_average(state["ema"], model, decay)}
    # float32 rounds the decay: over 60 rounds that is a few parts in a hundred thousand.
    assert np.allclose(averaged_model(state, config, num_rounds), model, rtol=1e-4, atol=1e-6)


@given(st.floats(0.01, 0.99), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_the_average_is_the_weighted_mean_written_out(
    decay: float, num_rounds: int, seed: int
) -> None:
    models = np.random.default_rng(seed).normal(size=(num_rounds, 3)).astype(np.float32)
    config = FedAvg(ema=decay)
    state = initial_optimizer_state(config, models[0])
    for model in models:
        state = {"ema": moving_average(state["ema"], model, decay)}
    weights = decay ** np.arange(num_rounds)[::-1]
    expected = np.average(models.astype(np.float64), axis=0, weights=weights)
    assert np.allclose(averaged_model(state, config, num_rounds), expected, atol=1e-4)


@pytest.mark.parametrize("name", EVERY_RULE)
def test_averaging_changes_no_model_and_no_moment_of_the_rule(name: str) -> None:
    plain, averaging = (EVERY_RULE[name](name=name, ema=ema) for ema in (0.0, 0.75))
    raw, moments = after_three_rounds(plain)
    models, state = after_three_rounds(averaging)
    for one, other in zip(raw, models, strict=True):
        assert one.tobytes() == other.tobytes()
    average = state.pop("ema")
    assert "ema" not in moments
    assert state.keys() == moments.keys()
    for kind, moment in moments.items():
        assert moment.tobytes() == state[kind].tobytes()
    # Weights 9, 12 and 16 thirty-sevenths; with fedadam and fedyogi too it is the models' average.
    expected = (9 * models[0] + 12 * models[1] + 16 * models[2]) / 37
    assert average / (1 - 0.75**3) == pytest.approx(expected, rel=1e-5)


def at_round(number: int, study: Study, optimizer: dict[str, Any], *validation: Any) -> State:
    return State(number, number, MODEL, optimizer, (), 3, tuple(validation))


def test_a_study_returns_the_average_only_if_it_asks_for_one(
    make_study: Callable[..., Study],
) -> None:
    plain, averaging = (
        make_study(),
        make_study({"server_optimizer": {"name": "fedavg", "ema": 0.5}}),
    )
    kept = {"ema": np.array([0.75, 1.5, 3.0], np.float32)}
    model = np.array([5.0, 6.0, 7.0], np.float32)
    assert returned_model(at_round(2, plain, {}), plain, model) is model
    # After two rounds the weights add up to three quarters.
    assert returned_model(at_round(2, averaging, kept), averaging, model).tolist() == [1, 2, 4]
    assert returned_model(at_round(1, averaging, kept), averaging, model).tolist() == [1.5, 3, 6]


@pytest.mark.parametrize(
    ("title", "figure", "values", "best"),
    [
        ("the lowest loss", "loss", [0.5, 0.2, 0.3], 2),
        ("the highest of any other figure", "dice", [0.5, 0.2, 0.7], 3),
        ("the first of equal losses", "loss", [0.5, 0.2, 0.2], 2),
        ("the first of equal figures", "auroc", [0.7, 0.2, 0.7], 1),
        ("what is undefined is never best", "dice", [None, 0.0, None], 2),
        ("nor the lowest loss", "loss", [None, 3.0, None], 2),
        ("nothing is defined", "dice", [None, None], 1),
        ("a single round", "loss", [9.0], 1),
        ("no round", "loss", [], 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_best_round(title: str, figure: str, values: list[float | None], best: int) -> None:
    by_round = [{figure: value, "unrelated": -9.0} for value in values]
    assert best_of(by_round, figure) == best


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1), st.booleans())
def test_no_round_is_better_than_the_best(values: list[float | None], lower: bool) -> None:
    figure = "loss" if lower else "dice"
    best = best_of([{figure: value} for value in values], figure)
    known = [value for value in values if value is not None]
    if known:
        assert values[best - 1] == (min(known) if lower else max(known))
        assert values.index(values[best - 1]) == best - 1


def test_the_untrained_model_is_not_returned_even_if_it_is_best(
    make_study: Callable[..., Study],
) -> None:
    figures = [{"loss": loss} for loss in (0.1, 0.9, 0.4, 0.6)]
    stopping = make_study({"training.early_stopping": {"patience": 2}})
    assert best_round(at_round(3, stopping, {}, *figures), stopping) == 2
    plain = make_study()
    assert best_round(at_round(3, plain, {}, *figures), plain) == 3  # the last
    assert best_round(at_round(0, stopping, {}, figures[0]), stopping) == 0


def test_a_federation_that_averages_returns_the_average_of_the_models_it_trained(
    tmp_path: Path,
) -> None:
    study = tiny_study(3, num_rounds=2, server_optimizer={"name": "fedavg", "ema": 0.5})
    schema, folder = build_network(study).schema, tmp_path / "run"
    assert federate(study, folder)["returned_round"] == 2
    final = load_file(folder / FINAL)
    first, second = (RunDir(folder).model(number, schema).astype(np.float64) for number in (1, 2))
    returned = np.concatenate([final[name].ravel() for name in schema.names])
    assert np.abs(first - second).max() > 1e-3
    assert np.allclose(returned, (first + 2 * second) / 3, rtol=0, atol=1e-6)
