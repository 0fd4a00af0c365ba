"""From the mean update to the next global model.

Source: McMahan et al. (2017), Communication-Efficient Learning of Deep Networks from Decentralized
Data (FedAvg); Reddi et al. (2021), Adaptive Federated Optimization, for the server's learning rate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.study import ServerOptimizer

OptimizerState = dict[str, NDArray[np.float32]]


def initial_optimizer_state(config: ServerOptimizer, model: NDArray[np.float32]) -> OptimizerState:
    """Arrays the optimizer carries from round to round; FedAvg has none."""
    del config, model
    return {}


def apply_mean_update(
    model: NDArray[np.float32],
    update: NDArray[np.float32],
    state: OptimizerState,
    config: ServerOptimizer,
) -> tuple[NDArray[np.float32], OptimizerState]:
    """One step of the server optimizer.

    Args:
      model: The global model, shape (num_params,).
      update: The weighted mean of local minus global, shape (num_params,).
      state: What the last step left.
      config: The study's ``[server_optimizer]``.

    Returns:
      The next model and the state for the next step.
    """
    return model + np.float32(config.learning_rate) * update, state
