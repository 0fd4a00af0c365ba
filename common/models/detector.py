"""A network that finds boxes: how likely a centre is at each place, and how far the sides are.

Source: Zhou, Wang and Krähenbühl (2019), Objects as Points; Oktay et al. (2018), Attention U-Net.
"""

from __future__ import annotations

import math

import torch
from monai.networks.nets import AttentionUnet
from torch import Tensor, nn

from common.models.normalise import to_group_norm
from common.study import CenterUnet
from common.study.task import NUM_SIDES

FIRST_SCORE = 0.1  # of an untrained network: nearly every place has no centre


class Detector(nn.Module):
    """Takes (batch, channels, height, width) to (batch, classes + 4, height / 4, width / 4).

    The first maps are logits of a centre, the last four the distances from the place to the left,
    upper, right and lower side, as common.tasks.boxes reads them.
    """

    def __init__(self, config: CenterUnet, num_channels: int, num_outputs: int) -> None:
        super().__init__()
        first, second, *_ = config.channels
        num_classes = num_outputs - NUM_SIDES
        self.stem = nn.Sequential(
            nn.Conv2d(num_channels, first, 3, stride=2, padding=1),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, first, 3, stride=2, padding=1),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        )
        self.unet = AttentionUnet(
            spatial_dims=2,
            in_channels=first,
            out_channels=first,
            channels=config.channels,
            strides=(2,) * (len(config.channels) - 1),
            dropout=config.dropout,
        )
        self.neck = nn.Sequential(nn.Conv2d(first, second, 3, padding=1), nn.ReLU())
        self.centres = nn.Conv2d(second, num_classes, 1)
        self.sides = nn.Conv2d(second, NUM_SIDES, 1)
        assert self.centres.bias is not None  # noqa: S101 - the default
        nn.init.constant_(self.centres.bias, math.log(FIRST_SCORE / (1 - FIRST_SCORE)))
        to_group_norm(self)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = self.neck(self.unet(self.stem(images)))
        return torch.cat([self.centres(features), self.sides(features)], dim=1)
