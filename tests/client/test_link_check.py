"""What ``check`` says about a link, and what it does when there is nothing to say."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from callers import GOOD, HOST, found_with_stranger, place_of, site_of, told_of
from deployment import Consortium
from federation import tiny_study

from client import link_check
from client.link_check import PIECE_S, Link, NotMeasured, cost, measure
from common.models.flat import Schema
from common.study import Study
from common.traffic import Traffic, traffic_of
from server.superlink import link_test, listener
from server.superlink.launcher import SuperLink
from server.superlink.listener import tls_context

MBIT = 125_000  # bytes per second
LARGE = Schema(("weights",), ((11_000_000,),))
SMALL = Schema(("weights",), ((2_000,),))
SLOW = Link(down=10 * MBIT, up=10 * MBIT, round_trip_s=0.05)
TRAFFIC = Traffic(model=1000, relayed=0, body=1000, tail=0, shares=0)


def study_of(ring_bits: int = 32, upload_s: float = 3600.0) -> Study:
    return tiny_study(aggregation={"ring_bits": ring_bits}, deadlines={"upload_s": upload_s})


# The line


def test_a_large_model_on_a_slow_link_is_told_by_the_way_and_by_the_bits() -> None:
    found = cost(SLOW, study_of(), LARGE)
    assert str(found) == (
        "ok       link: 10 Mbit/s down, 10 up, 50 ms; this model (11.0 million parameters) takes "
        "71 s per round on it: 36 s down, 36 s up at 32 bits, 27 s up at 24, 18 s up at 16"
    )


@pytest.mark.parametrize(
    ("bits", "ends"),
    [
        (24, "27 s up at 24 bits, 18 s up at 16"),
        (16, "18 s up at 16 bits"),
    ],
)
def test_only_fewer_bits_than_the_studys_are_an_alternative(bits: int, ends: str) -> None:
    assert cost(SLOW, study_of(bits), LARGE).text.endswith(ends)


def test_bits_that_make_no_difference_are_not_mentioned() -> None:
    said = cost(SLOW, study_of(), SMALL).text
    assert said.endswith("up at 32 bits")
    assert "(2,000 parameters) takes 0.9 s per round" in said
    up_is_fast = Link(down=MBIT, up=1000 * MBIT, round_trip_s=0.05)
    assert cost(up_is_fast, study_of(), LARGE).text.endswith("up at 32 bits")


@pytest.mark.parametrize(("upload_s", "level"), [(150, "ok"), (140, "warning"), (10, "warning")])
def test_a_transfer_of_more_than_half_the_deadline_is_a_warning(upload_s: int, level: str) -> None:
    found = cost(SLOW, study_of(upload_s=upload_s), LARGE)
    assert found.level == level
    assert found.exit_code == 0
    if level == "warning":
        assert f"% of deadlines.upload_s ({upload_s} s)" in found.text
        assert "ask the coordinator for a study with a longer one" in found.text


def test_a_link_over_which_no_piece_arrives_in_time_is_a_warning() -> None:
    """Two pieces of 5 MB share the line: with less than 58 kB/s each takes over 180 s."""
    assert PIECE_S == listener.BODY_S
    for rate, is_too_slow in ((58_000, True), (59_000, False)):
        found = cost(Link(MBIT, rate, 0.05), study_of(upload_s=1e5), LARGE)
        assert ("no update will arrive" in found.text) == is_too_slow
        assert found.level == ("warning" if is_too_slow else "ok")
    assert cost(Link(MBIT, 100.0, 0.05), study_of(upload_s=1e5), SMALL).level == "ok"


# The measurement


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return found_with_stranger(tmp_path_factory.mktemp("consortium"))


@pytest.mark.parametrize("rate", [40e6, 4e6, 0.4e6])
def test_the_rate_of_a_link_is_what_it_carries_steadily(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that all pieces share, 20 ms long."""
    monkeypatch.setattr(link_check, "MEASURED_S", 1.0)
    monkeypatch.setattr(link_check, "STEADY_S", 0.1)
    line, way_s = threading.Lock(), 0.02

    def move(size: int) -> None:
        time.sleep(way_s)
        with line:
            time.sleep(size / rate)

    with httpx.Client(trust_env=False) as unused:
        test = link_check._Test(unused, "", time.monotonic() + 30)
        test.round_trip_s = way_s
        assert test.rate(move, 1 << 30) == pytest.approx(rate, rel=0.2)


