"""Build the network a study names, with initial weights that depend on the study's seed alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence

import torch
from torch import nn

from common.errors import ConfigError
from common.models.classifiers import densenet121, efficientnet_b0, resnet18
from common.models.cnn import SmallCnn
from common.models.detector import Detector
from common.models.flat import CONTROL, SUMMED, WEIGHT, FlatNetwork
from common.models.tabular import ImageAndTable, logistic, mlp
from common.models.unet import attention_unet, segresnet, unet
from common.study import (
    AttentionUnet,
    CenterUnet,
    Cnn,
    DenseNet121,
    EfficientNetB0,
    Logistic,
    Mlp,
    Model,
    Multimodal,
    ResNet18,
    SegResNet,
    Study,
    Unet,
)

NORMS = (nn.GroupNorm, nn.LayerNorm)  # every network here is normalised by one of these


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
    fills = isinstance(study.model, Unet | AttentionUnet | SegResNet | CenterUnet)
    is_planar = len(study.input.size) == 2  # noqa: PLR2004
    local = _local(module) if study.training.local_normalisation else ()
    return FlatNetwork(
        module,
        torch.device(device),
        channels_last=fills and is_planar,
        local=local,
        blocks=_blocks(study, module, local),
    )


def _local(module: nn.Module) -> set[str]:
    """Names of the parameters of all layers that normalise.

    Raises:
      ConfigError: The network has none.

    Source:
      Li et al. (2021), FedBN: Federated Learning on Non-IID Features via Local Batch Normalization.
      Here it is group normalisation that stays.
    """
    names = {
        f"{place}.{name}"
        for place, layer in module.named_modules()
        if isinstance(layer, NORMS)
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.requires_grad
    }
    if not names:
        raise ConfigError(
            "training.local_normalisation: this network trains no layer that normalises; leave it "
            "out"
        )
    return names


def _blocks(
    study: Study, module: nn.Module, local: Collection[str]
) -> list[tuple[str, tuple[int, ...]]]:
    """What travels behind the parameters: see ``common.models.flat``."""
    blocks: list[tuple[str, tuple[int, ...]]] = []
    if study.training.control_variates:
        blocks += [
            (CONTROL + name, tuple(parameter.shape))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and name not in local
        ]
    if study.training.keeps_state:
        blocks += [(SUMMED, (max(1, len(study.site_names)),)), (WEIGHT, (1,))]
    return blocks


def row_shape(study: Study) -> tuple[int, ...]:
    """Shape of what the network takes for one sample: an image, or its pixels with its table."""
    config = study.input
    shape = (config.channels, *config.size)
    if study.table is None:
        return shape
    return ((math.prod(shape) if config.size else 0) + study.table.num_features,)


def digest_of_weights(network: FlatNetwork) -> str:
    """SHA-256 of the travelling weights and then of the frozen ones; 64 hex digits."""
    digest = hashlib.sha256(network.vector().data)
    for tensor in network.kept().values():
        digest.update(tensor.data)
    return digest.hexdigest()


def _module(study: Study) -> nn.Module:
    num_outputs = study.task.num_outputs
    num_features = study.table.num_features if study.table else 0
    match study.model:
        case Logistic() as config:
            return logistic(config, num_features, num_outputs)
        case Mlp() as config:
            return mlp(config, num_features, num_outputs)
        case Multimodal() as config:
            image = _of_images(study, config.image, config.image_features)
            shape = (study.input.channels, *study.input.size)
            return ImageAndTable(config, image, shape, num_features, num_outputs)
        case config:
            return _of_images(study, config, num_outputs)


def _of_images(  # noqa: PLR0911 - one for each network
    study: Study, model: Model, num_outputs: int
) -> nn.Module:
    num_channels = study.input.channels
    num_dims = len(study.input.size)
    match model:
        case Cnn() as config:
            return SmallCnn(config, num_channels, num_outputs)
        case ResNet18() as config:
            return resnet18(config, num_dims, num_channels, num_outputs)
        case DenseNet121() as config:
            return densenet121(config, num_dims, num_channels, num_outputs)
        case EfficientNetB0() as config:
            return efficientnet_b0(config, num_dims, num_channels, num_outputs)
        case CenterUnet() as config:
            return Detector(config, num_channels, num_outputs)
        case AttentionUnet() as config:
            return attention_unet(config, num_dims, num_channels, num_outputs)
        case SegResNet() as config:
            return segresnet(config, num_dims, num_channels, num_outputs)
        case Unet() as config:
            return unet(config, num_dims, num_channels, num_outputs)
        case _:
            raise AssertionError(f"{model.name} is no network of images")


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
