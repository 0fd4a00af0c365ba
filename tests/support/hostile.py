"""A federation that somebody attacks: tiny updates, a clock, an authority that can err.

``Federation`` is the coordinator's part of ``protocol.Cast`` with everything a hostile one has: its
key, whatever the members said, and in a test also their keys, because some of them may help it.
The members run the product's own ``client.round``; only training and scoring are stand-ins.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from faulty_network import FaultyNetwork
from federation import tiny_study
from protocol import Cast

from client import round as round_of_site
from client.contents import Contents
from client.journal import Journal
from client.ledger import Ledger
from client.round import answer
from client.site import Site
from client.statistics import Counted
from common.audit import AuditLog
from common.authority import Authority
from common.evidence import FILE, Evidence
from common.identity import Identity, Role
from common.manifest import KeyedMember, Manifest, Opening, plan_epoch
from common.messages import (
    Agreement,
    FromCoordinator,
    Invitation,
    Message,
    Roster,
    RoundTask,
    SiteKeys,
    Upload,
    digest_of_model,
)
from common.models.flat import Schema
from common.quantize import quantize
from common.record import as_table
from common.roster import CoordinatorCredentials, Credentials, Trust
from common.secagg.header import SECRET_BYTES, Header, commit_row, digest_of_rows, row_digest
from common.secagg.keys import EpochKeys, share_key
from common.secagg.protect import share_context
from common.secagg.sharing import seal
from common.signing import sign
from common.tasks import task_of
from common.update import LocalUpdate, QuantizedUpdate
from server.collected import Collected
from server.epoch import Epoch, exchange_keys
from server.exchange import Exchange
from server.secure_sum import Total, secure_sum

T = TypeVar("T")
START = datetime(2031, 5, 1, 12, tzinfo=UTC)
CERTIFICATE_DAYS, REVOCATION_DAYS, EPOCH_DAYS = 30, 7, 60
SCHEMA = Schema(("weight", "bias"), ((2, 2), (2,)))
MODEL = np.linspace(-1, 1, SCHEMA.num_params, dtype=np.float32)
OTHER_MODEL = MODEL + 1
RUN, OTHER_RUN = "1" * 32, "2" * 32
LOW_ORDER = {  # on Curve25519; whoever uses one gets the same secret with everybody
    "zero": bytes(32),
    "one": bytes([1, *bytes(31)]),
    "of order eight": bytes.fromhex(
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"
    ),
    "of order eight, the other": bytes.fromhex(
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"
    ),
    "minus one": bytes.fromhex("ec" + "ff" * 30 + "7f"),
}
P256 = bytes.fromhex("06082a8648ce3d030107")
UNKNOWN_CURVE = bytes.fromhex("06082a8648ce3d030117")
V3, UNKNOWN_VERSION = bytes.fromhex("a003020102"), bytes.fromhex("a003020107")


@contextmanager
def federations(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Federation]]:
    """A way to make ``Federation(folder, num_sites, **study)``; all are closed at the end."""
    train_nobody(monkeypatch)
    made: list[Federation] = []

    def make(num_sites: int = 4, **study: Any) -> Federation:
        made.append(Federation(folder, num_sites, **study))
        return made[-1]

    yield make
    for federation in made:
        federation.close()


def by_title(*tables: Mapping[str, Mapping[str, T]]) -> dict[str, tuple[T, str]]:
    """(What is done, the rule it breaks) by title, from tables by rule."""
    cases = [
        (title, (what, rule))
        for table in tables
        for rule, entries in table.items()
        for title, what in entries.items()
    ]
    assert len(dict(cases)) == len(cases)
    return dict(cases)


class Federation(Cast):
    """Members, their authority and their coordinator.

    Attributes:
      clock: What time it is for everybody.
      identities: The members' keys by site.
      settled: Uploads that had arrived at the deadline; empty while nobody was asked.
      due: The task that an honest coordinator goes on with: its sum and what differs.
    """

    def __init__(self, folder: Path, num_sites: int = 4, **study: Any) -> None:
        self.folder, self.clock = folder, START
        self.study = tiny_study(num_sites, **study)
        self.authority = Authority.create("consortium", START, days=3650)
        self.identities = [self.issue(name) for name in self.study.site_names]
        coordinator = self.issue("coordinator", "coordinator")
        self.trust = Trust(
            ca=self.authority.certificate,
            members={one.name: one.fingerprint for one in self.identities},
            coordinator=coordinator.fingerprint,
        )
        credentials = CoordinatorCredentials(coordinator, self.trust, folder / "revoked.crl")
        sites = [self._open(k) for k in range(num_sites)]
        super().__init__(sites, self._manifest(), credentials, MODEL)
        self.publish_revoked()
        self.settled: dict[int, Upload] = {}
        self.due: tuple[int, dict[str, Any]] = (0, {})

    def _open(self, index: int) -> Site:
        name = self.study.site_names[index]
        state_dir = self.folder / "sites" / name
        images = SimpleNamespace(
            train=None, validation=index, test=index, contents=Contents("0" * 64, 0, frozenset())
        )
        images.to = lambda _: images
        return Site(
            name=name,
            study=self.study,
            weight=10 + index,
            network=SimpleNamespace(schema=SCHEMA, values=torch.zeros(SCHEMA.num_params)),
            first_model=digest_of_model(MODEL),
            task=task_of(self.study),
            journal=quick_journal(state_dir),
            ledger=Ledger(state_dir / "ledgers" / "tiny.jsonl", "tiny", None),
            plan=None,
            load=lambda: images,
            count=lambda: Counted(np.zeros(0, np.int64), images.contents),
            state_dir=state_dir,
            home=state_dir,
            credentials=lambda: Credentials(self.identities[index], self.trust),
            now=lambda: self.clock,
        )

    def close(self) -> None:
        for site in self.members:
            site.journal.close()

    # The authority

    def issue(
        self,
        name: str,
        role: Role = "site",
        *,
        key: ec.EllipticCurvePrivateKey | None = None,
        by: Authority | None = None,
        at: datetime = START,
    ) -> Identity:
        """A certificate, for a fresh key unless one is given."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        authority = by or self.authority
        certificate = authority.issue(name, role, key.public_key(), at, days=CERTIFICATE_DAYS)
        return Identity(name, key, certificate.public_bytes(Encoding.DER))

    def revoked(self, *identities: Identity, by: Authority | None = None) -> bytes:
        """A list of revoked certificates that is fresh now."""
        numbers = [serial_number(one) for one in identities]
        return (by or self.authority).revocation_list(numbers, self.clock, days=REVOCATION_DAYS)

    def publish_revoked(self, *identities: Identity) -> None:
        """What every later message of the coordinator brings."""
        self.credentials.revocation_list.write_bytes(self.revoked(*identities))

    def wait(self, **duration: float) -> None:
        """Time passes, and the authority publishes a fresh list."""
        self.clock += timedelta(**duration)
        self.publish_revoked()

    # Epochs

    def _manifest(self, run: str = RUN, epoch: int = 1) -> Manifest:
        now = int(self.clock.timestamp())
        opening = Opening(
            run=run,
            epoch=epoch,
            members=tuple(KeyedMember(name=n, key=key) for n, key in self.trust.members.items()),
            coordinator=self.trust.coordinator,
            valid_from=now - 3600,
            valid_until=now + EPOCH_DAYS * 86_400,
            nonce=f"{epoch:032x}",
        )
        first = digest_of_model(MODEL)
        return plan_epoch(self.study, SCHEMA, task_of(self.study), opening, first_model=first)

    def next_epoch(self, run: str = RUN) -> Federation:
        """The coordinator opens another epoch; nobody was invited to it yet."""
        self.manifest = self._manifest(run, self.manifest.epoch + 1)
        self.keys, self.agreements = {}, {}
        return self

    def altered(self, **changes: Any) -> str:
        """The manifest's text with other values, possible ones or not."""
        values = {**json.loads(self.manifest.canonical()), **changes}
        return json.dumps(values, separators=(",", ":"))

    def proposal(self, text: str, *, by: Identity | None = None, **changes: Any) -> Invitation:
        """An invitation to any text, from anybody."""
        sender = by or self.credentials.identity
        invitation = Invitation(text, sender.certificate, self.credentials.revoked())
        return sign(replace(invitation, **changes), sender)

    def keys_signed(self, site: int, by: Identity | None = None, **changes: Any) -> SiteKeys:
        """A member's keys altered, and signed by it or with a key that is given."""
        return sign(replace(self.keys[site], **changes), by or self.identities[site])

    def roster_with(self, *altered: SiteKeys, **changes: Any) -> Roster:
        """The roster with some members' keys replaced."""
        kept = self.keys
        self.keys = {**kept, **{one.site: one for one in altered}}
        roster = self.roster()
        self.keys = kept
        return self.sign(replace(roster, **changes))

    def resigned(self, message: FromCoordinator, **changes: Any) -> FromCoordinator:
        """A message altered by the coordinator itself."""
        return self.sign(replace(message, **changes))

    # Sums

    def settle(self, *sites: int, sum_number: int = 0, **changes: Any) -> dict[int, Upload]:
        """Everybody answers; only these sites' uploads arrived in time."""
        uploads = self.uploads(sum_number, **changes)
        self.settled = {site: uploads[site] for site in sites or self.sites}
        self.due = (sum_number, changes)
        return uploads

    def quantized(self, site: int, task: RoundTask) -> QuantizedUpdate:
        """What a member hides in its upload."""
        member = self.members[site]
        return quantize(
            update_of(task, member),
            _counts_of(task.model, site, network=member.network, task=member.task),
            sizes=SCHEMA.sizes,
            exponents=task.exponents,
            weight=member.weight,
            weight_cap=self.manifest.weight_cap,
            ring=self.manifest.ring,
        )

    def twin(self, site: int, folder: Path) -> Site:
        """A copy of a member with a memory of its own: one that helps to attack answers twice."""
        member = self.members[site]
        member.journal.close()
        shutil.copytree(member.state_dir, folder)
        self.members[site] = replace(member, journal=quick_journal(member.state_dir))
        return replace(member, journal=quick_journal(folder), state_dir=folder)

    # What a site knows

    def memory(self, site: int) -> dict[str, Any]:
        """Everything in a site's journal, and the bodies of its uploads."""
        member = self.members[site]
        tables = ("manifest", "answered", "memory", "counter")
        known: dict[str, Any] = {
            table: member.journal._database.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608
            for table in tables
        }
        bodies = sorted(member.state_dir.glob("answer-*.bin"))
        return {**known, **{path.name: path.read_bytes() for path in bodies}}

    def evidence(self, site: int) -> list[dict[str, Any]]:
        """What a site has kept as refused."""
        return evidence_in(self.members[site].state_dir)

    # An honest coordinator

    @property
    def exchange(self) -> Exchange:
        """The product's own way to ask the members; what a site refuses arrives as a word."""
        network = FaultyNetwork(
            {member.name: partial(answer, site=member) for member in self.members}
        )
        evidence = Evidence(self.folder / "run")
        audit = AuditLog(self.folder / "run" / "audit.jsonl", lambda: self.clock)
        return Exchange(network, self.credentials, evidence, audit, now=lambda: self.clock)

    def epoch(self) -> Epoch:
        """The epoch that everybody agreed to, or agrees to now."""
        if len(self.agreements) == len(self.members):
            agreements = tuple(self.agreements[k] for k in self.sites)
            return Epoch(self.manifest, self.roster(), agreements)
        epoch, missing = exchange_keys(self.exchange, self.manifest)
        assert not missing
        assert epoch is not None
        self.agreements = dict(enumerate(epoch.agreements))
        self.keys = {site: epoch.roster.keys_of(site) for site in self.sites}
        return epoch

    def collected(self, epoch: Epoch, task: RoundTask) -> Collected:
        """What the coordinator holds at the deadline."""
        collected = Collected.nothing(task, self.manifest)
        for site, upload in self.settled.items():
            collected.take(site, upload, epoch, is_private=False)
        return collected

    def finish(self) -> Total:
        """An honest coordinator takes over and ends the sum; it must be exact."""
        self.clock = START
        self.publish_revoked()
        epoch, (number, changes) = self.epoch(), self.due
        task = self.task(0, number, **changes)
        total = secure_sum(
            self.exchange,
            epoch,
            task,
            min_sites=3,
            is_private=False,
            pending=self.collected(epoch, task) if self.settled else None,
            keep_pending=lambda _: None,
        )
        assert isinstance(total, Total)
        taking_part = list(self.settled or self.sites)
        assert total.survivors == tuple(self.manifest.names[k] for k in taking_part)
        hidden = [self.quantized(site, task) for site in taking_part]
        assert total.values.tolist() == np.sum([one.values for one in hidden], axis=0).tolist()
        tail = [total.weight, *total.clipped, *total.counts]
        assert tail == np.sum([one.tail for one in hidden], axis=0).tolist()
        return total


