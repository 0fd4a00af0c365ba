"""Bytes on the wire per round and site, counted at the socket, of a masked round over mutual TLS.

The limit is what was promised: no more than 5 percent beyond the update's bits up, and beyond the
model's 4 bytes per parameter down. What is beyond stands in the settings.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from typing import Any

from our_rounds.wire import NUM_SITES, Traffic, traffic_of_rounds

NUM_PARAMS = 11_000_000
BITS = (32, 24, 16)
BEYOND = 1.05  # promised
MODEL_BYTES = 4  # of a parameter, as it comes down
MEGA = 1e6


def rows() -> list[dict[str, Any]]:
    """A row for each direction and each size of the ring."""
    made = []
    for bits in BITS:
        rounds = traffic_of_rounds(NUM_PARAMS, bits)
        made += [row(bits, rounds, is_up=True), row(bits, rounds, is_up=False)]
    return made


def row(bits: int, rounds: list[Traffic], *, is_up: bool) -> dict[str, Any]:
    """The median round; by what it was, and how many calls."""
    way = "up" if is_up else "down"
    least = NUM_PARAMS * (bits // 8 if is_up else MODEL_BYTES)
    ours = statistics.median(one.up if is_up else one.down for one in rounds)
    print(f"{bits} bits {way}: {ours / least - 1:.2%} beyond", file=sys.stderr, flush=True)
    middle = min(rounds, key=lambda one: abs((one.up if is_up else one.down) - ours))
    return {
        "case": f"{way}, {NUM_PARAMS:,} parameters, {bits} bits",
        "unit": "MB per round and site",
        "ours": ours / MEGA,
        "peers": {},
        "limit": {"promised": BEYOND * least / MEGA, "the parameters alone": least / MEGA},
        "better": "lower",
        "settings": {
            "num_params": NUM_PARAMS,
            "num_sites": NUM_SITES,
            "bits": bits,
            "rounds": len(rounds),
            "beyond_bytes": ours - least,
            "bytes": middle.told(is_up=is_up),
            "calls": dict(Counter(call.name for call in middle.calls)),
            "calls_of_coordinator": dict(Counter(c.name for c in middle.calls_of_coordinator)),
        },
    }
