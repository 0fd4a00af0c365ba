"""What a site measures its link against: bytes that come or go and mean nothing.

``GET /link-test?bytes=N`` sends N bytes, ``POST /link-test`` takes a body and drops it. Nothing is
kept and nothing of Flower is reached. A site has two places, as a round has two pieces on their
way, and an allowance: a link test must not take the coordinator's own link from the others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from server.superlink.asgi import Receive, Scope, Send, declared_length, reply

LINK_TEST = "/link-test"
MAX_TEST_BYTES = 5 << 20  # of one request: a piece of a model as Flower cuts it
MAX_OF_ONE, MAX_AT_ONCE = 2, 8  # requests of one site, and of all
ALLOWANCE_BYTES = 256 << 20  # of one site, both ways: two or three whole tests
REFILL_S = 600.0  # until a spent allowance is whole again: 3.6 Mbit/s
TEST_S = 30.0  # for one request; a site asks for what takes it a second
PIECE = os.urandom(1 << 16)  # nothing on the way can make it smaller
ASKED = re.compile(rb"bytes=(\d{1,9})")

log = logging.getLogger("consilium.listener")


@dataclass
class _Allowance:
    """Bytes that a site may still move."""

    left: float
    at: float  # when that was so


class LinkTest:
    """Answers the requests of members' link tests.

    Args:
      clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at_once: Counter[str] = Counter()
        self._allowed: dict[str, _Allowance] = {}

    async def answer(self, site: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request of a member.

        Args:
          site: Its name.
          scope: Of the request.
          receive: Its body.
          send: Takes the answer.
        """
        kind = _DIRECTIONS.get(scope["method"])
        if kind is None:
            await reply(send, 405, "GET or POST")
            return
        num_bytes_of, move = kind
        num_bytes = num_bytes_of(scope)
        if num_bytes is None:
            await reply(send, 411, "a length is needed")
        elif num_bytes > MAX_TEST_BYTES:
            await reply(send, 413, "too large")
        elif self._at_once[site] >= MAX_OF_ONE or self._at_once.total() >= MAX_AT_ONCE:
            await reply(send, 429, "too many link tests at once")
        elif not self._may_move(site, num_bytes):
            await reply(send, 429, "this site has tested its link enough for now")
        else:
            self._at_once[site] += 1
            try:
                await move(num_bytes, receive, send)
            except TimeoutError:
                log.warning("a link test of %s was cut off after %.0f s", site, TEST_S)
            finally:
                self._at_once[site] -= 1

    def _may_move(self, site: str, num_bytes: int) -> bool:
        """Whether its allowance covers these bytes, which are then taken from it."""
        now = self._clock()
        before = self._allowed.get(site, _Allowance(ALLOWANCE_BYTES, now))
        refilled = before.left + (now - before.at) * ALLOWANCE_BYTES / REFILL_S
        left = min(ALLOWANCE_BYTES, refilled) - num_bytes
        if left < 0:
            return False
        self._allowed[site] = _Allowance(left, now)
        return True


def _asked(scope: Scope) -> int | None:
    found = ASKED.fullmatch(scope["query_string"])
    return int(found[1]) if found else None


async def _send(num_bytes: int, _: Receive, send: Send) -> None:
    """Piece by piece: what a site is slow to take waits in its own link, not in memory.

    Raises:
      TimeoutError: It takes too long; the server then ends the connection.
    """
    headers = [(b"content-type", b"application/octet-stream")]
    headers.append((b"content-length", b"%d" % num_bytes))
    async with asyncio.timeout(TEST_S):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for left in range(num_bytes, 0, -len(PIECE)):
            body = PIECE[:left]
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _take(num_bytes: int, receive: Receive, send: Send) -> None:
    """Drop a body; the answer comes when all of it is here."""
    try:
        async with asyncio.timeout(TEST_S):
            while (event := await receive())["type"] == "http.request" and event["more_body"]:
                pass
    except TimeoutError:
        await reply(send, 408, "too slow")
    else:
        await reply(send, 200, str(num_bytes))


_DIRECTIONS = {"GET": (_asked, _send), "POST": (declared_length, _take)}