def split(fed: Federation) -> tuple[Federation, Roster]:
    """Member 3 signs two keys: members 0 and 1 agree to one roster, member 2 to another one."""
    fed.invite()
    other = fed.roster_with(fed.keys_signed(3, public_key=EpochKeys.generate().public_key))
    for site in (0, 1):
        fed.agreements[site] = fed.ask(site, fed.roster(), Agreement)
    fed.agreements[2] = fed.ask(2, other, Agreement)
    return fed, other


# Certificates


def stranger(name: str = "consortium") -> Authority:
    """Another authority; only its key tells it from the pinned one."""
    return Authority.create(name, START, days=3650)


def on_unknown_curve(identity: Identity) -> Identity:
    """The same key, in a certificate that this program cannot read."""
    return _disguised(identity, P256, UNKNOWN_CURVE)


def of_unknown_version(identity: Identity) -> Identity:
    """The same key, in a certificate of the future."""
    return _disguised(identity, V3, UNKNOWN_VERSION)


def _disguised(identity: Identity, before: bytes, after: bytes) -> Identity:
    assert before in identity.certificate
    return replace(identity, certificate=identity.certificate.replace(before, after))


# What a site would have learned


def train_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace training and scoring by numbers that follow from the site and the task."""
    monkeypatch.setattr(round_of_site, "evaluate", _counts_of)
    monkeypatch.setattr(round_of_site, "local_update", update_of)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test here cuts the power


def quick_journal(folder: Path) -> Journal:
    """A site's journal that does not wait for the disk."""
    path = folder / "journal.sqlite"
    if not folder.exists():
        folder.mkdir(parents=True)
        path.write_bytes(_empty_journal())
    journal = Journal(path)
    journal._database.execute("PRAGMA synchronous = OFF")
    return journal


