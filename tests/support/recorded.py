"""An honest run of four sites, with all that was said and each disk as it was before.

Two training sums, the second without its last site, and an evaluation. Training itself is replaced
by small random updates; everything that handles messages is the product's.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from federation import answers_of, open_sites, tiny_study
from papers import odd_certificates, odd_lists

from client import round as site_round
from client.site import Site
from common.audit import GENESIS, AuditLog
from common.authority import Authority
from common.evidence import Evidence
from common.identity import Identity, read_certified
from common.manifest import KeyedMember, Manifest, Opening, plan_epoch
from common.messages import Message, Purpose, RoundTask, Upload, digest_of_model
from common.models.build import build_network, digest_of_weights
from common.roster import CoordinatorCredentials
from common.secagg.header import Header
from common.statement import Statement
from common.tasks import task_of
from common.throwaway import CA, coordinator_credentials
from common.update import LocalUpdate
from server.collected import Collected
from server.epoch import Epoch, exchange_keys
from server.exchange import Exchange
from server.network import Enough, never
from server.secure_sum import Total, secure_sum
from server.state import initial_state, training_task

NUM_SITES, THRESHOLD = 4, 3
HERO, DROPPED = 1, 3  # the site that is attacked, or attacks; the one that drops out
COORDINATOR = -1


class RecordingNetwork:
    """Asks sites in this process; withholds answers of some; copies one site's disk before."""

    def __init__(self, sites: Mapping[str, Site], folder: Path) -> None:
        self._answers = answers_of(sites)
        self._watched = list(sites)[HERO]
        self._state_dir = sites[self._watched].state_dir
        self._folder = folder
        self.said: list[tuple[str, Message, Message]] = []
        self.before: list[tuple[Message, Path]] = []  # what came, and the disk it came to
        self.withheld: set[str] = set()

    def sites(self) -> Sequence[str]:
        return list(self._answers)

    def ask(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        for site, message in messages.items():
            if site == self._watched:
                copy = self._folder / f"before-{len(self.before)}"
                shutil.copytree(self._state_dir, copy)
                self.before.append((message, copy))
            reply = self._answers[site](message)
            self.said.append((site, message, reply))
            if site not in self.withheld:
                yield site, reply


@dataclass
class Recording:
    """One run."""

    folder: Path
    now: datetime
    sites: dict[str, Site]
    credentials: CoordinatorCredentials
    manifest: Manifest
    network: RecordingNetwork
    epoch: Epoch
    tasks: list[RoundTask]
    collected: list[Collected]  # by sum: masked still, with every upload that arrived
    identities: dict[int, Identity] = field(default_factory=dict)  # by site, and the coordinator's
    good_certificates: dict[int, set[bytes]] = field(default_factory=dict)
    good_lists: set[bytes] = field(default_factory=set)
    odd: dict[str, list[bytes]] = field(default_factory=dict)  # by name of a field

    def replies(self, kind: type[Any]) -> list[Any]:
        """What the attacked site answered, of one kind, in order."""
        name = self.manifest.names[HERO]
        return [
            reply
            for site, _, reply in self.network.said
            if site == name and isinstance(reply, kind)
        ]

    def messages(self) -> list[Message]:
        """Everything that was said."""
        return [message for _, *both in self.network.said for message in both]

    def header(self, sum_number: int, site: int) -> Header:
        """A site's header, also of an upload that did not arrive."""
        (content,) = (
            reply.header
            for name, _, reply in self.network.said
            if isinstance(reply, Upload)
            and (reply.sum_number, name) == (sum_number, self.manifest.names[site])
        )
        return Header.decode(content)

    def with_papers(self) -> Recording:
        """Add certificates and revocation lists: renewed ones, and odd ones."""
        authority = Authority.load(self.folder / CA)
        identities = {k: site.party().identity for k, site in enumerate(self.sites.values())}
        identities[COORDINATOR] = self.credentials.identity
        renewed = {
            k: authority.issue(
                one.name,
                "coordinator" if k == COORDINATOR else "site",
                one.key.public_key(),
                self.now,
                days=9,
            ).public_bytes(serialization.Encoding.DER)
            for k, one in identities.items()
        }
        fresh = authority.revocation_list([12345], self.now, days=9)
        numbers = [read_certified(one.certificate).serial_number for one in identities.values()]
        odd = [
            paper
            for k in (COORDINATOR, HERO, 0)
            for paper in odd_certificates(authority, identities[k], self.now).values()
        ]
        return replace(
            self,
            identities=identities,
            good_certificates={k: {one.certificate, renewed[k]} for k, one in identities.items()},
            good_lists={self.credentials.revoked(), fresh},
            odd={
                "certificate": [*odd, *renewed.values()],
                "revoked": [*odd_lists(authority, numbers, self.now).values(), fresh],
                "public_key": [bytes(32), b"\x01" + bytes(31), b"\xff" * 32],
                "kem_key": [b"\xff" * 1184],
            },
        )


@contextmanager
def recorded() -> Iterator[Recording]:
    """Record a run; in memory where there is room, as every refusal is written and flushed."""
    memory = Path("/dev/shm")  # noqa: S108
    beside = memory if memory.is_dir() else None
    counts = np.ones(task_of(tiny_study(NUM_SITES)).num_counts, np.int64)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=beside) as folder:
        patch.setattr(site_round, "evaluate", lambda *_, **__: counts)
        patch.setattr(site_round, "local_update", _update)
        patch.setattr(Site, "statement", _statement)
        for name in ("consilium.site", "consilium.coordinator"):
            patch.setattr(logging.getLogger(name), "disabled", True)
        yield _record(Path(folder)).with_papers()


