"""What a person at the coordinator sees while a run goes on."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.cli import figures_line
from common.study import Study
from common.tasks import Figures
from server.secure_sum import Void

LOOK_S, SLOW_S, EVERY_S = 1.0, 5.0, 10.0  # a transfer that takes so long is shown, and how often


class ConsoleObserver:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._num_rounds = 0
        self._transfers = Transfers()

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

    def counted(self, figures: Figures) -> None:
        """What the images of all sites are like, before anything is trained."""
        for line in statistics_lines(figures):
            self._console.print(line, markup=False)  # [input] is no style

    def uploaded(self, site: str, num_uploads: int, num_sites: int) -> None:
        """On a terminal, show who has answered."""
        if self._progress is not None:
            self._update(description=f"{num_uploads}/{num_sites} uploads, last {site}")

    def receiving(self, num_bytes: Mapping[str, int]) -> None:
        """Show what is on its way, by site, and how fast; no word of what comes at once."""
        text = self._transfers.told(num_bytes)
        if not text:
            return
        if self._progress is not None:
            self._update(description=text)
        elif self._transfers.is_due():
            self._console.print(text)

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


def statistics_lines(figures: Figures) -> Iterator[str]:
    """The statistics in a few lines; ``statistics.json`` has all of them."""
    images, patients = figures["images"], figures["patients"]
    yield f"statistics: {images['train']} training images of {patients['train']} patients"
    if shown := [
        f"{entry['class']} in {entry['images']} ({entry['share_of_images']:.1%})"
        for entry in figures["classes"]
        if entry["share_of_images"] is not None
    ]:
        yield f"  classes: {', '.join(shown)}"
    for number, channel in enumerate(figures.get("grey", ()), start=1):
        named = f" of channel {number}" * (len(figures["grey"]) > 1)
        at = ", ".join(f"{p} %: {_short(value)}" for p, value in channel["percentiles"].items())
        yield f"  grey values{named}: {at}"
    for what, unit in (("side", "pixels"), ("spacing", "mm")):
        middles = [axis["50"] for axis in figures.get(what, ()) if axis["50"] is not None]
        if middles:
            yield f"  median {what}: {' x '.join(f'{each:.3g}' for each in middles)} {unit}"
    if suggested := figures.get("suggested"):
        chosen = ", ".join(f"{key} = {json.dumps(value)}" for key, value in suggested.items())
        yield f"  [input] of a study could say: {chosen}"
    if figures["images"]["train"] and "mean" not in figures.get("suggested", {"mean": 0}):
        yield "  no window: grey values lie outside the bins, or in few; see statistics.intensity"
    for column, num in figures.get("empty_cells", {}).items():
        yield f"  empty cells of {column!r}: {num}"


def _short(value: float | None) -> str:
    return "outside" if value is None else f"{value:.4g}"


class Transfers:
    """How fast answers come, from how much of them is there."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began: float | None = None  # since when something is on its way
        self._said = self._looked = -math.inf
        self._before: Mapping[str, int] = {}
        self._rate = 0.0  # bytes a second

    def told(self, num_bytes: Mapping[str, int]) -> str:
        """What is to be said now; nothing in the first seconds, and at most once a second."""
        now = self._now()
        if not num_bytes:
            self._began, self._before = None, {}
            return ""
        if self._began is None:
            self._began = self._looked = now
        if now - self._looked < LOOK_S:
            return ""
        new = sum(max(0, num - self._before.get(site, 0)) for site, num in num_bytes.items())
        self._rate = new / (now - self._looked)
        self._looked, self._before = now, dict(num_bytes)
        if now - self._began < SLOW_S:
            return ""
        came = ", ".join(f"{site} {num / 1e6:.0f} MB" for site, num in num_bytes.items())
        return f"receiving {came}; {self._rate / 1e6:.2f} MB/s"

    def is_due(self) -> bool:
        """Whether a log gets a line for it, too."""
        if self._now() - self._said < EVERY_S:
            return False
        self._said = self._now()
        return True


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


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The result of a run in a few lines."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if figures := summary["metrics"]["final"]:
        if not figures["num_examples"]:
            console.print("no site has a test image: set data.splits.test, or add a test split")
        console.print(
            f"test ({figures['num_examples']} images, model of round "
            f"{summary['returned_round']}): {figures_line(figures)}"
        )
        console.print(f"final_model_sha256 {summary['final_model_sha256']}")
    console.print(f"{summary['wall_s']['total']:.1f} s; run folder {folder}")
