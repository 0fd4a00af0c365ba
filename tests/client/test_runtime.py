"""The line to a coordinator that means harm, and a site process that nothing ends."""

from __future__ import annotations

import gzip
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import (
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.task_identity import TaskIdentity

import client.place
import client.runtime
import client.transfer
from client.place import Place
from client.runtime import Connection, Disconnected, serve
from common.authority import CERTIFICATE, Authority
from common.errors import ConfigError, RemoteProtocolError
from common.identity import Identity

HOST, DAYS, NODE = "127.0.0.1", 30, 5
SOON_S = 20.0  # it takes a fraction of a second
PEERS_WORDS = "<what the peer wrote>"

Answer = Callable[[bytes], bytes]  # a request's body in, a whole HTTP response out


def response(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    fields = {"content-length": str(len(body)), "connection": "close", **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


class Coordinator:
    """Speaks TLS with the coordinator's kit, and answers each call as a test says."""

    def __init__(self, kit: Path) -> None:
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(kit / "certificate.pem", kit / "key.pem")
        self._listening = socket.create_server((HOST, 0))
        self.port = self._listening.getsockname()[1]
        self.calls: list[tuple[str, bytes]] = []  # name of a call, and its head
        self.answers: dict[str, Answer] = {
            "activate-node": lambda _: response(
                ActivateNodeResponse(node_id=NODE).SerializeToString()
            ),
            "push-messages": lambda _: response(PushMessagesResponse().SerializeToString()),
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def num(self, call: str) -> int:
        return [name for name, _ in self.calls].count(call)

    def send(self, message: Message, content: Callable[[str, bytes], bytes] | None = None) -> None:
        """Answer the next question with a message; ``content`` changes its objects."""
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects = {
                name: item.deflate() for name, item in get_all_nested_objects(message).items()
            }
            found = PullMessagesResponse(
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[get_object_tree(message)],
            ).SerializeToString()
        waiting = [found]

        def pull_object(body: bytes) -> bytes:
            name = PullObjectRequest.FromString(body).object_id
            data = content(name, objects[name]) if content else objects[name]
            return response(
                PullObjectResponse(
                    object_found=True, object_available=True, object_content=data
                ).SerializeToString()
            )

        self.answers["pull-messages"] = lambda _: response(waiting.pop() if waiting else b"")
        self.answers["pull-object"] = pull_object

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with suppress(OSError), line, self._tls.wrap_socket(line, server_side=True) as secure:
            received = b""
            while b"\r\n\r\n" not in received:
                received += _some(secure)
            head, _, body = received.partition(b"\r\n\r\n")
            fields = dict(item.split(b": ", 1) for item in head.lower().split(b"\r\n")[1:])
            while len(body) < int(fields[b"content-length"]):
                body += _some(secure)
            call = head.split()[1].decode().rpartition("/")[2]
            self.calls.append((call, head))
            secure.sendall(self.answers.get(call, lambda _: response())(body))


def _some(line: ssl.SSLSocket) -> bytes:
    content = line.recv(1 << 16)
    if not content:
        raise ConnectionError
    return content


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create("Test consortium", datetime.now(UTC), days=DAYS)
    made.save(tmp_path / "ca")
    now = datetime.now(UTC)
    made.enrol("hub", "coordinator", tmp_path / "hub", now, days=DAYS, hosts=[HOST])
    made.enrol("north", "site", tmp_path / "north", now, days=DAYS)
    return made


@pytest.fixture
def coordinator(authority: Authority, tmp_path: Path) -> Iterator[Coordinator]:
    with Coordinator(tmp_path / "hub") as started:
        yield started


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages are made in one."""
    monkeypatch.setattr(TaskIdentity, "_task_id", 3)
    monkeypatch.setattr(TaskIdentity, "_run_id", 7)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)


@pytest.fixture
def place(coordinator: Coordinator, tmp_path: Path) -> Place:
    return Place(
        f"{HOST}:{coordinator.port}",
        tmp_path / "ca" / CERTIFICATE,
        tmp_path / "north" / "certificate.pem",
        tmp_path / "north" / "key.pem",
        tmp_path / "node-id",
        tmp_path / "revoked.crl",
    )


@contextmanager
def serving(place: Place, **more: object) -> Iterator[None]:
    """A site in a thread, which must still be there at the end."""
    stopped = threading.Event()
    arguments = {"reply": _echo, "stopped": stopped, **more}
    thread = threading.Thread(target=serve, args=(place,), kwargs=arguments)
    thread.start()
    try:
        yield
        assert thread.is_alive()
    finally:
        stopped.set()
        thread.join(SOON_S)


def _echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def question() -> Message:
    return Message(RecordDict({}), dst_node_id=NODE, message_type="query", ttl=60)


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def renew(authority: Authority, place: Place) -> bytes:
    """Another certificate for the site's key."""
    key = Identity.load(place.certificate, place.key).key.public_key()
    certificate = authority.issue("north", "site", key, datetime.now(UTC), days=DAYS)
    return certificate.public_bytes(Encoding.PEM)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_followed_nowhere(
    coordinator: Coordinator, place: Place, status: str
) -> None:
    with socket.create_server((HOST, 0)) as inside:
        inside.settimeout(0.3)
        there = f"http://{HOST}:{inside.getsockname()[1]}/pacs/admin?delete=all"
        coordinator.answers["activate-node"] = lambda _: response(b"", status, location=there)
        with pytest.raises(Disconnected, match=f"HTTP status {status[:3]}"), Connection(place):
            pass
        with pytest.raises(TimeoutError):
            inside.accept()


def test_a_redirect_does_not_cost_the_reply_that_waits(
    coordinator: Coordinator, place: Place
) -> None:
    push = coordinator.answers["push-messages"]
    coordinator.send(question())
    coordinator.answers["push-messages"] = lambda _: response(b"", "302 Found", location="/x")
    with serving(place):
        until(lambda: coordinator.num("push-messages") == 1)
        coordinator.answers["push-messages"] = push
        until(lambda: coordinator.num("push-messages") == 2)


def test_nothing_packed_is_asked_for_or_taken(coordinator: Coordinator, place: Place) -> None:
    packed = gzip.compress(bytes(10_000))
    coordinator.answers["pull-messages"] = lambda _: response(packed, content_encoding="gzip")
    with Connection(place) as connection, pytest.raises(Disconnected, match="packed"):
        connection.pull()
    heads = [head.lower() for _, head in coordinator.calls]
    assert heads
    assert all(b"\r\naccept-encoding: identity\r\n" in head + b"\r\n" for head in heads)


def test_an_answer_without_an_end_is_read_up_to_a_bound(
    coordinator: Coordinator, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.place, "MAX_ANSWER_BYTES", 1000)
    pieces = b"400\r\n" + bytes(1024) + b"\r\n"
    endless = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + 3 * pieces
    coordinator.answers["pull-messages"] = lambda _: endless
    with Connection(place) as connection, pytest.raises(Disconnected, match="more than 1000 bytes"):
        connection.pull()


def test_a_message_of_too_many_objects_is_not_fetched(
    coordinator: Coordinator, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.runtime, "MAX_OBJECTS", 1)
    coordinator.send(question())
    with Connection(place) as connection, pytest.raises(Disconnected, match="at most 1 are taken"):
        connection.pull()
    assert coordinator.num("pull-object") == 0


def test_a_message_of_too_many_bytes_is_given_up(
    coordinator: Coordinator, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.runtime, "MAX_MESSAGE_BYTES", 10)
    coordinator.send(question())
    with Connection(place) as connection, pytest.raises(Disconnected, match="more than 10 bytes"):
        connection.pull()
    assert coordinator.num("confirm-message-received") == 0


def test_a_revoked_coordinator_is_told_nothing(
    authority: Authority, coordinator: Coordinator, place: Place, tmp_path: Path
) -> None:
    assert place.newest_list is not None
    now = datetime.now(UTC)
    shown = Identity.load(tmp_path / "hub" / "certificate.pem", tmp_path / "hub" / "key.pem")
    number = x509.load_der_x509_certificate(shown.certificate).serial_number
    place.newest_list.write_bytes(authority.revocation_list([], now, days=DAYS))
    with Connection(place):
        assert coordinator.num("activate-node") == 1
    coordinator.calls.clear()
    place.newest_list.write_bytes(authority.revocation_list([number], now, days=DAYS))
    with pytest.raises(Disconnected, match="was revoked"), Connection(place):
        pass
    assert coordinator.calls == []


def test_an_answer_over_a_line_that_nobody_checked_is_refused(
    coordinator: Coordinator, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would come if httpx no longer told of its connections."""
    monkeypatch.setattr(client.place._Watch, "_on_event", lambda *_: None)
    with pytest.raises(Disconnected, match="not checked"), Connection(place):
        pass


def test_a_certificate_of_a_site_is_no_coordinators(place: Place) -> None:
    own = Identity.load(place.certificate, place.key).certificate
    with pytest.raises(RemoteProtocolError, match="certified as a site"):
        place.check_coordinator(own)


def test_a_revocation_list_that_another_wrote_is_no_reason_to_go_on(
    place: Place, tmp_path: Path
) -> None:
    assert place.newest_list is not None
    now = datetime.now(UTC)
    other = Authority.create("Other", now, days=DAYS)
    place.newest_list.write_bytes(other.revocation_list([], now, days=DAYS))
    shown = Identity.load(tmp_path / "hub" / "certificate.pem", tmp_path / "hub" / "key.pem")
    with pytest.raises(ConfigError, match="not signed by this CA"):
        place.check_coordinator(shown.certificate)


def test_a_proxy_of_the_environment_sees_a_tunnel_and_nothing_in_it(
    coordinator: Coordinator, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    with socket.create_server((HOST, 0)) as listening:
        threading.Thread(target=_tunnel, args=(listening, asked), daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://{HOST}:{listening.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "")
        with Connection(place) as connection:
            assert connection.pull() is None
    assert coordinator.num("pull-messages") == 1
    assert asked
    assert all(head.startswith(f"CONNECT {place.address} ".encode()) for head in asked)
    assert not any(b"flwr" in head.lower() for head in asked)


def _tunnel(listening: socket.socket, asked: list[bytes]) -> None:
    with suppress(OSError):
        while True:
            line, _ = listening.accept()
            threading.Thread(target=_tunnel_one, args=(line, asked), daemon=True).start()


def _tunnel_one(line: socket.socket, asked: list[bytes]) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        head += line.recv(1 << 16)
    asked.append(head)
    host, _, port = head.split()[1].decode().partition(":")
    with line, socket.create_connection((host, int(port))) as there:
        line.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        back = threading.Thread(target=_pipe, args=(there, line), daemon=True)
        back.start()
        _pipe(line, there)
        back.join()


def _pipe(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while content := one.recv(1 << 16):
            other.sendall(content)
    with suppress(OSError):
        other.shutdown(socket.SHUT_WR)


# What must not end a site


def test_a_full_disk_costs_the_node_file_and_nothing_else(
    coordinator: Coordinator, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(replace(place, node_file=Path("/dev/full"))):
        until(lambda: coordinator.num("pull-messages") > 2)
    assert coordinator.num("activate-node") == 1
    assert "/dev/full: No space left on device" in caplog.text


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:200]), id="half copied"),
        pytest.param(lambda path: path.rename(path.with_suffix(".old")), id="moved away"),
        pytest.param(
            lambda path: path.write_bytes((path.parents[1] / "hub" / path.name).read_bytes()),
            id="of another key",
        ),
    ],
)
def test_a_certificate_that_is_not_there_yet_changes_nothing_until_it_is(
    authority: Authority, coordinator: Coordinator, place: Place, disturb: Callable[[Path], object]
) -> None:
    renewed = renew(authority, place)
    with serving(place):
        until(lambda: coordinator.num("pull-messages") > 2)
        disturb(place.certificate)
        asked = coordinator.num("pull-messages")
        until(lambda: coordinator.num("pull-messages") > asked + 2)
        assert coordinator.num("activate-node") == 1
        place.certificate.write_bytes(renewed)
        until(lambda: coordinator.num("activate-node") == 2)


@pytest.mark.parametrize("missing", ["ca", "certificate", "key"])
def test_a_site_whose_files_cannot_be_read_waits_for_them(
    coordinator: Coordinator, place: Place, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = getattr(place, missing)
    content = path.read_bytes()
    path.write_bytes(b"half")
    with serving(place):
        until(lambda: "trying again for ever" in caplog.text)
        assert str(path) in caplog.text
        assert coordinator.calls == []
        path.write_bytes(content)
        until(lambda: coordinator.num("pull-messages"))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(response(b"garbage", content_encoding="gzip"), id="packed"),
        pytest.param(response(b"\xff\xff garbage"), id="no protobuf"),
        pytest.param(
            response(PullMessagesResponse(messages_list=[MessageProto()]).SerializeToString()),
            id="a message without objects",
        ),
        pytest.param(f"HTTP/1.1 {PEERS_WORDS}\r\n\r\n".encode(), id="no HTTP"),
        pytest.param(response(PEERS_WORDS.encode(), f"500 {PEERS_WORDS}"), id="an error"),
    ],
)
def test_an_answer_that_cannot_be_used_is_waited_out(
    coordinator: Coordinator, place: Place, wrong: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.answers["pull-messages"] = lambda _: wrong
    with serving(place):
        until(lambda: coordinator.num("activate-node") > 1)
    assert PEERS_WORDS not in caplog.text


def test_objects_that_are_none_are_waited_out(coordinator: Coordinator, place: Place) -> None:
    coordinator.send(question(), lambda _, __: PEERS_WORDS.encode())
    with serving(place):
        until(lambda: coordinator.num("activate-node") > 1)


def test_a_defect_is_told_by_its_kind_and_waited_out(
    coordinator: Coordinator, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.send(question())

    def reply(message: Message) -> Message:
        raise ZeroDivisionError(PEERS_WORDS)

    with serving(place, reply=reply):
        until(lambda: coordinator.num("activate-node") > 1)
    assert "a defect (ZeroDivisionError)" in caplog.text
    assert PEERS_WORDS not in caplog.text


def test_a_connection_that_ends_at_once_again_and_again_is_told_once(
    coordinator: Coordinator, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.answers["pull-messages"] = lambda _: response(b"", "500 Error")
    with serving(place):
        until(lambda: coordinator.num("activate-node") > 3)
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1


def test_signs_of_life_go_on_whatever_one_of_them_met(
    coordinator: Coordinator,
    place: Place,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client.runtime, "HEARTBEAT_S", 0.02)
    met = iter([IndexError(PEERS_WORDS), OSError(PEERS_WORDS), ConfigError("no certificate")])
    with Connection(place) as connection:
        send = connection._client.SendNodeHeartbeat

        def beat(request: object) -> object:
            for error in met:
                raise error
            return send(request)

        monkeypatch.setattr(connection._client, "SendNodeHeartbeat", beat)
        until(lambda: coordinator.num("send-node-heartbeat") > 2)
    assert caplog.text.count("a sign of life did not arrive") == 3
    assert PEERS_WORDS not in caplog.text


@pytest.mark.parametrize("error", [IndexError, RecursionError, MemoryError, AttributeError])
def test_whatever_flower_raises_at_an_answer_is_an_end_of_the_connection(
    coordinator: Coordinator, place: Place, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def inflate(*_: object) -> None:
        raise error(PEERS_WORDS)

    monkeypatch.setattr(client.runtime, "put_together", inflate)
    coordinator.send(question())
    with (
        Connection(place) as connection,
        pytest.raises(Disconnected, match=rf"cannot be used \({error.__name__}\)$"),
    ):
        connection.pull()


def test_a_pause_is_made_after_an_answer_and_not_before(
    coordinator: Coordinator, place: Place
) -> None:
    coordinator.send(question())
    pauses: list[int] = []

    def pause_s() -> float:
        pauses.append(coordinator.num("push-messages"))
        return 0.5

    with serving(place, pause_s=pause_s):
        until(lambda: pauses)
        asked = coordinator.num("pull-messages")
        time.sleep(0.25)
        assert coordinator.num("pull-messages") == asked
        until(lambda: coordinator.num("pull-messages") > asked)
    assert pauses == [1]


# What must not begin anew


@dataclass
class Store:
    """What a coordinator keeps of one answer; ``hiccup`` may spoil an object's way."""

    hiccup: Callable[[int], bytes | None] = lambda _: None  # by its number: what comes instead
    loses_answers: bool = False  # to objects that it has kept
    kept: list[str] = field(default_factory=list)
    num_asked: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def at(self, coordinator: Coordinator) -> Self:
        coordinator.answers |= {"push-messages": self.announced, "push-object": self.pushed}
        return self

    def announced(self, body: bytes) -> bytes:
        tree = PushMessagesRequest.FromString(body).message_object_trees[0]
        names = [node.object_id for node in iterate_object_tree(tree)]
        lacking = [name for name in names if name not in self.kept]
        found = PushMessagesResponse(objects_to_push=lacking, session_id="a session")
        return response(found.SerializeToString())

    def pushed(self, body: bytes) -> bytes:
        with self.lock:
            self.num_asked += 1
            instead = self.hiccup(self.num_asked)
            if instead is None or self.loses_answers:
                self.kept.append(PushObjectRequest.FromString(body).object_id)
        stored = PushObjectResponse(stored=True)
        return response(stored.SerializeToString()) if instead is None else instead


def answered(num_arrays: int = 8) -> Message:
    """A reply of so many arrays, and some objects around them."""
    arrays = {
        str(k): Array(dtype="uint8", shape=(9,), stype="raw", data=bytes([k] * 9))
        for k in range(num_arrays)
    }
    return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=with_id(question()))


def with_id(message: Message) -> Message:
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.transfer, "PAUSES_S", (0.01, 0.02, 0.04))


HICCUPS = {
    "too slow": response(b"", "408 Too Slow"),
    "too many": response(b"", "429 Too Many"),
    "bad gateway": response(b"", "502 Bad Gateway"),
    "unavailable": response(b"", "503 Unavailable"),
    "gateway timeout": response(b"", "504 Timeout"),
    "cut": b"",
    "cut in the answer": b"HTTP/1.1 200 OK\r\ncontent-length: 70\r\n\r\nhalf",
    "not kept": response(PushObjectResponse(stored=False).SerializeToString()),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("title", HICCUPS)
def test_a_hiccup_costs_one_object_of_a_push(
    title: str, coordinator: Coordinator, place: Place
) -> None:
    store = Store(lambda number: HICCUPS[title] if number % 4 == 2 else None).at(coordinator)
    with Connection(place) as connection:
        connection.push(answered())
    assert len(set(store.kept)) == len(store.kept) == 8 + 8 + 3  # arrays, their pieces, around them
    assert store.num_asked > len(store.kept) + 5
    assert coordinator.num("activate-node") == 1


@pytest.mark.usefixtures("quick")
def test_an_object_whose_receipt_was_lost_is_not_sent_again(
    coordinator: Coordinator, place: Place
) -> None:
    store = Store(lambda number: b"" if number in (3, 9) else None, loses_answers=True)
    store.at(coordinator)
    with Connection(place) as connection:
        connection.push(answered())
    assert len(set(store.kept)) == store.num_asked == 8 + 8 + 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("title", [title for title in HICCUPS if title != "not kept"])
def test_a_hiccup_costs_one_object_of_a_pull(
    title: str, coordinator: Coordinator, place: Place
) -> None:
    coordinator.send(question())
    pull, calls = coordinator.answers["pull-object"], []

    def hiccup(body: bytes) -> bytes:
        calls.append(PullObjectRequest.FromString(body).object_id)
        return HICCUPS[title] if calls.count(calls[-1]) < 3 else pull(body)

    coordinator.answers["pull-object"] = hiccup
    confirm = iter([b"", response(b"", "503 Unavailable")])
    coordinator.answers["confirm-message-received"] = lambda _: next(confirm, response())
    with Connection(place) as connection:
        message = connection.pull()
    assert message is not None
    assert len(calls) == 3 * len(set(calls))
    assert coordinator.num("confirm-message-received") == 3
    assert coordinator.num("activate-node") == 1


@pytest.mark.usefixtures("quick")
def test_a_question_whose_announcement_was_lost_is_not_asked_for_on_the_same_line(
    coordinator: Coordinator, place: Place
) -> None:
    """It counts as taken: only a site that connects anew is asked again."""
    coordinator.answers["pull-messages"] = lambda _: response(b"", "503 Unavailable")
    with Connection(place) as connection, pytest.raises(Disconnected, match="503"):
        connection.pull()
    assert coordinator.num("pull-messages") == 1


@pytest.mark.usefixtures("quick")
def test_a_new_connection_sends_only_what_is_missing(
    coordinator: Coordinator, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "consilium.site")
    store = Store(lambda number: b"" if 5 < number < 25 else None).at(coordinator)
    coordinator.send(question())
    reply = answered()
    with serving(place, reply=lambda _: reply):
        until(lambda: len(store.kept) >= 8 + 8 + 3)
        until(lambda: "the answer that the connection broke under has arrived" in caplog.text)
    assert coordinator.num("activate-node") > 1
    assert len(set(store.kept)) == len(store.kept)
    assert re.search(rf"connected again to {place.address} after \d+ s", caplog.text)


@pytest.mark.usefixtures("quick")
def test_an_answer_that_nobody_waits_for_is_dropped_with_a_line(
    coordinator: Coordinator, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "consilium.site")
    coordinator.send(question())
    coordinator.answers["push-messages"] = lambda _: response(b"", "410 Gone")
    with serving(place):
        until(lambda: "nobody waits any more for what this site answered" in caplog.text)
        asked = coordinator.num("pull-messages")
        until(lambda: coordinator.num("pull-messages") > asked)
    assert coordinator.num("push-messages") == 1
    assert coordinator.num("activate-node") == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", ["500 Internal Server Error", "401 Unauthorized"])
def test_an_answer_refused_for_an_unknown_reason_is_dropped_with_its_connection(
    status: str, coordinator: Coordinator, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A coordinator that waits for it asks who connects anew, and nobody else."""
    caplog.set_level(logging.INFO, "consilium.site")
    coordinator.send(question())
    coordinator.answers["push-messages"] = lambda _: response(b"", status)
    with serving(place):
        until(lambda: coordinator.num("activate-node") == 2)
        asked = coordinator.num("pull-messages")
        until(lambda: coordinator.num("pull-messages") > asked)
    assert coordinator.num("push-messages") == 1
    assert "connected again" in caplog.text


def test_what_is_refused_again_and_again_keeps_its_line_in_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each answer may be hundreds of megabytes: it is not sent for ever."""
    caplog.set_level(logging.INFO, "consilium.site")

    class Refusing:
        def push(self, _: Message) -> None:
            raise client.runtime.Withdrawn("HTTP status 500")

    unsent = client.runtime.Unsent()
    for _ in range(2):
        unsent.reply = answered()
        with pytest.raises(Disconnected):
            unsent.send(Refusing())  # type: ignore[arg-type]
    unsent.reply = answered()
    unsent.send(Refusing())  # type: ignore[arg-type]
    assert unsent.reply is None
    assert "nobody waits any more" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_question_that_vanishes_while_it_is_fetched_ends_the_connection(
    coordinator: Coordinator, place: Place
) -> None:
    coordinator.send(question())
    gone = PullObjectResponse(object_found=False).SerializeToString()
    coordinator.answers["pull-object"] = lambda _: response(gone)
    with Connection(place) as connection, pytest.raises(Disconnected, match="withdrawn"):
        connection.pull()


def test_signs_of_life_go_on_while_a_long_answer_is_sent(
    coordinator: Coordinator, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.runtime, "HEARTBEAT_S", 0.02)
    beats: list[int] = []

    def slow(_: int) -> None:
        time.sleep(0.05)
        beats.append(coordinator.num("send-node-heartbeat"))

    Store(slow).at(coordinator)
    with Connection(place) as connection:
        connection.push(answered())
    assert beats[-1] > beats[0] + 3


def test_a_long_transfer_is_told_of_while_it_goes_on_and_a_short_one_is_not(
    coordinator: Coordinator,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "consilium.site")
    Store().at(coordinator)
    with Connection(place) as connection:
        connection.push(answered())
    assert caplog.text == ""
    monkeypatch.setattr(client.transfer, "SLOW_S", 0.1)
    monkeypatch.setattr(client.transfer, "EVERY_S", 0.2)
    Store(lambda _: time.sleep(0.05)).at(coordinator)
    with Connection(place) as connection:
        connection.push(answered())
    *on_the_way, done = (record.getMessage() for record in caplog.records)
    assert on_the_way
    assert all(re.fullmatch(r"sending 0\.0 MB: \d+ %, 0\.00 MB/s", line) for line in on_the_way[:1])
    assert re.fullmatch(r"sent 0\.0 MB in \d+ s, 0\.00 MB/s", done)
