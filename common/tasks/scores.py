"""Histograms of scores, which can be added up over sites, and what follows from them.

Bins stand in the logit of a probability, where the scores of a confident network still differ, and
are finest around 0, where an untrained one puts all of them. Areas under curves follow by the
trapezoid rule, within the width of a bin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 1024
LOGIT_RANGE = 64.0  # scores beyond sigmoid(+-64) share the outermost bins
FINEST = 8.0  # bins are finest within +-1 / FINEST of logit 0
RECALLS = np.linspace(0, 1, 101)  # at which precision is read off, as COCO does
NUM_TENTHS = 10  # groups of like probability in a calibration curve
FALSE_PER_IMAGE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # at which FROC is read off


def probabilities() -> NDArray[np.float64]:
    """The probability in the middle of each bin, shape (NUM_BINS,)."""
    place = (np.arange(NUM_BINS) + 0.5) * 2 / NUM_BINS - 1
    logits = np.sinh(place * np.arcsinh(LOGIT_RANGE * FINEST)) / FINEST
    middle: NDArray[np.float64] = 1 / (1 + np.exp(-logits))
    return middle


def calibration_curve(
    without: NDArray[np.int64], having: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean probability, share that has the class and number of images, of those with a like score.

    Args:
      without: Images without the class, by the bin of their score, shape (NUM_BINS,).
      having: Those that have it.

    Returns:
      One entry for each tenth of the probability that holds an image.
    """
    middle = probabilities()
    tenth = np.minimum((middle * NUM_TENTHS).astype(np.int64), NUM_TENTHS - 1)
    num = np.bincount(tenth, without + having, NUM_TENTHS)
    held = num > 0
    said = np.bincount(tenth, (without + having) * middle, NUM_TENTHS)[held] / num[held]
    true = np.bincount(tenth, having, NUM_TENTHS)[held] / num[held]
    return said, true, num[held].astype(np.int64)


def calibration_error(without: NDArray[np.int64], having: NDArray[np.int64]) -> float | None:
    """How far probabilities are from the truth, mean over images; None of none.

    Source:
      Guo et al. (2017), On Calibration of Modern Neural Networks (expected calibration error).
    """
    said, true, num = calibration_curve(without, having)
    return float((num * np.abs(said - true)).sum() / num.sum()) if num.size else None


def bins_of(logits: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin of each logit, 0 to NUM_BINS - 1; NaN goes to the middle."""
    within = np.clip(np.nan_to_num(logits), -LOGIT_RANGE, LOGIT_RANGE)
    place = np.arcsinh(within * FINEST) / np.arcsinh(LOGIT_RANGE * FINEST)
    bins: NDArray[np.int64] = np.clip((place + 1) * (NUM_BINS / 2), 0, NUM_BINS - 1).astype(
        np.int64
    )
    return bins


def auroc(without: NDArray[np.int64], having: NDArray[np.int64]) -> float | None:
    """Area under the ROC curve from two histograms of the score; None if one is empty.

    The chance that a random image with the class scores above one without it; images in the same
    bin count one half.
    """
    num_pairs = int(without.sum()) * int(having.sum())
    if num_pairs == 0:
        return None
    below = np.cumsum(without) - without
    return float((having * (2 * below + without)).sum() / (2 * num_pairs))


def roc_curve(
    without: NDArray[np.int64], having: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates from the strictest threshold to the laxest."""
    false_positives = np.concatenate([[0], np.cumsum(without[::-1])])
    true_positives = np.concatenate([[0], np.cumsum(having[::-1])])
    return false_positives / max(1, without.sum()), true_positives / max(1, having.sum())


def precision_curve(
    wrong: NDArray[np.int64], right: NDArray[np.int64], num_true: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recall and precision of findings, from the strictest threshold that has one to the laxest.

    Args:
      wrong: Findings that are none, by the bin of their score, shape (NUM_BINS,).
      right: Those that are.
      num_true: What there was to find, at least 1.
    """
    hits, false = np.cumsum(right[::-1]), np.cumsum(wrong[::-1])
    first = int(np.searchsorted(hits + false, 1))
    hits, false = hits[first:], false[first:]
    return hits / num_true, hits / (hits + false)


def average_precision(
    wrong: NDArray[np.int64], right: NDArray[np.int64], num_true: int
) -> float | None:
    """Mean precision over the recalls from 0 to 1; None where there was nothing to find.

    Precision at a recall is the best that any threshold gives at that recall or a higher one; where
    none reaches it, 0.

    Source:
      Lin et al. (2014), Microsoft COCO; its evaluation reads 101 recalls.
    """
    if not num_true:
        return None
    recall, precision = precision_curve(wrong, right, num_true)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(recall, RECALLS, side="left")
    return float(np.append(best, 0.0)[place].mean())


def froc_curve(
    wrong: NDArray[np.int64], right: NDArray[np.int64], num_true: int, num_images: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False findings per image and sensitivity, from the strictest threshold to the laxest."""
    false = np.cumsum(wrong[::-1]) / max(1, num_images)
    return false, np.cumsum(right[::-1]) / max(1, num_true)


def froc_score(
    wrong: NDArray[np.int64], right: NDArray[np.int64], num_true: int, num_images: int
) -> float | None:
    """Mean sensitivity at 1/4 to 8 false findings per image; None with nothing to find.

    Source:
      Ehteshami Bejnordi et al. (2017), Diagnostic Assessment of Deep Learning Algorithms for
      Detection of Lymph Node Metastases.
    """
    if not num_true or not num_images:
        return None
    curve = froc_curve(wrong, right, num_true, num_images)
    return float(np.interp(FALSE_PER_IMAGE, *curve).mean())