def copied(collected: Collected) -> Collected:
    """The same uploads in other arrays."""
    return replace(
        collected,
        values=collected.values.copy(),
        tail=collected.tail.copy(),
        uploads=dict(collected.uploads),
    )


def _record(folder: Path) -> Recording:
    study, now = tiny_study(NUM_SITES), datetime.now(UTC)
    names = study.site_names
    sites = {
        name: replace(site, now=lambda: now) for name, site in open_sites(study, folder).items()
    }
    credentials = coordinator_credentials(folder, names)
    network = RecordingNetwork(sites, folder)
    audit = AuditLog(folder / "audit.jsonl", lambda: now)
    talk = Exchange(network, credentials, Evidence(folder), audit, now=lambda: now)
    first = build_network(study)
    approved, seconds = credentials.trust.members, int(now.timestamp())
    opening = Opening(
        run="0123456789abcdef" * 2,
        epoch=1,
        members=tuple(KeyedMember(name=name, key=approved[name]) for name in names),
        coordinator=credentials.identity.fingerprint,
        valid_from=seconds - 1000,
        valid_until=seconds + 1000,
        nonce="fedcba9876543210" * 2,
    )
    manifest = plan_epoch(
        study, first.schema, task_of(study), opening, first_model=digest_of_weights(first)
    )
    epoch, missing = exchange_keys(talk, manifest)
    assert epoch is not None, missing
    begun = training_task(initial_state(study, manifest, first.vector()), epoch.run.hex())
    tasks = [
        begun,
        _following(begun, 1, Purpose.TRAIN),
        _following(begun, 2, Purpose.VALIDATE),
    ]
    kept: list[Collected] = []
    for task, silent in zip(tasks, ((), (names[DROPPED],), ()), strict=True):
        network.withheld = set(silent)
        total = secure_sum(
            talk,
            epoch,
            task,
            min_sites=THRESHOLD,
            is_private=True,
            pending=None,
            keep_pending=lambda collected: kept.append(copied(collected)),
        )
        assert isinstance(total, Total)
    return Recording(
        folder, now, sites, credentials, manifest, network, epoch, tasks, collected=kept
    )


def _following(first: RoundTask, sum_number: int, purpose: Purpose) -> RoundTask:
    """A later task, for round 2, over a model of its own."""
    model = first.model + np.float32(0.5 * sum_number)
    return replace(
        first,
        sum_number=sum_number,
        round_number=2,
        purpose=purpose,
        model=model,
        model_digest=digest_of_model(model),
    )


def _update(task: RoundTask, site: Site, _: object = None) -> LocalUpdate:
    values = np.random.default_rng(task.sum_number).normal(0, 1e-3, task.model.size)
    return LocalUpdate(values.astype(np.float32))


def _statement(site: Site, run: str, sum_number: int) -> str:
    return (
        Statement(
            run=run,
            study=site.study.digest(),
            site=site.name,
            sum_number=sum_number,
            epsilon=1.5,
            delta=1e-5,
            unit="patient",
            noise_multiplier=1.1,
            sampling_probability=0.25,
            steps=20,
            accountant="prv",
            randomness="os",
            audit=GENESIS,
            ledger=GENESIS,
        )
        .signed(site.party().identity)
        .model_dump_json()
    )
