"""Everything one site brings to a round."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.clipping import check_engine, check_layers
from client.config import Budget, Policy
from client.dataset import SiteData
from client.heads import check_heads
from client.journal import JOURNAL, RELEASED, Journal
from client.ledger import Ledger, any_holds, charge_key
from client.noise import Keystream
from client.session import Party
from client.statistics import Counted
from common.audit import AuditLog
from common.charges import LEDGERS, WITHOUT_PRIVACY
from common.errors import ConfigError, LocalProtocolError
from common.evidence import Evidence
from common.models.build import build_network, digest_of_weights, row_shape
from common.models.flat import FlatNetwork
from common.plan import PrivacyPlan, plan_privacy
from common.roster import Credentials
from common.statement import Statement
from common.study import Study
from common.tasks import Task, task_of

AUDIT = "audit.jsonl"  # in a site's folder


def utc_now() -> datetime:
    """This site's clock."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Source:
    """Where a site has its images; nothing is opened yet but, at most, file names and labels."""

    data_name: str
    num_units: int  # what the site declares: training patients, or images where they are the unit
    budget: Budget | None
    load: Callable[[], SiteData]
    count: Callable[[], Counted]  # for a study that asks what the images are like


@dataclass(frozen=True)
class Site:
    """Private. One hospital: its study, its images, its network."""

    name: str
    study: Study
    weight: int  # declared patients: public, and not the true count
    network: FlatNetwork
    first_model: str  # SHA-256 of the weights every run of this study starts from
    task: Task
    journal: Journal
    ledger: Ledger
    plan: PrivacyPlan | None  # None in a study without privacy
    load: Callable[[], SiteData]
    count: Callable[[], Counted]
    state_dir: Path  # on this site's disk: journal, evidence, its own example
    home: Path  # what all studies of this site have in common: ledgers and the audit log
    credentials: Callable[[], Credentials] | None = None  # None: it trains alone, sends nothing
    policy: Policy = field(default_factory=Policy)
    now: Callable[[], datetime] = utc_now
    first_local: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """Initial weights of the parameters that stay here."""

    def party(self) -> Party:
        """This site as others know it.

        Raises:
          LocalProtocolError: It takes part in no federation.
        """
        if self.credentials is None:
            raise LocalProtocolError(f"{self.name} trains alone: it has no certificate")
        known = self.credentials()  # read anew: a certificate may have been renewed
        return Party(known.identity, known.trust, self.now())

    def charge(self, run: str, sum_number: int) -> None:
        """Charge one training to the data set; on disk when this returns.

        Raises:
          BudgetExhausted: The budget does not cover it; no data may be opened.
        """
        if self.plan is None:  # what a run costs has no bound, however many sums it has
            self.ledger.debit(self.charged(run), 0, WITHOUT_PRIVACY, num_rounds=1, unit="none")
            return
        self.ledger.debit(
            self.charged(run),
            sum_number,
            self.plan.event,
            num_rounds=self.plan.num_rounds,
            unit=self.plan.terms.unit,
            randomness=self.plan.terms.randomness,
        )

    @property
    def evidence(self) -> Evidence:
        """What this site refused."""
        return Evidence(self.state_dir)

    def ledgers_hold(self, head: str) -> bool:
        """Whether any data set's ledger has this head: another study may have used another one."""
        return self.ledger.holds(head) or any_holds(self.home, head)

    @functools.cached_property
    def audit(self) -> AuditLog:
        """What this site received, decided and sent."""
        return AuditLog(self.home / AUDIT, self.now)

    @functools.cached_property
    def data(self) -> SiteData:
        """The site's images; the first access opens them. Training charges first."""
        data = self.load()
        self.ledger.opened(data.contents)
        return data.to(self.network.values.device)

    def counted(self) -> NDArray[np.int64]:
        """Counts of what the site's images are like; it opens them, and whoever asks charges."""
        found = self.count()
        self.ledger.opened(found.contents)
        return found.counts

    def rng(self, sum_number: int) -> torch.Generator:
        """A reproducible stream for one sum: order of images and augmentation without privacy."""
        text = f"{self.study.seed}/{self.index}/{sum_number}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return torch.Generator().manual_seed(seed % 2**63)

    def secrets(self, sum_number: int) -> Keystream:
        """What draws patients and noise: the operating system, unless the study says seeded."""
        if self.plan is not None and self.plan.terms.randomness == "seeded":
            return Keystream.from_seed(self.study.seed, self.index, sum_number)
        return Keystream.from_os()

    def charged(self, run: str) -> str:
        """How the ledger names a run of this site's study."""
        return charge_key(run, self.study.digest())

    def spending(self, run: str) -> dict[str, Any]:
        """What this run has spent so far, and how; empty in a study without privacy."""
        if self.plan is None:
            return {}
        steps = sum(event.steps for event in self.ledger.events_of(self.charged(run)))
        event, terms = self.plan.event, self.plan.terms
        return {
            "epsilon": self.plan.epsilon_of_steps(steps),
            "delta": terms.delta,
            "unit": terms.unit,
            "noise_multiplier": event.noise_multiplier,
            "sampling_probability": event.sampling_probability,
            "steps": steps,
            "accountant": "prv",
            "randomness": terms.randomness,
        }

    def statement(self, run: str, sum_number: int) -> str:
        """The same, signed, as JSON; empty in a study without privacy."""
        spending = self.spending(run)
        if not spending:
            return ""
        stated = Statement(
            **spending,
            run=run,
            study=self.study.digest(),
            site=self.name,
            sum_number=sum_number,
            audit=self.audit.head(),
            ledger=self.ledger.head(),
        )
        return stated.signed(self.party().identity).model_dump_json()

    @property
    def index(self) -> int:
        """The site's place in the study."""
        return self.study.site_names.index(self.name)


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
      ConfigError: A GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device "cuda": torch finds no GPU here; set device to "auto" or "cpu"')
    return torch.device(name)


