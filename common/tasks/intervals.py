"""95 % confidence intervals from summed counts. Images are taken to be independent of each other.

Source: Wilson (1927), Probable Inference, the Law of Succession, and Statistical Inference; DeLong,
DeLong and Clarke-Pearson (1988), Comparing the Areas under Two or More Correlated Receiver
Operating Characteristic Curves; Cochran (1977), Sampling Techniques, chapter 6 (ratios).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from common.tasks.scores import auroc

Z = 1.959964  # standard deviations to either side that hold 95 % of a normal distribution
Interval = list[float]  # lower and upper end; a list, as JSON has it


def of_share(part: int, whole: int) -> Interval | None:
    """Of a share of examples, by Wilson; None of nothing."""
    if not whole:
        return None
    share, square = min(1.0, part / whole), Z * Z
    middle = (share + square / (2 * whole)) / (1 + square / whole)
    half = (Z / (1 + square / whole)) * math.sqrt(
        share * (1 - share) / whole + square / (4 * whole * whole)
    )
    return [max(0.0, middle - half), min(1.0, middle + half)]


def of_auroc(without: NDArray[np.int64], having: NDArray[np.int64]) -> Interval | None:
    """Of the area under a ROC curve, from two histograms of the score; None if one is empty.

    DeLong's variance on the scale of the logit, where the interval stays between 0 and 1. Where the
    classes are wholly apart no variance is seen: then it is that of a share of the rarer class.
    """
    area = auroc(without, having)
    if area is None:
        return None
    num_without, num_having = int(without.sum()), int(having.sum())
    rarer = min(num_without, num_having)
    below = (np.cumsum(without) - without / 2) / num_without  # of one with the class in each bin
    above = (num_having - np.cumsum(having) + having / 2) / num_having
    variance = _variance(below, having, area) + _variance(above, without, area)
    if rarer < 2 or area in (0.0, 1.0) or not variance:  # noqa: PLR2004
        return of_share(round(area * rarer), rarer)
    middle = math.log(area / (1 - area))
    half = Z * math.sqrt(variance) / (area * (1 - area))
    return [1 / (1 + math.exp(-end)) for end in (middle - half, middle + half)]


def of_ratio(top: float, bottom: float, squares: tuple[float, float, float], num: int) -> Interval:
    """Of a sum over images divided by another one, as Dice over all pixels is.

    Args:
      top: Sum over images.
      bottom: The same of what it is divided by, above 0.
      squares: Sums over images of top squared, of top times bottom and of bottom squared.
      num: Images, at least 2.
    """
    ratio = top / bottom
    apart = squares[0] - 2 * ratio * squares[1] + ratio * ratio * squares[2]
    half = Z * math.sqrt(max(0.0, apart) * num / (num - 1)) / bottom
    return [max(0.0, ratio - half), min(1.0, ratio + half)]


def _variance(values: NDArray[np.float64], num: NDArray[np.int64], mean: float) -> float:
    """Of the mean of values, each seen so many times."""
    total = int(num.sum())
    return float((num * (values - mean) ** 2).sum()) / max(1, total - 1) / total
