"""What this site permits. A study outside it is refused, with both values."""

from __future__ import annotations

from collections.abc import Iterator

from client.config import Data, Policy
from common.errors import ConfigError, PolicyError
from common.plan import plan_privacy
from common.study import DifferentialPrivacy, NoPrivacy, Study

SHORT = 12  # digits of a fingerprint


def check_policy(policy: Policy, study: Study, declared_patients: int | None) -> None:
    """Hold a study against the site's policy.

    Raises:
      PolicyError: With every rule that the study breaks, its value and the site's.
    """
    if broken := list(broken_rules(policy, study, declared_patients)):
        rules = "; ".join(broken)
        raise PolicyError(f"study {study.name}: {rules}; the site's owner decides on [policy]")


def check_unit(data: Data, study: Study) -> None:
    """Refuse a promise about patients where nobody knows which images are of one patient.

    Raises:
      ConfigError: The study's unit is the patient and the data name none.
    """
    terms = study.privacy
    if isinstance(terms, DifferentialPrivacy) and terms.unit == "patient":
        if data.names_patients:
            return
        key = "data.patients" if data.format == "npz" else "data.patient"
        raise ConfigError(
            f"data set {data.name} names no patients and study {study.name} promises privacy to "
            f'patients; set {key}, or let the study say privacy.unit = "image"'
        )


def broken_rules(policy: Policy, study: Study, declared: int | None) -> Iterator[str]:
    """Every rule of the policy that a study breaks, with both values."""
    if study.task.kind not in policy.allowed_tasks:
        yield f"task {study.task.kind} is not in allowed_tasks"
    if policy.max_rounds is not None and study.num_rounds > policy.max_rounds:
        yield f"{study.num_rounds} rounds, max_rounds is {policy.max_rounds}"
    if study.members and len(study.members) < policy.min_sites:
        yield f"{len(study.members)} members, min_sites is {policy.min_sites}"
    if declared is not None and declared < policy.min_patients:
        yield f"{declared} declared patients, min_patients is {policy.min_patients}"
    if study.statistics is not None and not policy.allow_statistics:
        yield "exact counts of what the images are like, allow_statistics is false"
    yield from _other_keys(policy, study)
    if isinstance(study.privacy, NoPrivacy):
        if not policy.allow_no_privacy:
            yield "no differential privacy, allow_no_privacy is false"
        return
    yield from _broken_terms(policy, study, study.privacy, declared)


def _other_keys(policy: Policy, study: Study) -> Iterator[str]:
    """Keys that this site's own file pins, and the study has others."""
    pinned = policy.coordinator_key
    if pinned is not None and (study.coordinator is None or study.coordinator.key != pinned):
        stated = study.coordinator.key[:SHORT] if study.coordinator else "none"
        yield f"the coordinator's key is {stated}, coordinator_key is {pinned[:SHORT]}"
    if not policy.member_keys:
        return
    for member in study.members:
        expected, stated = policy.member_keys.get(member.name), (member.key or "none")
        if expected is None:
            yield f"{member.name} is a member, member_keys does not name it"
        elif stated != expected:
            yield (
                f"the key of {member.name} is {stated[:SHORT]}, member_keys has {expected[:SHORT]}"
            )


def _broken_terms(
    policy: Policy, study: Study, terms: DifferentialPrivacy, declared: int | None
) -> Iterator[str]:
    if terms.randomness == "seeded" and not policy.allow_seeded_randomness:
        yield "seeded randomness, allow_seeded_randomness is false"
    if policy.max_delta is not None and terms.delta > policy.max_delta:
        yield f"delta {terms.delta:g}, max_delta is {policy.max_delta:g}"
    if policy.max_epsilon is None:
        return
    plan = plan_privacy(study, declared) if declared else None
    epsilon = plan.epsilon_after(study.num_rounds) if plan else terms.epsilon
    if epsilon is None:
        yield "data.declared_patients is needed to know the study's epsilon"
    elif epsilon > policy.max_epsilon:
        yield f"epsilon {epsilon:.3g}, max_epsilon is {policy.max_epsilon:g}"
