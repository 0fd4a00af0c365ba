"""The site's half of SCAFFOLD: steps corrected by control variates, and the next variate.

A control variate is the mean gradient that a site saw in its last round. What the site's differs
from all sites' is how far its own data pull the model aside; every step takes that back.

Source: Karimireddy et al. (2020), SCAFFOLD: Stochastic Controlled Averaging for Federated Learning,
algorithm 1 with option II.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Variates:
    """Private. What one round of one site is corrected by; each of shape (num_own,)."""

    own: Vector  # c_i: of this site, zeros before its first round
    common: Vector  # c: of all sites, as the model brings it

    @property
    def correction(self) -> Vector:
        """What is added to every gradient."""
        corrected: Vector = self.common - self.own
        return corrected

    def change(self, update: Vector, num_steps: int, rate: float) -> Vector:
        """How this site's variate changes.

        Args:
          update: Local minus global model, shape (num_own,).
          num_steps: Steps that made it.
          rate: Their learning rate.
        """
        mean_gradient = update / np.float32(-num_steps * rate) - self.correction
        changed: Vector = mean_gradient - self.own
        return changed
