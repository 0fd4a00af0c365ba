"""Too much, too slow, too many: callers at the public door who keep it busy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from callers import (
    BAD,
    GOOD,
    HOST,
    PULL,
    Caller,
    Line,
    found_with_stranger,
    is_served,
    node_headers,
    pull_request,
    request,
    site_of,
    told_of,
)
from deployment import Consortium

from common.identity import Certified
from server.superlink import link_test, listener, peer_protocol
from server.superlink.doorkeeper import Doorkeeper
from server.superlink.launcher import SuperLink
from server.superlink.link_test import LINK_TEST, MAX_OF_ONE, MAX_TEST_BYTES
from server.superlink.listener import (
    MAX_BODY_BYTES,
    MAX_TOGETHER,
    PublicListener,
    public_config,
    tls_context,
)
from server.superlink.peer_protocol import MAX_FROM_ONE

CUT = 0  # in place of a status: the connection was closed


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return found_with_stranger(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def superlink(consortium: Consortium) -> Iterator[SuperLink]:
    told = told_of(consortium)
    with SuperLink.start(told, consortium.folder / "superlink.log") as started:
        yield started


@pytest.fixture
def door(consortium: Consortium, superlink: SuperLink) -> Iterator[Consortium]:
    """The public listener; after every test it serves a good member, and its log has no defect."""
    yield consortium
    is_served(site_of(consortium, GOOD), consortium.folder / "node-of-good")
    assert "Traceback" not in (consortium.folder / "superlink.log").read_text()


def test_a_body_that_declares_too_much_is_refused_before_it_is_sent(door: Consortium) -> None:
    bad = site_of(door, BAD)
    headers = {**node_headers(bad.identity), "content-length": str(MAX_BODY_BYTES + 1)}
    with bad.connected() as line:
        assert line.ask(request(PULL, headers=headers)).status == 413
        assert line.is_closed()


@pytest.mark.parametrize("length", ["99999999999999999999", "-1", "+5", "0x10", "5, 5", "five"])
def test_a_length_that_is_none_is_refused(door: Consortium, length: str) -> None:
    bad = site_of(door, BAD)
    headers = {**node_headers(bad.identity), "content-length": length}
    assert bad.ask(request(PULL, b"12345", headers=headers)).status in {400, 413}


def test_a_body_without_a_declared_length_is_refused(door: Consortium) -> None:
    """Pieces, their extensions and what trails them have no bound; Flower's clients send none."""
    bad = site_of(door, BAD)
    headers = {
        **node_headers(bad.identity),
        "content-length": "",
        "transfer-encoding": "chunked",
    }
    with bad.connected() as line:
        assert line.ask(request(PULL, b"5\r\n12345\r\n", headers=headers)).status == 411
        assert line.is_closed()


@pytest.mark.parametrize(
    "lengths",
    [
        "content-length: 5\r\ncontent-length: 60\r\n",
        "content-length: 60\r\ncontent-length: 5\r\n",
        "content-length: 5\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 5\r\n",
        "transfer-encoding: identity, chunked\r\ncontent-length: 5\r\n",
        "transfer-encoding: \x0bchunked\r\ncontent-length: 5\r\n",
        "content-length : 5\r\n",
        "content-length: 5\r\n x: y\r\n",
    ],
)
def test_a_request_that_hides_another_is_refused_with_it(door: Consortium, lengths: str) -> None:
    bad = site_of(door, BAD)
    hidden = request("/health", method="GET")
    signed = "".join(f"{k}: {v}\r\n" for k, v in node_headers(bad.identity).items())
    smuggled = f"POST {PULL} HTTP/1.1\r\nhost: x\r\n{signed}{lengths}\r\n0\r\n\r\n".encode()
    with bad.connected() as line:
        assert line.ask(smuggled + hidden).status in {400, 411}
        assert line.is_closed()  # nothing of what was hidden was answered


def test_a_huge_header_is_cut_off(door: Consortium) -> None:
    bad = site_of(door, BAD)
    with bad.connected() as line:
        line.send(b"GET /health HTTP/1.1\r\nx-filler: ")
        assert bytes_until_cut(line, b"x" * 60_000) < 8 << 20  # what was on its way counts, too


def test_many_headers_are_cut_off(door: Consortium) -> None:
    bad = site_of(door, BAD)
    with bad.connected() as line:
        line.send(b"GET /health HTTP/1.1\r\n")
        assert bytes_until_cut(line, b"x: y\r\n" * 10_000) < 8 << 20


