"""What a site states about its privacy spending in a run: declared constants and epsilon only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config import Frozen, parse_message


class Statement(Frozen):
    """One site's statement about one run, up to the round it was made in."""

    run: str
    site: str
    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["patient", "image"]
    noise_multiplier: Annotated[float, Field(gt=0)]
    sampling_probability: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=0)]
    accountant: Literal["prv", "pld"]
    randomness: Literal["os", "seeded"]

    @classmethod
    def parse(cls, text: str) -> Statement:
        """Read a statement that came over the wire.

        Raises:
          RemoteProtocolError: It is not a statement of this version.
        """
        return parse_message(text, cls, what="privacy statement")
