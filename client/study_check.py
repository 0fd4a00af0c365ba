"""Does this site take part in the study: is it approved, permitted, and paid for?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from client.approvals import Approvals
from client.books import charged_in_run_under_way, ledger_file
from client.config import SiteConfig
from client.finding import Finding, fault, ok, warning
from client.ledger import Ledger
from client.policy import broken_rules, check_unit
from common.accounting import Event
from common.charges import WITHOUT_PRIVACY
from common.config import load
from common.errors import BudgetExhausted, ConfigError, FederationError, PolicyError
from common.identity import fingerprint, read_certificate, read_party
from common.plan import PrivacyPlan, plan_privacy
from common.study import NoPrivacy, Study


def planned_study(
    config: SiteConfig, study_file: Path | None
) -> tuple[Study | None, list[Finding]]:
    """The study of a file, else the newest approved one; and what is to be said of it."""
    approvals = Approvals(config.state_dir)
    try:
        study = load(study_file, Study) if study_file else newest_approved(approvals)
    except ConfigError as error:
        return None, [fault(error)]
    if study is None:
        return None, [
            warning("study: none is approved here, so none is checked; give --study FILE")
        ]
    return study, [_standing(study, approvals)]


def newest_approved(approvals: Approvals) -> Study | None:
    """The study that was approved last.

    Raises:
      ConfigError: Its file was changed since.
    """
    for line in reversed(approvals.lines()):
        if study := approvals.study(line["digest"]):
            return study
    return None


def check_terms(config: SiteConfig, study: Study) -> Iterator[Finding]:
    """Membership, the site's policy, and what must fit before a message is answered."""
    try:
        _check_member(config, study)
        check_unit(config.data, study)
        _check_weight(config.data.declared_patients, study)
        _plan(config, study)
    except ConfigError as error:
        yield fault(error)
        return
    broken = list(broken_rules(config.policy, study, config.data.declared_patients))
    for rule in broken:
        yield fault(PolicyError(f"policy: {rule}; the site's owner decides on [policy]"))
    if not broken:
        yield ok(f"policy: permits study {study.name}")


def check_budget(config: SiteConfig, study: Study) -> Iterator[Finding]:
    """Whether the budget covers what the study still costs this site."""
    try:
        plan = _plan(config, study)
    except ConfigError:
        return  # check_terms has said so
    if plan is None and not isinstance(study.privacy, NoPrivacy):
        yield ok("budget: not checked, data.declared_patients is not set")
    elif config.budget is None:
        yield warning(
            "budget: no [budget] in the site file; nothing bounds what the data set costs"
        )
    elif plan is not None and (config.budget.unit, plan.terms.unit) == ("patient", "image"):
        yield fault(
            ConfigError("budget: protects patients, the study only images; see budget.unit")
        )
    else:
        yield _check_left(config, study, plan)


def planned_lines(config: SiteConfig, study_file: Path | None = None) -> Iterator[str]:
    """What studies would still cost this site's data set: of a file, or every approved one.

    Raises:
      FederationError: A study or a book cannot be read.
    """
    approvals = Approvals(config.state_dir)
    studies = (
        [load(study_file, Study)] if study_file else [one.study for one in approvals.earlier()]
    )
    for study in {study.digest(): study for study in studies}.values():
        try:
            said = _planned(config, study)
        except FederationError as error:
            said = f"what it costs is unknown: {error}"  # of this study; others are told
        yield f"planned: study {study.name}, {said}"


def _planned(config: SiteConfig, study: Study) -> str:
    if isinstance(study.privacy, NoPrivacy):
        return "without differential privacy: what it costs has no bound"
    plan = _plan(config, study)
    if plan is None:
        return "what it costs is unknown: set data.declared_patients"
    ledger = Ledger(ledger_file(config), config.data.name, config.budget)
    rest = _rest(config, study, plan, ledger)
    if not rest:
        return "is paid for in full"
    delta = config.budget.delta if config.budget else plan.terms.delta
    after = ledger.spent(delta, rest)
    said = (
        f"{len(rest)} of {plan.num_rounds} rounds left: epsilon {after:.3g} at delta {delta:g} "
        "after them"
    )
    if config.budget is None:
        return f"{said}; no [budget] bounds it"
    left = config.budget.epsilon - after
    if left < 0:
        return f"{said}; DOES NOT FIT the budget of {config.budget.epsilon:g}"
    return f"{said}; {left:.3g} of {config.budget.epsilon:g} left"


