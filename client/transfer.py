"""A message on its way, object by object: what is tried again, and how it goes. No Flower here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self, TypeVar

import httpx

from common.disk import megabytes

PASSING = (408, 429, 502, 503, 504)  # HTTP statuses after which the same may be tried again
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # before the line is given up
TOGETHER = 2  # objects that are sent at once
SLOW_S, EVERY_S = 5.0, 10.0  # a transfer that takes so long is told of, and how often

Result = TypeVar("Result")
log = logging.getLogger("consilium.site")


class NotKept(Exception):  # noqa: N818 - what the other side did with it, not a defect
    """An object arrived, and the other side has it no more, or not yet."""


class Outgoing(Protocol):
    """A message of ours, of which the other side may have a part."""

    def announce(self) -> Mapping[str, int]:
        """Say what comes: the objects that the other side lacks, and how many bytes each has."""
        ...

    def send(self, object_id: str) -> None:
        """Send one of them."""
        ...


def send(message: Outgoing, stopped: threading.Event) -> None:
    """Send a message; after a hiccup of the line, what of it is missing still.

    Raises:
      httpx.HTTPError: The line is broken, or the other side wants nothing of it.
      NotKept: It does not keep what arrives.
    """
    with Meter("sending", "sent") as meter:

        def send_missing() -> None:
            missing = message.announce()
            meter.expect(len(missing), sum(missing.values()))
            _send_all(message, missing, meter)

        persistently(send_missing, stopped, lambda: meter.num_objects)


def _send_all(message: Outgoing, missing: Mapping[str, int], meter: Meter) -> None:
    """A few together; when one fails, those on their way are waited for, and no more begun."""

    def send_one(object_id: str) -> None:
        message.send(object_id)
        meter.moved(missing[object_id])

    with ThreadPoolExecutor(TOGETHER) as pool:
        for _ in pool.map(send_one, missing):
            pass


def persistently(
    attempt: Callable[[], Result],
    stopped: threading.Event,
    progress: Callable[[], int] = lambda: 0,
) -> Result:
    """Try again what a hiccup of the line has stopped, a few times, with growing pauses.

    Args:
      attempt: What may be repeated.
      stopped: Ends the pauses.
      progress: Grows when attempts get further: then all pauses may be made again.

    Raises:
      httpx.HTTPError: What the last attempt met, or something that does not pass.
      NotKept: The same.
    """
    left, before = list(PAUSES_S), progress()
    while True:
        try:
            return attempt()
        except (httpx.HTTPError, NotKept) as error:
            if progress() > before:
                left, before = list(PAUSES_S), progress()
            if not is_passing(error) or not left or stopped.wait(left.pop(0)):
                raise
            log.info("a transfer was interrupted (%s); going on where it stopped", _kind(error))


def is_passing(error: Exception) -> bool:
    """Whether the same may go well in a moment."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in PASSING
    return isinstance(error, httpx.TransportError | NotKept)


def _kind(error: Exception) -> str:
    """Without a word of the peer's."""
    match error:
        case httpx.HTTPStatusError():
            return f"HTTP status {error.response.status_code}"
        case httpx.TimeoutException():
            return "no answer in time"
        case NotKept():
            return "what arrived was not kept"
    return "the connection broke"


class Meter:
    """Counts what a transfer moves; where it takes long, the log says how it goes."""

    def __init__(self, doing: str, done: str) -> None:
        """Say what it is, in two words: "sending" and "sent"."""
        self._doing, self._done = doing, done
        self.num_objects, self.num_bytes = 0, 0
        self._all_objects, self._all_bytes = 0, 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        """Begin to watch."""
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Say that it is done, where it was said that it goes on."""
        self._ended.set()
        took_s = time.monotonic() - self._began
        if kind is None and took_s > SLOW_S:
            log.info(
                "%s %s in %.0f s, %s", self._done, megabytes(self.num_bytes), took_s, self._rate()
            )

    def expect(self, num_objects: int, num_bytes: int = 0) -> None:
        """Say how much is to come; 0 bytes where nobody knows."""
        self._all_objects = self.num_objects + num_objects
        self._all_bytes = self.num_bytes + num_bytes

    def moved(self, num_bytes: int) -> int:
        """Count one object; the bytes of all so far."""
        with self._lock:
            self.num_objects += 1
            self.num_bytes += num_bytes
            return self.num_bytes

    def _watch(self) -> None:
        pause = SLOW_S
        while not self._ended.wait(pause):
            pause = EVERY_S
            if self._all_bytes > self.num_bytes:
                amount, share = megabytes(self._all_bytes), self.num_bytes / self._all_bytes
            else:
                amount = f"{self._all_objects} objects"
                share = self.num_objects / max(1, self._all_objects)
            log.info("%s %s: %.0f %%, %s", self._doing, amount, 100 * share, self._rate())

    def _rate(self) -> str:
        return f"{self.num_bytes / 1e6 / max(1e-3, time.monotonic() - self._began):.2f} MB/s"
