"""The manifest: what one epoch of a run consists of, in names, keys and numbers.

People approve a study; programs then check every manifest against that study, the site's policy and
the members its people approved. Its digest, with everybody's fresh keys, names the run in every
message.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from common.audit import GENESIS
from common.config import Frozen, parse_message
from common.errors import RemoteProtocolError, VersionMismatch
from common.messages import Purpose
from common.models.flat import Schema
from common.quantize import Ring, first_exponents
from common.secagg.encoding import digest
from common.study import MIN_SITES, Name, Study
from common.tasks import Task
from common.tasks.statistics import StatisticsTask

NUM_EVALUATIONS = 2  # the last model on validation, the returned model on test
MAX_SITES = 255
PACKAGES = ("client", "common")  # what a site runs

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Seconds = Annotated[int, Field(ge=0, lt=1 << 40)]  # since 1970


class KeyedMember(Frozen):
    """A member, the fingerprint of its public key, and what it last stated about its own books.

    The heads come back to the site that stated them: where its audit log or its ledger does not
    hold them, lines were cut off or an older copy was put back.
    """

    name: Name
    key: Digest
    audit: Digest = GENESIS
    ledger: Digest = GENESIS


class Opening(Frozen):
    """What a coordinator chooses when it opens an epoch; the study gives everything else."""

    run: Nonce  # names the run through all its epochs
    epoch: Annotated[int, Field(ge=1, lt=1 << 31)]
    members: Annotated[tuple[KeyedMember, ...], Field(max_length=MAX_SITES)]
    coordinator: Digest  # fingerprint of its public key
    valid_from: Seconds
    valid_until: Seconds
    nonce: Nonce  # makes every epoch new


class Manifest(Opening):
    """One epoch of a run."""

    version: Literal[1] = 1
    study: Digest
    threshold: int  # shares that recover a secret
    num_sums: int  # statistics, rounds, evaluations and spare ones for void sums
    num_params: int
    num_tail: int
    num_statistics: int = 0  # counts of what images are like; 0 in a study that asks for none
    schema_digest: Digest
    first_model: Digest
    exponents: tuple[int, ...]
    ring_bits: Literal[16, 24, 32]
    weight_cap: int
    code: Digest

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Read a manifest that came over the wire.

        Raises:
          RemoteProtocolError: R2. It is not a manifest of this version in its canonical form.
        """
        found = parse_message(text, cls, what="manifest", rule="R2")
        if found.canonical() != text:
            raise _refused("a manifest came that is not in its canonical form")
        return found

    def canonical(self) -> str:
        """The text whose digest names the epoch."""
        return self.model_dump_json()

    def digest(self) -> str:
        """The digest that every key message is bound to; 64 hex digits."""
        return digest("manifest", self.canonical()).hex()

    @property
    def names(self) -> tuple[str, ...]:
        """The members in order; a site's index is its place here."""
        return tuple(member.name for member in self.members)

    def num_tail_of(self, purpose: Purpose) -> int:
        """Numbers beside the update in an answer: weight, clipped entries per tensor, counts."""
        if purpose == Purpose.STATISTICS:
            return 1 + len(self.exponents) + self.num_statistics
        return self.num_tail

    @property
    def ring(self) -> Ring:
        """The ring that this epoch's updates are summed in."""
        return Ring(self.ring_bits, len(self.members))