def test_a_test_moves_no_more_than_a_round(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {"pull": 0, "push": 0}
    for name in moved:
        watch(monkeypatch, name, moved)
    with SuperLink.start(told_of(consortium), consortium.folder / "superlink.log"):
        place = place_of(site_of(consortium, GOOD), tmp_path / "node")
        small = measure(place, TRAFFIC)
        assert max(moved.values()) <= 3 * link_check.LEAST_BYTES
        measure(place, traffic_of(tiny_study(), LARGE))
    most = 2 * (link_check.MOST_BYTES + 4 * link_check.LARGEST)
    assert sum(moved.values()) <= most < link_test.ALLOWANCE_BYTES / 2  # two tests in a row
    assert min(small.down, small.up) > MBIT  # on loopback
    assert 0 < small.round_trip_s < 5


def watch(monkeypatch: pytest.MonkeyPatch, name: str, moved: dict[str, int]) -> None:
    move = getattr(link_check._Test, name)

    def watched(self: link_check._Test, size: int) -> None:
        moved[name] += size
        move(self, size)

    monkeypatch.setattr(link_check._Test, name, watched)


# Coordinators that are none, or stall


Talk = Callable[[ssl.SSLSocket, int], None]


@contextlib.contextmanager
def talking(consortium: Consortium, talk: Talk) -> Iterator[None]:
    """In the coordinator's place: every connection is told the same, with its number."""
    told = told_of(consortium)
    context = tls_context(Path(told.ca), Path(told.certificate), Path(told.key))
    ended = threading.Event()

    def serve(plain: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as line:
            line.settimeout(0.1)
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    if not line.recv(1 << 20):
                        return
                    talk(line, number)

    def accept() -> None:
        for number in itertools.count():
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(plain, number)))
            threads[-1].start()

    with socket.create_server((HOST, consortium.port)) as listening:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield
        finally:
            ended.set()
            listening.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


def answering(status: str, body: bytes = b"") -> Talk:
    def talk(line: ssl.SSLSocket, _: int) -> None:
        line.sendall(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status.encode(), len(body)))
        line.sendall(body)

    return talk


def hang_up(line: ssl.SSLSocket, _: int) -> None:
    line.sendall(b"HTTP/1.1 200 OK\r\n")
    line.close()


def say_nothing(line: ssl.SSLSocket, _: int) -> None:
    line.settimeout(0.1)


def drip(line: ssl.SSLSocket, _: int) -> None:
    """A byte now and then: no operation on the socket ever takes long."""
    line.sendall(b"HTTP/1.1 200 OK\r\nx-more: ")
    with contextlib.suppress(OSError):
        for _ in range(100):
            line.sendall(b"x")
            time.sleep(0.05)


def stall_on_one(line: ssl.SSLSocket, number: int) -> None:
    """The other connection goes well."""
    (say_nothing if number else answering("200 OK"))(line, number)


@pytest.mark.parametrize(
    ("talk", "says"),
    [
        (answering("404 Not Found"), "HTTP status 404: this coordinator has no link test"),
        (answering("429 Too Many Requests"), "HTTP status 429: the coordinator is testing"),
        (answering("503 Service Unavailable"), "HTTP status 503: ask its operator"),
        (answering("302 Found"), "HTTP status 302: ask its operator"),
        (answering("200 OK", b"{}"), "what answers there is no link test"),
        (hang_up, "the connection broke"),
        (say_nothing, "did not end within 2 s"),
        (drip, "did not end within 2 s"),
        (stall_on_one, "did not end within 2 s"),
    ],
)
def test_whatever_answers_the_test_ends_soon_and_says_why(
    consortium: Consortium,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    talk: Talk,
    says: str,
) -> None:
    monkeypatch.setattr(link_check, "ENDS_S", 2.0)
    place = place_of(site_of(consortium, GOOD), tmp_path / "node")
    with talking(consortium, talk), pytest.raises(NotMeasured) as ended:
        measure(place, TRAFFIC)
    assert says in str(ended.value)
