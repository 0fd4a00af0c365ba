"""Build the network a study names, with initial weights that depend on the study's seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from common.errors import ConfigError
from common.models.classifiers import densenet121, efficientnet_b0, resnet18
from common.models.cnn import SmallCnn
from common.models.flat import FlatNetwork
from common.models.unet import attention_unet, unet
from common.study import (
    AttentionUnet,
    Cnn,
    DenseNet121,
    EfficientNetB0,
    ResNet18,
    Study,
    Unet,
)


def build_network(study: Study, device: torch.device | str = "cpu") -> FlatNetwork:
    """The study's network with its initial weights.

    Args:
      study: Names the model, the input and the task; ``seed`` fixes the weights.
      device: Where the network shall live; weights are drawn on the CPU either way.

    Returns:
      A network whose travelling parameters are one vector.

    Guarantees:
      Equal studies give equal weights, and the caller's random state is left as it was.

    Raises:
      ConfigError: ``model.frozen`` names no parameter, or all of them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        module = _module(study)
    _freeze(module, study.model.frozen)
    planar_unet = isinstance(study.model, Unet | AttentionUnet) and len(study.input.size) == 2  # noqa: PLR2004
    return FlatNetwork(module, torch.device(device), channels_last=planar_unet)


def digest_of_weights(network: FlatNetwork) -> str:
    """SHA-256 of the travelling weights and then of the frozen ones; 64 hex digits."""
    digest = hashlib.sha256(network.vector().data)
    for tensor in network.kept().values():
        digest.update(tensor.data)
    return digest.hexdigest()


def _module(study: Study) -> nn.Module:
    num_channels, num_outputs = study.input.channels, study.task.num_outputs
    num_dims = len(study.input.size)
    match study.model:
        case Cnn() as config:
            return SmallCnn(config, num_channels, num_outputs)
        case ResNet18() as config:
            return resnet18(config, num_dims, num_channels, num_outputs)
        case DenseNet121() as config:
            return densenet121(config, num_dims, num_channels, num_outputs)
        case EfficientNetB0() as config:
            return efficientnet_b0(config, num_dims, num_channels, num_outputs)
        case AttentionUnet() as config:
            return attention_unet(config, num_dims, num_channels, num_outputs)
        case config:
            return unet(config, num_dims, num_channels, num_outputs)


def _freeze(module: nn.Module, beginnings: Sequence[str]) -> None:
    """Keep the parameters with these beginnings of a name as they are; they never travel."""
    for beginning in beginnings:
        named = [p for name, p in module.named_parameters() if name.startswith(beginning)]
        if not named:
            names = ", ".join(
                dict.fromkeys(name.split(".")[0] for name, _ in module.named_parameters())
            )
            raise ConfigError(
                f"model.frozen: no parameter's name begins with {beginning!r}; the first parts of "
                f"the names are {names}"
            )
        for parameter in named:
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError("model.frozen: nothing is left to train; leave a layer out of the list")
