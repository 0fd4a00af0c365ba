"""Replace normalisation that couples the images of a batch."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MAX_GROUPS = 32


def batch_to_group_norm(network: nn.Module) -> nn.Module:
    """Put a GroupNorm in the place of every BatchNorm, in place.

    BatchNorm keeps statistics of a site's patients inside the model and couples the images of a
    batch; it can neither be averaged soundly nor trained under per-patient clipping.
    """
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm):
            setattr(network, name, _group_norm(child.num_features))
        else:
            batch_to_group_norm(child)
    return network


def _group_norm(num_features: int) -> nn.GroupNorm:
    """At most 32 groups of two maps or more: one map may be a single pixel, without spread."""
    half = num_features // 2 if num_features % 2 == 0 else 1
    return nn.GroupNorm(math.gcd(MAX_GROUPS, half), num_features)
