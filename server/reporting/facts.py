"""What a report says, as ``report.json`` holds it."""

from __future__ import annotations

import hashlib
from statistics import median
from typing import Any, Final

from common.errors import FederationError
from common.seal import SUMS
from common.simulation import STUDY, Simulation
from common.study import Detection, DifferentialPrivacy, NoPrivacy, Segmentation, Study
from server.reporting.classes import figures_by_class
from server.reporting.record import Facts, Record
from server.reporting.seen import seen_by_coordinator
from server.run_dir import STATISTICS, SUMMARY

MIN_SUPPORT: Final = 30  # test images of a class; with fewer, one image moves recall by over 3 %
MIN_IMAGES: Final = 10  # test images with masks; pixels are many, but those of one image are alike

COUNTS_WITHOUT_NOISE = "Counts of held-out images were added up over the sites without noise."
STATISTICS_WITHOUT_NOISE = (
    "Counts of what the training images are like were added up over the sites without noise."
)
COUNTS_ALONE = (
    "No differential privacy: nothing in this run bounds what the sums of counts may reveal about "
    "a single patient. Nothing was trained."
)
MASKS: Final = {  # by the version of the manifests
    1: "Every update, weight and count left its site under masks; the coordinator could remove "
    "them from the sum over all survivors alone (MaskedSum v1; no formal proof exists yet).",
}


def privacy_lines(study: Study, summary: dict[str, Any]) -> list[str]:
    """The sentences on privacy that open every report, the most important first."""
    # A case per plan: mypy rejects this function when a study gains a plan without its lines.
    match study.privacy:
        case NoPrivacy():
            if summary["privacy"]:
                raise FederationError(f"{SUMMARY} lists epsilons, {STUDY} asks for no privacy")
            if not study.num_rounds:
                return [COUNTS_ALONE, STATISTICS_WITHOUT_NOISE]
            bounds_nothing = (
                "No differential privacy: nothing in this run bounds what the model, or an update "
                "that was sent to make it, may reveal about a single training patient."
            )
            asked = [] if study.statistics is None else [STATISTICS_WITHOUT_NOISE]
            return [bounds_nothing, *asked, COUNTS_WITHOUT_NOISE]
        case DifferentialPrivacy():
            return _private_lines(study.privacy, summary["privacy"])


def _private_lines(terms: DifferentialPrivacy, by_site: dict[str, Any]) -> list[str]:
    if not by_site:
        raise FederationError(f"{STUDY} asks for privacy, {SUMMARY} lists no site's epsilon")
    largest = max(site["epsilon"] for site in by_site.values())
    first = (
        f"Differential privacy: epsilon {largest:.3f} at delta {terms.delta:g}, the largest of the "
        f"{len(by_site)} sites, for one {terms.unit}'s whole training record at one site; "
        "neighbouring data sets differ by adding or removing it."
    )
    lines = [first]
    if terms.randomness == "seeded":
        lines.insert(
            0,
            "Seeded randomness: whoever knows the seed can subtract the noise. This run is a "
            "simulation or a test and protects nobody.",
        )
    if terms.unit == "image":
        lines.append(
            "The unit is one image, a weaker promise than one patient: a patient with several "
            "images is covered for each of them alone."
        )
    return [
        *lines,
        "A patient seen at two sites is exposed to the sum of both sites' epsilon.",
        COUNTS_WITHOUT_NOISE,
    ]


def facts_of(record: Record) -> Facts:
    """Everything the report says, ready for JSON."""
    study, summary, rounds = record.study, record.summary, record.rounds
    return {
        "study": summary["study"],
        "run": {"digest": record.manifest.digest(), "code": record.manifest.code},
        "privacy": {
            "mode": "none" if isinstance(study.privacy, NoPrivacy) else "dp-sgd",
            "lines": privacy_lines(study, summary),
            "masks": MASKS[record.manifest.version],
            "sites": summary["privacy"],
        },
        "setting": _setting(record.simulation),
        "settings": record.settings,
        "num_params": summary["num_params"],
        "num_rounds": summary["num_rounds"],
        "returned_round": summary["returned_round"],
        **(_tested(record) if study.num_rounds else {"test": None}),
        "validation_by_round": summary["metrics"]["by_round"],
        "sites": [
            {
                "name": site,
                "rounds": sum(site in line["survivors"] for line in rounds),
                "refusals": sum(site in line["refusals"] for line in rounds),
                "bytes_up": summary["bytes_up_per_site"][site],
            }
            for site in summary["sites"]
        ],
        "statistics": record.run_dir.statistics(),
        "seen": seen_by_coordinator(record),
        "clipped_entries": sum(line["clipped"] for line in rounds),
        "seconds": _seconds(rounds, record.evaluations),
        "files": {
            "sums_sha256": hashlib.sha256((record.run_dir.path / SUMS).read_bytes()).hexdigest(),
            "sha256": record.digests,
        },
    }


def _tested(record: Record) -> Facts:
    """The returned model on the test images."""
    study, test = record.study, record.summary["metrics"]["final"]
    classes = figures_by_class(study, record.run_dir.counts("test"))
    support, least = _support(study, classes, test["num_examples"])
    return {
        "test": test | {"by_class": classes, "support": support},
        "test_sites": next(e["survivors"] for e in record.evaluations if e["counts"] == "test"),
        "weak_support": {name: images for name, images in support.items() if images < least},
    }


def _support(study: Study, classes: list[Facts], num_images: int) -> tuple[dict[str, int], int]:
    """Test images behind the figures, by class where an image has one, and how many are few."""
    if isinstance(study.task, Segmentation):
        return {"images": num_images}, MIN_IMAGES
    if isinstance(study.task, Detection):
        return {entry["class"]: entry["boxes"]["true"] for entry in classes}, MIN_SUPPORT
    by_class = {name: images for entry in classes for name, images in entry["images"].items()}
    return by_class, MIN_SUPPORT


def _setting(simulation: Simulation | None) -> Facts:
    """Simulated or deployed, and what is known of the data."""
    if simulation is None:
        return {"simulated": False}
    data = simulation.data
    # Without a rule that names patients, the readers take every image for its own patient.
    named = data["format"] == "phantom" or data.get("patients") or data.get("patient")
    return {
        "simulated": True,
        "data": data["name"],
        "format": data["format"],
        "partition": simulation.partition,
        "patients_are_named": bool(named),
    }


def _seconds(rounds: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Facts:
    """Seconds per round by phase; ``other`` is what no phase of ``rounds.jsonl`` covers."""
    by_phase = {
        phase: [line["seconds"][phase] for line in rounds]
        for phase in (rounds[0]["seconds"] if rounds else ())
        if phase != "total"
    }
    whole = [line["seconds"]["total"] for line in rounds]
    beside = {STATISTICS: 0.0, "scored": 0.0}  # sums without training
    for line in evaluations:
        what = STATISTICS if line["counts"] == STATISTICS else "scored"
        beside[what] += line["seconds"]["total"]
    by_phase["other"] = [
        max(0.0, all_of_it - sum(parts))
        for all_of_it, *parts in zip(whole, *by_phase.values(), strict=True)
    ]
    return {
        "phases": {
            phase: {"total": sum(spent), "median": median(spent or [0.0]), "by_round": spent}
            for phase, spent in by_phase.items()
        },
        "rounds": {"total": sum(whole), "median": median(whole or [0.0])},
        "statistics": beside[STATISTICS],
        "evaluations": beside["scored"],
        "total": sum(whole) + sum(beside.values()),
    }
