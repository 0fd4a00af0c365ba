"""The report of a finished run: the door through which results reach people.

Every number is computed from the files of the run folder, and what the folder records twice is
compared first, so that no report is written from files that disagree. It holds no date of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import jinja2
import tomli_w
from markupsafe import Markup

from common.config import read_table
from common.errors import ConfigError, FederationError
from common.manifest import Manifest
from common.simulation import STUDY, Simulation
from common.study import DifferentialPrivacy, NoPrivacy, Study
from common.tasks import Figures, task_of
from common.tasks.classification import NUM_BINS
from server.report_figures import Svg, draw_pictures, examples_of, figures_by_class
from server.run_dir import EVALUATIONS, FINAL, ROUNDS, SUMMARY, SUMS, RunDir

Facts = dict[str, Any]

HTML, JSON = "report.html", "report.json"
REQUIRED: Final = (STUDY, SUMMARY, ROUNDS, EVALUATIONS, FINAL, "epoch-1.json", "counts/test.npy")
MIN_SUPPORT: Final = 30  # test images of a class; with fewer, one image moves recall by over 3 %

# What the masks of a run hide, by the version of its manifests (common/secagg/masking.py).
COUNTS_WITHOUT_NOISE = "Counts of held-out images were added up over the sites without noise."
MASKS: Final = {
    1: "Masks are the identity in this version: updates were added up in the ring of the secure "
    "sum, but nothing hid them, and the coordinator could read the update of a single site.",
}


@dataclass(frozen=True)
class Record:
    """A finished run as its files tell it."""

    run_dir: RunDir
    study: Study
    manifest: Manifest
    simulation: Simulation | None  # None: deployed
    settings: dict[str, Any]  # study.toml as it was written
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    digests: dict[str, str]  # file name to SHA-256, as SHA256SUMS has them

    def figures(self, counts: str) -> Figures:
        """Figures recomputed from ``counts/<counts>.npy``, as JSON holds them."""
        recomputed = task_of(self.study).figures(self.run_dir.counts(counts))
        figures: Figures = json.loads(json.dumps(recomputed))
        return figures


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``report.json`` into a run folder.

    Args:
      folder: Of a finished run.

    Returns:
      The path of ``report.html``.

    Guarantees:
      Equal folders give equal files: no clock is read.

    Raises:
      ConfigError: The folder holds no finished run.
      FederationError: A file is not as recorded; the message names it.
    """
    run_dir = RunDir(folder)
    digests = digests_of(run_dir)
    # The models of single rounds are large and no number here comes from them; verify reads all.
    check_files(folder, {name: sha for name, sha in digests.items() if "models/" not in name})
    record = read_record(run_dir, digests)
    check_record(record)
    facts, examples = facts_of(record), examples_of(record.study, record.simulation, run_dir)
    facts["examples"] = [example.facts for example in examples]
    pictures = draw_pictures(facts, record.study, run_dir.counts("test"), examples)
    page = render(facts, record.study, pictures)
    (folder / JSON).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / HTML).write_text(page, encoding="utf-8")
    return folder / HTML


def verify(folder: Path) -> int:
    """Check every file of a run folder and recompute its figures; the number of files.

    Raises:
      ConfigError: The folder holds no finished run.
      FederationError: A file differs or is missing; the message names the first.
    """
    run_dir = RunDir(folder)
    digests = digests_of(run_dir)
    check_files(folder, digests)
    check_record(read_record(run_dir, digests))
    return len(digests)


# Reading


