"""The coordinator's doors against callers who mean harm; every case opens a real socket."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path

import httpx
import pytest
from callers import (
    BAD,
    GOOD,
    HOST,
    MEMBERS,
    PULL,
    SECRET,
    Answer,
    Caller,
    Line,
    authority_of,
    forged_key,
    found_with_stranger,
    is_served,
    node_headers,
    place_of,
    pull_request,
    request,
    serial_number,
    site_of,
    told_of,
    with_certificate,
)
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from deployment import Consortium
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient

from client.runtime import Connection, Disconnected
from common.authority import CERTIFICATE, REVOKED, Authority
from common.identity import Role
from server.superlink.grid import SuperLinkDied, direct
from server.superlink.launcher import ADMIN_HEADER, SuperLink
from server.superlink.link_test import LINK_TEST
from server.superlink.listener import (
    CALLS,
    FLEET,
    tls_context,
)

DAYS = 30
NUMBERS = count(2)  # of revocation lists: the door takes none that is older
WITHHELD = sorted(
    {path for _, path in PROTOBUF_REQUEST_TYPES if path not in CALLS}
    | {"/docs", "/openapi.json", "/redoc", "/v1/runtime/responses", "/", "/v1/fleet", FLEET}
)


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


def certificate_for(
    consortium: Consortium,
    name: str,
    folder: Path,
    begins: datetime,
    days: int,
    role: Role = "site",
) -> Path:
    """Another certificate over the key that a site has."""
    key = site_of(consortium, name).identity.key.public_key()
    issued = authority_of(consortium).issue(name, role, key, begins, days=days)
    path = folder / "other.pem"
    path.write_bytes(issued.public_bytes(serialization.Encoding.PEM))
    return path


@contextmanager
def revocation_list(consortium: Consortium, content: bytes | None) -> Iterator[None]:
    """The coordinator's list is replaced, or taken away; afterwards, a new one names nobody."""
    path = consortium.folder / "ca" / REVOKED
    _replace(path, content)
    try:
        yield
    finally:
        _replace(path, ca_list(consortium))