def bytes_until_cut(line: Line, more: bytes) -> int:
    """How much is sent until the other side hangs up; it stops at 64 MB."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < 64 << 20:
            line.send(more)
            sent += len(more)
    return sent


@pytest.mark.parametrize(
    "junk",
    [b"\x00" * 100, b"\r\n" * 1000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    ids=["zeros", "empty lines", "HTTP/2"],
)
def test_what_is_no_http_ends_the_connection(door: Consortium, junk: bytes) -> None:
    with site_of(door, BAD).connected() as line:
        line.send(junk + b"\x00\r\n\r\n")
        assert line.answer().status == 400
        assert line.is_closed()


def test_a_body_that_is_no_request_of_flowers_is_refused(door: Consortium) -> None:
    bad = site_of(door, BAD)
    with bad.connected() as line:
        for _ in range(3):  # the connection goes on: it was a whole request
            answer = line.ask(request(PULL, b"\xff" * 1000, headers=node_headers(bad.identity)))
            assert answer.status == 400
            assert b"/" not in answer.body  # no path of the coordinator's


def test_a_connection_that_ends_within_a_body_leaves_nothing_behind(door: Consortium) -> None:
    bad = site_of(door, BAD)
    headers = {**node_headers(bad.identity), "content-length": "1000"}
    for _ in range(MAX_TOGETHER + 1):  # each would hold one of the member's places
        with bad.connected() as line:
            line.send(request(PULL, b"half", headers=headers))
    time.sleep(0.2)
    assert bad.ask(request("/health", method="GET")).status == 200
    assert bad.ask(pull_request(bad.identity, 1)).status == 401  # not 429


def test_one_member_with_200_connections_gets_its_share_and_the_others_theirs(
    door: Consortium, tmp_path: Path
) -> None:
    bad = site_of(door, BAD)
    headers = {**node_headers(bad.identity), "content-length": "1000"}
    with ExitStack() as stack:
        lines = [stack.enter_context(bad.connected()) for _ in range(200)]
        for line in lines:
            with contextlib.suppress(OSError):
                line.send(request(PULL, b"half", headers=headers))
        waiting, statuses = lines, Counter[int]()
        while len(waiting) > MAX_TOGETHER:
            waiting = [line for line in waiting if not _is_answered(line, statuses)]
        for _ in range(3):
            is_served(site_of(door, GOOD), tmp_path / "good")
    assert len(waiting) == MAX_TOGETHER  # for their bodies
    assert statuses == {429: MAX_FROM_ONE - MAX_TOGETHER, CUT: 200 - MAX_FROM_ONE}


def test_a_stranger_cannot_use_up_the_connections(door: Consortium, tmp_path: Path) -> None:
    """TLS lets every certificate of the CA in, also revoked ones; requests tell them apart."""
    with ExitStack() as stack:
        stranger = site_of(door, "stranger")
        lines = [stack.enter_context(stranger.connected()) for _ in range(MAX_FROM_ONE + 10)]
        assert all(line.is_closed() for line in lines[MAX_FROM_ONE:])
        is_served(site_of(door, GOOD), tmp_path / "good")


def test_200_connections_that_never_start_tls_keep_nobody_out(
    door: Consortium, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((HOST, door.port), 10))
        for _ in range(3):
            is_served(site_of(door, GOOD), tmp_path / "good")


def _is_answered(line: Line, statuses: Counter[int]) -> bool:
    """Whether anything came; it is counted."""
    line._connection.settimeout(0.01)
    try:
        statuses[line.answer().status] += 1
    except TimeoutError:
        return False
    except OSError:
        statuses[CUT] += 1
    return True


# Slow callers, at a listener in this process with short limits


class Echo:
    """In Flower's place: answers with the length of the body that reached it."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        assert not event["more_body"]
        self.lengths.append(len(event["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class NoNodes:
    """There is no Flower to tell of members."""

    def register(self, site: Certified) -> None:
        pass

    def leave(self, name: str) -> None:
        pass


@pytest.fixture
def near(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Echo, Callable[[str], Caller]]]:
    """The app behind the listener, and who calls by name."""
    for where, name in ((listener, "BODY_S"), (listener, "PAUSE_S"), (peer_protocol, "HEAD_S")):
        monkeypatch.setattr(where, name, 60.0)  # each test makes one of them short
    monkeypatch.setattr(listener, "KEEP_ALIVE_S", 1)
    told, echo = told_of(consortium), Echo()
    doorkeeper = Doorkeeper(Path(told.ca), Path(told.revocation_list), told.members)
    door = PublicListener(echo, doorkeeper, NoNodes(), {})
    context = tls_context(Path(told.ca), Path(told.certificate), Path(told.key))
    server = uvicorn.Server(public_config(door, context))
    with socket.create_server((HOST, 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=asyncio.run, args=[server._serve([listening])])
        thread.start()
        yield echo, lambda name: replace(site_of(consortium, name), port=port)
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


Near = tuple[Echo, Callable[[str], Caller]]


def post(caller: Caller, length: int) -> bytes:
    """The head of a request whose body comes later."""
    headers = {**node_headers(caller.identity), "content-length": str(length)}
    return request(PULL, headers=headers)


def test_a_whole_body_reaches_flower_and_a_largest_one_too(near: Near) -> None:
    echo, caller = near
    good = caller(GOOD)
    with good.connected() as line:
        for length in (0, 5, MAX_BODY_BYTES):
            assert line.ask(post(good, length) + b"x" * length).status == 200
    assert echo.lengths == [0, 5, MAX_BODY_BYTES]


def test_a_body_of_a_byte_now_and_then_ends_at_its_limit(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "BODY_S", 1.5)
    echo, caller = near
    bad, good = caller(BAD), caller(GOOD)
    with bad.connected() as line:
        line.send(post(bad, 1000))
        started = time.monotonic()
        while time.monotonic() - started < 1.2:
            line.send(b"x")
            assert good.ask(post(good, 1) + b"x").status == 200  # the others are served meanwhile
            time.sleep(0.2)
        assert line.answer().status == 408
        assert time.monotonic() - started > 1.4
        assert line.is_closed()
    assert set(echo.lengths) == {1}


def test_a_body_that_stops_in_the_middle_ends_after_a_pause(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PAUSE_S", 0.5)
    echo, caller = near
    bad = caller(BAD)
    with bad.connected() as line:
        line.send(post(bad, 1000) + b"half")
        assert line.answer().status == 408
        assert line.is_closed()
    assert echo.lengths == []


def test_a_head_of_a_byte_now_and_then_ends_at_its_limit(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_protocol, "HEAD_S", 1.0)
    _, caller = near
    with caller(BAD).connected() as line:
        started = time.monotonic()
        line.send(b"GET /health HTTP/1.1\r\nx-filler: ")
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 8:
                line.send(b"x")
                time.sleep(0.1)
        assert 0.8 < time.monotonic() - started < 8


@pytest.mark.parametrize("asked", [False, True], ids=["at once", "after an answer"])
def test_a_connection_that_asks_nothing_is_closed(
    near: Near, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.setattr(peer_protocol, "HEAD_S", 60.0 if asked else 1.0)
    _, caller = near
    with caller(BAD).connected() as line:
        if asked:
            assert line.ask(request("/health", method="GET")).status == 200
        started = time.monotonic()
        assert line.is_closed()
        assert time.monotonic() - started > 0.8


def test_a_second_request_may_take_its_time_too(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a head is its own, not the connection's."""
    monkeypatch.setattr(peer_protocol, "HEAD_S", 1.0)
    _, caller = near
    good = caller(GOOD)
    with good.connected() as line:
        for _ in range(4):
            assert line.ask(post(good, 1) + b"x").status == 200
            time.sleep(0.4)


def test_a_member_whose_bodies_are_slow_gets_its_places_back(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PAUSE_S", 2.0)
    _, caller = near
    bad = caller(BAD)
    with ExitStack() as stack:
        lines = [stack.enter_context(bad.connected()) for _ in range(MAX_TOGETHER)]
        for line in lines:
            line.send(post(bad, 1000))
        time.sleep(0.1)
        assert bad.ask(post(bad, 1) + b"x").status == 429
        assert {line.answer().status for line in lines} == {408}
    assert bad.ask(post(bad, 1) + b"x").status == 200


def test_link_tests_that_nobody_reads_or_ends_give_their_places_back(
    near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_test, "TEST_S", 2.0)
    echo, caller = near
    bad = caller(BAD)
    pull = request(f"{LINK_TEST}?bytes={MAX_TEST_BYTES}", method="GET")
    with ExitStack() as stack:
        lines = [stack.enter_context(bad.connected()) for _ in range(MAX_OF_ONE)]
        lines[0].send(pull)  # more than what is on the way can hold
        lines[1].send(request(LINK_TEST, b"half", headers={"content-length": "1000"}))
        time.sleep(0.2)
        assert bad.ask(pull).status == 429
        assert caller(GOOD).ask(pull).status == 200
        assert lines[1].answer().status == 408
        with pytest.raises(ConnectionError):
            lines[0].answer()
    assert bad.ask(pull).status == 200
    assert echo.lengths == []  # nothing of it reached Flower
