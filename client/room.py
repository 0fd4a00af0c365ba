"""A full disk ends nothing at a site: it waits, and what could not be written is done again.

Every step of a site may be repeated after a failure in its middle, as after a crash: a message is
answered with the same bytes, a debit is charged once, a line of a book is whole or not there.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.disk import existing, free_bytes, has_room, is_full, megabytes
from common.errors import DataError

RETRY_S = 3.0
SPARE_BYTES = 4 << 20  # for the books, beside what a message makes this site write

Result = TypeVar("Result")
log = logging.getLogger("consilium.site")


class Stopped(BaseException):
    """The program is to end; it waited for room."""


class Room:
    """Whether the disk takes what this site writes."""

    def __init__(self, folder: Path, stopped: threading.Event) -> None:
        """Say where this site writes, and what ends the waiting."""
        self._folder = folder
        self._stopped = stopped
        self._full_since: float | None = None

    def wait_through(
        self, step: Callable[[], Result], *, num_bytes: int = 0, within_s: float = math.inf
    ) -> Result:
        """Take a step as often as it needs until the disk has room for it.

        Args:
          step: What may be repeated.
          num_bytes: That it writes at most, beside lines of the books. Without room for them it is
            not begun: a training would be for nothing.
          within_s: Nobody waits for it longer.

        Raises:
          Stopped: The program is to end.
          DataError: There was no room for so long.
        """
        end, needed = time.monotonic() + within_s, num_bytes + SPARE_BYTES
        if free_bytes(self._folder) < needed and not self._has(needed):
            self._wait(needed, end)
        self._say_that_it_is_over()
        while True:
            try:
                return step()
            except OSError as error:
                if not is_full(error):
                    raise
                reason = f"{error.strerror}; "
            self._wait(needed, end, reason)  # out here: the error would hold what failed in memory

    def _has(self, num_bytes: int) -> bool:
        return has_room(existing(self._folder), num_bytes)

    def _wait(self, needed: int, end: float, reason: str = "") -> None:
        if self._full_since is None:  # once, however many messages come meanwhile
            self._full_since = time.monotonic()
            log.warning(
                "%s: the disk is full (%s%s free): nothing is answered until %s are free; make "
                "room, this site then goes on by itself",
                self._folder,
                reason,
                megabytes(free_bytes(self._folder)),
                megabytes(needed),
            )
        while True:
            if self._stopped.wait(RETRY_S):
                raise Stopped
            if time.monotonic() > end:
                raise DataError(
                    f"{self._folder}: the disk was full until nobody waited for this answer any "
                    "more; nothing was sent"
                )
            if self._has(needed):
                self._say_that_it_is_over()
                return

    def _say_that_it_is_over(self) -> None:
        if self._full_since is not None:
            took_s = time.monotonic() - self._full_since
            log.info("%s: there is room again after %.0f s", self._folder, took_s)
            self._full_since = None
