"""What a study asks of a hospital, in plain words, for the person who approves it."""

from __future__ import annotations

from collections.abc import Iterator

from client.config import SiteConfig
from client.policy import broken_rules
from common.manifest import default_threshold, most_colluders
from common.plan import plan_privacy
from common.study import DifferentialPrivacy, NoPrivacy, Study


def describe(study: Study, config: SiteConfig) -> Iterator[str]:
    """The study's demands, and what this site's policy says to them."""
    yield f"study {study.name}, digest {study.digest()}"
    yield f"task: {study.task.kind} ({', '.join(study.task.classes)}), model {study.model.name}"
    yield f"members: {', '.join(study.site_names) or 'none named'}"
    if study.members:
        num = len(study.members)
        yield (
            f"sums: over at least {study.cohort.min_sites} sites; {default_threshold(num)} of "
            f"{num} must help to unmask one; safe while at most "
            f"{most_colluders(num, study.cohort.min_sites)} sites collude with the coordinator"
        )
    yield (
        f"training: up to {study.num_rounds} rounds on this site's own machine; images and labels "
        "never leave it. What leaves: masked updates, of which the coordinator learns the sum "
        "alone, the declared number of patients, and privacy statements"
    )
    yield from _privacy(study, config.data.declared_patients)
    broken = list(broken_rules(config.policy, study, config.data.declared_patients))
    yield from (f"NOT PERMITTED by [policy]: {rule}" for rule in broken)
    if not broken:
        yield "[policy]: permits it"


def _privacy(study: Study, declared: int | None) -> Iterator[str]:
    terms = study.privacy
    if isinstance(terms, NoPrivacy):
        yield (
            "privacy: NO differential privacy: what one patient adds to the model is not bounded "
            "by anything but the number of patients"
        )
        return
    yield (
        f"privacy: differential privacy for every {terms.unit}, delta {terms.delta:g}, "
        f"{_epsilon(study, terms, declared)}"
    )
    if terms.randomness == "seeded":
        yield "privacy: SEEDED noise: whoever knows the seed can subtract it; for tests only"


def _epsilon(study: Study, terms: DifferentialPrivacy, declared: int | None) -> str:
    if declared is None:
        return (
            f"epsilon {terms.epsilon or 'unknown'}; set data.declared_patients to see this site's"
        )
    plan = plan_privacy(study, declared)
    spent = plan.epsilon_after(study.num_rounds) if plan else None
    return f"epsilon {spent:.3g} after all rounds with {declared} declared patients"
