"""The site's half of one run: what may come when, and the last step before an update leaves."""

from __future__ import annotations

import hashlib

from client.journal import Journal
from common.errors import LocalProtocolError, RemoteProtocolError
from common.manifest import Manifest
from common.messages import RoundTask, Upload
from common.quantize import EXPONENT_RANGE
from common.secagg.masking import mask, pack
from common.update import QuantizedUpdate


class Session:
    """One site in one run.

    A sum number is answered once and never again: an update of the same sum under another model
    would reveal the difference of the two.
    """

    def __init__(self, manifest: Manifest, journal: Journal) -> None:
        self.manifest = manifest
        self.run = manifest.digest()
        self._journal = journal
        self._accepted: tuple[RoundTask, str] | None = None

    @classmethod
    def current(cls, journal: Journal) -> Session:
        """The session that the last invitation opened.

        Raises:
          RemoteProtocolError: This site was not invited yet.
        """
        manifest = journal.manifest()
        if manifest is None:
            raise RemoteProtocolError("a task arrived before an invitation")
        return cls(manifest, journal)

    @classmethod
    def begin(cls, manifest: Manifest, journal: Journal) -> Session:
        """Take part in an epoch; the same invitation again changes nothing."""
        journal.begin_epoch(manifest)
        return cls(manifest, journal)

    def accept(self, task: RoundTask) -> Upload | None:
        """Check a task against the manifest and what was already answered.

        Returns:
          The stored answer if exactly this task was answered before, else None.

        Raises:
          RemoteProtocolError: The task is of another run, repeats or skips back a sum with other
            content, or its model or exponents have the wrong length.
        """
        manifest, last = self.manifest, self._journal.last_sum()
        if task.run != self.run:
            raise RemoteProtocolError("a task of another run arrived; invite this site first")
        digest = digest_of(task)
        if answered := self._journal.stored(self.run, task.sum_number, digest):
            return answered
        if not last < task.sum_number < manifest.num_sums:
            raise RemoteProtocolError(
                f"sum {task.sum_number}: sums after {last} and before {manifest.num_sums} are due"
            )
        if task.model.shape != (manifest.num_params,):
            raise RemoteProtocolError(
                f"the model has {task.model.size} parameters, the manifest {manifest.num_params}"
            )
        if len(task.exponents) != len(manifest.exponents):
            raise RemoteProtocolError(
                f"{len(task.exponents)} exponents, the manifest has {len(manifest.exponents)}"
            )
        if not all(EXPONENT_RANGE[0] <= e <= EXPONENT_RANGE[1] for e in task.exponents):
            raise RemoteProtocolError(f"an exponent is outside {EXPONENT_RANGE}")
        self._accepted = (task, digest)
        return None

    def mask(self, update: QuantizedUpdate, statement: str = "") -> Upload:
        """Turn the answer to the accepted task into what may leave the site, and keep it.

        Raises:
          LocalProtocolError: No task was accepted, or it was already answered.
        """
        accepted, self._accepted = self._accepted, None
        if accepted is None:
            raise LocalProtocolError("there is no accepted task to answer")
        task, digest = accepted
        bits = self.manifest.ring_bits
        masked = mask(update, bits=bits)
        body = pack(masked.values, bits=bits)
        upload = Upload(self.run, task.sum_number, body, masked.tail, statement)
        self._journal.record(upload, digest)
        return upload


def digest_of(task: RoundTask) -> str:
    """SHA-256 over everything a task says; 64 hex digits."""
    about = (task.run, task.sum_number, task.round_number, task.purpose, task.exponents)
    digest = hashlib.sha256(repr(about).encode())
    digest.update(task.model.data)
    return digest.hexdigest()
