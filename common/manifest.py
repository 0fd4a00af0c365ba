"""The manifest: what one epoch of a run consists of, in numbers.

People approve a study; programs then check every manifest against that study. Its digest names the
run in every message.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Annotated, Literal

from pydantic import Field

from common.config import Frozen, parse_message
from common.errors import RemoteProtocolError
from common.models.flat import Schema
from common.quantize import Ring, first_exponents
from common.study import Study
from common.tasks import Task

NUM_EVALUATIONS = 2  # the last model on validation, the returned model on test

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Frozen):
    """One epoch of a run."""

    version: Literal[1] = 1
    epoch: Annotated[int, Field(ge=1)]
    study: Digest
    members: tuple[str, ...]
    num_sums: int  # rounds, evaluations and spare ones for void sums
    num_params: int
    num_tail: int
    schema_digest: Digest
    first_model: Digest
    exponents: tuple[int, ...]
    ring_bits: Literal[16, 24, 32]
    weight_cap: int
    code: str
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # makes every run's name new

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Read a manifest that came over the wire.

        Raises:
          RemoteProtocolError: It is not a manifest of this version.
        """
        return parse_message(text, cls, what="manifest")

    def canonical(self) -> str:
        """The text whose digest names the run."""
        return self.model_dump_json()

    def digest(self) -> str:
        """SHA-256 of the canonical text; 64 hex digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @property
    def ring(self) -> Ring:
        """The ring that this epoch's updates are summed in."""
        return Ring(self.ring_bits, len(self.members))


def plan_epoch(
    study: Study, schema: Schema, task: Task, *, first_model: str, epoch: int, nonce: str
) -> Manifest:
    """The manifest that follows from a study and its network; only the nonce is free."""
    ring = Ring(study.aggregation.ring_bits, len(study.members))
    num_tensors = len(schema.names)
    return Manifest(
        epoch=epoch,
        study=study.digest(),
        members=study.site_names,
        num_sums=study.num_rounds + NUM_EVALUATIONS + study.num_rounds // 4 + 2,
        num_params=schema.num_params,
        num_tail=1 + num_tensors + task.num_counts,
        schema_digest=schema.digest(),
        first_model=first_model,
        exponents=first_exponents(num_tensors, study.aggregation.first_round_bound, ring),
        ring_bits=study.aggregation.ring_bits,
        weight_cap=study.aggregation.weight_cap,
        code=version("consilium"),
        nonce=nonce,
    )


def check_manifest(proposed: Manifest, expected: Manifest) -> None:
    """Refuse a manifest that differs from what this site's own study gives.

    Raises:
      RemoteProtocolError: Some value differs; the message names each, ours and theirs.
    """
    ours, theirs = expected.model_dump(), proposed.model_dump()
    wrong = [key for key in ours if key != "nonce" and ours[key] != theirs[key]]
    if wrong:
        lines = ", ".join(f"{key} is {theirs[key]}, expected {ours[key]}" for key in wrong)
        raise RemoteProtocolError(f"the manifest is not this study's: {lines}")