@functools.cache
def _empty_journal() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        Journal(path).close()
        return path.read_bytes()


def update_of(task: RoundTask, site: Site, _: object = None) -> LocalUpdate:
    rng = np.random.default_rng([task.sum_number, site.weight])
    return LocalUpdate(rng.normal(size=SCHEMA.num_params).astype(np.float32) + 0 * task.model)


def _counts_of(model: Any, samples: int, *, network: Any, task: Any) -> Any:
    return np.arange(task.num_counts, dtype=np.int64) * (samples + 1)


# Uploads of a site that lies, but signs what it says


def rebound(upload: Upload, site: Site, header: Mapping[str, Any] = {}, **changes: Any) -> Upload:
    """An altered upload whose header binds it, or says something else where ``header`` says so.

    The site's journal says so too: the liar stands by what it sent.
    """
    changed = replace(upload, **changes)
    bound = replace(
        Header.decode(upload.header),
        body=_sha256(changed.body.tobytes()),
        statement=_sha256(changed.statement.encode()),
        rows=digest_of_rows(list(map(row_digest, changed.share_commitments, changed.sealed))),
    )
    epoch, said = site.journal.epoch(), site.journal.sum()
    assert epoch is not None
    assert said is not None
    signed = replace(bound, **header).signed(site.party().identity).encode()
    site.journal.go_on(epoch, said.model_copy(update={"header": signed}))
    return replace(changed, header=signed)


