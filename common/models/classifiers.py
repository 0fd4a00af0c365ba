"""MONAI's image classifiers, with GroupNorm in the place of BatchNorm.

Source: He et al. (2016), Deep Residual Learning for Image Recognition; Huang et al. (2017),
Densely Connected Convolutional Networks; Tan and Le (2019), EfficientNet; Wu and He (2018), Group
Normalization.
"""

from __future__ import annotations

from monai.networks.nets import DenseNet121 as MonaiDenseNet121
from monai.networks.nets import EfficientNetBN
from monai.networks.nets import resnet18 as monai_resnet18
from torch import nn

from common.models.normalise import to_group_norm
from common.study import DenseNet121, EfficientNetB0, ResNet18


def resnet18(config: ResNet18, num_dims: int, num_channels: int, num_outputs: int) -> nn.Module:
    """Takes (batch, channels, *size) and returns (batch, num_outputs)."""
    network = monai_resnet18(
        spatial_dims=num_dims,
        n_input_channels=num_channels,
        num_classes=num_outputs,
        conv1_t_size=3,
        conv1_t_stride=config.stem_stride,
        no_max_pool=not config.max_pool,
    )
    # MONAI's ``norm=`` argument does not reach every layer of this network.
    return to_group_norm(network)


def densenet121(
    config: DenseNet121, num_dims: int, num_channels: int, num_outputs: int
) -> nn.Module:
    """Takes (batch, channels, *size) and returns (batch, num_outputs)."""
    network = MonaiDenseNet121(
        spatial_dims=num_dims,
        in_channels=num_channels,
        out_channels=num_outputs,
        dropout_prob=config.dropout,
    )
    return to_group_norm(network)


def efficientnet_b0(
    _: EfficientNetB0, num_dims: int, num_channels: int, num_outputs: int
) -> nn.Module:
    """Takes (batch, channels, *size) and returns (batch, num_outputs)."""
    network = EfficientNetBN(
        "efficientnet-b0",
        pretrained=False,
        spatial_dims=num_dims,
        in_channels=num_channels,
        num_classes=num_outputs,
    )
    return to_group_norm(network)
