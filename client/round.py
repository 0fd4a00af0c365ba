"""One round at one site: a message in, a message out."""

from __future__ import annotations

import hashlib

from client.evaluate import evaluate
from client.session import Session
from client.site import Site
from client.train import train
from common.errors import RemoteProtocolError
from common.manifest import Manifest, check_manifest, plan_epoch
from common.messages import Invitation, Message, Present, Purpose, RoundTask, Upload
from common.models.build import initial_weights
from common.quantize import only_counts, quantize


def answer(message: Message, site: Site) -> Message:
    """Answer one message of the coordinator.

    Raises:
      FederationError: The site does not answer; the reason stays at the site.
    """
    if isinstance(message, Invitation):
        return join(message, site)
    if not isinstance(message, RoundTask):
        raise RemoteProtocolError(f"a site does not take {type(message).__name__}")
    session = Session.current(site.journal)
    if answered := session.accept(message):
        return answered
    if message.purpose == Purpose.TRAIN:
        return contribute(message, session, site)
    return score(message, session, site)


def join(invitation: Invitation, site: Site) -> Present:
    """Check the manifest against this site's own study and open a session."""
    manifest = Manifest.parse(invitation.manifest)
    first_model = hashlib.sha256(initial_weights(site.study).tobytes()).hexdigest()
    expected = plan_epoch(
        site.study,
        site.network.schema,
        site.task,
        first_model=first_model,
        epoch=manifest.epoch,
        nonce=manifest.nonce,
    )
    check_manifest(manifest, expected)
    session = Session.begin(manifest, site.journal)
    return Present(run=session.run, site=site.name)


def contribute(task: RoundTask, session: Session, site: Site) -> Upload:
    """Score the incoming model, train it on local images and return the masked update."""
    counts = evaluate(task.model, site.data.validation, network=site.network, task=site.task)
    update = train(
        task.model,
        site.data.train,
        site.study.training,
        network=site.network,
        task=site.task,
        progress=(task.round_number - 1) / site.study.num_rounds,
        rng=site.randomness(task.sum_number),
    )
    quantized = quantize(
        update,
        counts,
        sizes=site.network.schema.sizes,
        exponents=task.exponents,
        weight=site.weight,
        weight_cap=session.manifest.weight_cap,
        ring=session.manifest.ring,
    )
    return session.mask(quantized)


def score(task: RoundTask, session: Session, site: Site) -> Upload:
    """Return the masked counts of a model on one split; nothing is trained, no weights travel."""
    images = site.data.test if task.purpose == Purpose.TEST else site.data.validation
    counts = evaluate(task.model, images, network=site.network, task=site.task)
    return session.mask(only_counts(counts, site.weight, len(task.exponents)))
