"""A federation that sums made-up integers: real keys, journals and messages; nothing is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from faulty_network import Fault, FaultyNetwork
from numpy.typing import NDArray

from client import enrolment, unmasking
from client.journal import Journal
from client.session import Party, Session
from common.audit import AuditLog
from common.errors import RemoteProtocolError
from common.evidence import Evidence
from common.manifest import KeyedMember, Manifest, check_members, default_threshold
from common.messages import (
    Invitation,
    Message,
    Purpose,
    Roster,
    RoundTask,
    Survivors,
    Unmask,
    digest_of_model,
)
from common.quantize import Ring
from common.roster import Credentials
from common.throwaway import coordinator_credentials, issue_identities, site_credentials
from common.update import QuantizedUpdate
from server.epoch import Epoch, exchange_keys
from server.exchange import Exchange, utc_now
from server.run_dir import RunDir
from server.secure_sum import Total, Void, secure_sum

IN_MEMORY = Path("/dev/shm")  # noqa: S108 - a journal flushes every entry; here that costs nothing
NUM_TENSORS = 1
WEIGHT_CAP = 100_000
MIN_SITES = 3

Draw = Callable[[RoundTask, int], QuantizedUpdate]  # the update of a site for a task


@contextmanager
def fast_folder() -> Iterator[Path]:
    """A temporary folder, in memory where the machine has such a place."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def next_round(purpose: Purpose, sum_number: int) -> int:
    """A round that no sum of the run was about before: one a sum, and the model before it."""
    return sum_number + 1 if purpose == Purpose.TRAIN else sum_number


class VectorSite:
    """A site that has integers in the place of a model."""

    def __init__(self, folder: Path, credentials: Credentials, draw: Draw) -> None:
        self.credentials = credentials
        self.draw = draw
        self._path = folder / "journal.sqlite"
        self.journal = Journal(self._path)

    def restart(self) -> None:
        """Another process takes over: all it has is what is on disk."""
        self.journal.close()
        self.journal = Journal(self._path)

    def answer(self, message: Message) -> Message:
        party = self.party()
        if isinstance(message, Invitation):
            return enrolment.join(message, self.journal, party, self._approve)
        session = Session(self.journal, party)
        match message:
            case Roster():
                return enrolment.agree(session, message)
            case RoundTask():
                drawn = session.accept(message)
                return drawn or session.mask(self.draw(message, session.index))
            case Survivors():
                return unmasking.vote(session, message)
            case Unmask():
                return unmasking.unmask(session, message)
        raise RemoteProtocolError("unknown")

    def party(self) -> Party:
        return Party(self.credentials.identity, self.credentials.trust, datetime.now(UTC))

    def _approve(self, manifest: Manifest) -> None:
        check_members(
            manifest,
            site=self.credentials.identity.name,
            approved=self.credentials.trust.members,
            min_sites=MIN_SITES,
        )


