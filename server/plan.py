"""What a study would do, before anything runs: digest, rounds, sizes and privacy."""

from __future__ import annotations

from collections.abc import Iterator

from common.manifest import default_threshold
from common.models.build import build_network
from common.plan import plan_privacy
from common.study import Classification, NoPrivacy, Study
from common.traffic import traffic_of

SITE_SIZES = (100, 300, 1000, 3000, 10_000)  # declared patients


def plan_lines(study: Study) -> Iterator[str]:
    """The plan of a study in plain lines."""
    training = study.training
    schema = build_network(study).schema
    traffic = traffic_of(study, schema)
    yield f"study {study.name}"
    yield f"digest {study.digest()}"
    yield f"privacy: {privacy_sentence(study)}"
    yield from privacy_table(study)
    labels = f"{study.task.labels} " if isinstance(study.task, Classification) else ""
    yield f"task: {labels}{study.task.kind} of {', '.join(study.task.classes)}"
    num_params, num_tensors = schema.num_params, len(schema.names)
    yield f"model: {study.model.name}, {num_params} parameters in {num_tensors} tensors"
    length = (
        f"{training.local_steps} steps"
        if training.local_steps
        else f"{training.local_epochs} epoch(s)"
    )
    yield (
        f"rounds: {study.num_rounds}, each {length} of {training.optimizer} in batches of "
        f"{training.batch_size}"
    )
    if training.early_stopping:
        stopping = training.early_stopping
        yield f"early stopping: {stopping.figure} without gain for {stopping.patience} rounds"
    yield f"members: {', '.join(study.site_names) or 'filled in by the simulation'}"
    if num_sites := len(study.members):
        threshold = default_threshold(num_sites)
        yield (
            f"secure sum: {threshold} of {num_sites} sites recover it, "
            f"{num_sites - threshold} may drop out; with each upload "
            f"{traffic.shares:,} bytes of shares, commitments and signature"
        )
    yield (
        f"each site per round: {traffic.body + traffic.tail:,} bytes up "
        f"({study.aggregation.ring_bits} bits a parameter, {traffic.tail:,} bytes of counts), "
        f"{traffic.model:,} bytes down"
    )


def privacy_sentence(study: Study) -> str:
    """The first thing anybody must know about a study."""
    terms = study.privacy
    if isinstance(terms, NoPrivacy):
        return "no differential privacy: the model and every sum may reveal training images"
    seeded = "SEEDED RANDOMNESS, protects nobody; " if terms.randomness == "seeded" else ""
    asked = f"epsilon {terms.epsilon:g}" if terms.epsilon else f"noise {terms.noise_multiplier:g}"
    return f"{seeded}{asked} at delta {terms.delta:g} for one {terms.unit}'s whole record at a site"


def privacy_table(study: Study) -> Iterator[str]:
    """What the study costs sites of several sizes, round by round."""
    for declared in SITE_SIZES:
        plan = plan_privacy(study, declared)
        if plan is None:
            return
        event = plan.event
        yield (
            f"a site of {declared:>6} {plan.terms.unit}s: noise multiplier "
            f"{event.noise_multiplier:.3f}, sampling probability {event.sampling_probability:.4f}, "
            f"{event.steps} steps a round"
        )
        rounds = sorted(
            {1, *range(0, plan.num_rounds, max(1, plan.num_rounds // 5)), plan.num_rounds}
        )
        spent = (f"{k}: {plan.epsilon_after(k):.3f}" for k in rounds if k)
        yield f"  epsilon after round {', '.join(spent)}"
