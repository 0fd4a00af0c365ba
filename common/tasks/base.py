"""What every task offers: a loss, counts that can be summed over sites, and figures from the sums.

Counts are int64 vectors: adding them over batches and sites loses nothing, so the figures of a
federation are those of the pooled images, and no site's own score has to leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.quantize import FIXED_POINT

MAX_LOSS = 2.0**10  # per image: two million diverged images still fit the sum

Loss = Callable[[Tensor, Tensor], Tensor]
Figures = dict[str, Any]


class Task(Protocol):
    """One kind of question asked of an image."""

    num_counts: int

    def local_loss(self, targets: Tensor | None) -> Loss:
        """The training loss, mean over a batch.

        Args:
          targets: All labels the site trains on, for a loss that adapts to its class shares; None
            for the plain loss.
        """
        ...

    def made_up_targets(self, num: int) -> Tensor:
        """Targets of images that do not exist, for checks before data is opened."""
        ...

    def counts(self, outputs: Tensor, targets: Tensor) -> NDArray[np.int64]:
        """Summable counts of one batch, shape (num_counts,)."""
        ...

    def figures(self, counts: NDArray[np.int64]) -> Figures:
        """Figures from summed counts, ready for JSON; what is undefined is None."""
        ...


def summed_loss(losses: Tensor) -> int:
    """Losses of images as a fixed-point sum; a diverged one counts as ``MAX_LOSS``, not as NaN."""
    bounded = losses.detach().double().clamp(0, MAX_LOSS).nan_to_num(nan=MAX_LOSS)
    return int((bounded * FIXED_POINT).round().sum())


def mean_loss(total: int, num_examples: int) -> float | None:
    """The mean of what ``summed_loss`` added up; None of nothing."""
    return ratio(total / FIXED_POINT, num_examples)


def ratio(part: float, whole: float) -> float | None:
    """A share; None where there is nothing to share."""
    return float(part) / float(whole) if whole else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is defined; None if nothing is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
