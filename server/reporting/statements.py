"""The sites' signed privacy statements, checked again: signatures, arithmetic, completeness."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from common.accounting import AGREEMENT, Event, epsilon_of, second_opinion
from common.errors import FederationError, RemoteProtocolError
from common.identity import read_certified
from common.plan import plan_privacy
from common.statement import Statement
from common.study import DifferentialPrivacy
from server.reporting.record import Record
from server.run_dir import PRIVACY

CONSTANT = ("delta", "unit", "noise_multiplier", "sampling_probability", "accountant", "randomness")


def check_statements(record: Record) -> int:
    """Check every statement of a run; their number.

    Raises:
      FederationError: One is missing, is not its site's, or its epsilon is not what its own numbers
        give; the message names the file and the sum.
    """
    if not isinstance(record.study.privacy, DifferentialPrivacy):
        return 0
    keys = dict(_keys(record))
    stated = record.run_dir.all_statements()
    for site, statements in stated.items():
        for one in statements:
            _check(one, site, record, keys)
        for before, after in itertools.pairwise(statements):
            if _constants(before) != _constants(after) or after.steps < before.steps:
                raise _wrong(after, "it does not follow from the statement before it")
    for line in (*record.rounds, *record.evaluations):
        _check_complete(line, stated)
    for site, statements in stated.items():
        trained = sorted(line["sum"] for line in record.rounds if site in line["survivors"])
        for one in statements:
            _check_spent(one, record, sum(number <= one.sum_number for number in trained))
        if statements:
            _check_by_the_other(statements[-1])
    return sum(map(len, stated.values()))


def _check_by_the_other(one: Statement) -> None:
    """Refuse an epsilon that another library does not find."""
    event = Event(one.noise_multiplier, one.sampling_probability, one.steps)
    other = second_opinion([event], one.delta)
    if other is not None and not math.isclose(
        one.epsilon, other, rel_tol=AGREEMENT, abs_tol=AGREEMENT
    ):
        raise _wrong(one, f"epsilon is {one.epsilon:.4g}, the other accountant has {other:.4g}")


def _check_complete(line: dict[str, Any], stated: dict[str, list[Statement]]) -> None:
    """Refuse a sum about which one of its sites stated nothing."""
    for site in line["survivors"]:
        if line["sum"] not in {one.sum_number for one in stated.get(site, [])}:
            raise FederationError(
                f"{PRIVACY}/{site}.json: no statement about sum {line['sum']}, which the site "
                "was part of; restore the file that the run wrote"
            )


def _check_spent(one: Statement, record: Record, num_trained: int) -> None:
    """Refuse a statement of less than the study asked for, or than the site was seen to train."""
    terms = record.study.privacy
    assert isinstance(terms, DifferentialPrivacy)  # noqa: S101 - check_statements() has looked
    for key in ("delta", "unit", "randomness"):
        if getattr(one, key) != getattr(terms, key):
            raise _wrong(one, f"{key} is {getattr(one, key)}, the study says {getattr(terms, key)}")
    # The sampling probability tells the declared number of patients, and that the rest of the plan.
    declared = round(record.study.training.batch_size / one.sampling_probability)
    plan = plan_privacy(record.study, max(1, declared))
    assert plan is not None  # noqa: S101 - the study is private
    if not math.isclose(plan.event.noise_multiplier, one.noise_multiplier, rel_tol=1e-9):
        wanted = f"{plan.event.noise_multiplier:.6g}"
        raise _wrong(one, f"noise_multiplier is {one.noise_multiplier:.6g}, the plan's {wanted}")
    if one.steps % plan.event.steps or one.steps < num_trained * plan.event.steps:
        raise _wrong(
            one,
            f"{one.steps} steps, where {num_trained} sums of {plan.event.steps} steps were "
            "unmasked with this site's update in them",
        )


def _check(
    one: Statement, site: str, record: Record, keys: dict[str, ec.EllipticCurvePublicKey]
) -> None:
    run, digest = record.manifest.run, record.summary["study"]["digest"]
    if (one.site, one.run, one.study) != (site, run, digest) or site not in keys:
        raise _wrong(one, "it is about another site, run or study")
    try:
        one.check_signed(keys[site])
    except RemoteProtocolError as error:
        raise _wrong(one, str(error)) from None
    event = Event(one.noise_multiplier, one.sampling_probability, one.steps)
    epsilon = epsilon_of([event], one.delta)
    if not math.isclose(epsilon, one.epsilon, rel_tol=1e-6, abs_tol=1e-9):
        raise _wrong(one, f"epsilon is {one.epsilon:.6g}, its own numbers give {epsilon:.6g}")


def _keys(record: Record) -> Iterator[tuple[str, ec.EllipticCurvePublicKey]]:
    """Each site's public key: of the certificate whose fingerprint the manifest names."""
    for manifest in record.manifests:
        path = record.run_dir.path / f"keys-{manifest.epoch}.json"
        roster = json.loads(path.read_text())[0]
        pinned = {member.name: member.key for member in record.study.members if member.key}
        for member, certificate in zip(manifest.members, roster["certificates"], strict=True):
            certified = read_certified(bytes.fromhex(certificate))
            if certified.fingerprint != pinned.get(member.name, member.key):
                raise FederationError(
                    f"{path.name}: the certificate of {member.name} has another key than the study"
                )
            yield member.name, certified.key


def _constants(one: Statement) -> dict[str, object]:
    return one.model_dump(include=set(CONSTANT))


def _wrong(one: Statement, why: str) -> FederationError:
    return FederationError(f"{PRIVACY}/{one.site}.json, sum {one.sum_number}: {why}")
