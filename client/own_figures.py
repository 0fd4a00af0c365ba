"""What each model said on this hospital's own held-out images; only this hospital ever sees it.

The coordinator learns the figures of all sites together. How well the common model does here is in
one file per study, and ``fl-client report`` shows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.disk import replace_file
from common.errors import DataError
from common.study import Study

NAME = "own-figures.json"  # in a study's folder
PAGE = "own-figures.md"  # of all studies
FEW = 30  # images, below which the figures mean little


def keep_figures(
    folder: Path, study: Study, run: str, split: str, model_round: int, figures: dict[str, Any]
) -> None:
    """Note the figures of one model on one split; they replace those of the model before.

    Args:
      folder: Of the study, at the site.
      study: Named in the file.
      run: Another one begins a new file.
      split: ``validation`` or ``test``.
      model_round: Rounds that made the model.
      figures: As ``Task.figures`` gives them. Private.
    """
    known = _read(folder / NAME)
    if known.get("run") != run:
        known = {"study": study.name, "run": run}
    known[split] = {"round": model_round, "figures": figures}
    replace_file(folder / NAME, (json.dumps(known, indent=1) + "\n").encode())


def own_lines(state_dir: Path) -> Iterator[str]:
    """Lines for people: of every study the last run's figures here, its test images first.

    Raises:
      DataError: A file is damaged.
    """
    for path in sorted(state_dir.rglob(NAME)):
        known = _read(path)
        if not known:
            continue
        yield f"## Study {known['study']}, run {known['run'][:8]}"
        yield ""
        for split in ("test", "validation"):
            if split in known:
                yield from _of_split(split, **known[split])


def write_own_figures(state_dir: Path) -> Path | None:
    """Write ``own-figures.md``; None where no study scored a model here."""
    lines = list(own_lines(state_dir))
    if not lines:
        return None
    head = [
        "# Figures on this hospital's own images",
        "",
        "Of the common models, on images that were held out here. Nobody else has these numbers:",
        "the coordinator knows the sum over all sites alone.",
        "",
    ]
    path = state_dir / PAGE
    replace_file(path, ("\n".join([*head, *lines]).rstrip() + "\n").encode())
    return path


def _of_split(split: str, round: int, figures: dict[str, Any]) -> Iterator[str]:  # noqa: A002 - a key
    num = figures["num_examples"]
    yield f"Model of round {round} on {num} {split} images:"
    yield ""
    intervals = figures.get("intervals", {})
    for name, value in figures.items():
        if isinstance(value, float):
            interval = intervals.get(name)
            between = f" (95 %: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            yield f"* {name}: {value:.4f}{between}"
    yield ""
    if num < FEW:
        yield f"Fewer than {FEW} images: a single one changes these figures visibly."
        yield ""


def _read(path: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); remove it, the next round writes it") from None
    return known
