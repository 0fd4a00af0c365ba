"""What travels behind a model's parameters: SCAFFOLD's common variate, and who was summed when.

Source: Karimireddy et al. (2020), SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.models.flat import CONTROL, SUMMED, WEIGHT, Schema, is_parameter
from common.study import Study


@dataclass(frozen=True)
class Last:
    """The round that was just summed."""

    round_number: int
    survivors: Collection[str]
    weight: float  # of all survivors together


def blocks_after(
    model: NDArray[np.float32],
    update: NDArray[np.float32],
    schema: Schema,
    last: Last,
    study: Study,
) -> NDArray[np.float32]:
    """What travels behind the parameters of the next model.

    Args:
      model: The one before, with its blocks.
      update: The weighted mean of the survivors' updates, with their blocks.
      schema: Of both.
      last: The round that gave the update.
      study: Names all sites.

    Returns:
      The common variate, which stays the weighted mean of the sites' own as soon as all of them
      took part in one round; for every site the last round that held its update; the largest
      weight.
    """
    before, mean = schema.split(model), schema.split(update)
    known = float(before[WEIGHT][0])
    most = max(known, last.weight)
    blocks = {
        name: np.float32(known / most) * before[name] + np.float32(last.weight / most) * mean[name]
        for name in schema.names
        if name.startswith(CONTROL)
    }
    took_part = [site in last.survivors for site in study.site_names]
    blocks[SUMMED] = np.where(took_part, np.float32(last.round_number), before[SUMMED])
    blocks[WEIGHT] = np.array([most], np.float32)
    ordered = [blocks[name].reshape(-1) for name in schema.names if not is_parameter(name)]
    return np.concatenate(ordered).astype(np.float32)