def digests_of(run_dir: RunDir) -> dict[str, str]:
    """File name to SHA-256 by ``SHA256SUMS``, which the run writes last."""
    folder, sums = run_dir.path, run_dir.path / SUMS
    if not sums.exists() and not (folder / STUDY).exists():
        raise ConfigError(f"{folder} is not a run folder; give one that holds {STUDY} and {SUMS}")
    if not sums.exists():
        done = f"{len(run_dir.rounds())} of {run_dir.study().num_rounds} rounds are recorded"
        raise ConfigError(f"{folder}: the run is not finished ({done}); finish it with --resume")
    digests = {}
    for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines(), start=1):
        found = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if found is None:
            raise FederationError(f"{SUMS}: line {number} is not a SHA-256 and a file name")
        digests[found.group(2)] = found.group(1)
    for name in REQUIRED:
        if name not in digests:
            raise FederationError(f"{name} is not listed in {SUMS}; a finished run lists it")
    return digests


def check_files(folder: Path, digests: dict[str, str]) -> None:
    """Refuse a folder in which a file is missing or is not the one that was recorded."""
    for name, recorded in digests.items():
        if not (folder / name).is_file():
            raise FederationError(f"{name} is missing; restore it, {SUMS} lists it")
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != recorded:
            raise FederationError(
                f"{name} differs: its SHA-256 is {found[:12]}..., {SUMS} has {recorded[:12]}...; "
                "restore the file that the run wrote"
            )


def read_record(run_dir: RunDir, digests: dict[str, str]) -> Record:
    """Everything the report is computed from; ``check_files`` has found the files complete."""
    summary, manifest = run_dir.summary(), run_dir.epoch()
    assert summary is not None  # noqa: S101 - digests_of asked for both files
    assert manifest is not None  # noqa: S101
    simulation = run_dir.simulation() if run_dir.is_simulation else None
    return Record(
        run_dir=run_dir,
        study=run_dir.study(),
        manifest=manifest,
        simulation=simulation,
        settings=read_table(run_dir.path / STUDY),
        summary=summary,
        rounds=run_dir.rounds(),
        evaluations=run_dir.evaluations(),
        digests=digests,
    )


def check_record(record: Record) -> None:
    """Recompute what the summary says.

    Raises:
      FederationError: A recorded value is not what the other files give; the message names both.
    """
    for what, file, computed, recorded in _recorded_twice(record):
        if not _same(computed, recorded):
            raise FederationError(
                f"{SUMMARY}: {what} is {str(recorded)[:80]}, {file} gives {str(computed)[:80]}; "
                "the files are not of one run, or another version of this program wrote them"
            )


def _same(computed: Any, recorded: Any) -> bool:
    """Equal; fractions up to the last digits, which another Python may add up differently."""
    if isinstance(computed, float) and isinstance(recorded, float):
        return math.isclose(computed, recorded, rel_tol=1e-9)
    return bool(computed == recorded)


def _recorded_twice(record: Record) -> Iterator[tuple[str, str, Any, Any]]:
    """(What, file, value by that file, value by the summary) of all that is recorded twice."""
    summary, rounds = record.summary, record.rounds
    sums = [*rounds, *record.evaluations]
    digest = summary["study"]["digest"]
    yield "study.digest", STUDY, _digest_as_written(record.settings), digest
    yield "study.digest", "the manifest", record.manifest.study, digest
    yield "sites", "the manifest", list(record.manifest.members), summary["sites"]
    yield "num_rounds", ROUNDS, len(rounds), summary["num_rounds"]
    by_round = summary["metrics"]["by_round"]
    yield "the length of metrics.by_round", ROUNDS, len(rounds), len(by_round)
    yield "survivors", ROUNDS, [line["survivors"] for line in rounds], summary["survivors"]
    seconds = [line["seconds"]["total"] for line in sums]
    yield "wall_s.per_round", ROUNDS, seconds[: len(rounds)], summary["wall_s"]["per_round"]
    yield "wall_s.total", EVALUATIONS, sum(seconds), summary["wall_s"]["total"]
    sent = {site: sum(line["bytes_up"].get(site, 0) for line in sums) for site in summary["sites"]}
    yield "bytes_up_per_site", EVALUATIONS, sent, summary["bytes_up_per_site"]
    yield "final_model_sha256", FINAL, record.digests[FINAL], summary["final_model_sha256"]
    returned = f"models/round-{summary['returned_round']:04d}.safetensors"
    yield "final_model_sha256", returned, record.digests.get(returned), record.digests[FINAL]
    num_params = sum(tensor.size for tensor in record.run_dir.final_model().values())
    yield "num_params", FINAL, num_params, summary["num_params"]
    scored = {"test": summary["metrics"]["final"]}
    for number, figures in enumerate(by_round, start=1):
        scored[f"validation-{number:04d}"] = figures
    for counts, figures in scored.items():
        for key, computed in record.figures(counts).items():
            yield f"{key} ({counts})", f"counts/{counts}.npy", computed, figures.get(key)


