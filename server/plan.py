"""What a study would do, before anything runs: digest, rounds, sizes and privacy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from common.accounting import noise_multiplier_for
from common.errors import ConfigError
from common.manifest import default_threshold
from common.models.build import build_network
from common.plan import MOST_ROUNDS, SITE_SIZES, PrivacyPlan, plan_privacy
from common.study import Classification, NoPrivacy, Study
from common.traffic import traffic_of

MOST_ROWS = 20  # of a table: each takes a second


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
    if study.statistics is not None:
        yield "statistics: one exact sum over all sites' images before the first round"
    length = (
        f"{training.local_steps} steps"
        if training.local_steps
        else f"{training.local_epochs} epoch(s)"
    )
    if not study.num_rounds:
        yield "rounds: none; nothing is trained and no model is scored"
        return
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
    for plan in _plans(study, SITE_SIZES):
        rounds = sorted(
            {1, *range(0, plan.num_rounds, max(1, plan.num_rounds // 5)), plan.num_rounds}
        )
        spent = (f"{k}: {plan.epsilon_after(k):.3f}" for k in rounds if k)
        yield f"a site of {plan.num_public:>6} {plan.terms.unit}s: {_mechanism(plan)}"
        yield f"  epsilon after round {', '.join(spent)}"


def print_costs(study: Study, sizes: Sequence[int]) -> None:
    """Epsilon after every round, or twenty of them, a column for each size of a site.

    Raises:
      ConfigError: The study has no differential privacy, or its epsilon cannot be reached.
    """
    plans = _private_plans(study, sizes)
    terms = plans[0].terms
    whose = f"one {terms.unit} in or out, delta {terms.delta:g}"
    table = Table(title=f"Epsilon of study {study.name}: {whose}", box=box.SIMPLE)
    table.add_column("after round", justify="right")
    for plan in plans:
        table.add_column(f"{plan.num_public:,} {terms.unit}s", justify="right")
    step = -(-study.num_rounds // MOST_ROWS)
    for number in sorted({1, *range(step, study.num_rounds, step), study.num_rounds}):
        table.add_row(str(number), *(f"{plan.epsilon_after(number):.3f}" for plan in plans))
    table.add_section()
    events = [plan.event for plan in plans]
    table.add_row("noise multiplier", *(f"{one.noise_multiplier:.4f}" for one in events))
    table.add_row("sampling probability", *(f"{one.sampling_probability:.4f}" for one in events))
    table.add_row("steps a round", *(str(one.steps) for one in events))
    Console().print(table)


def solved_lines(study: Study, sizes: Sequence[int], budget: float) -> Iterator[str]:
    """What an epsilon buys: the noise for all rounds of a study, or the rounds for its noise.

    Raises:
      ConfigError: The study has no differential privacy, or this epsilon cannot be reached.
    """
    for plan in _private_plans(study, sizes):
        event, unit = plan.event, plan.terms.unit
        rounds = plan.rounds_within(budget)
        yield (
            f"a site of {plan.num_public:>6} {unit}s: epsilon {budget:g} pays for "
            f"{'more than ' if rounds == MOST_ROUNDS else ''}{rounds} rounds with the study's "
            f"noise multiplier {event.noise_multiplier:.4f}"
        )
        needed = _with_epsilon(plan, budget)
        yield (
            f"  and for all {plan.num_rounds} rounds with noise multiplier {needed:.4f} "
            f"([privacy] noise_multiplier, or epsilon = {budget:g})"
        )


def _with_epsilon(plan: PrivacyPlan, epsilon: float) -> float:
    event = plan.event
    try:
        return noise_multiplier_for(
            epsilon,
            plan.terms.delta,
            sampling_probability=event.sampling_probability,
            steps=plan.num_rounds * event.steps,
        )
    except ValueError as error:
        raise ConfigError(f"--budget {epsilon:g}: {error}") from None


def _private_plans(study: Study, sizes: Sequence[int]) -> list[PrivacyPlan]:
    if plans := list(_plans(study, sizes)):
        return plans
    raise ConfigError(
        f'study {study.name}: [privacy] mode is "none", so there is no epsilon to plan; set '
        "epsilon or noise_multiplier, delta and example_clip_norm"
    )


def _plans(study: Study, sizes: Sequence[int]) -> Iterator[PrivacyPlan]:
    for declared in sizes:
        try:
            plan = plan_privacy(study, declared)
        except ValueError as error:
            raise ConfigError(f"study {study.name}, {declared} declared: {error}") from None
        if plan is not None:
            yield plan


def _mechanism(plan: PrivacyPlan) -> str:
    event = plan.event
    return (
        f"noise multiplier {event.noise_multiplier:.3f}, sampling probability "
        f"{event.sampling_probability:.4f}, {event.steps} steps a round"
    )
