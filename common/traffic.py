"""Bytes that one round moves between a site and the coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from common.models.flat import Schema
from common.secagg.header import overhead_bytes, relayed_bytes
from common.study import Study
from common.tasks import task_of

BYTES_PER_PARAM = 4  # float32, down


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round at one site, without what the protocols below add."""

    model: int  # down: the global model
    relayed: int  # down: what unmasks the sum
    body: int  # up: the masked update
    tail: int  # up: the masked weight and counts
    shares: int  # up: shares, commitments and signature

    @property
    def down(self) -> int:
        """From the coordinator."""
        return self.model + self.relayed

    @property
    def up(self) -> int:
        """To the coordinator."""
        return self.body + self.tail + self.shares


def traffic_of(study: Study, schema: Schema, ring_bits: int | None = None) -> Traffic:
    """What a round of a study moves.

    Args:
      study: With its members; without them, what depends on their number is left out.
      schema: Of its model.
      ring_bits: In the place of the study's.
    """
    num_sites = len(study.members)
    bits = ring_bits or study.aggregation.ring_bits
    return Traffic(
        model=BYTES_PER_PARAM * schema.num_params,
        relayed=relayed_bytes(num_sites),
        body=schema.num_params * bits // 8,
        tail=8 * (1 + len(schema.names) + task_of(study).num_counts),
        shares=overhead_bytes(num_sites) if num_sites else 0,
    )
