"""The consortium's privacy report: of one run, from its folder alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.accounting import Event, second_opinion
from common.privacy_report.facts import (
    Facts,
    assumptions,
    attacks_in,
    promise,
    sent,
    sources,
    versions,
)
from common.privacy_report.texts import Texts
from common.simulation import STUDY
from common.statement import Statement
from common.study import DifferentialPrivacy
from server.reporting.record import Record
from server.run_dir import PRIVACY, ROUNDS, SUMMARY
from server.transcript import TRANSCRIPT


def privacy_facts(record: Record, texts: Texts) -> Facts:
    """Everything the report says, ready for JSON."""
    run_dir, study = record.run_dir, record.study
    folder, terms = run_dir.path, study.privacy
    stated = run_dir.all_statements()
    costs = [_cost(statements[-1]) for statements in stated.values()]
    is_private = isinstance(terms, DifferentialPrivacy)
    return {
        "kind": "consortium",
        "name": study.name,
        "digest": record.summary["study"]["digest"],
        "names": [
            (texts("names.study_digest"), record.summary["study"]["digest"]),
            (texts("names.run"), record.manifest.run),
        ],
        "promise": list(_promise(record, costs, texts)),
        "terms": _terms(terms),
        "costs": costs,
        "curves": {"rounds": _by_round(record, stated), "life": [], "budget": None},
        "sent": sent(_received(record), texts, TRANSCRIPT),
        "members": [
            {"name": member.name, "key": member.key} for member in record.manifests[0].members
        ],
        "attacks": attacks_in(folder),
        "assumptions": _assumptions(record, texts),
        "limits": [
            *(texts.lines("limits.private") if is_private else ()),
            *texts.lines("limits.always"),
        ],
        "signer": record.manifest.coordinator,
        "sources": sources(folder, _files(folder, stated, texts)),
        "versions": versions(),
    }


def _promise(record: Record, costs: list[Facts], texts: Texts) -> list[str]:
    terms = record.study.privacy
    if not isinstance(terms, DifferentialPrivacy):
        lines = [texts("promise.none")]
    else:
        largest = max(row["epsilon"] for row in costs)
        lines = [promise(texts, terms.unit, largest, terms.delta)]
        if terms.randomness == "seeded":
            lines.insert(0, texts("promise.seeded"))
        lines.append(texts("promise.largest", number=len(costs)))
        lines.append(texts("promise.two_sites"))
    if record.simulation is not None:
        lines.insert(0, texts("promise.simulated"))
    sums = [*record.rounds, *record.evaluations]
    fewest = min(len(line["survivors"]) for line in sums)
    return [*lines, texts("promise.masks", sums=len(sums), fewest=fewest)]


def _assumptions(record: Record, texts: Texts) -> list[str]:
    terms = record.study.privacy
    if not isinstance(terms, DifferentialPrivacy):
        return []
    return assumptions(
        texts,
        terms.unit,
        is_seeded=terms.randomness == "seeded",
        is_simulated=record.simulation is not None,
    )


def _terms(terms: Any) -> Facts:
    if not isinstance(terms, DifferentialPrivacy):
        return {}
    return {
        "unit": terms.unit,
        "clip_norm": terms.example_clip_norm,
        "images": terms.max_images_per_patient,
    }


def _cost(last: Statement) -> Facts:
    event = Event(last.noise_multiplier, last.sampling_probability, last.steps)
    return {
        "name": last.site,
        "about": f"{PRIVACY}/{last.site}.json",
        "epsilon": last.epsilon,
        "second": second_opinion([event], last.delta),
        "delta": last.delta,
        "noise_multiplier": last.noise_multiplier,
        "sampling_probability": last.sampling_probability,
        "steps": last.steps,
        "randomness": last.randomness,
    }


def _by_round(record: Record, stated: dict[str, list[Statement]]) -> dict[str, list[list[float]]]:
    """Epsilon by each site's statement with the update of each round."""
    rounds = {line["sum"]: number for number, line in enumerate(record.rounds, start=1)}
    return {
        site: [
            [rounds[one.sum_number], one.epsilon] for one in statements if one.sum_number in rounds
        ]
        for site, statements in stated.items()
    }


def _received(record: Record) -> list[dict[str, Any]]:
    return [
        {"kind": line["kind"], "bytes": sum(line["bytes"].values())}
        for line in record.transcript
        if line["direction"] == "received"
    ]


def _files(folder: Path, stated: Iterable[str], texts: Texts) -> dict[str, Path]:
    named = {"study": STUDY, "summary": SUMMARY, "rounds": ROUNDS, "messages": TRANSCRIPT}
    if not (folder / ROUNDS).exists():  # nothing was trained
        del named["rounds"]
    files = {texts(f"files.{what}"): folder / name for what, name in named.items()}
    for site in stated:
        files[texts("files.statements", name=site)] = folder / PRIVACY / f"{site}.json"
    return files
