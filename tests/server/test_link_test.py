"""The coordinator's side of a link test: what it sends, takes and refuses."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.superlink import link_test
from server.superlink.link_test import (
    ALLOWANCE_BYTES,
    LINK_TEST,
    MAX_AT_ONCE,
    MAX_OF_ONE,
    MAX_TEST_BYTES,
    REFILL_S,
    LinkTest,
)

SITE = "site-1"


@dataclass
class Asked:
    """One request, and what came of it."""

    status: int = 0
    body: int = 0  # bytes that came
    is_whole: bool = False
    headers: dict[bytes, bytes] = field(default_factory=dict)


def scope_of(method: str, query: str = "", length: str | None = None) -> dict[str, Any]:
    headers = [] if length is None else [(b"content-length", length.encode())]
    return {
        "type": "http",
        "method": method,
        "path": LINK_TEST,
        "query_string": query.encode(),
        "headers": headers,
    }


async def ask(
    test: LinkTest, scope: dict[str, Any], body: bytes = b"", site: str = SITE, pause_s: float = 0.0
) -> Asked:
    """Ask, and take the answer piece by piece with a pause before each."""
    asked = Asked()
    pieces = [body[k : k + 1000] for k in range(0, len(body), 1000)] or [b""]

    async def receive() -> Any:
        await asyncio.sleep(pause_s)
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(event: Any) -> None:
        await asyncio.sleep(pause_s)
        if event["type"] == "http.response.start":
            asked.status, asked.headers = event["status"], dict(event["headers"])
        else:
            asked.body += len(event["body"])
            asked.is_whole = not event.get("more_body", False)

    await test.answer(site, scope, receive, send)
    return asked


def pull(test: LinkTest, num_bytes: int, site: str = SITE) -> Asked:
    return asyncio.run(ask(test, scope_of("GET", f"bytes={num_bytes}"), site=site))


def push(test: LinkTest, num_bytes: int) -> Asked:
    return asyncio.run(ask(test, scope_of("POST", length=str(num_bytes)), bytes(num_bytes)))


@pytest.mark.parametrize("num_bytes", [0, 1, 65536, 65537, MAX_TEST_BYTES])
def test_as_many_bytes_come_as_were_asked_for(num_bytes: int) -> None:
    asked = pull(LinkTest(), num_bytes)
    assert (asked.status, asked.body, asked.is_whole) == (200, num_bytes, True)
    assert asked.headers[b"content-length"] == b"%d" % num_bytes


@pytest.mark.parametrize("num_bytes", [0, 1, 5000])
def test_a_body_is_taken_whole_and_its_length_told(num_bytes: int) -> None:
    assert push(LinkTest(), num_bytes).status == 200


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        (scope_of("GET"), 411),
        (scope_of("GET", "bytes="), 411),
        (scope_of("GET", "bytes=-1"), 411),
        (scope_of("GET", "bytes=1&bytes=2"), 411),
        (scope_of("GET", "bytes=9999999999"), 411),
        (scope_of("GET", f"bytes={MAX_TEST_BYTES + 1}"), 413),
        (scope_of("POST"), 411),
        (scope_of("POST", length="x"), 411),
        (scope_of("POST", length=str(MAX_TEST_BYTES + 1)), 413),
        (scope_of("PUT", "bytes=1", "1"), 405),
        (scope_of("HEAD", "bytes=1"), 405),
    ],
)
def test_anything_else_is_refused_and_the_connection_ends(
    scope: dict[str, Any], status: int
) -> None:
    asked = asyncio.run(ask(LinkTest(), scope))
    assert (asked.status, asked.headers[b"connection"]) == (status, b"close")


def test_a_site_has_two_places_and_all_together_eight() -> None:
    async def at_once(sites: list[str]) -> list[int]:
        test = LinkTest()
        scope = scope_of("GET", "bytes=10")
        asked = await asyncio.gather(*(ask(test, scope, b"", site, 0.01) for site in sites))
        again = await ask(test, scope, b"", sites[0])
        assert again.status == 200  # places come back
        return [each.status for each in asked]

    assert asyncio.run(at_once([SITE] * 4)) == [200] * MAX_OF_ONE + [429] * 2
    sites = [f"site-{number}" for number in range(MAX_AT_ONCE + 1)]
    assert asyncio.run(at_once(sites)) == [200] * MAX_AT_ONCE + [429]


def test_what_a_site_may_move_is_bounded_and_comes_back_slowly() -> None:
    now = [0.0]
    test = LinkTest(lambda: now[0])
    for number in range(ALLOWANCE_BYTES // MAX_TEST_BYTES):
        move = pull if number % 5 else push
        assert move(test, MAX_TEST_BYTES).status == 200
    assert pull(test, MAX_TEST_BYTES).status == 429
    assert push(test, MAX_TEST_BYTES).status == 429
    assert pull(test, MAX_TEST_BYTES, "site-2").status == 200  # the others have their own
    now[0] += 2 * REFILL_S * MAX_TEST_BYTES / ALLOWANCE_BYTES
    assert [pull(test, MAX_TEST_BYTES).status for _ in range(3)] == [200, 200, 429]
    now[0] += 100 * REFILL_S
    statuses = [pull(test, MAX_TEST_BYTES).status for _ in range(60)]
    assert statuses.count(200) == ALLOWANCE_BYTES // MAX_TEST_BYTES  # it grows no further


def test_who_is_too_slow_is_cut_off_and_gives_the_place_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link_test, "TEST_S", 0.05)

    async def slow() -> tuple[list[Asked], Asked]:
        test = LinkTest()
        pulled = ask(test, scope_of("GET", "bytes=500000"), pause_s=0.02)
        pushed = ask(test, scope_of("POST", length="9000"), bytes(9000), pause_s=0.02)
        both = await asyncio.gather(pulled, pushed)
        return both, await ask(test, scope_of("GET", "bytes=1"))

    (pulled, pushed), after = asyncio.run(slow())
    assert pulled.body < 500_000
    assert not pulled.is_whole  # the server then closes the connection
    assert pushed.status == 408
    assert after.status == 200
    assert "a link test of site-1 was cut off" in caplog.text
