"""Build the network a study names, with initial weights that depend on the study's seed alone."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.models.cnn import SmallCnn
from common.models.flat import FlatNetwork
from common.models.resnet import resnet18
from common.study import Cnn, Study


def build_network(study: Study, device: torch.device | str = "cpu") -> FlatNetwork:
    """The study's network with its initial weights.

    Args:
      study: Names the model, the input and the task; ``seed`` fixes the weights.
      device: Where the network shall live; weights are drawn on the CPU either way.

    Returns:
      A network whose travelling parameters are one vector.

    Guarantees:
      Equal studies give equal weights, and the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        module = _module(study)
    return FlatNetwork(module, torch.device(device))


def digest_of_weights(weights: NDArray[np.float32]) -> str:
    """SHA-256 of a weight vector; 64 hex digits."""
    return hashlib.sha256(weights.data).hexdigest()


def _module(study: Study) -> nn.Module:
    channels, num_outputs = study.input.channels, study.task.num_outputs
    if isinstance(study.model, Cnn):
        return SmallCnn(study.model, channels, num_outputs)
    return resnet18(study.model, channels, num_outputs)
