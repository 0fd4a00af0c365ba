"""What stands in the place of a study's model and of its training: vectors of any length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.models.flat import FlatNetwork
from common.update import LocalUpdate

LARGEST = 2.0**-8  # of an update's entries; studies expect about so much


class Vector(nn.Module):
    """A model that is one tensor; it is never called."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.from_numpy(drawn(num_params, seed=0)))


def network_of(num_params: int) -> FlatNetwork:
    """The same for everybody, in the place of ``build_network``."""
    return FlatNetwork(Vector(num_params), torch.device("cpu"))


class Trainer:
    """In the place of ``train`` and ``evaluate``: every site's update is another one."""

    def __init__(self, num_params: int, site: int) -> None:
        self._update = LocalUpdate(np.float32(LARGEST) * drawn(num_params, seed=site))

    def train(self, *_: Any, **__: Any) -> LocalUpdate:
        """Nothing is learned, and no time is spent."""
        return self._update

    def evaluate(self, *_: Any, task: Any, **__: Any) -> NDArray[np.int64]:
        """Counts of no image."""
        return np.zeros(task.num_counts, np.int64)


def drawn(num_params: int, seed: int) -> NDArray[np.float32]:
    """Numbers between -1 and 1."""
    return np.random.default_rng(seed).random(num_params, np.float32) * 2 - 1