def _replace(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
        return
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


def ca_list(consortium: Consortium, *revoked: Caller, begins: datetime | None = None) -> bytes:
    serials = [serial_number(one) for one in revoked]
    now = begins or datetime.now(UTC)
    return authority_of(consortium).revocation_list(serials, now, days=DAYS, number=next(NUMBERS))


# Who comes in


def is_refused_by_tls(consortium: Consortium, caller: Caller) -> str:
    """The running listener answers nothing; returned is the reason, which it has from OpenSSL."""
    assert not caller.is_answered()
    told = told_of(consortium)
    context = tls_context(Path(told.ca), Path(told.certificate), Path(told.key))
    return caller.reason_at(context)


def test_tls_ends_without_a_client_certificate(door: Consortium) -> None:
    nobody = Caller(door.port, door.folder / "ca" / CERTIFICATE)
    assert is_refused_by_tls(door, nobody) == "PEER_DID_NOT_RETURN_A_CERTIFICATE"


@pytest.mark.parametrize("lie", ["none", "its name", "its name and key identifier"])
def test_tls_ends_for_a_certificate_of_another_ca(
    door: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    real, now = authority_of(door), datetime.now(UTC)
    other = Authority.create("Another" if lie == "none" else "Test consortium", now, days=DAYS)
    if lie == "its name and key identifier":
        identifier = real._key_identifier()
        monkeypatch.setattr(Authority, "_key_identifier", lambda _: identifier)
    other.enrol(BAD, "site", tmp_path, now, days=DAYS)
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    reason = is_refused_by_tls(door, with_certificate(site_of(door, BAD), *files))
    signature = lie == "its name and key identifier"
    assert reason == (
        "certificate signature failure" if signature else "unable to get local issuer certificate"
    )


@pytest.mark.parametrize(
    ("days_from_now", "reason"),
    [(-10, "certificate has expired"), (2, "certificate is not yet valid")],
    ids=["ended", "begins the day after tomorrow"],
)
def test_tls_ends_for_a_members_certificate_out_of_its_time(
    door: Consortium, tmp_path: Path, days_from_now: int, reason: str
) -> None:
    begins = datetime.now(UTC) + timedelta(days=days_from_now)
    other = certificate_for(door, BAD, tmp_path, begins, days=5)
    assert is_refused_by_tls(door, with_certificate(site_of(door, BAD), other)) == reason


def test_tls_ends_for_a_members_certificate_without_its_key(
    door: Consortium, tmp_path: Path
) -> None:
    """A certificate is public: it travels in every roster."""
    theirs, own = site_of(door, GOOD), ec.generate_private_key(ec.SECP256R1())
    assert theirs.certificate is not None
    (tmp_path / "forged.pem").write_bytes(forged_key(theirs.certificate, own))
    caller = with_certificate(theirs, theirs.certificate, tmp_path / "forged.pem")
    assert is_refused_by_tls(door, caller) == "BAD_SIGNATURE"


def test_tls_1_2_is_not_spoken(door: Consortium) -> None:
    old = replace(site_of(door, BAD), newest=ssl.TLSVersion.TLSv1_2)
    assert is_refused_by_tls(door, old) == "UNSUPPORTED_PROTOCOL"


def test_plain_http_gets_no_answer(door: Consortium) -> None:
    with socket.create_connection((HOST, door.port), 10) as plain:
        plain.sendall(request("/health", method="GET"))
        try:
            got = plain.recv(100)
        except ConnectionError:
            got = b""
    assert b"HTTP" not in got


def test_a_member_revoked_while_it_is_connected_is_refused_at_its_next_request(
    door: Consortium, tmp_path: Path
) -> None:
    bad, good = site_of(door, BAD), site_of(door, GOOD)
    with (
        Connection(place_of(bad, tmp_path / "bad")) as one,
        Connection(place_of(good, tmp_path / "good")) as other,
        bad.connected() as line,
    ):
        ask = pull_request(bad.identity, one._node.node_id)
        assert line.ask(ask).status == 200
        assert line.ask(ask).status == 200  # the same connection goes on
        with revocation_list(door, ca_list(door, bad)):
            assert line.ask(ask).status == 403
            with pytest.raises(Disconnected, match="refuses this site's certificate"):
                one.pull()
            assert other.pull() is None
        assert one.pull() is None  # a list without it: it may come in again


def test_a_member_that_is_revoked_is_gone_at_once_also_where_it_says_nothing(
    door: Consortium, superlink: SuperLink, tmp_path: Path
) -> None:
    """Flower by itself would wait a minute for it, and so would every sum."""
    bad, good = site_of(door, BAD), site_of(door, GOOD)
    grid = superlink.open_grid()
    with (
        Connection(place_of(good, tmp_path / "good")),
        Connection(place_of(bad, tmp_path / "bad")) as one,
    ):
        node = one._node.node_id
        asked = Message(RecordDict(), dst_node_id=node, message_type="query", ttl=60.0)
        (sent,) = grid.push_messages([asked])
        assert set(grid.connected()) == {BAD, GOOD}
        with revocation_list(door, ca_list(door, bad)):
            time.sleep(1.5)
            assert set(grid.connected()) == {GOOD}
            (reply,) = grid.pull_messages([sent])
            assert reply.has_error()
            assert reply.metadata.src_node_id == SUPERLINK_NODE_ID
    with Connection(place_of(bad, tmp_path / "bad")):  # a list without it
        assert set(grid.connected()) == {BAD}
    grid.finish()


@pytest.mark.parametrize("kind", ["stale", "of tomorrow", "of another CA", "damaged", "missing"])
def test_without_a_valid_revocation_list_nobody_comes_in(door: Consortium, kind: str) -> None:
    now = datetime.now(UTC)
    other = Authority.create("Test consortium", now, days=DAYS)
    lists = {
        "stale": ca_list(door, begins=now - timedelta(days=2 * DAYS)),
        "of tomorrow": ca_list(door, begins=now + timedelta(days=1)),
        "of another CA": other.revocation_list([], now, days=DAYS),
        "damaged": ca_list(door)[:-1],
        "missing": None,
    }
    with revocation_list(door, lists[kind]):
        for name in MEMBERS:
            answer = site_of(door, name).ask(request("/health", method="GET"))
            assert (answer.status, answer.body) == (403, b"certificate refused")


@pytest.mark.parametrize("path", ["/health", LINK_TEST, *sorted(CALLS)])
def test_a_certified_site_of_another_study_is_refused(door: Consortium, path: str) -> None:
    stranger = site_of(door, "stranger")
    answer = stranger.ask(request(path, headers=node_headers(stranger.identity)))
    assert (answer.status, answer.body) == (403, b"certificate refused")


def test_the_coordinators_own_certificate_calls_nothing(door: Consortium) -> None:
    own = door.folder / "coordinator"
    caller = with_certificate(site_of(door, BAD), own / "certificate.pem", own / "key.pem")
    for path in ("/health", LINK_TEST, PULL):
        assert caller.ask(request(path, headers=node_headers(caller.identity))).status == 403


def test_a_coordinators_certificate_over_a_members_name_and_key_calls_nothing(
    door: Consortium, tmp_path: Path
) -> None:
    as_coordinator = certificate_for(
        door, BAD, tmp_path, datetime.now(UTC), days=5, role="coordinator"
    )
    caller = with_certificate(site_of(door, BAD), as_coordinator)
    assert caller.ask(request("/health", method="GET")).status == 403
    as_site = certificate_for(door, BAD, tmp_path, datetime.now(UTC), days=5)
    assert with_certificate(caller, as_site).ask(request("/health", method="GET")).status == 200


def test_a_member_cannot_use_another_members_node(door: Consortium, tmp_path: Path) -> None:
    bad, good = site_of(door, BAD), site_of(door, GOOD)
    with (
        Connection(place_of(bad, tmp_path / "bad")) as one,
        Connection(place_of(good, tmp_path / "good")) as other,
    ):
        own, theirs = one._node.node_id, other._node.node_id
        with_their_key = bad.ask(pull_request(good.identity, theirs))
        with_own_key = bad.ask(pull_request(bad.identity, theirs))
        in_order = bad.ask(pull_request(bad.identity, own))
    assert with_their_key.status == 401
    assert with_their_key.body == b"the node's key is not the certificate's"
    assert with_own_key.status == 401
    assert in_order.status == 200


@pytest.mark.parametrize("path", sorted(CALLS))
def test_every_call_needs_flowers_signature_besides_the_certificate(
    door: Consortium, path: str
) -> None:
    """Whatever the Host header says: Flower's own check has gone by the URL that it makes up."""
    bad = site_of(door, BAD)
    only_key = {"flwr-public-key": node_headers(bad.identity)["flwr-public-key"]}
    for host in (HOST, "x/y?", "x/v1/fleet?", "x#", "[", ""):
        assert bad.ask(request(path, headers={**only_key, "host": host})).status in {400, 401, 410}
    assert bad.ask(request(path)).body == b"the node's key is not the certificate's"


def test_a_member_cannot_send_another_member_an_instruction(
    door: Consortium, superlink: SuperLink, tmp_path: Path
) -> None:
    """Flower checks who pushes, and not whom a pushed message says it is from."""
    grid = superlink.open_grid()
    with (
        Connection(place_of(site_of(door, BAD), tmp_path / "bad")) as one,
        Connection(place_of(site_of(door, GOOD), tmp_path / "good")) as other,
    ):
        for sender in (SUPERLINK_NODE_ID, one._node.node_id):
            told = Message(RecordDict(), other._node.node_id, "query", ttl=60.0)
            told.metadata.__dict__.update(_src_node_id=sender, _run_id=grid.run.run_id)
            with pytest.raises(Disconnected, match="400"):
                one.push(told)
            assert other.pull() is None
    grid.finish()


def test_a_member_cannot_answer_in_another_members_place(
    door: Consortium, superlink: SuperLink, tmp_path: Path
) -> None:
    grid = superlink.open_grid()
    with (
        Connection(place_of(site_of(door, BAD), tmp_path / "bad")) as one,
        Connection(place_of(site_of(door, GOOD), tmp_path / "good")) as other,
    ):
        asked = Message(RecordDict(), other._node.node_id, "query", ttl=60.0)
        (sent,) = grid.push_messages([asked])
        received = other.pull()
        assert received is not None
        theirs = RecordDict({"from": ConfigRecord({"name": BAD})})
        with pytest.raises(Disconnected, match="400"):
            one.push(Message(theirs, reply_to=received))
        own = RecordDict({"from": ConfigRecord({"name": GOOD})})
        other.push(Message(own, reply_to=received))
        (reply,) = grid.pull_messages([sent])
        assert reply.content["from"]["name"] == GOOD
    grid.finish()


# What can be called


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_a_site_does_not_need_is_not_there(door: Consortium, method: str) -> None:
    bad = site_of(door, BAD)
    ask = partial(request, method=method, headers=node_headers(bad.identity))
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(bad.ask, map(ask, WITHHELD))
        for path, answer in zip(WITHHELD, answers, strict=True):
            assert (answer.status, answer.body) == (404, b"no such call"), path


def test_the_paths_that_are_withheld_are_flowers(superlink: SuperLink) -> None:
    """The admin listener lists them to whoever has the secret: they exist."""
    admin = int(superlink._admin.rpartition(":")[2])
    answer = plain_ask(
        admin, request("/openapi.json", method="GET", headers={ADMIN_HEADER: SECRET})
    )
    served = set(json.loads(answer.body)["paths"])
    assert served >= CALLS
    assert served - CALLS - {"/health"} <= set(WITHHELD)
    assert served & {FLEET + "get-fab", "/v1/control/start-run", "/v1/runtime/acquire-task"}
    assert len(served & set(WITHHELD)) > 50


TRICKS = [
    "//v1/fleet/get-fab",
    "/v1//fleet/get-fab",
    "/v1/fleet/../fleet/get-fab",
    "/v1/fleet/pull-messages/../get-fab",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/pull-messages%2f..%2fget-fab",
    "/v1/fleet/get%2dfab",
    "/v1/fleet/get-fab/",
    "/v1/fleet/pull-messages/",
    "/V1/FLEET/PULL-MESSAGES",
    "/v1/fleet/Pull-Messages",
    "/v1/fleet/get-fab?/v1/fleet/pull-messages",
    "/v1/control/start-run?path=/v1/fleet/pull-messages",
    "/v1/fleet/pull-messages;/../get-fab",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages%0a",
    "/v1/fleet/pull-messages%3f",
    "/health/../docs",
    "/health/",
    "/health%20",
    "/link-test/",
    "/link-test/../docs",
    "http://127.0.0.1/v1/fleet/get-fab",
    "http://127.0.0.1/v1/control/start-run",
    "//127.0.0.1/v1/control/start-run",
]


@pytest.mark.parametrize("path", TRICKS)
def test_no_spelling_of_a_path_leads_past_the_list(door: Consortium, path: str) -> None:
    bad = site_of(door, BAD)
    answer = bad.ask(request(path, headers=node_headers(bad.identity)))
    assert answer.status in {400, 404}


def test_a_query_changes_nothing(door: Consortium, tmp_path: Path) -> None:
    bad = site_of(door, BAD)
    with Connection(place_of(bad, tmp_path / "bad")) as one:
        node = one._node.node_id
        plain = bad.ask(pull_request(bad.identity, node))
        asked = bad.ask(pull_request(bad.identity, node, path=f"{PULL}?path=/v1/fleet/get-fab"))
    assert plain.status == asked.status == 200
    assert plain.body == asked.body


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE"])
def test_calls_are_posts(door: Consortium, method: str) -> None:
    bad = site_of(door, BAD)
    answer = bad.ask(request(PULL, method=method, headers=node_headers(bad.identity)))
    assert answer.status in {400, 401}


@pytest.mark.parametrize("path", [PULL, "/health", "/v1/control/stream-logs"])
@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_no_connection_changes_its_protocol(door: Consortium, path: str, protocol: str) -> None:
    bad = site_of(door, BAD)
    wanted = {
        "upgrade": protocol,
        "connection": "Upgrade",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        "sec-websocket-version": "13",
    }
    answer = bad.ask(request(path, method="GET", headers={**node_headers(bad.identity), **wanted}))
    assert answer.status == {PULL: 401, "/health": 200}.get(path, 404)
    assert "upgrade" not in answer.headers


def test_the_health_call_says_what_it_is_told_to_members_only(door: Consortium) -> None:
    answer = site_of(door, BAD).ask(request("/health", method="GET"))
    assert answer.status == 200
    said = json.loads(answer.body)
    assert said.keys() == {"version", "time"}
    assert said["time"] == pytest.approx(time.time(), abs=60)


def test_a_link_test_moves_bytes_and_makes_nobody_a_node(
    door: Consortium, superlink: SuperLink
) -> None:
    bad, grid = site_of(door, BAD), superlink.open_grid()
    with bad.connected() as line:
        for num_bytes in (0, 1000, 1 << 20):
            pulled = line.ask(request(f"{LINK_TEST}?bytes={num_bytes}", method="GET"))
            pushed = line.ask(request(LINK_TEST, bytes(num_bytes)))
            assert (pulled.status, len(pulled.body)) == (200, num_bytes)
            assert (pushed.status, pushed.body) == (200, b"%d" % num_bytes)
    assert grid.connected() == {}
    grid.finish()


@pytest.mark.parametrize("guess", ["none", "wrong", "too short", "too long"])
def test_the_admin_listener_answers_nothing_without_its_secret(
    superlink: SuperLink, guess: str
) -> None:
    admin = int(superlink._admin.rpartition(":")[2])
    secret = {"none": "", "wrong": "0" * 64, "too short": SECRET[:-1], "too long": SECRET + "0"}[
        guess
    ]
    for path in ["/health", LINK_TEST, *WITHHELD, *sorted(CALLS)]:
        for method in ("GET", "POST"):
            answer = plain_ask(admin, request(path, method=method, headers={ADMIN_HEADER: secret}))
            assert (answer.status, answer.body) == (401, b"the secret is missing"), path


def test_the_admin_listener_is_not_reachable_from_other_machines(superlink: SuperLink) -> None:
    """In /proc/net/tcp, what listens on its port listens on 127.0.0.1."""
    assert superlink._admin.startswith("127.0.0.1:")
    number = f"{int(superlink._admin.rpartition(':')[2]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{number}")]
    loopback = struct.unpack("=I", socket.inet_aton("127.0.0.1"))[0]
    assert listening == [f"{loopback:08X}:{number}"]