def _standing(study: Study, approvals: Approvals) -> Finding:
    known = f"study {study.name}: digest {study.digest()}"
    for line in reversed(approvals.lines()):
        if line["digest"] == study.digest():
            return ok(f"{known}, approved by {line['by']} on {line['time'][:10]}")
    if missing := [key for key, _ in study.unpinned()]:
        lacks = ", ".join(dict.fromkeys(missing))
        return warning(f"{known}, cannot be approved: it lacks {lacks}; ask the coordinator")
    return warning(f"{known}, not approved here; read it, then fl-client approve FILE")


def _check_member(config: SiteConfig, study: Study) -> None:
    if not study.members:
        return
    keys = {member.name: member.key for member in study.members}
    if config.name not in keys:
        raise ConfigError(
            f"study {study.name}: {config.name} is not a member; ask the coordinator for one that "
            "names it, or correct name in site.toml"
        )
    pinned, own = keys[config.name], _own_key(config)
    if pinned and own and pinned != own:
        raise ConfigError(
            f"study {study.name}: made for another key of {config.name} ({pinned[:12]}..., the "
            f"certificate has {own[:12]}...); ask the coordinator for a corrected study"
        )


def _own_key(config: SiteConfig) -> str | None:
    """Fingerprint; None where the certificate's own check says what is wrong."""
    try:
        if config.certificates is not None:
            return fingerprint(read_party(read_certificate(config.certificates.cert))[2])
    except ConfigError:
        pass
    return None


def _check_weight(declared: int | None, study: Study) -> None:
    cap = study.aggregation.weight_cap
    if declared is not None and declared > cap:
        raise ConfigError(
            f"data.declared_patients: {declared}, aggregation.weight_cap of study {study.name} is "
            f"{cap}; ask the coordinator to raise it"
        )


def _plan(config: SiteConfig, study: Study) -> PrivacyPlan | None:
    declared = config.data.declared_patients
    try:
        return plan_privacy(study, declared) if declared else None
    except ValueError as error:
        raise ConfigError(f"study {study.name}: {error}; ask the coordinator") from None


def _check_left(config: SiteConfig, study: Study, plan: PrivacyPlan | None) -> Finding:
    """The rest of the run that is under way, or the whole study."""
    budget, name = config.budget, config.data.name
    assert budget is not None  # noqa: S101 - check_budget() has looked
    try:
        ledger = Ledger(ledger_file(config), name, budget)
        if plan is None:
            rest, what = [WITHOUT_PRIVACY], f"study {study.name}, without differential privacy,"
        else:
            rest = _rest(config, study, plan, ledger)
            what = f"{len(rest)} of {plan.num_rounds} rounds of study {study.name}"
        if not rest:
            return ok(f"budget: the run of study {study.name} is paid for in full")
        ledger.check(rest, what)
    except BudgetExhausted as error:
        return fault(BudgetExhausted(f"budget: {error}"))
    except FederationError as error:
        return fault(error)
    except OSError:
        return warning("budget: not checked, the state folder cannot be used")
    spent = ledger.spent(budget.delta)
    return ok(f"budget: covers {what}; {spent:.3g} of {budget.epsilon:g} is spent")


def _rest(config: SiteConfig, study: Study, plan: PrivacyPlan, ledger: Ledger) -> list[Event]:
    """What a study still costs: the rest of the run that is under way, or all of its rounds."""
    charged = charged_in_run_under_way(config.state_dir, study, ledger)
    return [plan.event] * max(0, plan.num_rounds - charged)
