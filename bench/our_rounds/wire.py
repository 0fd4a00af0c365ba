"""Every byte that a site and the coordinator send each other in a round, counted at the socket.

``python -m our_rounds.wire NUM_PARAMS BITS`` in ``bench/`` prints it. One site calls the
coordinator through a relay that counts; what its calls carry is counted in the site. The rest is
HTTP's and TLS's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from our_rounds.calls import Call, read_calls
from our_rounds.deployment import deployed
from our_rounds.notes import read_notes
from our_rounds.phases import bounds_of_rounds
from our_rounds.relay import HOST, relayed

NUM_ROUNDS, NUM_SITES = 3, 3


@dataclass(frozen=True)
class Traffic:
    """Of one site in one round."""

    up: int  # bytes at the socket
    down: int
    calls: Sequence[Call]
    calls_of_coordinator: Sequence[Call]  # for all sites together

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
        watched, coordinator = one.notes_of(one.made.names[0]), one.notes_of("coordinator")
        with relayed(one.made.port) as relay:
            divert(one.made.site(one.made.names[0]), one.made.port, relay.port)
            one.run("our_rounds.wire_coordinator", "our_rounds.wire_site")
        return [
            Traffic(
                relay.num_bytes(since, until, is_up=True),
                relay.num_bytes(since, until, is_up=False),
                read_calls(watched, since, until),
                read_calls(coordinator, since, until),
            )
            for since, until in list(pairwise(bounds_of_rounds(read_notes(coordinator))))[1:]
        ]


def divert(site: Path, port: int, relay_port: int) -> None:
    """Let a site call the relay."""
    text = site.read_text()
    site.write_text(text.replace(f"{HOST}:{port}", f"{HOST}:{relay_port}"))


if __name__ == "__main__":
    params, ring_bits = map(int, sys.argv[1:])
    for traffic in traffic_of_rounds(params, ring_bits):
        print(f"up {traffic.up:,} bytes, down {traffic.down:,} bytes")
        print("  up:", traffic.told(is_up=True))
        print("  down:", traffic.told(is_up=False))
        print("  calls:", Counter(call.name for call in traffic.calls))
        print("  coordinator's:", Counter(call.name for call in traffic.calls_of_coordinator))
