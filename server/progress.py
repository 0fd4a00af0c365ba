"""What a person at the coordinator sees while a run goes on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.study import Study
from server.secure_sum import Void


class ConsoleObserver:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._num_rounds = 0

    def __enter__(self) -> Self:
        """Watch one run."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal in order, also when the run stopped early or failed."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def waiting(self, study: Study) -> Readiness:
        """Before a deployed run: who is there."""
        return Readiness(self._console, study)

    def started(self, study: Study, round_number: int, sites: Sequence[str]) -> None:
        """Announce the run; on a terminal, open the bar."""
        self._num_rounds = study.num_rounds
        self._console.print(
            f"study {study.name}  digest {study.digest()[:12]}  {len(sites)} sites  "
            f"{study.num_rounds} rounds" + (f"  resumed after {round_number}" * bool(round_number))
        )
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._progress.add_task("", total=study.num_rounds, completed=round_number)
            self._progress.start()

    def uploaded(self, site: str, num_uploads: int, num_sites: int) -> None:
        """On a terminal, show who has answered."""
        if self._progress is not None:
            self._update(description=f"{num_uploads}/{num_sites} uploads, last {site}")

    def finished_round(self, line: dict[str, Any]) -> None:
        """One line per round; the figures are those of the model the round began with."""
        shown = figures_line(line["incoming_validation"])
        self._console.print(
            f"round {line['round']:>3}/{self._num_rounds}  {len(line['survivors'])} sites  "
            f"{line['seconds']['total']:.1f} s  validation of round {line['round'] - 1}: {shown}"
        )
        if self._progress is not None:
            self._update(completed=line["round"])

    def voided(self, void: Void) -> None:
        """Say that nothing was learned, and why."""
        refusals = ", ".join(f"{site}: {reason}" for site, reason in void.refusals.items())
        self._console.print(
            f"sum {void.task.sum_number} is void: {len(void.survivors)} uploads"
            + (f" ({refusals})" if refusals else "")
            + (f"; unequal keys: {'; '.join(void.disputes)}" if void.disputes else "")
        )

    def renewed(self, number: int, sites: Sequence[str]) -> None:
        """Say who goes on."""
        self._console.print(f"epoch {number}: new keys among {', '.join(sites)}")

    def _update(self, **changes: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], **changes)


class Readiness:
    """Who is connected and ready: a live table on a terminal, a line per change elsewhere."""

    def __init__(self, console: Console, study: Study) -> None:
        self._console = console
        self._states: dict[str, str] = {}
        self._live: Live | None = None
        console.print(f"study {study.name}: waiting for {len(study.members)} sites")

    def show(self, states: Mapping[str, str]) -> None:
        """The state of every member now."""
        if states == self._states:
            return
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, transient=True)
                self._live.start()
            self._live.update(_table(states))
        else:
            for name, state in states.items():
                if state != self._states.get(name, "not connected"):
                    self._console.print(f"{name}: {state}")
        self._states = dict(states)

    def done(self, states: Mapping[str, str]) -> None:
        """The run starts."""
        if self._live is not None:
            self._live.stop()
        ready = [name for name, state in states.items() if state == "ready"]
        self._console.print(f"ready: {', '.join(ready)} ({len(ready)} of {len(states)})")


def _table(states: Mapping[str, str]) -> Table:
    table = Table("site", "state")
    for name, state in states.items():
        colour = {"ready": "green", "not connected": "dim"}.get(state, "yellow")
        table.add_row(name, f"[{colour}]{state}[/]")
    return table


def figures_line(figures: dict[str, Any]) -> str:
    """The scalar figures of a model, side by side."""
    return "  ".join(f"{k} {v:.4f}" for k, v in figures.items() if isinstance(v, float))


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The result of a run in a few lines."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    figures = summary["metrics"]["final"]
    if not figures["num_examples"]:
        console.print("no site has a test image: set data.splits.test, or add a test split")
    console.print(
        f"test ({figures['num_examples']} images, model of round "
        f"{summary['returned_round']}): {figures_line(figures)}"
    )
    console.print(f"final_model_sha256 {summary['final_model_sha256']}")
    console.print(f"{summary['wall_s']['total']:.1f} s; run folder {folder}")
