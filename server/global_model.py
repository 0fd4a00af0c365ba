"""From the mean update to the next global model.

Source: McMahan et al. (2017), Communication-Efficient Learning of Deep Networks from Decentralized
Data (FedAvg); Hsu, Qi and Brown (2019), Measuring the Effects of Non-Identical Data Distribution
(FedAvgM); Reddi et al. (2021), Adaptive Federated Optimization (FedAdagrad, FedAdam,
FedYogi).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.study import FedAdagrad, FedAdaptive, FedAvg, FedAvgM, ServerOptimizer

Vector = NDArray[np.float32]
OptimizerState = dict[str, Vector]
BLOCK = 1 << 16  # entries at a time: what is computed on the way stays in the cache


def initial_optimizer_state(config: ServerOptimizer, model: Vector) -> OptimizerState:
    """Arrays the optimizer carries from round to round, each of shape (num_params,)."""
    state = {"ema": np.zeros_like(model)} if config.ema else {}
    if isinstance(config, FedAvg):
        return state
    if isinstance(config, FedAvgM):
        return {**state, "momentum": np.zeros_like(model)}
    # Reddi et al. start the second moment at tau squared, which bounds the first steps.
    return {
        **state,
        "first": np.zeros_like(model),
        "second": np.full_like(model, config.tau**2),
    }


def apply_mean_update(
    model: Vector, update: Vector, state: OptimizerState, config: ServerOptimizer
) -> tuple[Vector, OptimizerState]:
    """One step of the server optimizer.

    Args:
      model: The global model, shape (num_params,).
      update: The weighted mean of local minus global, shape (num_params,). It is used up: the next
        model takes its place in memory.
      state: What the last step left; used up by the next one.
      config: The study's ``[server_optimizer]``.

    Returns:
      The next model and the state for the next step.
    """
    for low in range(0, model.size, BLOCK):
        part = slice(low, low + BLOCK)
        before = {name: array[part] for name, array in state.items()}
        following, moments = _step(model[part], update[part], before, config)
        if config.ema:
            moments["ema"] = moving_average(before["ema"], following, config.ema)
        update[part] = following
        for name, moment in moments.items():
            state[name][part] = moment
    return update, state


def moving_average(average: Vector, model: Vector, decay: float) -> Vector:
    """One step of an exponential moving average that starts at zero."""
    kept = np.float32(decay)
    return kept * average + (1 - kept) * model


def averaged_model(state: OptimizerState, config: ServerOptimizer, num_rounds: int) -> Vector:
    """The average of the models after rounds 1 to ``num_rounds``; their weights add up to 1."""
    return state["ema"] / np.float32(1 - float(np.float32(config.ema)) ** num_rounds)


def _step(
    model: Vector, update: Vector, state: OptimizerState, config: ServerOptimizer
) -> tuple[Vector, OptimizerState]:
    rate = np.float32(config.learning_rate)
    if isinstance(config, FedAvg):
        return model + rate * update, {}
    if isinstance(config, FedAvgM):
        momentum = np.float32(config.momentum) * state["momentum"] + update
        return model + rate * momentum, {"momentum": momentum}
    return _adaptive_step(model, update, state, config)


def _adaptive_step(
    model: Vector, update: Vector, state: OptimizerState, config: FedAdaptive | FedAdagrad
) -> tuple[Vector, OptimizerState]:
    """Algorithm 2 of Reddi et al. (2021), without bias correction, as there."""
    beta1, one = np.float32(config.beta1), np.float32(1)
    first: Vector = beta1 * state["first"] + (one - beta1) * update
    second = _second_moment(update * update, state["second"], config)
    ratio: Vector = np.divide(first, np.sqrt(second) + np.float32(config.tau))
    return model + np.float32(config.learning_rate) * ratio, {"first": first, "second": second}


def _second_moment(square: Vector, before: Vector, config: FedAdaptive | FedAdagrad) -> Vector:
    if isinstance(config, FedAdagrad):
        return before + square
    beta2, one = np.float32(config.beta2), np.float32(1)
    changed: Vector = (one - beta2) * square
    if config.name == "fedadam":
        return beta2 * before + changed
    changed *= np.sign(before - square)
    return before - changed
