"""The books of one site in a run, written by the classes that a run writes them with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from client.hospital import CURRENT, STUDIES
from client.journal import EpochMemory, Journal, SumMemory
from client.ledger import Ledger, charge_key
from client.site import AUDIT
from common.audit import AuditLog
from common.identity import Identity
from common.manifest import KeyedMember, Manifest
from common.plan import plan_privacy
from common.secagg.phases import Phase
from common.statement import Statement
from common.study import Study

RUN = "12" * 16
HEX = "ab" * 32


def manifest_of(study: Study, run: str = RUN, epoch: int = 1) -> Manifest:
    return Manifest(
        run=run,
        epoch=epoch,
        members=tuple(KeyedMember(name=m.name, key=m.key or HEX) for m in study.members),
        coordinator=HEX,
        valid_from=0,
        valid_until=1 << 32,
        nonce="cd" * 16,
        study=study.digest(),
        threshold=2,
        num_sums=9,
        num_params=8,
        num_tail=2,
        schema_digest=HEX,
        first_model=HEX,
        exponents=(0, 0),
        ring_bits=32,
        weight_cap=100,
        code=HEX,
    )


@dataclass
class Books:
    """Of one site and one private study."""

    home: Path
    study: Study
    identity: Identity
    data_name: str
    declared: int

    def __post_init__(self) -> None:
        self.audit = AuditLog(self.home / AUDIT, lambda: datetime.now(UTC))
        self.ledger_file = self.home / "ledgers" / f"{self.data_name}.jsonl"

    @property
    def folder(self) -> Path:
        return self.home / STUDIES / self.study.digest()

    def invited(self, run: str = RUN, epoch: int = 1) -> None:
        """A run begins, or a new epoch of it."""
        manifest = manifest_of(self.study, run, epoch)
        memory = EpochMemory(manifest=manifest.canonical(), phase=Phase.READY, dh=b"a secret")
        journal = Journal(self.folder / "journal.sqlite")
        journal.begin_epoch(memory, manifest.digest(), run, is_new_run=epoch == 1)
        journal.close()
        (self.home / CURRENT).write_text(self.study.digest())
        self.audit.append("received", type="Invitation", run=run)

    def contribute(self, sum_number: int, run: str = RUN, *, unmasked: bool = True) -> Statement:
        """One sum is charged, stated, uploaded and, where that came about, unmasked."""
        plan = plan_privacy(self.study, self.declared)
        assert plan is not None
        ledger = Ledger(self.ledger_file, self.data_name, None)
        ledger.debit(
            charge_key(run, self.study.digest()), sum_number, plan.event, num_rounds=plan.num_rounds
        )
        stated = Statement(
            run=run,
            study=self.study.digest(),
            site=self.identity.name,
            sum_number=sum_number,
            epsilon=1.0,
            delta=plan.terms.delta,
            unit="patient",
            noise_multiplier=plan.event.noise_multiplier,
            sampling_probability=plan.event.sampling_probability,
            steps=plan.event.steps,
            accountant="prv",
            randomness="os",
            audit=self.audit.head(),
            ledger=ledger.head(),
        ).signed(self.identity)
        self._keep(stated, unmasked=unmasked)
        facts = {"type": "Upload", "bytes": 812, "digest": HEX, "run": run}
        self.audit.append("sent", peer="coordinator", **facts, sum_number=sum_number)
        return stated

    def _keep(self, stated: Statement, *, unmasked: bool) -> None:
        journal = Journal(self.folder / "journal.sqlite")
        epoch = journal.epoch()
        assert epoch is not None
        last = SumMemory(
            sum_number=stated.sum_number,
            task=b"t",
            model_digest=HEX,
            purpose="train",
            round_number=1,
            header=b"h",
            sealed=(),
            share_commitments=(),
            statement=stated.model_dump_json(),
            own_share=b"" if unmasked else b"a share",
        )
        journal.record_upload(epoch, last, np.zeros(4, np.uint8))
        journal.close()
