"""A record of every message that passed the coordinator: what it could see, for the report.

It holds no content: kinds, sizes, times, and for each masked upload how likely so uneven a byte
histogram is if every byte is random.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from common.facts import sizes
from common.messages import Message, Upload
from server.network import Enough, Network, never

TRANSCRIPT = "transcript.jsonl"
SAMPLE_BYTES = 1 << 16  # of each upload
LEAST_BYTES = 2560  # ten of each value: below, the test says nothing


class ObservedNetwork:
    """A network whose messages are written down."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._network = network
        self._path = folder / TRANSCRIPT
        self._started = time.monotonic()

    def sites(self) -> Sequence[str]:
        """As the network says."""
        return self._network.sites()

    def ask(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        """Ask, and note what was sent and what came."""
        lines = [self._line("sent", site, message) for site, message in messages.items()]
        try:
            for site, reply in self._network.ask(messages, deadline_s, enough):
                lines.append(self._line("received", site, reply))
                yield site, reply
                del reply  # a body: the next one comes in its place
        except BaseException:
            with contextlib.suppress(OSError):  # a run that ends on a full disk says so itself
                self._note(lines)
            raise
        self._note(lines)

    def _note(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _line(self, direction: str, site: str, message: Message) -> dict[str, Any]:
        line = {
            "seconds": round(time.monotonic() - self._started, 3),
            "direction": direction,
            "site": site,
            "kind": type(message).__name__,
            "sum": getattr(message, "sum_number", None),
            "bytes": sizes(message),
        }
        if isinstance(message, Upload):
            line["uniformity"] = uniformity(message.body)
        return line


def uniformity(body: NDArray[np.uint8]) -> float | None:
    """Chance of a byte histogram at least this uneven if all bytes are random (chi-square).

    None for a body too short to tell.
    """
    sample = body[:SAMPLE_BYTES]
    if sample.size < LEAST_BYTES:
        return None
    found = np.bincount(sample, minlength=256)
    expected = sample.size / 256
    return float(chi2.sf(np.square(found - expected).sum() / expected, 255))


def read_transcript(folder: Path) -> list[dict[str, Any]]:
    """Every message of a run, in the order of the exchanges; a line cut by a crash is left out."""
    lines = []
    for line in (folder / TRANSCRIPT).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
