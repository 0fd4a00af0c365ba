"""Run benchmarks and keep their rows: ``run.py [NAME]``.

Each ``bench/NAME.py`` has a function ``rows()``; its rows replace those of that name in
``bench/results.json``, and the table in ``bench/README.md`` is written anew.
"""

from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
README = HERE / "README.md"
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.name != "run.py")

INTRODUCTION = """\
# Benchmarks

`make bench` measures everything, `make bench BENCH=name` one file. Each row was measured in one run
in which ours, the peers and the limit took turns; figures are medians. Times of different rows or
machines are not comparable. Settings stand in `results.json`.

"""


def main() -> None:
    """Measure what the command line names, or everything."""
    chosen = sys.argv[1:] or NAMES
    if unknown := sorted(set(chosen) - set(NAMES)):
        sys.exit(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for name in chosen:
        fresh = [{"bench": name, **row, **circumstances()} for row in measure(name)]
        kept = [row for row in kept if row["bench"] != name] + fresh
    kept.sort(key=lambda row: row["bench"])
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    README.write_text(INTRODUCTION + table(kept))
    print(table(kept))


def measure(name: str) -> list[dict[str, Any]]:
    """The rows of one benchmark."""
    rows: list[dict[str, Any]] = importlib.import_module(name).rows()
    return rows


def circumstances() -> dict[str, Any]:
    """Where and when."""
    machine = {"cpus": os.cpu_count(), "arch": platform.machine(), "python": sys.version.split()[0]}
    return {"machine": machine, "date": dt.datetime.now(dt.UTC).date().isoformat()}


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as one Markdown table."""
    lines = ["| bench | case | unit | ours | others | limit | ours / limit |", "|---" * 7 + "|"]
    for row in rows:
        limit = row["limit"] or {}
        ratio = f"{row['ours'] / next(iter(limit.values())):.3f}" if limit else ""
        cells = [row["bench"], row["case"], row["unit"], f"{row['ours']:.3f}"]
        cells += [named(row["peers"]), named(limit), ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def named(values: dict[str, float]) -> str:
    """Names with their figures, in one cell."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
