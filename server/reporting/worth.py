"""Was it worth it? A site's own figures with its own model, the common one, and all images pooled.

Beside them stands what a model says that never looks: every figure must beat that.

scripts/worth trains what a simulated run is compared with and leaves ``worth.json``. No deployed
run has it: nobody could pool the images there, and no site's figures are known to others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import FederationError
from common.simulation import WORTH
from server.reporting.glossary import title_of
from server.reporting.record import Facts, Record
from server.state import HIGHER_IS_BETTER

TRAINED = ("alone", "federated", "pooled")
WAYS = ("blind", *TRAINED)


def worth_of(record: Record) -> Facts | None:
    """The table and what it says; None where nothing was compared.

    Raises:
      FederationError: The file is not of this run.
    """
    path = record.run_dir.path / WORTH
    if record.simulation is None or not path.exists():
        return None
    figure = record.study.task.figures[1]  # the first after the loss is what a task is judged by
    wrong = FederationError(f"{WORTH} is not of this run and version; scripts/worth makes it again")
    try:
        found = json.loads(path.read_text("utf-8"))
        rows = [_row(name, found[name], figure) for name in record.summary["sites"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise wrong from None
    known = [row for row in rows if all(row[way]["value"] is not None for way in TRAINED)]
    better = 1 if HIGHER_IS_BETTER.get(figure, True) else -1
    gained = [better * (row["federated"]["value"] - row["alone"]["value"]) for row in known]
    return {
        "figure": figure,
        "title": title_of(figure),
        "sites": rows,
        "num_compared": len(known),
        "num_better": sum(gain > 0 for gain in gained),
        "means": {way: _mean([row[way]["value"] for row in known]) for way in WAYS},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _row(name: str, ways: Mapping[str, Mapping[str, Any]], figure: str) -> Facts:
    return {
        "site": name,
        "images": int(ways["federated"]["num_examples"]),
        **{
            way: {
                "value": None if ways[way][figure] is None else float(ways[way][figure]),
                "interval": ways[way].get("intervals", {}).get(figure),
            }
            for way in WAYS
        },
    }
