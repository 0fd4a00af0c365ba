"""What a site states about its privacy spending in a run: declared constants and epsilon only."""

from __future__ import annotations

from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from common.config import Frozen, parse_message
from common.errors import RemoteProtocolError
from common.identity import Identity, check_signature
from common.secagg.encoding import encode

Head = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Statement(Frozen):
    """One site's statement about one run, up to the sum it was made in; signed with its key.

    ``audit`` and ``ledger`` are the heads of the site's books at that moment: they tell nothing,
    and bind everything that the site had written before.
    """

    run: str
    study: Head  # digest
    site: str
    sum_number: Annotated[int, Field(ge=0)]
    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["patient", "image"]
    noise_multiplier: Annotated[float, Field(gt=0)]
    sampling_probability: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=0)]
    accountant: Literal["prv", "pld"]
    randomness: Literal["os", "seeded"]
    audit: Head
    ledger: Head
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")] = ""  # ECDSA, DER

    def content(self) -> bytes:
        """The bytes that the site signs."""
        return encode("msum1/statement", self.model_dump_json(exclude={"signature"}))

    def signed(self, identity: Identity) -> Statement:
        """The same with the site's signature."""
        return self.model_copy(update={"signature": identity.sign(self.content()).hex()})

    def check_signed(self, key: ec.EllipticCurvePublicKey) -> None:
        """Refuse a statement that its site did not sign.

        Raises:
          RemoteProtocolError: R11.
        """
        if not check_signature(key, bytes.fromhex(self.signature), self.content()):
            text = f"the signature of {self.site} under its privacy statement is not good"
            raise RemoteProtocolError(text, rule="R11")

    @classmethod
    def parse(cls, text: str) -> Statement:
        """Read a statement that came over the wire.

        Raises:
          RemoteProtocolError: It is not a statement of this version.
        """
        return parse_message(text, cls, what="privacy statement")
