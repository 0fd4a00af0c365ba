"""The uploads of one sum, added up on arrival. No body is kept: memory does not grow with sites."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from common.errors import RemoteProtocolError
from common.manifest import Manifest
from common.messages import Message, Purpose, RoundTask, Upload
from common.record import as_table, from_table
from common.secagg.header import (
    SEAL_BYTES,
    SECRET_BYTES,
    SHARE_COMMITMENT_BYTES,
    Header,
    digest_of_rows,
    row_digest,
)
from common.secagg.masking import add_packed, split_body
from common.secagg.task import digest_of_task
from common.statement import Statement
from server.epoch import Epoch
from server.tensor_file import write_tensors


@dataclass(frozen=True)
class Kept:
    """What stays of an upload when its body was added."""

    header: bytes
    sealed: tuple[bytes, ...]
    share_commitments: tuple[bytes, ...]
    statement: str
    num_bytes: int  # of the whole upload

    def row_digests(self) -> bytes:
        """One digest per receiver, as the header binds them."""
        pairs = zip(self.share_commitments, self.sealed, strict=True)
        return b"".join(row_digest(commitments, sealed) for commitments, sealed in pairs)


@dataclass
class Collected:
    """The running sum and what is needed to unmask it."""

    sum_number: int
    task: bytes  # digest
    values: NDArray[np.uint32]  # (num_params,), or (0,) for an evaluation
    tail: NDArray[np.uint64]  # (num_tail,), or as long as statistics need
    uploads: dict[int, Kept] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # who is not in it, and why in a word

    @classmethod
    def nothing(cls, task: RoundTask, manifest: Manifest) -> Collected:
        """Before the first upload."""
        num_params = manifest.num_params if task.purpose == Purpose.TRAIN else 0
        return cls(
            task.sum_number,
            digest_of_task(task),
            np.zeros(num_params, np.uint32),
            np.zeros(manifest.num_tail_of(task.purpose), np.uint64),
        )

    @property
    def survivors(self) -> tuple[int, ...]:
        """Sites whose upload is in the sum, in order."""
        return tuple(sorted(self.uploads))

    def headers(self) -> tuple[bytes, ...]:
        """Their signed headers, in the same order."""
        return tuple(self.uploads[site].header for site in self.survivors)

    def statements(self) -> tuple[Statement, ...]:
        """Their privacy statements; none in a study without privacy."""
        texts = (self.uploads[site].statement for site in self.survivors)
        return tuple(Statement.parse(text) for text in texts if text)

    def take(self, site: int, reply: Message, epoch: Epoch, *, is_private: bool) -> None:
        """Check one upload and add it; in a private study, and only there, it has a statement.

        Raises:
          RemoteProtocolError: It is not exactly one answer of this site to this task; nothing was
            added.
        """
        num_bytes = self.values.size * epoch.manifest.ring_bits // 8 + self.tail.nbytes
        upload = _check(site, reply, epoch, self.sum_number, task=self.task, num_bytes=num_bytes)
        if bool(upload.statement) != is_private:
            raise RemoteProtocolError("a privacy statement is missing, or came unasked")
        if site in self.uploads:
            raise RemoteProtocolError("a second upload of one site for one sum", rule="R5")
        bits = epoch.manifest.ring_bits
        packed, tail = split_body(upload.body, self.values.size, bits=bits)
        add_packed(self.values, packed, bits=bits)
        np.add(self.tail, tail, out=self.tail)
        parts = (upload.header, *upload.sealed, *upload.share_commitments)
        num_bytes = upload.body.nbytes + len(upload.statement) + sum(map(len, parts))
        self.uploads[site] = Kept(
            upload.header, upload.sealed, upload.share_commitments, upload.statement, num_bytes
        )

    def save(self, path: Path) -> None:
        """Put it on disk; the sum is masked still."""
        about = {
            "sum_number": self.sum_number,
            "task": self.task.hex(),
            "missing": self.missing,
            "uploads": {site: as_table(kept) for site, kept in self.uploads.items()},
        }
        arrays: dict[str, NDArray[Any]] = {"values": self.values, "tail": self.tail}
        write_tensors(path, arrays, metadata={"collected": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Collected:
        """From the file that ``save`` wrote."""
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["collected"])
            values, tail = file.get_tensor("values"), file.get_tensor("tail")
        uploads = {int(site): from_table(kept, Kept) for site, kept in about["uploads"].items()}
        task = bytes.fromhex(about["task"])
        return cls(about["sum_number"], task, values, tail, uploads, about["missing"])

    def disagreements(self) -> Iterator[tuple[int, int]]:
        """Pairs of survivors that committed to different pair keys: their masks do not cancel."""
        headers = {site: Header.decode(kept.header) for site, kept in self.uploads.items()}
        for one, other in itertools.combinations(sorted(headers), 2):
            if headers[one].commitment(other) != headers[other].commitment(one):
                yield one, other


def _check(
    site: int,
    reply: Message,
    epoch: Epoch,
    sum_number: int,
    *,
    task: bytes,
    num_bytes: int,
) -> Upload:
    if not isinstance(reply, Upload):
        raise RemoteProtocolError(f"a task was answered with {type(reply).__name__}", rule="R7")
    manifest, run = epoch.manifest, epoch.run
    num_sites = len(manifest.members)
    header = Header.decode(reply.header)
    header.check_signature(epoch.members[site].key, epoch.members[site].name)
    about = (header.run, header.sum_number, header.task, header.site, header.num_slots)
    if (reply.run, reply.sum_number) != (run.hex(), sum_number) or about != (
        run,
        sum_number,
        task,
        site,
        num_sites,
    ):
        raise RemoteProtocolError("an upload for another sum or another task came", rule="R7")
    if reply.body.shape != (num_bytes,):
        text = f"an upload of {reply.body.nbytes} bytes came, expected {num_bytes}"
        raise RemoteProtocolError(text, rule="R4")
    sealed_bytes = SECRET_BYTES * num_sites + SEAL_BYTES
    sizes = [len(sealed) for sealed in reply.sealed]
    if sizes != [sealed_bytes if k != site else 0 for k in range(num_sites)]:
        raise RemoteProtocolError("the sealed shares have the wrong lengths", rule="R13")
    sizes = [len(row) for row in reply.share_commitments]
    if sizes != [SHARE_COMMITMENT_BYTES * num_sites] * num_sites:
        raise RemoteProtocolError("the share commitments have the wrong lengths", rule="R13")
    pairs = zip(reply.share_commitments, reply.sealed, strict=True)
    if (
        hashlib.sha256(reply.body.data).digest() != header.body
        or hashlib.sha256(reply.statement.encode(errors="replace")).digest() != header.statement
        or digest_of_rows([row_digest(*pair) for pair in pairs]) != header.rows
    ):
        raise RemoteProtocolError("an upload is not what its header binds", rule="R11")
    if reply.statement:
        statement = Statement.parse(reply.statement)
        said = (statement.site, statement.run, statement.study, statement.sum_number)
        if said != (epoch.members[site].name, manifest.run, manifest.study, sum_number):
            raise RemoteProtocolError(f"a statement of {statement.site} about another sum came")
        statement.check_signed(epoch.members[site].key)
    return reply
