"""The site's half of one epoch and of its sums: what may come when, and what leaves.

Every method takes a message and returns the answer, which was on disk before it is returned. The
order of messages is the table in common/secagg/phases.py. docs/life-of-a-round.md tells the story;
client/enrolment.py has its beginning, client/unmasking.py its end.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from client.journal import EpochMemory, Journal, SumMemory
from common.errors import DataError, LocalProtocolError, RemoteProtocolError
from common.identity import read_certified
from common.manifest import Manifest, check_window
from common.messages import (
    Encapsulated,
    FromCoordinator,
    Purpose,
    RoundTask,
    Upload,
    digest_of_model,
)
from common.quantize import EXPONENT_RANGE
from common.roster import Credentials, check_encapsulated, check_still_certified
from common.secagg.header import Header
from common.secagg.keys import advance, decapsulate, first_chain_key
from common.secagg.masking import THREADS
from common.secagg.protect import Place, protect
from common.secagg.task import digest_of_task
from common.signing import check_signed
from common.update import QuantizedUpdate


@dataclass(frozen=True)
class Party(Credentials):
    """This site at a moment: who it is, whom it believes, and what time it is."""

    now: datetime


def releases(purpose: Purpose | str, round_number: int) -> dict[str, int]:
    """What the sum of a task tells, and of which round's model: each is told once in a run.

    A training task for round r scores the model of round r - 1 on validation besides. The model
    that is returned is scored on test once in a run, and images are counted once.
    """
    match Purpose(purpose):
        case Purpose.STATISTICS:
            return {"statistics": 0}
        case Purpose.TRAIN:
            return {"update": round_number, "validation": round_number - 1}
        case Purpose.VALIDATE:
            return {"validation": round_number}
        case Purpose.TEST:
            return {"test": 0}


def subject_of(task: RoundTask, manifest: Manifest) -> tuple[str, str]:
    """What a task's sum is of, in a word and as a digest: a site gives each sum of one once.

    Statistics do not depend on the model that a task brings.
    """
    if task.purpose == Purpose.STATISTICS:
        return "study", manifest.study
    return "model", task.model_digest


class Session:
    """One site in the epoch that its journal holds."""

    def __init__(self, journal: Journal, party: Party) -> None:
        """Open the session that the last invitation began.

        Raises:
          RemoteProtocolError: This site was not invited yet; or its journal was put back.
        """
        journal.check()
        epoch = journal.epoch()
        if epoch is None:
            raise RemoteProtocolError("a message arrived before an invitation", rule="R7")
        self.manifest = Manifest.parse(epoch.manifest)
        self.index = self.manifest.names.index(party.identity.name)
        self.epoch = epoch
        self.journal = journal
        self.party = party
        self._accepted: tuple[RoundTask, EpochMemory] | None = None

    def accept(self, task: RoundTask) -> Upload | None:
        """Check a task against the epoch and what was already answered.

        Returns:
          The stored upload if exactly this task was answered before, else None: then train, and
          call ``mask``.

        Raises:
          RemoteProtocolError: R2, R3, R4, R5 or R7.
        """
        self.check_sender(task)
        if task.run != self.epoch.run.hex():
            raise RemoteProtocolError("a task of another run arrived", rule="R7")
        self._check_numbers(task)
        last = self.journal.sum()
        if last and (last.sum_number, last.task) == (task.sum_number, digest_of_task(task)):
            return self._stored(last)
        self.epoch.phase.after(task)
        self._check_is_new(task, last)
        now = self.party.now
        check_window(self.manifest, now=int(now.timestamp()))
        certificates = self.epoch.certificates
        check_still_certified(certificates, task.revoked, self.party.trust, now)
        self._accepted = (task, self._with_all_chains(task))
        return None

    def mask(self, update: QuantizedUpdate, statement: str = "") -> Upload:
        """Turn the answer to the accepted task into what may leave the site, and keep it.

        Raises:
          LocalProtocolError: No task was accepted, or it was already answered.
        """
        accepted, self._accepted = self._accepted, None
        if accepted is None:
            raise LocalProtocolError("there is no accepted task to answer")
        task, epoch = accepted
        number, own, about = task.sum_number, self.index, digest_of_task(task)
        chains = tuple(
            advance(key, at=epoch.chain_step, to=number) if key else b"" for key in epoch.chains
        )
        place = Place(epoch.run, number, about, own, self.manifest.threshold)
        protected = protect(
            update,
            place,
            chains,
            self.party.identity,
            statement=statement,
            bits=self.manifest.ring_bits,
            threads=THREADS,
        )
        said = SumMemory(
            sum_number=number,
            task=about,
            model_digest=subject_of(task, self.manifest)[1],
            purpose=task.purpose.value,
            round_number=task.round_number,
            header=protected.header.encode(),
            sealed=protected.sealed,
            share_commitments=protected.share_commitments,
            statement=statement,
            own_share=protected.own_share,
        )
        after = epoch.model_copy(
            update={
                "phase": self.epoch.phase.after(task),
                "chains": chains,
                "chain_step": number,
                "request": "",
                "reply": "",
            }
        )
        self.journal.record_upload(after, said, protected.body)
        self.epoch = after
        return self._upload(said, protected.body)

    def _upload(self, said: SumMemory, body: NDArray[np.uint8]) -> Upload:
        return Upload(
            self.epoch.run.hex(),
            said.sum_number,
            said.header,
            said.sealed,
            said.share_commitments,
            body,
            said.statement,
        )

    def _stored(self, said: SumMemory) -> Upload:
        body = self.journal.body(said.sum_number)
        if hashlib.sha256(body.data).digest() != Header.decode(said.header).body:
            raise DataError("the stored upload is damaged; this site must leave the run", rule="R6")
        return self._upload(said, body)

    def _check_numbers(self, task: RoundTask) -> None:
        manifest, wrong = self.manifest, ""
        if not 0 <= task.sum_number < manifest.num_sums:
            wrong = f"sum {task.sum_number}: the manifest has sums 0 to {manifest.num_sums - 1}"
        elif not 0 <= task.round_number <= manifest.num_sums:
            wrong = f"round {task.round_number} is none of a run of {manifest.num_sums} sums"
        elif task.model.shape != (manifest.num_params,):
            wrong = (
                f"the model has {task.model.size} parameters, the manifest {manifest.num_params}"
            )
        elif len(task.exponents) != len(manifest.exponents):
            wrong = f"{len(task.exponents)} exponents, the manifest has {len(manifest.exponents)}"
        elif not all(EXPONENT_RANGE[0] <= e <= EXPONENT_RANGE[1] for e in task.exponents):
            wrong = f"an exponent is outside {EXPONENT_RANGE}"
        elif digest_of_model(task.model) != task.model_digest:
            wrong = "the model is not the one of the task"
        elif not np.isfinite(task.model).all():
            wrong = "the model holds NaN or infinity"
        if wrong:
            raise RemoteProtocolError(wrong, rule="R4")

    def _check_is_new(self, task: RoundTask, last: SumMemory | None) -> None:
        number, after = task.sum_number, -1 if last is None else last.sum_number
        if number == after:
            text = f"sum {number} was answered for another task; nothing is masked twice"
            raise RemoteProtocolError(text, rule="R5")
        if number < after:
            raise RemoteProtocolError(f"sum {number}: sum {after} was answered since", rule="R4")
        kind, subject = subject_of(task, self.manifest)
        for what, of_round in releases(task.purpose, task.round_number).items():
            if self.journal.has_released(subject, what):
                raise RemoteProtocolError(
                    f"this site has helped to sum the {what} of this {kind} before; another sum "
                    "over other sites would show the difference",
                    rule="R4",
                )
            done = self.journal.last_round(self.manifest.run, what)
            if done is not None and of_round <= done:
                raise RemoteProtocolError(
                    f"the {what} of round {of_round}: this run has it for round {done} already",
                    rule="R4",
                )

    def _with_all_chains(self, task: RoundTask) -> EpochMemory:
        """The epoch with the pair keys that wait for a ciphertext of the first task."""
        epoch = self.epoch
        waiting = [site for site, secret in enumerate(epoch.exchanged) if secret]
        if not waiting:
            return epoch
        if len(task.ciphertexts) != len(waiting) or len(task.ciphertext_signatures) != len(waiting):
            raise RemoteProtocolError("the first task does not bring every ciphertext", rule="R3")
        chains = list(epoch.chains)
        relayed = zip(waiting, task.ciphertexts, task.ciphertext_signatures, strict=True)
        for site, ciphertext, signature in relayed:
            sender = read_certified(epoch.certificates[1 + site])
            message = Encapsulated(epoch.run.hex(), site, self.index, ciphertext, signature)
            check_encapsulated(message, sender)
            secret = decapsulate(epoch.kem, ciphertext)
            chains[site] = first_chain_key(
                epoch.run, epoch.exchanged[site], secret, self.index, site
            )
        update = {"exchanged": (), "kem": b"", "chains": tuple(chains)}
        return epoch.model_copy(update=update)

    def check_sender(self, message: FromCoordinator) -> None:
        """Refuse what the coordinator of this epoch did not sign: R7."""
        check_signed(message, self.coordinator_key, sender="the coordinator", rule="R7")

    # A session lives for one message: what it read of the certificates stays true. The members' are
    # there from the roster on, and nobody asks for their keys in the session that takes it.
    @functools.cached_property
    def coordinator_key(self) -> ec.EllipticCurvePublicKey:
        """The key that signs every message of this epoch."""
        return read_certified(self.epoch.certificates[0]).key

    @functools.cached_property
    def member_keys(self) -> list[ec.EllipticCurvePublicKey]:
        """The members' keys by site."""
        return [read_certified(one).key for one in self.epoch.certificates[1:]]
