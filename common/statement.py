"""What a site states about its privacy spending in a run: declared constants and epsilon only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from common.config import Frozen
from common.errors import RemoteProtocolError


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
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            keys = ", ".join(".".join(map(str, found["loc"])) for found in error.errors())
            raise RemoteProtocolError(f"not a privacy statement of this version: {keys}") from None
