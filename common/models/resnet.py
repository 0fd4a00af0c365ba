"""MONAI's ResNet-18 with GroupNorm.

Source: He et al. (2016), Deep Residual Learning for Image Recognition; Wu and He (2018), Group
Normalization.
"""

from __future__ import annotations

from monai.networks.nets import resnet18 as monai_resnet18
from torch import nn

from common.models.normalise import batch_to_group_norm
from common.study import ResNet18


def resnet18(config: ResNet18, num_channels: int, num_outputs: int) -> nn.Module:
    """Takes (batch, channels, height, width) and returns (batch, num_outputs)."""
    network = monai_resnet18(
        spatial_dims=2,
        n_input_channels=num_channels,
        num_classes=num_outputs,
        conv1_t_size=3,
        conv1_t_stride=config.stem_stride,
        no_max_pool=not config.max_pool,
    )
    # MONAI's ``norm=`` argument does not reach every layer of this network.
    return batch_to_group_norm(network)
