"""What stands in the place of a study's model and of its training: vectors of any length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.models.flat import FlatNetwork
from common.study import Study
from common.update import LocalUpdate

LARGEST = 2.0**-8  # of an update's entries; studies expect about so much


class Vector(nn.Module):
    """A model that is one tensor. Its answers say nothing, and its gradient is anything."""

    def __init__(self, num_params: int, num_outputs: int) -> None:
        super().__init__()
        values = torch.empty(num_params).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        self.vector = nn.Parameter(values)
        self._num_outputs = num_outputs

    def forward(self, images: Tensor) -> Tensor:
        """Zeros for every image, in no memory to speak of."""
        if self.training:
            assert self.vector.grad is not None  # noqa: S101 - the network's gradients lie there
            self.vector.grad.uniform_(-LARGEST, LARGEST)
        return torch.zeros(len(images), self._num_outputs, requires_grad=self.training)


def network_of(num_params: int, study: Study) -> FlatNetwork:
    """The same for everybody, in the place of ``build_network``."""
    return FlatNetwork(Vector(num_params, study.task.num_outputs), torch.device("cpu"))


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
