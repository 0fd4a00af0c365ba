"""Every message that crosses the wire. Nothing else leaves a site.

Coordinator to site: ``Greeting``, ``Invitation``, ``RoundTask``. Site to coordinator:
``Introduction``, ``Present``, ``Upload``, ``Refusal``. Arrays are flat; everything else is a few
numbers and words.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import get_args

import numpy as np
from numpy.typing import NDArray


class Purpose(StrEnum):
    """What one sum is for. Each purpose touches exactly the splits it names."""

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
    """The coordinator asks a node of Flower's which site it is; node ids are random."""


@dataclass(frozen=True)
class Introduction:
    """A simulated site's place among the members."""

    index: int


@dataclass(frozen=True)
class Invitation:
    """The coordinator opens an epoch: will you take part in exactly this?"""

    manifest: str  # canonical JSON of common.manifest.Manifest


@dataclass(frozen=True)
class Present:
    """A site has checked the manifest against its own study and takes part."""

    run: str  # the manifest's digest
    site: str


@dataclass(frozen=True)
class RoundTask:
    """One sum: which model, what for, and the number format of the answer."""

    run: str
    sum_number: int  # counts every sum from 0, never repeats
    round_number: int  # the round whose model this answer helps to make
    purpose: Purpose
    exponents: tuple[int, ...]  # one per tensor: steps of 2**exponent
    model: NDArray[np.float32]  # (num_params,)


@dataclass(frozen=True)
class Upload:
    """A site's masked answer to one ``RoundTask``."""

    run: str
    sum_number: int
    body: NDArray[np.uint8]  # packed residues modulo 2**bits; empty unless the purpose is TRAIN
    tail: NDArray[np.uint64]  # (num_tail,)
    statement: str = ""  # JSON of common.statement.Statement; empty without privacy


@dataclass(frozen=True)
class Refusal:
    """A site does not answer."""

    run: str
    reason: Reason


Message = Greeting | Introduction | Invitation | Present | RoundTask | Upload | Refusal
KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}
