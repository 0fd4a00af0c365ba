"""What a study promises a patient, in numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from common.config import Frozen
from common.study.training import Count, Positive

Engine = Literal["book-keeping", "opacus"]


class NoPrivacy(Frozen):
    """A study without differential privacy; its report says so on the first line."""

    mode: Literal["none"]


class DifferentialPrivacy(Frozen):
    """DP-SGD at every site: what one patient's (or image's) whole record may change."""

    unit: Literal["patient", "image"] = "patient"
    epsilon: Positive | None = None  # of the whole study, at each site; or the noise multiplier
    noise_multiplier: Positive | None = None  # noise standard deviation / example_clip_norm
    delta: Annotated[float, Field(gt=0, le=0.01)]
    example_clip_norm: Positive  # L2 norm of one unit's gradient
    max_images_per_patient: Count = 1  # images, or patches, of one patient in one step
    randomness: Literal["os", "seeded"] = "os"
    engine: Engine = "book-keeping"  # how gradients are clipped; "opacus" is slower

    @model_validator(mode="after")
    def _check_privacy(self) -> DifferentialPrivacy:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of epsilon and noise_multiplier")
        if self.unit == "image" and self.max_images_per_patient != 1:
            raise ValueError(
                "with unit = image every image is its own unit: leave out max_images_per_patient"
            )
        return self


def _privacy_kind(value: Any) -> str:
    mode = value.get("mode") if isinstance(value, dict) else getattr(value, "mode", None)
    return "private" if mode is None else "none"


Privacy = Annotated[
    Annotated[NoPrivacy, Tag("none")] | Annotated[DifferentialPrivacy, Tag("private")],
    Discriminator(_privacy_kind),
]
