"""Whether the coordinator is reached: a line for every change, and when to try again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0  # between two attempts to connect
STEADY_S = 5.0  # a connection that held so long is a new beginning

log = logging.getLogger("consilium.site")


class Contact:
    """One site's contact with its coordinator, over all connections."""

    def __init__(self, address: str) -> None:
        """Before the first connection."""
        self._address = address
        self._made_at: float | None = None
        self._lost_at: float | None = None
        self._told = ""
        self._waits = growing(FIRST_WAIT_S, LONGEST_WAIT_S)

    def made(self) -> None:
        """A connection stands."""
        self._made_at = time.monotonic()
        if self._lost_at is None:
            log.info("connected to %s", self._address)
        else:
            gone_s = self._made_at - self._lost_at
            log.info("connected again to %s after %.0f s", self._address, gone_s)

    def lost(self, reason: str) -> float:
        """A connection broke, or none came about; seconds to wait before the next attempt."""
        now, made_at = time.monotonic(), self._made_at
        if made_at is not None:
            self._made_at, self._lost_at = None, now
            if now > made_at + STEADY_S:  # not one that ends as soon as it began
                self._waits, self._told = growing(FIRST_WAIT_S, LONGEST_WAIT_S), ""
        if reason != self._told:  # once, not every five seconds of a night
            log.warning("%s: %s; trying again for ever", self._address, reason)
            self._told = reason
        return next(self._waits)


def growing(first: float, longest: float) -> Iterator[float]:
    """Pauses that grow by half, with some chance in them: sites must not ask in step."""
    pause = first
    while True:
        yield pause * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
        pause = min(longest, pause * 1.5)
