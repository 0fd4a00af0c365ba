"""How far two outlines are apart, image by image.

Source: Huttenlocher, Klanderman and Rucklidge (1993), Comparing Images Using the Hausdorff
Distance; its 95th percentile is what segmentation challenges report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from torch import Tensor

PERCENTILE = 95.0

Mask = NDArray[np.bool_]


def hausdorff_95(one: Tensor, other: Tensor, spacing: Sequence[float] | None) -> float | None:
    """95th percentile of the distances between two outlines, the larger of both ways.

    Args:
      one: Where the first is, shape (*size) bool.
      other: Where the second is, the same shape.
      spacing: Distance between pixels along each axis, (num_dims,); None for pixels as the unit.

    Returns:
      In the unit of ``spacing``, as ``monai.metrics.compute_hausdorff_distance`` has it; None where
      one of them is nowhere.
    """
    first, second = one.cpu().numpy(), other.cpu().numpy()
    if not first.any() or not second.any():
        return None
    (box,) = find_objects((first | second).astype(np.int8))  # nothing is farther than its corners
    outlines = [_outline(first[box]), _outline(second[box])]
    return max(
        _percentile(outlines[0], outlines[1], spacing),
        _percentile(outlines[1], outlines[0], spacing),
    )


def _outline(mask: Mask) -> Mask:
    """Pixels of a mask that have a neighbour outside."""
    made: Mask = mask & ~binary_erosion(mask)
    return made


def _percentile(start: Mask, end: Mask, spacing: Sequence[float] | None) -> float:
    """Of the distances from every pixel of one outline to the nearest of the other."""
    distances = distance_transform_edt(~end, sampling=spacing)[start]
    return float(np.percentile(distances, PERCENTILE))
