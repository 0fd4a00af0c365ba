"""Every byte that a site and the coordinator send each other in a round, counted at the socket.

``python -m our_rounds.wire NUM_PARAMS BITS`` in ``bench/`` prints it. One site calls the
coordinator through a relay that counts; what its calls carry is counted in the site. The rest is
HTTP's and TLS's.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from our_rounds.deployment import deployed
from our_rounds.notes import read_notes
from our_rounds.relay import HOST, Relay, relayed
from our_rounds.wire_site import CALLS

NUM_ROUNDS, NUM_SITES = 3, 3


class Call(NamedTuple):
    """One question of the site and its answer, without what HTTP puts before them."""

    at: float
    name: str
    up: int  # bytes
    down: int


@dataclass(frozen=True)
class Traffic:
    """Of one site in one round."""

    up: int  # bytes at the socket
    down: int
    calls: Sequence[Call]

    def told(self, *, is_up: bool) -> dict[str, int]:
        """Bytes by what they were, in one direction."""
        total: Counter[str] = Counter()
        for call in self.calls:
            total[call.name] += call.up if is_up else call.down
        whole = self.up if is_up else self.down
        return {**total, "HTTP and TLS": whole - total.total()}


def traffic_of_rounds(num_params: int, bits: int) -> list[Traffic]:
    """Of one site, without the first round, when connections are made."""
    overrides = {"aggregation.ring_bits": bits}
    with deployed(num_params, NUM_ROUNDS, NUM_SITES, **overrides) as one:
        watched = one.made.names[0]
        with relayed(one.made.port) as relay:
            divert(one.made.site(watched), one.made.port, relay.port)
            one.run("our_rounds.coordinator", "our_rounds.wire_site")
        noted = read_notes(one.notes_of("coordinator"))
        calls = read_calls(one.notes_of(watched).with_suffix(CALLS))
    tasks = [event.began for event in noted if event.what.endswith("_task")]
    return [in_between(relay, calls, *bounds) for bounds in pairwise(tasks)][1:]


def divert(site: Path, port: int, relay_port: int) -> None:
    """Let a site call the relay."""
    text = site.read_text()
    site.write_text(text.replace(f"{HOST}:{port}", f"{HOST}:{relay_port}"))


def read_calls(path: Path) -> list[Call]:
    """What the site counted."""
    return [Call(*json.loads(line)) for line in path.read_text().splitlines()]


def in_between(relay: Relay, calls: Iterable[Call], since: float, until: float) -> Traffic:
    """All that was carried in a stretch of time."""
    return Traffic(
        relay.num_bytes(since, until, is_up=True),
        relay.num_bytes(since, until, is_up=False),
        [call for call in calls if since <= call.at < until],
    )


if __name__ == "__main__":
    params, ring_bits = map(int, sys.argv[1:])
    for traffic in traffic_of_rounds(params, ring_bits):
        counted = Counter(call.name for call in traffic.calls)
        print(f"up {traffic.up:,} bytes, down {traffic.down:,} bytes; calls: {dict(counted)}")
        print("  up:", traffic.told(is_up=True))
        print("  down:", traffic.told(is_up=False))
