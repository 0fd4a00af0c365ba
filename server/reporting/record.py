"""A finished run as its files tell it: what every page, picture and figure is computed from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from common.config import read_table
from common.manifest import Manifest
from common.simulation import STUDY, Simulation
from common.study import Study
from common.tasks import Figures, task_of
from common.tasks.statistics import StatisticsTask
from server.run_dir import STATISTICS, RunDir
from server.transcript import read_transcript

Facts: TypeAlias = dict[str, Any]  # what report.json holds, or a part of it


@dataclass(frozen=True)
class Record:
    """A finished run."""

    run_dir: RunDir
    study: Study
    manifest: Manifest  # of the last epoch
    manifests: list[Manifest]
    transcript: list[dict[str, Any]]  # one line per message
    simulation: Simulation | None  # None: deployed
    settings: dict[str, Any]  # study.toml as it was written
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    digests: dict[str, str]  # file name to SHA-256, as SHA256SUMS has them

    def figures(self, counts: str) -> Figures:
        """Figures recomputed from ``counts/<counts>.npy``, as JSON holds them."""
        task = StatisticsTask(self.study) if counts == STATISTICS else task_of(self.study)
        recomputed = task.figures(self.run_dir.counts(counts))
        figures: Figures = json.loads(json.dumps(recomputed))
        return figures


def read_record(run_dir: RunDir, digests: dict[str, str]) -> Record:
    """Read everything a report is computed from; the files were found complete before."""
    summary, manifests = run_dir.summary(), run_dir.manifests()
    assert summary is not None  # noqa: S101 - it is in the list of digests
    simulation = run_dir.simulation() if run_dir.is_simulation else None
    return Record(
        run_dir=run_dir,
        study=run_dir.study(),
        manifest=manifests[-1],
        manifests=manifests,
        transcript=read_transcript(run_dir.path),
        simulation=simulation,
        settings=read_table(run_dir.path / STUDY),
        summary=summary,
        rounds=run_dir.rounds(),
        evaluations=run_dir.evaluations(),
        digests=digests,
    )
