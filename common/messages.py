"""Every message that crosses the wire. Nothing else leaves a site.

Coordinator to site: ``Greeting``; once per epoch ``Invitation``, ``Roster``; per sum ``RoundTask``,
``Survivors`` if somebody dropped, ``Unmask``. Site to coordinator, in the same order:
``Introduction``; ``SiteKeys``, ``Agreement``; ``Upload``, ``Vote``, ``Shares``; or ``Refusal``.

A message with a ``signature`` is signed by its sender: every field but the arrays, which a digest
among the fields stands for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from common.secagg.encoding import Part, encode


class Purpose(StrEnum):
    """What one sum is for. Each purpose touches exactly the splits it names."""

    STATISTICS = "statistics"  # count what the images are like; no model is looked at
    TRAIN = "train"  # score the model on validation, train it on training images
    VALIDATE = "validate"  # score the model on validation
    TEST = "test"  # score the model on test


class Reason(StrEnum):
    """Why a site refuses, in one word; the details stay in the hospital's own log."""

    POLICY = "policy"
    BUDGET = "budget"
    DATA = "data"
    BUSY = "busy"
    VERSION = "version"
    PROTOCOL = "protocol"


@dataclass(frozen=True)
class Greeting:
    """The coordinator asks a node of Flower's which site it is; node ids are random.

    In a deployment it brings the study, so that people can read it; who approved it takes part.
    """

    study: str = ""  # JSON of common.study.Study; empty in a simulation


@dataclass(frozen=True)
class Introduction:
    """A site's place among the members: it will take part."""

    index: int


@dataclass(frozen=True)
class Invitation:
    """K1. The coordinator opens an epoch: will you take part in exactly this?"""

    manifest: str  # canonical JSON of common.manifest.Manifest
    certificate: bytes  # the coordinator's, DER
    revoked: bytes  # the CA's revocation list, DER
    signature: bytes = b""


@dataclass(frozen=True)
class SiteKeys:
    """K1. A site takes part: its fresh public keys of this epoch."""

    run: str  # the manifest's digest
    site: int  # position among the manifest's members
    public_key: bytes  # X25519, 32 bytes
    kem_key: bytes  # ML-KEM-768, 1184 bytes
    nonce: bytes  # 16 bytes
    certificate: bytes  # DER
    signature: bytes = b""


@dataclass(frozen=True)
class Roster:
    """K2. Everybody's ``SiteKeys``, in the manifest's order."""

    run: str  # the manifest's digest
    public_keys: tuple[bytes, ...]
    kem_keys: tuple[bytes, ...]
    nonces: tuple[bytes, ...]
    certificates: tuple[bytes, ...]
    signatures: tuple[bytes, ...]
    revoked: bytes
    signature: bytes = b""

    def keys_of(self, site: int) -> SiteKeys:
        """What one site sent."""
        return SiteKeys(
            self.run,
            site,
            self.public_keys[site],
            self.kem_keys[site],
            self.nonces[site],
            self.certificates[site],
            self.signatures[site],
        )


@dataclass(frozen=True)
class Agreement:
    """K2. A site has checked the roster; its secrets for the sites after it, encapsulated."""

    run: str  # the run's id: manifest and all keys
    site: int
    ciphertexts: tuple[bytes, ...]  # for the sites after this one, in order; 1088 bytes each
    ciphertext_signatures: tuple[bytes, ...]
    signature: bytes = b""


@dataclass(frozen=True)
class Encapsulated:
    """One ciphertext of an ``Agreement``, as its sender signs it; it travels inside others."""

    run: str
    sender: int
    receiver: int
    ciphertext: bytes
    signature: bytes = b""