def test_the_coordinator_shows_its_secret_to_no_proxy(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines in hospitals name proxies in their environment; loopback is not always excepted."""
    with listening() as (port, got):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://{HOST}:{port}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        told = replace(told_of(consortium), port=0)
        with SuperLink.start(told, tmp_path / "superlink.log") as started:
            grid = started.open_grid()
            assert grid.connected() == {}
            grid.finish()
            with pytest.raises(SuperLinkDied):
                grid.connected()  # its client is made anew after the end, and the run is over
            grid.close()
    assert got == []


@pytest.mark.parametrize("kind", [ControlHttpClient, RuntimeHttpClient])
def test_the_coordinators_clients_follow_nobody_elsewhere(kind: type[ProtobufClient]) -> None:
    with listening() as (elsewhere, got):
        answer = (
            f"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://{HOST}:{elsewhere}/\r\n"
            "content-length: 0\r\nconnection: close\r\n\r\n"
        )
        with (
            listening(answer.encode()) as (port, asked),
            direct(kind(f"http://{HOST}:{port}")) as client,
            pytest.raises(httpx.HTTPStatusError, match="307"),
        ):
            client._unary_unary(
                path="/", rpc_method="", request=StartRunRequest(), response_type=StartRunRequest
            )
    assert len(asked) == 1
    assert got == []


@contextmanager
def listening(answer: bytes = b"") -> Iterator[tuple[int, list[bytes]]]:
    """A port, and what is sent to it."""
    got: list[bytes] = []

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    got.append(connection.recv(1 << 16))
                    connection.sendall(answer)

    with socket.create_server((HOST, 0)) as server:
        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield server.getsockname()[1], got
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def plain_ask(port: int, asked: bytes) -> Answer:
    """A request at a listener without TLS."""
    with socket.create_connection((HOST, port), 10) as plain:
        return Line(plain).ask(asked)
