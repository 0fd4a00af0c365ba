"""One round at one site: a message in, a message out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client import enrolment
from client.evaluate import evaluate
from client.examples import keep_example
from client.heads import check_heads
from client.keeping import Arrays, contribution_of, recall, remember, variates_of
from client.own_figures import keep_figures
from client.returned import keep_returned
from client.session import Session
from client.site import Site
from client.train import count_steps, learning_rate, train, train_privately
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
from common.tasks import DetectionTask, SegmentationTask
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
    if task.purpose == Purpose.STATISTICS:
        return count(task, session, site)
    if not site.study.num_rounds:
        text = f"the purpose {task.purpose}, and the study asks for nothing but statistics"
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
    run = session.manifest.run
    kept = recall(task, run, site)
    counts = evaluate(task.model, site.data.validation, network=site.network, task=site.task)
    note_figures(task, session, site, "validation", counts)
    # Nobody here holds on to the update: its memory is free before the masked one is made.
    quantized = quantize(
        local_update(task, site, kept),
        counts,
        sizes=site.network.schema.sizes,
        exponents=task.exponents,
        weight=site.weight,
        weight_cap=session.manifest.weight_cap,
        ring=session.manifest.ring,
    )
    if site.study.training.keeps_state:  # on disk before the update can leave
        remember(task, run, site, kept, contribution_of(quantized, task, site))
    return session.mask(quantized, site.statement(run, task.sum_number))


def note_figures(
    task: RoundTask, session: Session, site: Site, split: str, counts: NDArray[np.int64]
) -> None:
    """Keep what the model does on this site's own images, here alone."""
    model_round = task.round_number - (task.purpose == Purpose.TRAIN)
    figures = site.task.figures(counts)
    keep_figures(site.state_dir, site.study, session.manifest.run, split, model_round, figures)


def local_update(task: RoundTask, site: Site, kept: Arrays) -> LocalUpdate:
    """Train as the approved study says; the message only tells which round it is."""
    training = site.study.training
    rate = learning_rate(training, task.round_number, site.study.num_rounds)
    if not training.control_variates:
        return _trained(task, site, rate)
    variates, schema = variates_of(task, site, kept), site.network.schema
    update = _trained(task, site, rate, variates.correction)
    schema.control(update.values)[:] = variates.change(
        update.values[: schema.num_own], count_steps(site.data.train, training), rate
    )
    return update


def _trained(
    task: RoundTask, site: Site, rate: float, correction: NDArray[np.float32] | None = None
) -> LocalUpdate:
    if site.plan is None:
        return train(
            task.model,
            site.data.train,
            site.study.training,
            network=site.network,
            task=site.task,
            rate=rate,
            rng=site.rng(task.sum_number),
            correction=correction,
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


def count(task: RoundTask, session: Session, site: Site) -> Upload:
    """Return the masked counts of what this site's images are like; no model is looked at.

    Raises:
      RemoteProtocolError: R4. The study asks for none.
    """
    if site.study.statistics is None:
        text = "statistics of the images, which the study does not ask for"
        raise RemoteProtocolError(text, rule="R4")
    site.charge(session.manifest.run, task.sum_number)
    counted = only_counts(site.counted(), site.weight, len(task.exponents))
    return session.mask(counted, site.statement(session.manifest.run, task.sum_number))


def score(task: RoundTask, session: Session, site: Site) -> Upload:
    """Return the masked counts of a model on one split; nothing is trained, no weights travel."""
    if site.plan is None:
        site.charge(session.manifest.run, task.sum_number)
    recall(task, session.manifest.run, site)
    samples = site.data.test if task.purpose == Purpose.TEST else site.data.validation
    counts = evaluate(task.model, samples, network=site.network, task=site.task)
    split = "test" if task.purpose == Purpose.TEST else "validation"
    note_figures(task, session, site, split, counts)
    if task.purpose == Purpose.TEST:
        keep_returned(site.network, site.state_dir)
    if task.purpose == Purpose.TEST and isinstance(site.task, SegmentationTask | DetectionTask):
        keep_example(task.model, samples, site.state_dir, network=site.network, task=site.task)
    counted = only_counts(counts, site.weight, len(task.exponents))
    return session.mask(counted, site.statement(session.manifest.run, task.sum_number))