def open_site(
    name: str,
    study: Study,
    source: Source,
    *,
    state_dir: Path,
    device: torch.device,
    home: Path | None = None,
    credentials: Callable[[], Credentials] | None = None,
    policy: Policy | None = None,
) -> Site:
    """Put a site together; no image is opened.

    Raises:
      ConfigError: The site is not a member of the study, declares more patients than the study's
        weight cap; or the model cannot be trained privately.
      BudgetExhausted: The whole study does not fit the data set's budget.
    """
    if name not in study.site_names:
        raise ConfigError(f"{name} is not a member of study {study.name}")
    weight, cap = source.num_units, study.aggregation.weight_cap
    if weight > cap:
        raise ConfigError(f"{name} declares {weight} patients, aggregation.weight_cap is {cap}")
    torch.set_num_threads(study.torch_threads)
    network, plan = build_network(study, device), plan_privacy(study, weight)
    home = home or state_dir
    site = Site(
        name=name,
        study=study,
        # The true count would tell whether one patient is there: the rounded constant is public.
        weight=plan.num_public if plan else weight,
        network=network,
        first_model=digest_of_weights(network),
        task=task_of(study),
        journal=Journal(state_dir / JOURNAL, home / RELEASED),
        ledger=Ledger(
            home / LEDGERS / f"{source.data_name}.jsonl", source.data_name, source.budget
        ),
        plan=plan,
        load=source.load,
        count=source.count,
        state_dir=state_dir,
        home=home,
        credentials=credentials,
        policy=policy or Policy(),
        first_local=network.local(),
    )
    check_own_books(site)
    if plan is not None:
        check_private_training(site, plan, source.budget)
    else:
        site.ledger.check([WITHOUT_PRIVACY], f"study {study.name}, without differential privacy,")
    return site


def check_own_books(site: Site) -> None:
    """Refuse books that no longer hold what this site stated last in this study.

    Raises:
      DataError: R6. Lines were cut off, or an older copy was put back.
    """
    last = site.journal.sum()
    if last is not None and last.statement:
        stated = Statement.parse(last.statement)
        which = f"of its own statement on sum {stated.sum_number}"
        check_heads(site.audit.holds, stated.audit, site.ledgers_hold, stated.ledger, which)


def check_private_training(site: Site, plan: PrivacyPlan, budget: Budget | None) -> None:
    """Refuse before any data is opened: layers, the clipping engine, the budget."""
    if budget is not None and (budget.unit, plan.terms.unit) == ("patient", "image"):
        raise ConfigError("the budget protects patients, the study only images; see budget.unit")
    check_layers(site.network.module)
    shape = row_shape(site.study)
    targets = site.task.made_up_targets(3).to(site.network.values.device)
    check_engine(plan.terms.engine, site.network, shape, site.task.local_loss(None), targets)
    if site.journal.epoch() is None:  # a run that goes on is checked sum by sum
        site.ledger.check([plan.event] * plan.num_rounds, f"study {site.study.name}")