@dataclass(frozen=True)
class RoundTask:
    """One sum: which model, what for, and the number format of the answer."""

    run: str
    sum_number: int  # counts every sum from 0, never repeats
    round_number: int  # the round whose model this answer helps to make
    purpose: Purpose
    exponents: tuple[int, ...]  # one per tensor: steps of 2**exponent
    model_digest: str  # SHA-256 of the model's bytes
    ciphertexts: tuple[bytes, ...]  # for this site, from the sites before it; until it answered
    ciphertext_signatures: tuple[bytes, ...]
    revoked: bytes
    model: NDArray[np.float32]  # (num_params,)
    signature: bytes = b""


@dataclass(frozen=True)
class Upload:
    """A site's masked answer to one ``RoundTask``; ``header`` binds and signs all of it."""

    run: str
    sum_number: int
    header: bytes  # common.secagg.header.Header
    sealed: tuple[bytes, ...]  # by receiver; its own is empty
    share_commitments: tuple[bytes, ...]  # by receiver: 16 bytes for every slot
    body: NDArray[np.uint8]  # masked entries, none unless the purpose is TRAIN, and masked tail
    statement: str = ""  # JSON of common.statement.Statement; empty without privacy


@dataclass(frozen=True)
class Survivors:
    """Somebody dropped: whose uploads arrived. A site votes on one such view per sum."""

    run: str
    sum_number: int
    survivors: tuple[int, ...]
    headers: tuple[bytes, ...]  # signed, one per survivor
    signature: bytes = b""


@dataclass(frozen=True)
class Vote:
    """A site has seen exactly this view, and will answer no other."""

    run: str
    sum_number: int
    site: int
    view: bytes  # digest of the headers
    signature: bytes = b""


@dataclass(frozen=True)
class Unmask:
    """Asks for the shares that remove the survivors' self masks and the dropouts' pair masks."""

    run: str
    sum_number: int
    survivors: tuple[int, ...]
    headers: tuple[bytes, ...]  # signed, one per survivor
    voters: tuple[int, ...]
    votes: tuple[bytes, ...]  # signatures of the voters' ``Vote``
    sealed: tuple[bytes, ...]  # for this site, one per survivor
    share_commitments: tuple[bytes, ...]  # for this site, one per survivor
    row_digests: tuple[bytes, ...]  # one per survivor: 32 bytes for every receiver
    signature: bytes = b""


@dataclass(frozen=True)
class Shares:
    """A site's shares of one sum. It answers once; the same request gets the same answer."""

    run: str
    sum_number: int
    site: int
    view: bytes
    shares: tuple[bytes, ...]  # one per survivor: 32 bytes each for it and for every dropout
    complaints: tuple[int, ...]  # survivors whose sealed share was bad; theirs above is empty
    signature: bytes = b""


@dataclass(frozen=True)
class Refusal:
    """A site does not answer."""

    run: str
    reason: Reason


Message = (
    Greeting
    | Introduction
    | Invitation
    | SiteKeys
    | Roster
    | Agreement
    | RoundTask
    | Upload
    | Survivors
    | Vote
    | Unmask
    | Shares
    | Refusal
)
Signed = (
    Invitation
    | SiteKeys
    | Roster
    | Agreement
    | Encapsulated
    | RoundTask
    | Survivors
    | Vote
    | Unmask
    | Shares
)
FromCoordinator = Invitation | Roster | RoundTask | Survivors | Unmask
KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def signed_content(message: Signed) -> bytes:
    """The bytes that a message's sender signs."""
    parts: list[Part] = []
    for field in fields(message):
        value = getattr(message, field.name)
        if field.name != "signature" and not isinstance(value, np.ndarray):
            parts.append(_part(value))
    return encode("msum1/" + type(message).__name__, *parts)


def digest_of_model(model: NDArray[np.float32]) -> str:
    """SHA-256 of a model's bytes, 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(model, "<f4").data).hexdigest()


def _part(value: int | str | bytes | tuple[int | bytes, ...]) -> Part:
    if isinstance(value, tuple):
        return [_part(entry) for entry in value]
    if isinstance(value, int):  # exponents may be negative
        return value.to_bytes(8, "big", signed=True)
    return value