def default_threshold(num_sites: int) -> int:
    """Shares needed to recover a secret: more than two thirds of the sites, three at least."""
    return min(num_sites, max(3, 2 * num_sites // 3 + 1))


def smallest_epoch(num_approved: int) -> int:
    """The fewest members an epoch may have, of those that people approved.

    Any two groups of ``threshold`` sites of two such epochs have a site in common: a coordinator
    cannot split the members into two federations and learn two sums of one round.
    """
    sizes = range(MIN_SITES, num_approved + 1)
    return next((n for n in sizes if 2 * default_threshold(n) > num_approved), MIN_SITES)


def most_colluders(num_approved: int, min_sites: int) -> int:
    """Sites that may collude with a malicious coordinator without breaking "one sum per round"."""
    threshold = default_threshold(max(min_sites, smallest_epoch(num_approved)))
    return max(0, min(2 * threshold - num_approved - 1, threshold - 2))


def plan_epoch(
    study: Study, schema: Schema, task: Task, opening: Opening, *, first_model: str
) -> Manifest:
    """The manifest that follows from a study, its network and who takes part."""
    num_sites = len(opening.members)
    ring = Ring(study.aggregation.ring_bits, num_sites)
    num_tensors, asks = len(schema.names), study.statistics is not None
    return Manifest(
        **opening.model_dump(include=set(Opening.model_fields)),
        study=study.digest(),
        threshold=default_threshold(num_sites),
        num_sums=asks + study.num_rounds + NUM_EVALUATIONS + study.num_rounds // 4 + 2,
        num_params=schema.num_params,
        num_tail=1 + num_tensors + task.num_counts,
        num_statistics=StatisticsTask(study).num_counts if asks else 0,
        schema_digest=schema.digest(),
        first_model=first_model,
        exponents=first_exponents(num_tensors, study.aggregation.first_round_bound, ring),
        ring_bits=study.aggregation.ring_bits,
        weight_cap=study.aggregation.weight_cap,
        code=code_digest(),
    )


def check_members(
    opening: Opening, *, site: str, approved: Mapping[str, str], min_sites: int
) -> None:
    """Hold who takes part against what the site's people approved.

    Args:
      opening: As proposed.
      site: This site's name.
      approved: Fingerprint by name, in the study's order.
      min_sites: The fewest this site sums with.

    Raises:
      RemoteProtocolError: R2.
    """
    names = [member.name for member in opening.members]
    for member in opening.members:
        if approved.get(member.name) != member.key:
            known = "its key is another one" if member.name in approved else "it was not approved"
            raise _refused(f"{member.name} is proposed as a member, and {known}")
    if names != [name for name in approved if name in names]:
        raise _refused("a member is proposed twice, or not in the study's order")
    if site not in names:
        raise _refused(f"{site} is not among the proposed members")
    needed = max(min_sites, smallest_epoch(len(approved)))
    if len(names) < needed:
        raise _refused(f"{len(names)} of {len(approved)} members, at least {needed} are needed")


def check_manifest(proposed: Manifest, expected: Manifest, *, now: int) -> None:
    """Refuse a manifest that differs from what this site's own study gives.

    Raises:
      RemoteProtocolError: R2. Some value differs, the message names each, ours and theirs; or the
        manifest is not valid now.
    """
    ours, theirs = expected.model_dump(), proposed.model_dump()
    if wrong := [key for key in ours if ours[key] != theirs[key]]:
        lines = ", ".join(f"{key} is {theirs[key]}, expected {ours[key]}" for key in wrong)
        if wrong == ["code"]:
            text = f"the manifest is not this study's: {lines}; install one version on both sides"
            raise VersionMismatch(text, rule="R2")
        raise _refused(f"the manifest is not this study's: {lines}")
    check_window(proposed, now=now)


def check_window(manifest: Manifest, *, now: int) -> None:
    """Refuse a manifest outside its time.

    Raises:
      RemoteProtocolError: R2.
    """
    if not manifest.valid_from <= now <= manifest.valid_until:
        raise _refused(
            f"the epoch is valid from {manifest.valid_from} to {manifest.valid_until} (seconds "
            f"since 1970), it is {now}; the coordinator opens a new one"
        )


@functools.cache
def code_digest() -> str:
    """SHA-256 over the code that a site runs; 64 hex digits.

    A version check, not a proof: a program that lies about itself says what it likes.
    """
    root = Path(__file__).parent.parent
    content = hashlib.sha256()
    for file in sorted(file for name in PACKAGES for file in (root / name).rglob("*.py")):
        content.update(digest("file", file.relative_to(root).as_posix(), file.read_bytes()))
    return content.hexdigest()


def _refused(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, rule="R2")
