"""One round at one site: a message in, a message out."""

from __future__ import annotations

from client import enrolment
from client.evaluate import evaluate
from client.examples import keep_example
from client.heads import check_heads
from client.session import Session
from client.site import Site
from client.train import learning_rate, train, train_privately
from client.unmasking import unmask, vote
from common.audit import MAX_VALUE_CHARS
from common.errors import DataError, FederationError, PolicyError, RemoteProtocolError
from common.facts import facts_of
from common.manifest import Manifest, check_manifest, check_members, plan_epoch
from common.memory import give_back
from common.messages import (
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
)
from common.quantize import only_counts, quantize
from common.tasks import SegmentationTask
from common.update import LocalUpdate

COORDINATOR = "coordinator"  # the only peer a site ever hears


def answer(message: Message, site: Site) -> Message:
    """Answer one message of the coordinator; a refused one is kept as evidence.

    Raises:
      FederationError: The site does not answer; the reason stays at the site.
    """
    about = {"study": site.study.name, "peer": COORDINATOR}
    site.audit.append("received", **about, **facts_of(message))
    try:
        reply = _answer(message, site)
    except FederationError as error:
        reason = f"{type(error).__name__}: {error}"[:MAX_VALUE_CHARS]
        site.audit.append("refused", **about, rule=error.rule, reason=reason)
        if isinstance(error, RemoteProtocolError):
            site.evidence.keep(message, error, now=site.now())
        raise
    site.audit.append("sent", **about, **facts_of(reply))
    return reply


def _answer(message: Message, site: Site) -> Message:
    if isinstance(message, Invitation):
        return answer_invitation(message, site)
    session = Session(site.journal, site.party())
    match message:
        case Roster():
            return enrolment.agree(session, message)
        case RoundTask():
            return take_part(message, session, site)
        case Survivors():
            return vote(session, message)
        case Unmask():
            return give_shares(message, session, site)
    raise RemoteProtocolError(f"a site does not take {type(message).__name__}", rule="R7")


def answer_invitation(invitation: Invitation, site: Site) -> SiteKeys:
    """Hold the manifest against this site's own study and members, and send fresh keys."""
    party = site.party()

    def approve(manifest: Manifest) -> None:
        if site.ledger.events_of(site.charged(manifest.run)) and not site.journal.has_seen_run(
            manifest.run
        ):
            raise DataError(
                "the ledger knows this run and the journal does not: the journal is not this "
                "site's own; this site must leave the run",
                rule="R6",
            )
        check_members(
            manifest,
            site=site.name,
            approved=party.trust.members,
            min_sites=max(site.study.cohort.min_sites, site.policy.min_sites),
        )
        check_books(manifest, site)
        runs = site.journal.num_runs()
        if runs >= site.policy.max_runs and not site.journal.has_seen_run(manifest.run):
            raise PolicyError(
                f"run {runs + 1} of study {site.study.name}, max_runs is {site.policy.max_runs}; "
                "the site's owner decides on [policy]"
            )
        expected = plan_epoch(
            site.study, site.network.schema, site.task, manifest, first_model=site.first_model
        )
        check_manifest(manifest, expected, now=int(party.now.timestamp()))
        if manifest.threshold < site.policy.min_threshold:
            raise PolicyError(
                f"{manifest.threshold} sites can unmask a sum, min_threshold is "
                f"{site.policy.min_threshold}; the site's owner decides on [policy]"
            )

    return enrolment.join(invitation, site.journal, party, approve)


def check_books(manifest: Manifest, site: Site) -> None:
    """Refuse to go on where this site's books no longer hold what it once stated about them.

    Raises:
      DataError: R6. Lines were cut off, or an older copy was put back.
    """
    stated = next(member for member in manifest.members if member.name == site.name)
    which = "that this site stated before"
    check_heads(site.audit.holds, stated.audit, site.ledgers_hold, stated.ledger, which)


def take_part(task: RoundTask, session: Session, site: Site) -> Upload:
    """Answer a task: the stored upload if it was answered before, else a new one."""
    if stored := session.accept(task):
        return stored
    first = 1 if task.purpose == Purpose.TRAIN else 0
    if not first <= task.round_number <= site.study.num_rounds:
        text = f"round {task.round_number} is not one of the study's"
        raise RemoteProtocolError(text, rule="R4")
    if task.purpose == Purpose.TRAIN:
        return contribute(task, session, site)
    return score(task, session, site)


def give_shares(request: Unmask, session: Session, site: Site) -> Shares:
    """Help to unmask a sum; a bad share of another site is named and kept as evidence."""
    shares = unmask(session, request)
    if shares.complaints:
        named = ", ".join(session.manifest.names[k] for k in shares.complaints)
        error = RemoteProtocolError(f"the sealed shares of {named} are bad", rule="R13")
        site.evidence.keep(request, error, now=site.now())
    return shares


def contribute(task: RoundTask, session: Session, site: Site) -> Upload:
    """Score the incoming model, train it on local images and return the masked update."""
    # Debit before the data is touched: a crash may waste budget, never overspend it.
    site.charge(session.manifest.run, task.sum_number)
    give_back()  # what fetching the model took: training needs it
    counts = evaluate(task.model, site.data.validation, network=site.network, task=site.task)
    # Nobody here holds on to the update: its memory is free before the masked one is made.
    quantized = quantize(
        local_update(task, site),
        counts,
        sizes=site.network.schema.sizes,
        exponents=task.exponents,
        weight=site.weight,
        weight_cap=session.manifest.weight_cap,
        ring=session.manifest.ring,
    )
    return session.mask(quantized, site.statement(session.manifest.run, task.sum_number))


def local_update(task: RoundTask, site: Site) -> LocalUpdate:
    """Train as the approved study says; the message only tells which round it is."""
    rate = learning_rate(site.study.training, task.round_number, site.study.num_rounds)
    if site.plan is None:
        return train(
            task.model,
            site.data.train,
            site.study.training,
            network=site.network,
            task=site.task,
            rate=rate,
            rng=site.rng(task.sum_number),
        )
    return train_privately(
        task.model,
        site.data.train,
        site.study.training,
        site.plan,
        network=site.network,
        task=site.task,
        rate=rate,
        secrets=site.secrets(task.sum_number),
    )


def score(task: RoundTask, session: Session, site: Site) -> Upload:
    """Return the masked counts of a model on one split; nothing is trained, no weights travel."""
    if site.plan is None:
        site.charge(session.manifest.run, task.sum_number)
    samples = site.data.test if task.purpose == Purpose.TEST else site.data.validation
    counts = evaluate(task.model, samples, network=site.network, task=site.task)
    if task.purpose == Purpose.TEST and isinstance(site.task, SegmentationTask):
        keep_example(task.model, samples, site.state_dir, network=site.network, task=site.task)
    counted = only_counts(counts, site.weight, len(task.exponents))
    return session.mask(counted, site.statement(session.manifest.run, task.sum_number))
