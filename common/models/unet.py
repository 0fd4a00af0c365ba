"""Networks that segment images and volumes, with GroupNorm: one logit per class and pixel.

Source: Ronneberger et al. (2015), U-Net; Oktay et al. (2018), Attention U-Net; Myronenko (2018), 3D
MRI Brain Tumor Segmentation Using Autoencoder Regularization (SegResNet, without its autoencoder).
"""

from __future__ import annotations

from monai.networks.nets import AttentionUnet as MonaiAttentionUnet
from monai.networks.nets import SegResNet as MonaiSegResNet
from monai.networks.nets import UNet
from torch import Tensor, nn

from common.models.normalise import to_group_norm
from common.study import AttentionUnet, SegResNet, Unet

NUM_GROUPS = 4
NUM_FEATURES = 8  # maps of full size from which the last convolution decides


class _Segmenter(nn.Module):
    """A U-Net and the convolution that decides.

    A U-Net with residual units normalises its last layer too: asked for one output map it would
    bring the logits of every image to mean 0. So it gives features, and a convolution without
    normalisation follows.
    """

    def __init__(self, unet: nn.Module, num_dims: int, num_outputs: int) -> None:
        super().__init__()
        self.unet = unet
        convolution = nn.Conv2d if num_dims == 2 else nn.Conv3d  # noqa: PLR2004
        self.decide = convolution(NUM_FEATURES, num_outputs, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, *size) to logits of shape (batch, num_outputs, *size)."""
        logits: Tensor = self.decide(self.unet(images))
        return logits


def unet(config: Unet, num_dims: int, num_channels: int, num_outputs: int) -> nn.Module:
    """Takes (batch, channels, *size) and returns (batch, num_outputs, *size)."""
    network = UNet(
        spatial_dims=num_dims,
        in_channels=num_channels,
        out_channels=NUM_FEATURES,
        channels=config.channels,
        strides=(2,) * (len(config.channels) - 1),
        num_res_units=config.residual_units,
        norm=("GROUP", {"num_groups": NUM_GROUPS}),
        dropout=config.dropout,
    )
    return _Segmenter(network, num_dims, num_outputs)


def attention_unet(
    config: AttentionUnet, num_dims: int, num_channels: int, num_outputs: int
) -> nn.Module:
    """Takes (batch, channels, *size) and returns (batch, num_outputs, *size)."""
    network = MonaiAttentionUnet(
        spatial_dims=num_dims,
        in_channels=num_channels,
        out_channels=NUM_FEATURES,
        channels=config.channels,
        strides=(2,) * (len(config.channels) - 1),
        dropout=config.dropout,
    )
    return _Segmenter(to_group_norm(network), num_dims, num_outputs)


def segresnet(config: SegResNet, num_dims: int, num_channels: int, num_outputs: int) -> nn.Module:
    """Takes (batch, channels, *size) and returns (batch, num_outputs, *size)."""
    network: nn.Module = MonaiSegResNet(
        spatial_dims=num_dims,
        init_filters=config.filters,
        in_channels=num_channels,
        out_channels=num_outputs,
        dropout_prob=config.dropout or None,
        norm=("GROUP", {"num_groups": NUM_GROUPS}),
        blocks_down=config.blocks,
        blocks_up=(1,) * (len(config.blocks) - 1),
    )
    return network
