"""What a study asks of the images themselves before it trains on them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from common.config import Frozen


class Statistics(Frozen):
    """Counts of what all training images are like, summed once before the first round."""

    intensity: tuple[float, float] | None = None
    """Grey values of the files between which the bins lie; what is lower or higher is counted, too.
    For CT [-1024, 3071], for 8 bits [0, 255]. Left out in a study without images."""
    num_bins: Annotated[int, Field(ge=4, le=4096)] = 64

    @model_validator(mode="after")
    def _check_range(self) -> Statistics:
        if self.intensity is not None and not self.intensity[0] < self.intensity[1]:
            raise ValueError("the lowest grey value of intensity must be below the highest")
        return self
