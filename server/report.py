"""The report of a finished run: the door through which results reach people.

Every number is computed from the files of the run folder, and what the folder records twice is
compared first, so that no report is written from files that disagree. It holds no date of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common import privacy_report
from common.audit import verify as verify_log
from common.errors import ConfigError, DataError, FederationError, RemoteProtocolError
from common.identity import Certified
from common.models.build import build_network
from common.models.flat import is_parameter
from common.privacy_report.texts import Texts
from common.seal import SIGNATURE, SUMS, check_files, check_signature_of, read_sums
from common.simulation import STUDY
from server.global_model import averaged_model, moving_average
from server.reporting.boxed import draw_boxed
from server.reporting.facts import facts_of
from server.reporting.figures import draw_pictures, draw_statistics
from server.reporting.overlays import draw_overlays
from server.reporting.page import render
from server.reporting.phantoms import draw_phantoms
from server.reporting.privacy import privacy_facts
from server.reporting.record import Facts, Record, read_record
from server.reporting.statements import check_statements
from server.reporting.worth import worth_of
from server.run_dir import AUDIT, EVALUATIONS, FINAL, ROUNDS, STATISTICS, SUMMARY, RunDir
from server.transcript import TRANSCRIPT

HTML, JSON = "report.html", "report.json"
REQUIRED: Final = (STUDY, SUMMARY, EVALUATIONS, TRANSCRIPT, AUDIT)
OF_ROUNDS: Final = (ROUNDS, FINAL, "counts/test.npy")  # of a run that trained


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
    # The models of single rounds are large: the returned one is compared below, verify reads all.
    check_files(folder, {name: sha for name, sha in digests.items() if "models/" not in name})
    record = read_record(run_dir, digests)
    check_record(record)
    facts = facts_of(record)
    if record.study.num_rounds:
        phantoms, overlays = draw_phantoms(record), draw_overlays(record) + draw_boxed(record)
        facts["worth"] = worth_of(record)
        facts["examples"] = [*(one.facts for one in phantoms), *(one.facts for one in overlays)]
        pictures = draw_pictures(facts, record.study, run_dir.counts("test"), phantoms)
    else:
        overlays, pictures = [], {**draw_statistics(facts), "seconds": []}
    page = render(facts, record.study, pictures, overlays)
    (folder / JSON).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / HTML).write_text(page, encoding="utf-8")
    write_privacy_report(record)
    return folder / HTML


def write_privacy_report(record: Record) -> None:
    """Write what a data-protection officer files: ``privacy-report.html`` and ``.json``."""
    folder, texts = record.run_dir.path, Texts()
    facts = privacy_facts(record, texts)
    (folder / privacy_report.JSON).write_bytes(_as_written(facts))
    (folder / privacy_report.HTML).write_text(
        privacy_report.render(facts, texts, folder), encoding="utf-8"
    )


@dataclass(frozen=True)
class Verified:
    """What was found intact."""

    num_files: int
    num_statements: int  # signatures and epsilon checked again
    num_lines: int  # of the audit log


def verify(folder: Path) -> Verified:
    """Check every file of a run folder, every signature and every figure again.

    Raises:
      ConfigError: The folder holds no finished run.
      FederationError: A file differs or is missing; the message names the first.
    """
    run_dir = RunDir(folder)
    digests = digests_of(run_dir)
    signer = check_signature_of(folder)
    check_files(folder, digests)
    record = read_record(run_dir, digests)
    check_signer(signer, record)
    check_record(record)
    try:
        num_statements = check_statements(record)
        log = verify_log(folder / AUDIT)
        check_privacy_report(record)
    except (DataError, RemoteProtocolError) as error:
        raise FederationError(str(error)) from None  # a verdict about a file: exit code 1
    return Verified(len(digests), num_statements, log.num_lines)


# Reading


def digests_of(run_dir: RunDir) -> dict[str, str]:
    """File name to SHA-256 by ``SHA256SUMS``, which the run writes last."""
    folder, sums = run_dir.path, run_dir.path / SUMS
    if not sums.exists() and not (folder / STUDY).exists():
        raise ConfigError(f"{folder} is not a run folder; give one that holds {STUDY} and {SUMS}")
    if not sums.exists():
        done = f"{len(run_dir.rounds())} of {run_dir.study().num_rounds} rounds are recorded"
        raise ConfigError(f"{folder}: the run is not finished ({done}); finish it with --resume")
    digests = read_sums(folder)
    manifests = [f"epoch-{number}.json" for number in run_dir.epochs()]
    of_rounds = OF_ROUNDS if run_dir.study().num_rounds else ()
    for name in (*REQUIRED, *of_rounds, *(manifests or ["epoch-1.json"])):
        if name not in digests:
            raise FederationError(f"{name} is not listed in {SUMS}; a finished run lists it")
    return digests


def check_record(record: Record) -> None:
    """Recompute what the summary says.

    Raises:
      FederationError: A recorded value is not what the other files give; the message names both.
    """
    check_statistics(record)
    if record.study.num_rounds:
        check_model(record)
    for what, file, computed, recorded in _recorded_twice(record):
        if not _same(computed, recorded):
            raise FederationError(
                f"{SUMMARY}: {what} is {str(recorded)[:80]}, {file} gives {str(computed)[:80]}; "
                "the files are not of one run, or another version of this program wrote them"
            )


def check_model(record: Record) -> None:
    """Hold the returned model against those of the rounds.

    Raises:
      FederationError: It is not what they give.
    """
    final = record.run_dir.final_model()
    for name, tensor in _returned_model(record).items():
        if name not in final or not np.array_equal(tensor, final[name]):
            raise FederationError(
                f"{FINAL}: {name} is not what models/ gives for round "
                f"{record.summary['returned_round']}, which {SUMMARY} says was returned"
            )
    for name, tensor in build_network(record.study).kept().items():
        if name not in final or not np.array_equal(tensor, final[name]):
            raise FederationError(f"{FINAL}: {name} is not what this study freezes it at")


def check_statistics(record: Record) -> None:
    """Recompute what ``statistics.json`` says, where the study asks for statistics.

    Raises:
      FederationError: It is missing, or is not what its counts give.
    """
    if record.study.statistics is None:
        return
    counts = f"counts/{STATISTICS}.npy"
    for name in (f"{STATISTICS}.json", counts):
        if name not in record.digests:
            raise FederationError(f"{name} is not listed in {SUMS}; the study asks for statistics")
    recorded = record.run_dir.statistics() or {}
    for key, computed in record.figures(STATISTICS).items():
        if not _same(computed, recorded.get(key)):
            raise FederationError(
                f"{STATISTICS}.json: {key} is {str(recorded.get(key))[:80]}, {counts} gives "
                f"{str(computed)[:80]}"
            )


def check_privacy_report(record: Record) -> None:
    """Refuse a privacy report that does not say what the run's files give; none is there to write.

    Raises:
      FederationError: The message names the file.
    """
    folder, texts = record.run_dir.path, Texts()
    path = folder / privacy_report.JSON
    if not path.exists():
        return
    facts = json.loads(json.dumps(privacy_facts(record, texts)))
    again = "another version of this program wrote it, or it was changed; fl-report writes it again"
    if path.read_bytes() != _as_written(facts):
        raise FederationError(f"{path.name} is not what the files of the run give: {again}")
    if (folder / privacy_report.HTML).read_bytes() != privacy_report.render(
        facts, texts, folder
    ).encode():
        raise FederationError(f"{privacy_report.HTML} is not what {path.name} gives: {again}")


def _as_written(facts: Facts) -> bytes:
    return json.dumps(facts, indent=2).encode() + b"\n"


def check_signer(signer: Certified, record: Record) -> None:
    """Refuse a list of digests that the run's coordinator did not sign.

    Raises:
      FederationError: Another party signed it.
    """
    for manifest in record.manifests:
        if signer.fingerprint != manifest.coordinator:
            raise FederationError(
                f"{SIGNATURE}: signed with key {signer.fingerprint[:12]}..., the coordinator of "
                f"epoch {manifest.epoch} has {manifest.coordinator[:12]}..."
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
    everybody = {name for manifest in record.manifests for name in manifest.names}
    sites = [name for name in record.study.site_names if name in everybody]
    yield "sites", "the manifests", sites, summary["sites"]
    yield "num_rounds", ROUNDS, len(rounds), summary["num_rounds"]
    by_round = summary["metrics"]["by_round"]
    yield "the length of metrics.by_round", ROUNDS, len(rounds), len(by_round)
    yield "survivors", ROUNDS, [line["survivors"] for line in rounds], summary["survivors"]
    seconds = [line["seconds"]["total"] for line in sums]
    yield "wall_s.per_round", ROUNDS, seconds[: len(rounds)], summary["wall_s"]["per_round"]
    yield "wall_s.total", EVALUATIONS, sum(seconds), summary["wall_s"]["total"]
    sent = {site: sum(line["bytes_up"].get(site, 0) for line in sums) for site in summary["sites"]}
    yield "bytes_up_per_site", EVALUATIONS, sent, summary["bytes_up_per_site"]
    final = record.digests.get(FINAL, "")
    yield "final_model_sha256", FINAL, final, summary["final_model_sha256"]
    tensors = record.run_dir.tensors(summary["returned_round"])
    num_params = sum(tensor.size for name, tensor in tensors.items() if is_parameter(name))
    yield "num_params", "models/", num_params, summary["num_params"]
    scored = {"test": summary["metrics"]["final"]} if record.study.num_rounds else {}
    for number, figures in enumerate(by_round, start=1):
        scored[f"validation-{number:04d}"] = figures
    for counts, figures in scored.items():
        for key, computed in record.figures(counts).items():
            yield f"{key} ({counts})", f"counts/{counts}.npy", computed, figures.get(key)


def _returned_model(record: Record) -> dict[str, NDArray[np.float32]]:
    """What travelled of the returned model, by the files of the rounds; frozen parts do not."""
    config, run_dir = record.study.server_optimizer, record.run_dir
    last = record.summary["returned_round"]
    if not config.ema:
        tensors = run_dir.tensors(last)
        return {name: tensor for name, tensor in tensors.items() if is_parameter(name)}
    average = {name: np.zeros_like(tensor) for name, tensor in run_dir.tensors(1).items()}
    for number in range(1, last + 1):
        for name, tensor in run_dir.tensors(number).items():
            average[name] = moving_average(average[name], tensor, config.ema)
    return {name: averaged_model({"ema": tensor}, config, last) for name, tensor in average.items()}


def _digest_as_written(settings: dict[str, Any]) -> str:
    """The study's digest by its file alone.

    ``Study.digest`` would change for an old run as soon as a study gains a setting with a default.
    """
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
