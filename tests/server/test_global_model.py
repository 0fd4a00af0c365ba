"""Each server optimizer against its paper's rule, worked out by hand on three numbers."""

from __future__ import annotations

import numpy as np
import pytest

from common.study import FedAdaptive, FedAvg, FedAvgM
from server.global_model import apply_mean_update, initial_optimizer_state

MODEL = np.array([1.0, 2.0, -1.0], np.float32)
UPDATES = [np.array([0.5, -1.0, 0.0], np.float32), np.array([0.25, 0.5, -1.0], np.float32)]


def _two_steps(config):  # type: ignore[no-untyped-def]
    model, state = MODEL, initial_optimizer_state(config, MODEL)
    for update in UPDATES:
        model, state = apply_mean_update(model, update, state, config)
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
