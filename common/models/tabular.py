"""Networks for clinical tables, alone or beside an image.

A sample is one row: the pixels of its image, flattened, and then the numbers of its table. ``pack``
makes such rows, ``unpack`` takes them apart again; a study without images has no pixels in them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.study import Logistic, Mlp, Multimodal


def pack(pixels: Tensor, table: Tensor) -> Tensor:
    """(batch, channels, *size) and (batch, num_features) to (batch, pixels + features)."""
    return torch.cat([pixels.flatten(1), table], dim=1)


def unpack(rows: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pixels (batch, *shape) and table (batch, num_features) of packed rows."""
    num = math.prod(shape)
    return rows[:, :num].unflatten(1, tuple(shape)), rows[:, num:]  # type: ignore[no-untyped-call]


def logistic(_: Logistic, num_features: int, num_outputs: int) -> nn.Module:
    """Takes (batch, num_features) and returns (batch, num_outputs): logistic regression."""
    made = nn.Linear(num_features, num_outputs)
    # The usual start of a regression: nothing is known, and all seeds begin alike.
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def mlp(config: Mlp, num_features: int, num_outputs: int) -> nn.Module:
    """Takes (batch, num_features) and returns (batch, num_outputs)."""
    widths = (num_features, *config.hidden)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(config.dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))


class ImageAndTable(nn.Module):
    """An image network and a table network; what both found decides together.

    Takes packed rows and returns (batch, num_outputs). Either part can be frozen by its name.
    """

    def __init__(
        self,
        config: Multimodal,
        image: nn.Module,
        shape: Sequence[int],
        num_features: int,
        num_outputs: int,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.image = image  # (batch, *shape) to (batch, config.image_features)
        self.table = nn.Sequential(nn.Linear(num_features, config.table_features), nn.ReLU())
        self.decide = nn.Linear(config.image_features + config.table_features, num_outputs)

    def forward(self, rows: Tensor) -> Tensor:
        """See the class."""
        pixels, table = unpack(rows, self.shape)
        found = torch.cat([self.image(pixels).relu(), self.table(table)], dim=1)
        logits: Tensor = self.decide(found)
        return logits
