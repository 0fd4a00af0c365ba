"""What the coordinator could see, computed from the record of the run's own messages."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import numpy as np

from common.manifest import most_colluders
from server.reporting.record import Facts, Record

# What each message of a site holds for its reader, in the order of a run.
SITE_MESSAGES: Final = {
    "SiteKeys": "fresh public keys of an epoch, a certificate, a signature",
    "Agreement": "encapsulated secrets for other sites, which only those can open; a signature",
    "Upload": "the update, its weight and all counts under masks; shares sealed for other sites; "
    "commitments; in a private study, the privacy statement in clear",
    "Vote": "a signature under the list of survivors",
    "Shares": "shares of the survivors' self masks and of the dropouts' pair masks, of one sum",
    "Refusal": "one word",
    "Introduction": "a simulated site's number",
}
CLEAR: Final = {"Upload": ("statement",)}  # fields that hold a site's own numbers in clear


def seen_by_coordinator(record: Record) -> Facts:
    """Messages by kind, how even the masked bytes were, and how many sums were learned."""
    received = [line for line in record.transcript if line["direction"] == "received"]
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in received:
        by_kind[line["kind"]].append(line)
    sums = [*record.rounds, *record.evaluations]
    chances = [line["uniformity"] for line in by_kind["Upload"] if line["uniformity"] is not None]
    return {
        "messages": [
            {
                "kind": kind,
                "holds": holds,
                "number": len(by_kind[kind]),
                "bytes": sum(sum(line["bytes"].values()) for line in by_kind[kind]),
                "clear_bytes": sum(
                    line["bytes"][name] for line in by_kind[kind] for name in CLEAR.get(kind, ())
                ),
            }
            for kind, holds in SITE_MESSAGES.items()
            if by_kind[kind]
        ],
        "sums": len(sums),
        "fewest_sites_in_a_sum": min(len(line["survivors"]) for line in sums),
        "threshold": record.manifest.threshold,
        "epochs": len(record.manifests),
        "colluders": most_colluders(len(record.study.members), record.study.cohort.min_sites),
        "votes": sum(line["kind"] == "Vote" for line in received),
        "uniformity": _uniformity(chances),
        "convicted": {site: what for line in sums for site, what in line["convicted"].items()},
        "disputes": [dispute for line in sums for dispute in line["disputes"]],
    }


def _uniformity(chances: list[float]) -> Facts | None:
    """How even the bytes of the masked uploads were; None where they were too short to tell."""
    if not chances:
        return None
    return {
        "uploads": len(chances),
        "smallest": min(chances),
        "median": float(np.median(chances)),
    }