def with_row(
    upload: Upload, site: Site, receiver: int, *, sealed: bytes, commitments: bytes | None = None
) -> Upload:
    """An upload with another sealed share for one receiver, and perhaps other commitments to it."""
    rows = list(upload.sealed), list(upload.share_commitments)
    rows[0][receiver] = sealed
    if commitments is not None:
        rows[1][receiver] = commitments
    return rebound(upload, site, sealed=tuple(rows[0]), share_commitments=tuple(rows[1]))


def wrong_share(upload: Upload, site: Site, receiver: int) -> tuple[bytes, bytes]:
    """(Sealed, commitments) of a share that its receiver can open, but which is none."""
    epoch, header = site.journal.epoch(), Header.decode(upload.header)
    assert epoch is not None
    about = (header.sum_number, header.task, header.site, receiver)
    share = bytes(SECRET_BYTES * header.num_slots)
    key = share_key(epoch.chains[receiver], *about)
    sealed = seal(key, share, share_context(header.run, *about))
    return sealed, commit_row(header.run, header.sum_number, header.site, receiver, share)


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def not_authentic(upload: Upload, site: Site) -> Upload:
    return with_row(upload, site, 0, sealed=flipped(upload.sealed[0]))


def sealed_for_another(upload: Upload, site: Site) -> Upload:
    return with_row(
        upload, site, 0, sealed=upload.sealed[2], commitments=upload.share_commitments[2]
    )


def unlike_its_commitment(upload: Upload, site: Site) -> Upload:
    sealed, _ = wrong_share(upload, site, 0)
    return with_row(upload, site, 0, sealed=sealed)


BAD_SHARES = {
    "not authentic": not_authentic,
    "sealed for another": sealed_for_another,
    "unlike its commitment": unlike_its_commitment,
}


# Small things


def plain(message: Message) -> dict[str, Any]:
    """A message as it stands in the evidence."""
    table: dict[str, Any] = json.loads(json.dumps(as_table(message)))
    return table


def serial_number(identity: Identity) -> int:
    return x509.load_der_x509_certificate(identity.certificate).serial_number


def evidence_in(folder: Path) -> list[dict[str, Any]]:
    path = folder / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def flipped(content: bytes, at: int = 0) -> bytes:
    """The same with one bit changed."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def exchanged(entries: Sequence[Any], place: int, entry: Any) -> tuple[Any, ...]:
    """The same with one entry replaced."""
    return (*entries[:place], entry, *entries[place + 1 :])


def swapped(entries: Sequence[Any], one: int, other: int) -> tuple[Any, ...]:
    """The same with two entries in each other's place."""
    return exchanged(exchanged(entries, one, entries[other]), other, entries[one])