class VectorFederation:
    """Sites and a coordinator whose every sum is known beforehand."""

    def __init__(
        self,
        folder: Path,
        num_sites: int,
        *,
        bits: int = 32,
        num_params: int = 9,
        num_tail: int = 4,
        draw: Draw | None = None,
    ) -> None:
        self.names = [f"site-{k + 1}" for k in range(num_sites)]
        self.bits, self.num_params, self.num_tail = bits, num_params, num_tail
        self.draw = draw or self.drawn
        issue_identities(folder, self.names)
        self.sites = {
            name: VectorSite(
                folder / "sites" / name,
                site_credentials(folder, name, self.names),
                self.draw,
            )
            for name in self.names
        }
        self.network = FaultyNetwork({name: site.answer for name, site in self.sites.items()})
        self.run_dir = RunDir(folder / "coordinator")
        self.run_dir.path.mkdir()
        self.exchange = Exchange(
            self.network,
            coordinator_credentials(folder, self.names),
            Evidence(self.run_dir.path),
            AuditLog(self.run_dir.path / "audit.jsonl", utc_now),
        )
        self.sum_number = -1
        self.open_epoch(1, self.names)

    # Keys

    def open_epoch(self, number: int, names: Sequence[str]) -> Epoch:
        """New keys among some of the members."""
        epoch, missing = exchange_keys(self.exchange, self.manifest(number, names))
        if epoch is None:
            raise AssertionError(f"not agreed: {missing}, {self.network.refused}")
        self.epoch = epoch
        return epoch

    def manifest(self, number: int, names: Sequence[str]) -> Manifest:
        now, trust = int(datetime.now(UTC).timestamp()), self.exchange.credentials.trust
        return Manifest(
            run="1" * 32,
            epoch=number,
            members=tuple(KeyedMember(name=name, key=trust.members[name]) for name in names),
            coordinator=trust.coordinator,
            valid_from=now - 60,
            valid_until=now + 3600,
            nonce=f"{number:032x}",
            study="2" * 64,
            threshold=default_threshold(len(names)),
            num_sums=100_000,
            num_params=self.num_params,
            num_tail=self.num_tail,
            schema_digest="3" * 64,
            first_model="4" * 64,
            exponents=(0,) * NUM_TENSORS,
            ring_bits=self.bits,
            weight_cap=WEIGHT_CAP,
            code="5" * 64,
        )

    @property
    def threshold(self) -> int:
        return self.epoch.manifest.threshold

    # Sums

    def next_task(self, purpose: Purpose = Purpose.TRAIN, *, model: int | None = None) -> RoundTask:
        """The task of the next sum; every sum has a model of its own unless told otherwise."""
        self.sum_number += 1
        number = self.sum_number if model is None else model
        values = np.full(self.num_params, number, np.float32)
        return RoundTask(
            run=self.epoch.run.hex(),
            sum_number=self.sum_number,
            round_number=next_round(purpose, self.sum_number),
            purpose=purpose,
            exponents=(0,) * NUM_TENSORS,
            model_digest=digest_of_model(values),
            ciphertexts=(),
            ciphertext_signatures=(),
            revoked=b"",
            model=values,
        )

    def drawn(self, task: RoundTask, site: int) -> QuantizedUpdate:
        """Integers up to the largest that a site may send, and those themselves."""
        rng = np.random.default_rng([task.sum_number, site])
        bound = Ring(self.bits, len(self.epoch.manifest.members)).max_magnitude
        values = np.empty(0, np.int32)
        if task.purpose == Purpose.TRAIN:
            values = rng.integers(-bound, bound, self.num_params, np.int32, endpoint=True)
            values[:1], values[1:2] = bound, -bound  # where all sites send these, the sum just fits
        tail = rng.integers(0, 2**52, self.num_tail, np.int64)
        tail[0] = rng.integers(1, WEIGHT_CAP, endpoint=True)
        return QuantizedUpdate(values, tail)

    def sum(self, task: RoundTask) -> Total | Void:
        """What the coordinator does, with what it may have kept of this sum."""
        return secure_sum(
            self.exchange,
            self.epoch,
            task,
            min_sites=MIN_SITES,
            is_private=False,
            pending=self.run_dir.pending(),
            keep_pending=self.run_dir.save_pending,
        )

    def expected(self, task: RoundTask, survivors: Sequence[str]) -> list[NDArray[np.int64]]:
        """The sums of values and tails in plain integers."""
        names = self.epoch.manifest.names
        updates = [self.draw(task, names.index(name)) for name in survivors]
        return [
            np.sum([update.values for update in updates], axis=0, dtype=np.int64),
            np.sum([update.tail for update in updates], axis=0, dtype=np.int64),
        ]

    def check(self, total: Total | Void, survivors: Sequence[str]) -> None:
        """Fail unless this is the exact sum over exactly these sites."""
        assert isinstance(total, Total), total
        assert total.survivors == tuple(sorted(survivors))
        values, tail = self.expected(total.task, survivors)
        assert np.array_equal(total.values, values)
        summed = np.concatenate([[total.weight], total.clipped, total.counts])
        assert np.array_equal(summed, tail)


def silent_when(asked: Callable[[str, Message], bool]) -> Callable[[str, Message], Fault | None]:
    """Faults of a network with sites that never see some messages."""
    return lambda site, message: Fault.SILENT if asked(site, message) else None
