"""What a privacy report says, as its JSON holds it: the parts that both kinds have in common."""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from common.errors import DataError
from common.privacy_report.texts import Texts
from common.seal import digest_of

Facts: TypeAlias = dict[str, Any]

PACKAGES = ("opacus", "dp-accounting", "torch", "cryptography", "flwr")
HTML, JSON = "privacy-report.html", "privacy-report.json"
PARTS = ("membership", "inversion", "limits", "failures")
ATTACKS, PIXELS = "attacks.json", "attacks.npz"  # what scripts/audit-privacy leaves
MANY = 1e6  # beyond it a factor is no promise that anybody can read


def promise(texts: Texts, unit: str, epsilon: float, delta: float) -> str:
    """The first sentence: what epsilon means for one unit."""
    factor = math.exp(min(epsilon, 700.0))
    return texts(
        f"promise.{unit}",
        epsilon=f"{epsilon:.3f}",
        delta=f"{delta:g}",
        factor=f"{factor:,.1f}" if factor < MANY else "more than a million",
    )


def assumptions(
    texts: Texts, unit: str, *, is_seeded: bool, is_simulated: bool = False
) -> list[str]:
    """What the promise stands on."""
    names = (
        *(["seeded"] if is_seeded else []),  # whoever reads on must know
        "sampling",
        "simulated" if is_simulated else "declared",
        *([] if is_seeded else ["os"]),
        *("checked", "charged", "after"),
    )
    return [texts(f"assumptions.{name}", unit=unit) for name in names]


def sent(messages: Iterable[Mapping[str, Any]], texts: Texts, file: str) -> Facts:
    """Messages that left, by kind.

    Args:
      messages: Each with ``kind`` and ``bytes``, and ``time`` where it is known.
      texts: Say what each kind holds.
      file: Has every single one.
    """
    by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for message in messages:
        by_kind[message["kind"]].append(message)
    kinds = [
        {
            "kind": kind,
            "holds": texts(f"left.{kind}"),
            "number": len(those),
            "bytes": sum(one["bytes"] for one in those),
            "first": min((one["time"] for one in those if "time" in one), default=None),
            "last": max((one["time"] for one in those if "time" in one), default=None),
        }
        for kind, those in by_kind.items()
    ]
    return {"file": file, "kinds": kinds}


def attacks_in(folder: Path) -> Facts | None:
    """What was tried on a study, if anything was.

    Raises:
      DataError: The file cannot be read.
    """
    path = folder / ATTACKS
    if not path.exists():
        return None
    try:
        table: Facts = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: table[name] for name in ("study", *PARTS)}
        return {**parts, "file": ATTACKS, "sha256": digest_of(path)}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not what scripts/audit-privacy writes ({error})") from None


def sources(folder: Path, files: Mapping[str, Path]) -> list[Facts]:
    """Files that a report's parts were calculated from, by what they gave."""
    return [
        {"what": what, "file": str(file.relative_to(folder)), "sha256": digest_of(file)}
        for what, file in files.items()
    ]


def versions() -> dict[str, str]:
    """Of what calculated the report."""
    return {"Python": platform.python_version()} | {name: version(name) for name in PACKAGES}
