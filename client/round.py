"""One round at one site: a message in, a message out."""

from __future__ import annotations

from client.evaluate import evaluate
from client.examples import keep_example
from client.session import Session
from client.site import Site
from client.train import learning_rate, train, train_privately
from common.errors import RemoteProtocolError
from common.manifest import Manifest, check_manifest, plan_epoch
from common.messages import Invitation, Message, Present, Purpose, RoundTask, Upload
from common.quantize import only_counts, quantize
from common.tasks import SegmentationTask
from common.update import LocalUpdate


def answer(message: Message, site: Site) -> Message:
    """Answer one message of the coordinator.

    Raises:
      FederationError: The site does not answer; the reason stays at the site.
    """
    if isinstance(message, Invitation):
        return join(message, site)
    if not isinstance(message, RoundTask):
        raise RemoteProtocolError(f"a site does not take {type(message).__name__}")
    first = 1 if message.purpose == Purpose.TRAIN else 0
    if not first <= message.round_number <= site.study.num_rounds:
        raise RemoteProtocolError(f"round {message.round_number} is not one of the study's")
    session = Session.current(site.journal)
    if answered := session.accept(message):
        return answered
    if message.purpose == Purpose.TRAIN:
        return contribute(message, session, site)
    return score(message, session, site)


def join(invitation: Invitation, site: Site) -> Present:
    """Check the manifest against this site's own study and open a session."""
    manifest = Manifest.parse(invitation.manifest)
    expected = plan_epoch(
        site.study,
        site.network.schema,
        site.task,
        first_model=site.first_model,
        epoch=manifest.epoch,
        nonce=manifest.nonce,
    )
    check_manifest(manifest, expected)
    session = Session.begin(manifest, site.journal)
    return Present(run=session.run, site=site.name)


def contribute(task: RoundTask, session: Session, site: Site) -> Upload:
    """Score the incoming model, train it on local images and return the masked update."""
    if site.plan is not None:
        # Debit before the data is touched: a crash may waste budget, never overspend it.
        site.ledger.debit(
            session.run, task.sum_number, site.plan.event, num_rounds=site.plan.num_rounds
        )
    counts = evaluate(task.model, site.data.validation, network=site.network, task=site.task)
    update = local_update(task, site)
    quantized = quantize(
        update,
        counts,
        sizes=site.network.schema.sizes,
        exponents=task.exponents,
        weight=site.weight,
        weight_cap=session.manifest.weight_cap,
        ring=session.manifest.ring,
    )
    return session.mask(quantized, site.statement(session.run))


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
    samples = site.data.test if task.purpose == Purpose.TEST else site.data.validation
    counts = evaluate(task.model, samples, network=site.network, task=site.task)
    if task.purpose == Purpose.TEST and isinstance(site.task, SegmentationTask):
        keep_example(task.model, samples, site.state_dir, network=site.network, task=site.task)
    counted = only_counts(counts, site.weight, len(task.exponents))
    return session.mask(counted, site.statement(session.run))
