"""The coordinator's part, played by hand: one message at a time, every one of them signed.

``Cast.of(sites)`` plays it for real sites, ``Cast.bare(folder)`` for members that have a journal
and keys but neither images nor a network; what these upload is given by the test::

    cast = Cast.bare(folder, 4)
    cast.enrol()  # invitation and roster, answered by everybody
    uploads = cast.uploads()  # by site; leave one out and it has dropped
    votes = cast.votes(uploads)
    shares = cast.shares(uploads, votes)
    cast.total(uploads, shares)  # the exact sum

To be hostile, change a message with ``dataclasses.replace`` and ``cast.sign`` it again.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from client import enrolment, unmasking
from client.journal import Journal
from client.round import answer
from client.session import Party, Session
from client.site import Site
from common.manifest import KeyedMember, Manifest, Opening, default_threshold, plan_epoch
from common.messages import (
    Agreement,
    FromCoordinator,
    Invitation,
    Message,
    Purpose,
    Roster,
    RoundTask,
    Shares,
    SiteKeys,
    Survivors,
    Unmask,
    Upload,
    Vote,
    digest_of_model,
)
from common.models.build import build_network
from common.quantize import Ring
from common.roster import CoordinatorCredentials, Credentials
from common.secagg.header import row_digest, slot_of
from common.secagg.keys import run_id
from common.secagg.masking import (
    Mask,
    add_masks,
    add_packed,
    add_tail_masks,
    signed,
    split_body,
)
from common.secagg.sharing import recover
from common.secagg.task import digest_of_task
from common.secagg.view import digest_of_view
from common.signing import sign
from common.throwaway import coordinator_credentials, issue_identities, site_credentials
from common.update import QuantizedUpdate

NUM_PARAMS, NUM_TENSORS, NUM_TAIL, NUM_SUMS = 6, 2, 5, 9  # of a bare cast's manifest
M = TypeVar("M", bound=FromCoordinator)
R = TypeVar("R", bound=Message)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Bare:
    """A member without images; it approves every manifest and uploads ``update``."""

    name: str
    state_dir: Path
    credentials: Credentials
    update: QuantizedUpdate
    now: Callable[[], datetime] = utc_now

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """As after a crash: what it knows is what its journal holds."""
        if hasattr(self, "journal"):
            self.journal.close()
        self.journal = Journal(self.state_dir / "journal.sqlite")

    def party(self) -> Party:
        return Party(self.credentials.identity, self.credentials.trust, self.now())

    def session(self) -> Session:
        return Session(self.journal, self.party())

    def answer(self, message: Message) -> Message:
        if isinstance(message, Invitation):
            return enrolment.join(message, self.journal, self.party(), lambda _: None)
        session = self.session()
        match message:
            case Roster():
                return enrolment.agree(session, message)
            case RoundTask():
                stored = session.accept(message)
                return session.mask(self.answer_to(message)) if stored is None else stored
            case Survivors():
                return unmasking.vote(session, message)
            case Unmask():
                return unmasking.unmask(session, message)
        raise TypeError(type(message))

    def answer_to(self, task: RoundTask) -> QuantizedUpdate:
        if task.purpose == Purpose.TRAIN:
            return self.update
        return replace(self.update, values=np.empty(0, np.int32))


class Cast:
    """One epoch: its members, its manifest and what was said so far."""

    def __init__(
        self,
        members: Sequence[Site | Bare],
        manifest: Manifest,
        credentials: CoordinatorCredentials,
        model: NDArray[np.float32],
    ) -> None:
        self.members = list(members)
        self.manifest = manifest
        self.credentials = credentials
        self.model = model
        self.keys: dict[int, SiteKeys] = {}
        self.agreements: dict[int, Agreement] = {}

    @classmethod
    def of(cls, sites: Sequence[Site], **changes: Any) -> Cast:
        """Real sites of one simulation; ``changes`` go into the manifest they are proposed."""
        first = sites[0]
        folder = first.state_dir.parents[1]
        credentials = coordinator_credentials(folder, first.study.site_names)
        names = [site.name for site in sites]
        opening = _opening(credentials, names)
        network = build_network(first.study)
        manifest = plan_epoch(
            first.study, network.schema, first.task, opening, first_model=first.first_model
        )
        return cls(sites, manifest.model_copy(update=changes), credentials, network.vector().copy())

    @classmethod
    def bare(cls, folder: Path, num_sites: int = 4, **changes: Any) -> Cast:
        """Members without images; ``changes`` go into the manifest."""
        names = [f"site-{k + 1}" for k in range(num_sites)]
        issue_identities(folder, names)
        credentials = coordinator_credentials(folder, names)
        model = np.linspace(-1, 1, changes.get("num_params", NUM_PARAMS), dtype=np.float32)
        manifest = _bare_manifest(credentials, names, model).model_copy(update=changes)
        members = [
            Bare(
                name,
                folder / "sites" / name,
                site_credentials(folder, name, names),
                _drawn(manifest, k),
            )
            for k, name in enumerate(names)
        ]
        return cls(members, manifest, credentials, model)

    def renewed(self, members: Sequence[Site | Bare] | None = None, **changes: Any) -> Cast:
        """The next epoch of the same run, with these members; not yet enrolled."""
        chosen = list(members or self.members)
        names = [member.name for member in chosen]
        opening = _opening(self.credentials, names)
        update = {
            "epoch": self.manifest.epoch + 1,
            "members": opening.members,
            "nonce": opening.nonce,
            "threshold": default_threshold(len(names)),
        }
        manifest = self.manifest.model_copy(update={**update, **changes})
        return type(self)(chosen, manifest, self.credentials, self.model)

    # Messages, signed

    def sign(self, message: M) -> M:
        return sign(message, self.credentials.identity)

    def invitation(self, **changes: Any) -> Invitation:
        """K1; ``changes`` go into the manifest."""
        proposed = self.manifest.model_copy(update=changes)
        certificate = self.credentials.identity.certificate
        return self.sign(Invitation(proposed.canonical(), certificate, self.credentials.revoked()))

    def roster(self) -> Roster:
        """K2, of the keys that ``invite`` collected."""
        keys = [self.keys[site] for site in range(len(self.members))]
        return self.sign(
            Roster(
                run=self.manifest.digest(),
                public_keys=tuple(one.public_key for one in keys),
                kem_keys=tuple(one.kem_key for one in keys),
                nonces=tuple(one.nonce for one in keys),
                certificates=tuple(one.certificate for one in keys),
                signatures=tuple(one.signature for one in keys),
                revoked=self.credentials.revoked(),
            )
        )

    @property
    def run(self) -> bytes:
        """The run's id, known from the keys on."""
        roster = self.roster()
        manifest = bytes.fromhex(roster.run)
        return run_id(manifest, roster.public_keys, roster.kem_keys, roster.nonces)

    def task(self, site: int, sum_number: int = 0, **changes: Any) -> RoundTask:
        """The task as one site gets it; a changed model changes its digest too."""
        relayed = [
            (sender.ciphertexts[site - k - 1], sender.ciphertext_signatures[site - k - 1])
            for k, sender in sorted(self.agreements.items())
            if k < site
        ]
        model = changes.setdefault("model", self.model)
        task = RoundTask(
            run=self.run.hex(),
            sum_number=sum_number,
            round_number=_next_round(changes.get("purpose", Purpose.TRAIN), sum_number),
            purpose=Purpose.TRAIN,
            exponents=self.manifest.exponents,
            model_digest=digest_of_model(model),
            ciphertexts=tuple(ciphertext for ciphertext, _ in relayed),
            ciphertext_signatures=tuple(signature for _, signature in relayed),
            revoked=self.credentials.revoked(),
            model=model,
        )
        return self.sign(replace(task, **changes))

    def view(self, uploads: Mapping[int, Upload]) -> Survivors:
        """These uploads arrived, and no other."""
        return self.sign(Survivors(*_about(uploads)))

    def request(
        self, site: int, uploads: Mapping[int, Upload], votes: Mapping[int, Vote] | None = None
    ) -> Unmask:
        """What one site is asked to unmask."""
        said = [uploads[k] for k in sorted(uploads)]
        votes = votes or {}
        return self.sign(
            Unmask(
                *_about(uploads),
                voters=tuple(sorted(votes)),
                votes=tuple(votes[k].signature for k in sorted(votes)),
                sealed=tuple(upload.sealed[site] for upload in said),
                share_commitments=tuple(upload.share_commitments[site] for upload in said),
                row_digests=tuple(
                    b"".join(map(row_digest, upload.share_commitments, upload.sealed))
                    for upload in said
                ),
            )
        )

    # Exchanges: everybody answers, unless named

    def ask(self, site: int, message: Message, kind: type[R]) -> R:
        """One site's answer; of the kind that is expected."""
        member = self.members[site]
        reply = member.answer(message) if isinstance(member, Bare) else answer(message, member)
        assert isinstance(reply, kind)
        return reply

    def invite(self) -> None:
        for site in self.sites:
            self.keys[site] = self.ask(site, self.invitation(), SiteKeys)

    def agree(self) -> None:
        roster = self.roster()
        for site in self.sites:
            self.agreements[site] = self.ask(site, roster, Agreement)

    def enrol(self) -> Cast:
        """Both exchanges of an epoch."""
        self.invite()
        self.agree()
        return self

    def uploads(
        self, sum_number: int = 0, sites: Sequence[int] | None = None, **changes: Any
    ) -> dict[int, Upload]:
        return {
            site: self.ask(site, self.task(site, sum_number, **changes), Upload)
            for site in self._named(sites)
        }

    def votes(
        self, uploads: Mapping[int, Upload], sites: Sequence[int] | None = None
    ) -> dict[int, Vote]:
        """Of the survivors, unless named."""
        view = self.view(uploads)
        chosen = sorted(uploads) if sites is None else sites
        return {site: self.ask(site, view, Vote) for site in chosen}

    def shares(
        self,
        uploads: Mapping[int, Upload],
        votes: Mapping[int, Vote] | None = None,
        sites: Sequence[int] | None = None,
    ) -> dict[int, Shares]:
        """Of the survivors, unless named."""
        chosen = sorted(uploads) if sites is None else sites
        return {site: self.ask(site, self.request(site, uploads, votes), Shares) for site in chosen}

    # What comes of it

    def digest_of_view(self, uploads: Mapping[int, Upload], task: RoundTask) -> bytes:
        """What a vote on these uploads is about."""
        headers = [uploads[site].header for site in sorted(uploads)]
        return digest_of_view(self.run, task.sum_number, digest_of_task(task), headers)

    def total(self, uploads: Mapping[int, Upload], shares: Mapping[int, Shares]) -> QuantizedUpdate:
        """The sum, from any threshold of answers."""
        bits = self.manifest.ring_bits
        num_packed = len(next(iter(uploads.values())).body) - 8 * self.manifest.num_tail
        values = np.zeros(num_packed * 8 // bits, np.uint32)
        tail = np.zeros(self.manifest.num_tail, np.uint64)
        for upload in uploads.values():
            packed, its_tail = split_body(upload.body, values.size, bits=bits)
            add_packed(values, packed, bits=bits)
            tail += its_tail
        dropouts = [site for site in self.sites if site not in uploads]
        answers = dict(itertools.islice(sorted(shares.items()), self.manifest.threshold))
        masks = []
        for position, owner in enumerate(sorted(uploads)):
            for place, slot in enumerate((owner, *dropouts)):
                given = {k: slot_of(reply.shares[position], place) for k, reply in answers.items()}
                masks.append(Mask(recover(given), is_added=slot < owner))
        add_masks(values, masks)
        add_tail_masks(tail, masks, values.size)
        return QuantizedUpdate(signed(values, bits=bits), tail.view(np.int64))

    @property
    def sites(self) -> range:
        return range(len(self.members))

    def _named(self, sites: Sequence[int] | None) -> Sequence[int]:
        return self.sites if sites is None else sites


def summed(members: Sequence[Bare]) -> QuantizedUpdate:
    """What a sum over bare members must be."""
    return QuantizedUpdate(
        np.sum([member.update.values for member in members], axis=0, dtype=np.int32),
        np.sum([member.update.tail for member in members], axis=0),
    )


def _about(uploads: Mapping[int, Upload]) -> tuple[str, int, tuple[int, ...], tuple[bytes, ...]]:
    first = next(iter(uploads.values()))
    survivors = tuple(sorted(uploads))
    return first.run, first.sum_number, survivors, tuple(uploads[k].header for k in survivors)


def _opening(credentials: CoordinatorCredentials, names: Sequence[str]) -> Opening:
    """What a coordinator chooses: members, a fresh nonce, two hours around now."""
    now = int(utc_now().timestamp())
    approved = credentials.trust.members
    return Opening(
        run=secrets.token_hex(16),
        epoch=1,
        members=tuple(KeyedMember(name=name, key=approved[name]) for name in names),
        coordinator=credentials.identity.fingerprint,
        valid_from=now - 3600,
        valid_until=now + 3600,
        nonce=secrets.token_hex(16),
    )


def _bare_manifest(
    credentials: CoordinatorCredentials, names: Sequence[str], model: NDArray[np.float32]
) -> Manifest:
    opening = _opening(credentials, names)
    return Manifest(
        **opening.model_dump(),
        study="a" * 64,
        threshold=default_threshold(len(names)),
        num_sums=NUM_SUMS,
        num_params=model.size,
        num_tail=NUM_TAIL,
        schema_digest="b" * 64,
        first_model=digest_of_model(model),
        exponents=(-10,) * NUM_TENSORS,
        ring_bits=24,
        weight_cap=100,
        code="c" * 64,
    )


def _drawn(manifest: Manifest, site: int) -> QuantizedUpdate:
    """An update that uses the whole ring, and a tail with negative numbers."""
    rng = np.random.default_rng(site)
    edge = Ring(manifest.ring_bits, len(manifest.members)).max_magnitude
    values = rng.integers(-edge, edge, manifest.num_params, np.int32, endpoint=True)
    return QuantizedUpdate(values, rng.integers(-(2**40), 2**40, manifest.num_tail))


def _next_round(purpose: Purpose, sum_number: int) -> int:
    """A round that no sum of the run was about before; a model is scored on test once."""
    return {Purpose.TRAIN: sum_number + 1, Purpose.VALIDATE: sum_number, Purpose.TEST: 1}[purpose]
