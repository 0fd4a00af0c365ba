"""Normalise by groups of feature maps: what is normalised is one image, and large enough."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

MAX_GROUPS = 32


def to_group_norm(network: nn.Module) -> nn.Module:
    """Put a GroupNorm in the place of every BatchNorm and InstanceNorm, in place.

    BatchNorm keeps statistics of a site's patients inside the model and couples the images of a
    batch; it can neither be averaged soundly nor trained under per-patient clipping. InstanceNorm
    has nothing to learn and nothing left where a map is a single pixel.
    """
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm | _InstanceNorm):
            setattr(network, name, _group_norm(child.num_features))
        else:
            to_group_norm(child)
    return network


def _group_norm(num_features: int) -> nn.GroupNorm:
    """At most 32 groups of two maps or more: one map may be a single pixel, without spread."""
    half = num_features // 2 if num_features % 2 == 0 else 1
    return nn.GroupNorm(math.gcd(MAX_GROUPS, half), num_features)