def _digest_as_written(settings: dict[str, Any]) -> str:
    """The study's digest by its file alone.

    ``Study.digest`` would change for an old run as soon as a study gains a setting with a default.
    """
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# Facts


def privacy_lines(study: Study, summary: dict[str, Any]) -> list[str]:
    """The sentences on privacy that open every report, the most important first."""
    # A case per plan: mypy rejects this function when a study gains a plan without its lines.
    match study.privacy:
        case NoPrivacy():
            if summary["privacy"]:
                raise FederationError(f"{SUMMARY} lists epsilons, {STUDY} asks for no privacy")
            bounds_nothing = (
                "No differential privacy: nothing in this run bounds what the model, or an update "
                "that was sent to make it, may reveal about a single training patient."
            )
            return [
                bounds_nothing,
                COUNTS_WITHOUT_NOISE,
            ]
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
    classes = figures_by_class(study, record.run_dir.counts("test"))
    support = {name: images for entry in classes for name, images in entry["images"].items()}
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
        "test": summary["metrics"]["final"] | {"by_class": classes, "support": support},
        "test_sites": next(e["survivors"] for e in record.evaluations if e["counts"] == "test"),
        "weak_support": {name: images for name, images in support.items() if images < MIN_SUPPORT},
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
        "clipped_entries": sum(line["clipped"] for line in rounds),
        "seconds": _seconds(rounds, record.evaluations),
        "files": {
            "sums_sha256": hashlib.sha256((record.run_dir.path / SUMS).read_bytes()).hexdigest(),
            "sha256": record.digests,
        },
    }


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
        for phase in rounds[0]["seconds"]
        if phase != "total"
    }
    whole = [line["seconds"]["total"] for line in rounds]
    scoring = sum(line["seconds"]["total"] for line in evaluations)
    by_phase["other"] = [
        max(0.0, all_of_it - sum(parts))
        for all_of_it, *parts in zip(whole, *by_phase.values(), strict=True)
    ]
    return {
        "phases": {
            phase: {"total": sum(spent), "median": median(spent), "by_round": spent}
            for phase, spent in by_phase.items()
        },
        "rounds": {"total": sum(whole), "median": median(whole)},
        "evaluations": scoring,
        "total": sum(whole) + scoring,
    }


# The page


def render(facts: Facts, study: Study, pictures: dict[str, list[Svg]]) -> str:
    """The report as one HTML file that loads nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": _figure,
        "grouped": _grouped,
        "bytes": _bytes,
        "seconds": _duration,
    }
    drawn = {name: [Markup(svg) for svg in svgs] for name, svgs in pictures.items()}  # noqa: S704
    settings = {key: value for key, value in facts["settings"].items() if key != "members"}
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        study=study,
        study_toml=tomli_w.dumps(settings),
        pictures=drawn,
        min_support=MIN_SUPPORT,
        num_bins=NUM_BINS,
    )


def _figure(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _grouped(number: int) -> str:
    """Thousands apart by a narrow space that never breaks."""
    return f"{number:,}".replace(",", "\u202f")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:  # noqa: PLR2004
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 0.1:  # noqa: PLR2004
        return f"{1000 * seconds:.1f} ms"
    if seconds < 600:  # noqa: PLR2004 - ten minutes
        return f"{seconds:.2f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 600 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004
