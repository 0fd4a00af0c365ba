"""What a round costs on this site's link: the coordinator's link test, and a line about it.

The test moves pieces as a round does: over the same kind of connection, two at a time, no larger
than Flower cuts a model into. What comes before the connections run at full speed is left out.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx

from client.config import SiteConfig
from client.finding import Finding, ok, warning
from client.place import Place, open_line
from common.errors import FederationError
from common.models.flat import Schema
from common.study import Study
from common.traffic import Traffic, traffic_of

PATH = "/link-test"
TOGETHER = 2  # pieces on their way, as Flower pulls and pushes them
SMALLEST, LARGEST = 16 << 10, 5 << 20  # bytes of a piece; Flower's has 5 MB
STEADY_S = 0.5  # pieces that take so long are past TCP's slow start
MEASURED_S = 6.0  # each way
LEAST_BYTES, MOST_BYTES = 1 << 20, 32 << 20  # each way; in between, what a round moves
ENDS_S = 40.0  # with everything, whatever the coordinator does
NUM_PINGS = 5
# One after the other, in the two exchanges of a round: questions, small objects, confirmations.
ROUND_TRIPS_DOWN, ROUND_TRIPS_UP = 10, 7
FEWER_BITS = (24, 16)
NOTICED = 0.05  # of a round: a choice of ring bits that saves less is not mentioned
LARGE_PART = 0.5  # of the deadline for an upload
PIECE_S = 180.0  # a piece that takes longer is refused at the coordinator's door
STATUS_OK = 200
STATUSES = {
    404: "this coordinator has no link test; install the same release on both sides",
    429: "the coordinator is testing links for others, or has tested this one enough for now; "
    "try again in ten minutes",
}


class NotMeasured(Exception):  # noqa: N818 - a state of the link, not a defect
    """There is no figure; the message says why."""


@dataclass(frozen=True)
class Link:
    """What a link is worth to a round."""

    down: float  # bytes of messages per second
    up: float
    round_trip_s: float

    def seconds_down(self, traffic: Traffic) -> float:
        """For what a round brings."""
        return traffic.down / self.down + ROUND_TRIPS_DOWN * self.round_trip_s

    def seconds_up(self, traffic: Traffic) -> float:
        """For what a round takes away."""
        return traffic.up / self.up + ROUND_TRIPS_UP * self.round_trip_s


def check_link(config: SiteConfig, study: Study, schema: Schema) -> Iterator[Finding]:
    """Measure the link to the coordinator, and say what a round of a study costs on it.

    Args:
      config: With ``coordinator`` and ``[certificates]``; the coordinator was found to answer.
      study: What this site would take part in.
      schema: Of its model.
    """
    try:
        link = measure(Place.of(config), traffic_of(study, schema))
    except (NotMeasured, FederationError) as error:
        yield warning(f"link: not measured: {error}")
        return
    yield cost(link, study, schema)


def cost(link: Link, study: Study, schema: Schema) -> Finding:
    """One line: what a round of a study takes on this link, and what fewer bits would save."""
    traffic, bits = traffic_of(study, schema), study.aggregation.ring_bits
    down_s, up_s = link.seconds_down(traffic), link.seconds_up(traffic)
    total_s = down_s + up_s
    said = (
        f"link: {_mbit(link.down)} Mbit/s down, {_mbit(link.up)} up, {link.round_trip_s * 1e3:.0f} "
        f"ms; this model ({_number(schema.num_params)} parameters) takes {_seconds(total_s)} per "
        f"round on it: {_seconds(down_s)} down, {_seconds(up_s)} up at {bits} bits"
    )
    others = {k: link.seconds_up(traffic_of(study, schema, k)) for k in FEWER_BITS if k < bits}
    noticed = [k for k, seconds in others.items() if up_s - seconds > NOTICED * total_s]
    said += "".join(f", {_seconds(others[k])} up at {k}" for k in noticed)
    wrong = list(_too_slow(link, traffic, total_s, study.deadlines.upload_s))
    return warning("; ".join([said, *wrong])) if wrong else ok(said)


def _too_slow(link: Link, traffic: Traffic, total_s: float, deadline_s: float) -> Iterator[str]:
    piece_s = min(TOGETHER * LARGEST, traffic.body) / link.up
    if piece_s > PIECE_S:
        yield (
            f"the coordinator's door waits {PIECE_S:.0f} s for a piece of an update, and here one "
            f"takes {piece_s:.0f} s: no update will arrive; ask your network's operator for a "
            "faster link"
        )
    if total_s > LARGE_PART * deadline_s:
        yield (
            f"that is {total_s / deadline_s:.0%} of deadlines.upload_s ({deadline_s:g} s), in "
            "which this site also trains: ask the coordinator for a study with a longer one or "
            "fewer aggregation.ring_bits, or your network's operator for a faster link"
        )


def measure(place: Place, traffic: Traffic) -> Link:
    """Test the link both ways, for some 15 s where it is slow.

    Args:
      place: Where the coordinator is.
      traffic: Of a round; the test moves no more, unless that is very little.

    Raises:
      NotMeasured: The coordinator refuses, or the link breaks or stalls.
      ConfigError: A file of this site cannot be used.
    """
    line = open_line(place)
    try:
        test = _Test(line, f"https://{place.address}{PATH}", time.monotonic() + ENDS_S)
        test.together(test.ping)
        return Link(
            down=test.rate(test.pull, traffic.down),
            up=test.rate(test.push, traffic.up),
            round_trip_s=test.round_trip_s,
        )
    finally:
        line.close()


class _Test:
    """One link test, over connections that stay open.

    Args:
      line: To the coordinator.
      url: Of its link test.
      ends: When nobody waits any more, on the monotonic clock.
    """

    def __init__(self, line: httpx.Client, url: str, ends: float) -> None:
        self._line, self._url, self._ends = line, url, ends
        self._content = os.urandom(LARGEST)
        self.round_trip_s = ENDS_S

    def ping(self) -> None:
        """Ask for nothing, a few times."""
        for _ in range(NUM_PINGS):
            began = time.monotonic()
            self.pull(0)
            self.round_trip_s = min(self.round_trip_s, time.monotonic() - began)

    def pull(self, size: int) -> None:
        """Let the coordinator send a piece."""
        answer = self._line.get(self._url, params={"bytes": size})
        if _checked(answer) != size:
            raise NotMeasured("what answers there is no link test of Consilium")

    def push(self, size: int) -> None:
        """Send a piece; the answer says that all of it arrived."""
        _checked(self._line.post(self._url, content=self._content[:size]))

    def rate(self, move: Callable[[int], None], num_bytes: int) -> float:
        """Bytes per second of one direction, once it is steady."""
        most = min(max(LEAST_BYTES, num_bytes), MOST_BYTES)
        size = self._steady_size(move, most)
        pieces = iter(range(max(TOGETHER, most // size)))
        began = time.monotonic()
        moved: list[int] = []

        def work() -> None:
            while time.monotonic() < began + MEASURED_S and next(pieces, None) is not None:
                move(size)
                moved.append(size)

        self.together(work)
        took_s = time.monotonic() - began
        return sum(moved) / max(took_s - self.round_trip_s, took_s / 2)  # the first byte's way

    def _steady_size(self, move: Callable[[int], None], most: int) -> int:
        """Bytes of a piece with which this direction is past its start."""
        size = SMALLEST
        while True:
            began = time.monotonic()
            self.together(lambda: move(size))  # noqa: B023 - over before size changes
            took_s = time.monotonic() - began
            if took_s > STEADY_S or 2 * size > min(LARGEST, most / TOGETHER):
                return size
            size *= 2

    def together(self, work: Callable[[], None]) -> None:
        """Do the same over every connection.

        Raises:
          NotMeasured: It fails somewhere, or does not end in time.
        """
        failures: list[Exception] = []

        def worker() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - whatever a peer does; it is told below
                failures.append(error)

        # No pool: one waits for its threads at the end of the program, and a peer may hold them.
        threads = [threading.Thread(target=worker, daemon=True) for _ in range(TOGETHER)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self._ends - time.monotonic()))
        if failures:
            raise _why(failures[0])
        if any(thread.is_alive() for thread in threads):
            raise NotMeasured(
                f"the test did not end within {ENDS_S:.0f} s: the link is very slow, or stalls; "
                "ask your network's operator"
            )


def _checked(answer: httpx.Response) -> int:
    """Bytes of an answer to a link test."""
    if answer.status_code != STATUS_OK:
        told = STATUSES.get(answer.status_code, "ask its operator for the log")
        raise NotMeasured(f"HTTP status {answer.status_code}: {told}")
    return len(answer.content)


def _why(error: Exception) -> NotMeasured:
    if isinstance(error, NotMeasured | FederationError):
        return NotMeasured(str(error))
    return NotMeasured(f"the connection broke ({type(error).__name__}); try again")


def _mbit(rate: float) -> str:
    mbit = rate * 8 / 1e6
    return f"{mbit:.0f}" if mbit >= 100 else f"{mbit:.3g}"  # noqa: PLR2004


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004


def _number(num_params: int) -> str:
    is_large = num_params >= 100_000  # noqa: PLR2004
    return f"{num_params / 1e6:.1f} million" if is_large else f"{num_params:,}"
