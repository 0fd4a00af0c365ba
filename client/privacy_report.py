"""This hospital's own privacy report: everything ever charged here, and everything that left.

It stays at the hospital: totals over a data set's life and what is left of its budget are nobody
else's. Nothing in it is about one patient.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from client.approvals import Approvals
from client.books import USUAL_DELTA, check_statements, last_statements
from client.config import Budget, SiteConfig, deployed
from client.site import AUDIT
from client.study_check import planned_lines
from common import privacy_report
from common.accounting import epsilon_of, second_opinion
from common.audit import AuditLog
from common.charges import LEDGERS, WITHOUT_PRIVACY, Charge, by_run, counted, read_charges
from common.disk import replace_file
from common.errors import ConfigError
from common.identity import Identity
from common.privacy_report import site_folder
from common.privacy_report.facts import Facts, assumptions, promise, sent, sources, versions
from common.privacy_report.texts import Texts
from common.seal import seal

FOLDER = "privacy-report"  # in the state folder
SHORT = 8  # digits of a run's name
POINTS = 10  # of one run, in the curve


@dataclass(frozen=True)
class _Spent:
    """One data set's ledger, with the report's epsilon after each run."""

    path: Path
    budget: Budget | None
    delta: float
    runs: list[Facts]
    charges: list[Charge]
    unit: str  # whom the epsilon protects

    @property
    def is_seeded(self) -> bool:
        return any(one.randomness == "seeded" for one in self.charges)

    @property
    def epsilon(self) -> float | None:
        return self.runs[-1]["epsilon"] if self.runs else 0.0


def write_site_report(config: SiteConfig, folder: Path, now: Callable[[], datetime]) -> Path:
    """Write the report with the files it is calculated from, and sign the folder.

    Args:
      config: This site's.
      folder: Replaced, if it holds an older report.
      now: The clock, for reading the log.

    Returns:
      The path of ``privacy-report.html``.

    Raises:
      ConfigError: The site file names no certificate and key to sign with; or the folder holds
        something else.
      DataError: A book is damaged.
    """
    if folder.exists() and any(folder.iterdir()) and not site_folder.is_site_folder(folder):
        raise ConfigError(
            f"{folder} is not empty and holds no privacy report; choose another --out"
        )
    files = deployed(config)
    check_statements(config)
    identity = Identity.load(files.cert, files.key)
    texts = Texts()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    statements = [one.model_dump() for one in last_statements(config.state_dir)]
    _put(folder / site_folder.STATEMENTS, json.dumps(statements, indent=1))
    shutil.rmtree(folder / LEDGERS, ignore_errors=True)
    (folder / LEDGERS).mkdir(mode=0o700)
    for path in sorted((config.state_dir / LEDGERS).glob("*.jsonl")):
        replace_file(folder / LEDGERS / path.name, path.read_bytes())
    facts = _facts(config, folder, texts, now) | {"signer": identity.fingerprint}
    _put(folder / privacy_report.JSON, json.dumps(facts, indent=2, allow_nan=False))
    _put(folder / privacy_report.HTML, privacy_report.render(facts, texts, folder))
    seal(folder, _listed(folder), identity)
    return folder / privacy_report.HTML


def _listed(folder: Path) -> Iterator[Path]:
    yield from (folder / LEDGERS).glob("*.jsonl")
    for name in (privacy_report.HTML, privacy_report.JSON, site_folder.STATEMENTS):
        yield folder / name


def _facts(config: SiteConfig, folder: Path, texts: Texts, now: Callable[[], datetime]) -> Facts:
    ledgers = [_spent(config, path) for path in sorted((folder / LEDGERS).glob("*.jsonl"))]
    own = next((one for one in ledgers if one.path.stem == config.data.name), None)
    unit = own.unit if own else _unit(config.budget, [])
    log = AuditLog(config.state_dir / AUDIT, now)
    messages = [_message(line) for line in log.entries() if line["event"] in ("sent", "refused")]
    several = len(ledgers) > 1
    return {
        "kind": "site",
        "name": config.name,
        "digest": log.head(),
        "names": [(texts("names.site"), config.name), (texts("names.data"), config.data.name)],
        "promise": list(_promise(config, own, unit, texts)),
        "terms": {"unit": unit, "clip_norm": None, "images": None},
        "ledgers": [_table(one) for one in ledgers],
        "costs": [_row(one, run, several) for one in ledgers for run in one.runs],
        "curves": {
            "rounds": {},
            "life": _life(own) if own else [],
            "budget": config.budget.epsilon if config.budget else None,
        },
        "planned": list(planned_lines(config)),
        "sent": sent(messages, texts, AUDIT) | {"messages": messages},
        "approved": Approvals(config.state_dir).lines(),
        "attacks": None,
        "assumptions": assumptions(texts, unit, is_seeded=own.is_seeded) if own else [],
        "limits": [*texts.lines("limits.private"), *texts.lines("limits.always")],
        "sources": sources(folder, _files(folder, ledgers, texts)),
        "versions": versions(),
    }


def _spent(config: SiteConfig, path: Path) -> _Spent:
    is_own = path.stem == config.data.name
    budget = config.budget if is_own else None
    delta = budget.delta if budget else USUAL_DELTA
    runs, so_far = [], []
    charges = read_charges(path)
    unit = _unit(budget, charges)
    for run, own in by_run(charges).items():
        so_far += counted(own, unit)
        name, _, digest = run.partition("/")
        event = own[-1].event
        is_private = event != WITHOUT_PRIVACY
        runs.append(
            {
                "run": run,
                "study": _name_of(config, digest),
                "name": name,
                "sums": len(own),
                "first": own[0].time,
                "last": own[-1].time,
                "epsilon": _finite(epsilon_of(so_far, delta)),
                "second": None,
                "noise_multiplier": event.noise_multiplier if is_private else None,
                "sampling_probability": event.sampling_probability,
                "steps": sum(one.event.steps for one in own),
            }
        )
    if runs:  # after every run it would take minutes where many studies differ
        runs[-1]["second"] = second_opinion(so_far, delta)
    return _Spent(path, budget, delta, runs, charges, unit)


def _life(own: _Spent) -> list[list[float]]:
    """Epsilon after so many charges, at some points of each run; up to the first without bound."""
    points, so_far = [[0.0, 0.0]], []
    for charges in by_run(own.charges).values():
        step = -(-len(charges) // POINTS)
        for number, charge in enumerate(charges, start=1):
            so_far += counted([charge], own.unit)
            if so_far[-1] == WITHOUT_PRIVACY:
                return points
            if number % step == 0 or number == len(charges):
                points.append([len(so_far), epsilon_of(so_far, own.delta)])
    return points


def _promise(config: SiteConfig, own: _Spent | None, unit: str, texts: Texts) -> Iterator[str]:
    name = config.data.name
    if own is None or not own.runs:
        yield texts("promise.nothing_spent", data=name)
        return
    if own.is_seeded:
        yield texts("promise.seeded")
    if own.epsilon is None:
        yield texts("promise.none_spent")
        return
    yield promise(texts, unit, own.epsilon, own.delta)
    said = {"data": name, "spent": f"{own.epsilon:.3f}", "delta": f"{own.delta:g}"}
    if own.budget is None:
        yield texts("promise.no_budget", **said)
    else:
        left = max(0.0, own.budget.epsilon - own.epsilon)
        yield texts("promise.budget", **said, budget=f"{own.budget.epsilon:g}", left=f"{left:.3f}")
    yield texts("promise.two_sites")


def _table(one: _Spent) -> Facts:
    return {
        "data_set": one.path.stem,
        "epsilon": one.epsilon,
        "delta": one.delta,
        "unit": one.unit,
        "budget": one.budget.model_dump() if one.budget else None,
        "charges": len(one.charges),
        "runs": one.runs,
    }


def _row(one: _Spent, run: Facts, several: bool) -> Facts:
    about = f"{run['study']}, {run['first'][:10]}"
    return {
        **run,
        "name": run["name"][:SHORT],
        "about": f"{one.path.stem}: {about}" if several else about,
        "delta": one.delta,
    }


def _unit(budget: Budget | None, charges: list[Charge]) -> str:
    """Whom the budget protects; without one the weakest promise that was charged."""
    if budget is not None:
        return budget.unit
    return "image" if any(one.unit == "image" for one in charges) else "patient"


def _name_of(config: SiteConfig, digest: str) -> str:
    for line in Approvals(config.state_dir).lines():
        if line["digest"] == digest:
            return str(line["study"])
    return digest[:SHORT]


def _message(line: dict[str, Any]) -> Facts:
    """One line of the audit log about a message that left; of a refusal, a word."""
    if line["event"] == "refused":
        return {
            "kind": "Refusal",
            "bytes": 0,
            "time": line["time"],
            "to": line["peer"],
            "digest": "",
        }
    return {
        "kind": line["type"],
        "bytes": line["bytes"],
        "time": line["time"],
        "to": line["peer"],
        "digest": line["digest"],
    }


def _files(folder: Path, ledgers: list[_Spent], texts: Texts) -> dict[str, Path]:
    files = {texts("files.own_statements"): folder / site_folder.STATEMENTS}
    return files | {texts("files.ledger", name=one.path.stem): one.path for one in ledgers}


def _finite(epsilon: float) -> float | None:
    """JSON has no infinity."""
    return epsilon if math.isfinite(epsilon) else None


def _put(path: Path, text: str) -> None:
    replace_file(path, text.encode() + b"\n")
