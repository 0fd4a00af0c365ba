"""What a study asks of a hospital, in plain words, for the person who approves it.

The study may have come from anybody: every line is printed as one line, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from client.approvals import Approval, Approvals
from client.config import SiteConfig
from client.finding import one_line
from client.policy import broken_rules
from common.manifest import default_threshold, most_colluders
from common.plan import plan_privacy
from common.study import DifferentialPrivacy, NoPrivacy, Study

COORDINATOR = ""  # no site has that name
GROUP = 4  # digits that are read aloud at a time


def describe(study: Study, config: SiteConfig) -> Iterator[str]:
    """The study's demands, and what this site's policy says to them."""
    earlier = Approvals(config.state_dir).earlier()
    yield from map(one_line, _lines(study, config, earlier))


def _lines(study: Study, config: SiteConfig, earlier: Iterable[Approval]) -> Iterator[str]:
    yield f"study {study.name}, digest {study.digest()}"
    yield f"task: {study.task.kind}, model {study.model.name}"
    yield f"classes: {', '.join(map(repr, study.task.classes))}"
    if study.table is not None:
        columns = ", ".join(repr(column.name) for column in study.table.columns)
        yield f"data: reads the columns {columns} of every patient's record; they stay here"
    yield from _statistics(study)
    yield from _keys(study, config.name, earlier)
    yield from _sums(study)
    if study.num_rounds:
        yield from _training(study)
        yield from _between_rounds(study)
    else:
        yield "training: none; this study asks for counts alone"
    yield from _leaving(study, config.data.declared_patients)
    yield from _privacy(study, config.data.declared_patients)
    broken = list(broken_rules(config.policy, study, config.data.declared_patients))
    yield from (f"NOT PERMITTED by [policy]: {rule}" for rule in broken)
    if not broken:
        yield "[policy]: permits it"


def _statistics(study: Study) -> Iterator[str]:
    if study.statistics is None:
        return
    what = "images and patients by split, images by class"
    if study.task.kind != "classification":
        what += f", {'boxes' if study.task.kind == 'detection' else 'pixels'} by class"
    if study.input.size:
        what += ", grey values, sides and spacing"
    if study.table is not None:
        what += ", empty cells of each column"
    yield (
        f"leaving: once, before the first round, counts of what this site's images are like "
        f"({what}), masked and summed like the updates; the sum is exact, WITHOUT noise, and all "
        "other sites together can compute this site's from it"
    )


def _keys(study: Study, own: str, earlier: Iterable[Approval]) -> Iterator[str]:
    """Who takes part, with what is compared by telephone before anybody approves."""
    yield f"members: {', '.join(study.site_names) or 'none named'}"
    keys = _keys_of(study)
    if keys:
        yield (
            "keys: compare every one of these by telephone with its owner, who reads what "
            "fl-certs show prints; whoever holds another key can take that place"
        )
    known = _known_keys(earlier)
    for name, key in keys.items():
        whose = f"key of {name}" if name != COORDINATOR else "key of the coordinator"
        yield f"{whose}{' (this site)' if name == own else ''}: {_grouped(key)}"
        before, approval = known.get(name, (key, None))
        if approval is not None and before != key:
            yield (
                f"{whose}: CHANGED since study {approval.study.name} was approved on "
                f"{approval.time[:10]}, where it was {_grouped(before)}; ask its owner why"
            )


def _keys_of(study: Study) -> dict[str, str]:
    coordinator = {COORDINATOR: study.coordinator.key} if study.coordinator else {}
    return coordinator | {one.name: one.key for one in study.members if one.key is not None}


def _known_keys(earlier: Iterable[Approval]) -> dict[str, tuple[str, Approval]]:
    """The key that was approved last under each name."""
    known: dict[str, tuple[str, Approval]] = {}
    for approval in earlier:  # the newest first
        for name, key in _keys_of(approval.study).items():
            known.setdefault(name, (key, approval))
    return known


def _grouped(fingerprint: str) -> str:
    return " ".join(fingerprint[k : k + GROUP] for k in range(0, len(fingerprint), GROUP))


def _sums(study: Study) -> Iterator[str]:
    if study.members:
        num = len(study.members)
        yield (
            f"sums: over at least {study.cohort.min_sites} sites; {default_threshold(num)} of "
            f"{num} must help to unmask one; safe while at most "
            f"{most_colluders(num, study.cohort.min_sites)} sites collude with the coordinator"
        )
    yield (
        f"deadlines: the coordinator waits up to {study.deadlines.upload_s:g} s for an update, "
        f"{study.deadlines.keys_s:g} s for keys and {study.deadlines.unmask_s:g} s for help to "
        "unmask; a sum goes on without a site that is later"
    )


def _training(study: Study) -> Iterator[str]:
    training = study.training
    length = (
        f"{training.local_steps} steps"
        if training.local_steps is not None
        else f"{training.local_epochs} passes over its images"
    )
    yield (
        f"training: up to {study.num_rounds} rounds on this site's own machine, {length} a round "
        f"in batches of {training.batch_size}; images and labels never leave it"
    )


def _between_rounds(study: Study) -> Iterator[str]:
    if study.training.control_variates:
        yield (
            "leaving: this site's mean gradient of a round, masked and summed like the updates "
            "(SCAFFOLD)"
        )
    if study.training.local_normalisation:
        yield "staying: layers that normalise are trained here for this site alone (FedBN)"


def _leaving(study: Study, declared: int | None) -> Iterator[str]:
    if study.num_rounds:
        yield from _leaving_in_rounds()
    yield (
        f"leaving: the declared number of patients ({declared or 'not set'}); it is this site's "
        "weight in the mean, and becomes known"
    )


def _leaving_in_rounds() -> Iterator[str]:
    yield (
        "leaving: masked updates, of which the coordinator learns the sum alone, and signed "
        "statements about privacy"
    )
    yield (
        "leaving: counts of right and wrong answers on this site's validation and test images, "
        "masked and summed like the updates; the sum is exact, WITHOUT noise: differential "
        "privacy covers the patients that are trained on, not these"
    )


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
    if terms.unit == "image":
        yield "privacy: of ONE IMAGE: a patient with several is protected less"
    yield (
        f"privacy: one {terms.unit} moves a step by at most {terms.example_clip_norm:g} (clip "
        f"norm), with at most {terms.max_images_per_patient} image(s) or patches in a step"
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
