"""A member whose answers mean harm: to the others' answers, to the coordinator, to its memory."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from callers import (
    BAD,
    GOOD,
    MAX_UPLOAD_BYTES,
    PULL,
    found_with_stranger,
    node_headers,
    place_of,
    request,
    site_of,
    told_of,
)
from deployment import Consortium
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)

import server.superlink.arrival
import server.superlink.grid
from client.runtime import Connection
from common import wire
from common.messages import Greeting, Introduction, Reason, Refusal, Upload
from server.deployed import DeployedNetwork
from server.superlink.grid import CoordinatorGrid
from server.superlink.launcher import SuperLink

PUSH_MESSAGES, PUSH_OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"
REFUSAL = Refusal(run="", reason=Reason.PROTOCOL)
HONEST = Introduction(0)
EMPTY = ArrayRecord().object_id  # part of every message without arrays
JUNK = "cd" * 32
NUMBERS = iter(range(1000))


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return found_with_stranger(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def superlink(consortium: Consortium) -> Iterator[SuperLink]:
    log = consortium.folder / "superlink.log"
    with SuperLink.start(told_of(consortium), log) as started:
        yield started
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def grid(superlink: SuperLink) -> Iterator[CoordinatorGrid]:
    opened = superlink.open_grid()
    yield opened
    opened.finish()


@pytest.fixture
def sites(
    consortium: Consortium, superlink: SuperLink, tmp_path: Path
) -> Iterator[dict[str, Site]]:
    assert superlink.pid
    with ExitStack() as stack:
        yield {
            name: Site(
                consortium,
                name,
                stack.enter_context(
                    Connection(place_of(site_of(consortium, name), tmp_path / name))
                ),
            )
            for name in (BAD, GOOD)
        }


@dataclass
class Site:
    """A site whose every byte a test decides."""

    consortium: Consortium
    name: str
    connection: Connection
    questions: list[Message] = field(default_factory=list)

    @property
    def node(self) -> Node:
        return self.connection._node

    def question(self) -> Message:
        end = time.monotonic() + 10
        while (message := self.connection.pull()) is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        return message

    def answer(self) -> None:
        self.connection.push(Message(wire.pack(HONEST), reply_to=self.question()))

    def announce(self, *announced: tuple[Message, ObjectTree]) -> int:
        """The HTTP status; the session is kept for what is pushed next."""
        body = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(m)) for m, _ in announced],
            message_object_trees=[tree for _, tree in announced],
            clientapp_runtime_list=[0.0],
        )
        return self.post(PUSH_MESSAGES, body.SerializeToString())

    def push(self, message: Message, content: bytes) -> int:
        return self.post(
            PUSH_OBJECT,
            PushObjectRequest(
                node=self.node,
                run_id=message.metadata.run_id,
                object_id=hashlib.sha256(content).hexdigest(),
                object_content=content,
            ).SerializeToString(),
        )

    def post(self, path: str, body: bytes) -> int:
        caller = site_of(self.consortium, self.name)
        return caller.ask(request(path, body, headers=node_headers(caller.identity))).status


def signed(reply: Message) -> Message:
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def honest_to(question: Message) -> Message:
    return signed(Message(wire.pack(HONEST), reply_to=question))


def never_again() -> CoordinatorGrid:
    raise AssertionError("the SuperLink died")


def asked(
    grid: CoordinatorGrid, names: tuple[str, ...] = (BAD, GOOD), deadline_s: float = 10
) -> dict[str, object]:
    """What the coordinator makes of the answers to one question."""
    greeting = Greeting(f"{{{next(NUMBERS)}}}")
    return dict(DeployedNetwork(grid, never_again).ask(dict.fromkeys(names, greeting), deadline_s))


@contextmanager
def answering(*what: Callable[[], None]) -> Iterator[None]:
    """Sites that answer in threads of their own; they must come to their end."""
    failed: list[BaseException] = []

    def run(each: Callable[[], None]) -> None:
        try:
            each()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    running = [threading.Thread(target=run, args=[each], daemon=True) for each in what]
    for thread in running:
        thread.start()
    yield
    for thread in running:
        thread.join(10)
    assert not failed, failed
    assert not any(thread.is_alive() for thread in running)


def pushed(site: Site, reply: Message, tree: ObjectTree, contents: list[bytes]) -> None:
    assert site.announce((reply, tree)) == 200
    for content in contents:
        assert site.push(reply, content) == 200


def not_a_message(question: Message) -> tuple[Message, ObjectTree, list[bytes]]:
    record = RecordDict({"a": ConfigRecord({"x": 1})})
    reply = Message(record, reply_to=question)
    reply.metadata.__dict__["_message_id"] = record.object_id
    contents = [each.deflate() for each in get_all_nested_objects(record).values()]
    return reply, get_object_tree(record), contents


def without_records(question: Message) -> tuple[Message, ObjectTree, list[bytes]]:
    reply = honest_to(question)
    (child,) = reply.children
    (piece,) = chunks(1, 100)
    other = hashlib.sha256(piece).hexdigest()
    return raw(question, reply.deflate().replace(child.encode(), other.encode()), piece)


def damaged(question: Message) -> tuple[Message, ObjectTree, list[bytes]]:
    return raw(question, b"Message  3\x00xyz")


def raw(
    question: Message, content: bytes, *others: bytes
) -> tuple[Message, ObjectTree, list[bytes]]:
    """An answer of these objects, the first of which is the message."""
    ids = [hashlib.sha256(each).hexdigest() for each in (content, *others)]
    reply = Message(RecordDict(), reply_to=question)
    reply.metadata.__dict__["_message_id"] = ids[0]
    tree = ObjectTree(object_id=ids[0], children=[ObjectTree(object_id=each) for each in ids[1:]])
    return reply, tree, [content, *others]


def one_piece_twenty_times(question: Message) -> tuple[Message, ObjectTree, list[bytes]]:
    """Of 1 MB; a site could as well write: a million times."""
    small = Message(wire.pack(upload_like()), reply_to=question)
    objects = get_all_nested_objects(small)
    array = next(each for each in objects.values() if type(each).__name__ == "Array")
    (chunk,) = array.children
    body = json.dumps(
        {
            "dtype": "uint8",
            "shape": [20 << 20],
            "stype": "raw",
            "arraychunk_ids": [0] * 20,
        }
    ).encode()
    bomb = b"Array %s %d\x00" % (chunk.encode(), len(body)) + body
    contents = [each.deflate() for each in objects.values()]
    old, new = array.object_id, hashlib.sha256(bomb).hexdigest()
    contents = [bomb if each == array.deflate() else each for each in contents]
    for _ in range(3):  # the record of arrays, the records, the message
        renamed = [each.replace(old.encode(), new.encode()) for each in contents]
        (changed,) = [k for k, each in enumerate(renamed) if each != contents[k]]
        old = hashlib.sha256(contents[changed]).hexdigest()
        new = hashlib.sha256(renamed[changed]).hexdigest()
        contents = renamed
    return raw(question, contents[-1], *contents[:-1])


def upload_like() -> object:
    return Upload("", 0, b"", (), (), np.zeros(1 << 20, np.uint8))


# Answers that are none


@pytest.mark.parametrize(
    "make",
    [not_a_message, without_records, damaged, one_piece_twenty_times],
    ids=lambda make: make.__name__.replace("_", " "),
)
def test_an_answer_that_is_no_message_is_a_refusal_and_the_others_count(
    grid: CoordinatorGrid, sites: dict[str, Site], make: object
) -> None:
    def hostile() -> None:
        pushed(sites[BAD], *make(sites[BAD].question()))  # type: ignore[operator]

    with answering(hostile, sites[GOOD].answer):
        assert asked(grid) == {BAD: REFUSAL, GOOD: HONEST}


@pytest.mark.parametrize("code", [0, 2, 5, 9999])
def test_an_error_from_a_site_ends_no_run_and_says_nothing(
    grid: CoordinatorGrid, sites: dict[str, Site], caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Code 0 is what the simulation engine says when a worker of its own has died."""

    def hostile() -> None:
        error = Error(code=code, reason="\x1b[31mpwned")
        sites[BAD].connection.push(Message(error, reply_to=sites[BAD].question()))

    with caplog.at_level(logging.INFO), answering(hostile, sites[GOOD].answer):
        assert asked(grid) == {BAD: REFUSAL, GOOD: HONEST}
    assert f"{BAD}: its answer is no message" in caplog.text
    assert "pwned" not in caplog.text


def test_an_answer_counts_for_the_question_that_flower_checked(
    grid: CoordinatorGrid, sites: dict[str, Site]
) -> None:
    """Within the message a site may say anything, for instance that it answers another's one."""
    theirs: list[str] = []
    there = threading.Event()

    def good() -> None:
        question = sites[GOOD].question()
        theirs.append(question.metadata.message_id)
        there.set()
        sites[GOOD].connection.push(Message(wire.pack(HONEST), reply_to=question))

    def hostile() -> None:
        question = sites[BAD].question()
        assert there.wait(10)
        own = question.metadata.message_id
        reply = Message(wire.pack(Introduction(7)), reply_to=question)
        objects = [each.deflate() for each in get_all_nested_objects(reply).values()]
        content = objects.pop().replace(own.encode(), theirs[0].encode())
        pushed(sites[BAD], *raw(question, content, *objects))

    with answering(good, hostile):
        assert asked(grid) == {BAD: Introduction(7), GOOD: HONEST}


# Answers that never come


def test_an_answer_that_never_comes_whole_ends_with_the_exchange(
    grid: CoordinatorGrid, sites: dict[str, Site]
) -> None:
    def hostile() -> None:
        reply = honest_to(sites[BAD].question())
        assert sites[BAD].announce((reply, get_object_tree(reply))) == 200

    with answering(hostile, sites[GOOD].answer):
        started = time.monotonic()
        assert asked(grid, deadline_s=2) == {GOOD: HONEST}
        assert 1.5 < time.monotonic() - started < 5
    with answering(sites[BAD].answer, sites[GOOD].answer):
        assert asked(grid) == {BAD: HONEST, GOOD: HONEST}


def test_an_answer_without_progress_is_given_up_and_its_site_asked_again(
    grid: CoordinatorGrid, sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.superlink.arrival, "STALLED_S", 0.5)
    monkeypatch.setattr(server.superlink.asking, "AGAIN_S", 0.5)

    def killed_once() -> None:
        reply = honest_to(sites[BAD].question())
        assert sites[BAD].announce((reply, get_object_tree(reply))) == 200
        sites[BAD].answer()

    with answering(killed_once):
        assert asked(grid, (BAD,)) == {BAD: HONEST}


def test_an_answer_that_stands_still_holds_up_no_other(
    grid: CoordinatorGrid, sites: dict[str, Site]
) -> None:
    arrived, announced = [], threading.Event()

    def hostile() -> None:
        question = sites[BAD].question()
        reply = honest_to(question)
        *first, message = [each.deflate() for each in get_all_nested_objects(reply).values()]
        pushed(sites[BAD], reply, get_object_tree(reply), first)
        announced.set()
        while not arrived:
            time.sleep(0.05)
        assert sites[BAD].push(reply, message) == 200

    def good() -> None:
        assert announced.wait(10)
        sites[GOOD].answer()

    greeting = Greeting("{}")
    with answering(hostile, good):
        replies = DeployedNetwork(grid, never_again).ask(dict.fromkeys((BAD, GOOD), greeting), 10)
        for name, reply in replies:
            assert reply == HONEST
            arrived.append(name)
    assert arrived == [GOOD, BAD]


# Answers that spoil what others share


@pytest.mark.parametrize("as_message", [False, True], ids=["a part", "the message"])
def test_a_site_cannot_put_false_children_under_what_others_send_too(
    grid: CoordinatorGrid, sites: dict[str, Site], as_message: bool
) -> None:
    """Flower believed the first tree that named an id, and the others waited for its junk."""
    poison = ObjectTree(object_id=EMPTY, children=[ObjectTree(object_id=JUNK)])
    tree = poison if as_message else ObjectTree(object_id="ab" * 32, children=[poison])

    def hostile() -> None:
        reply = honest_to(sites[BAD].question())
        reply.metadata.__dict__["_message_id"] = tree.object_id
        assert sites[BAD].announce((reply, tree)) == 200

    with answering(hostile):
        assert asked(grid, (BAD,), deadline_s=1) == {}
    for _ in range(2):
        with answering(sites[GOOD].answer):
            assert asked(grid, (GOOD,)) == {GOOD: HONEST}


def test_a_site_cannot_spoil_the_next_broadcast_of_an_array(
    grid: CoordinatorGrid, sites: dict[str, Site]
) -> None:
    """It knows the id since the last one, and names it while nothing is stored under it."""
    records = wire.pack(upload_like())  # type: ignore[arg-type]
    (array,) = records["arrays"].values()

    def hostile() -> None:
        reply = honest_to(sites[BAD].question())
        bad = ObjectTree(object_id=array.object_id, children=[ObjectTree(object_id=JUNK)])
        tree = ObjectTree(object_id=reply.object_id, children=[bad])
        assert sites[BAD].announce((reply, tree)) == 200

    with answering(hostile):
        assert asked(grid, (BAD,), deadline_s=1) == {}
    node = sites[GOOD].node.node_id
    grid.push_messages([Message(records, dst_node_id=node, message_type="query", ttl=20)])
    received = sites[GOOD].question()
    assert bytes(received.content["arrays"]["body"].data) == bytes(array.data)


def two_messages(reply: Message) -> list[tuple[Message, ObjectTree]]:
    return [(reply, get_object_tree(reply))] * 2


def no_message(_: Message) -> list[tuple[Message, ObjectTree]]:
    return []


def another_root(reply: Message) -> list[tuple[Message, ObjectTree]]:
    return [(reply, ObjectTree(object_id=JUNK))]


def odd_ids(reply: Message) -> list[tuple[Message, ObjectTree]]:
    odd = ObjectTree(object_id="0x" + "_1" * 31)  # which int() takes for a number
    return [(reply, ObjectTree(object_id=reply.object_id, children=[odd]))]


def too_many_objects(reply: Message) -> list[tuple[Message, ObjectTree]]:
    many = [ObjectTree(object_id=f"{k:064x}") for k in range(64 + (MAX_UPLOAD_BYTES >> 20))]
    return [(reply, ObjectTree(object_id=reply.object_id, children=many))]


def too_deep(reply: Message) -> list[tuple[Message, ObjectTree]]:
    tree = ObjectTree(object_id=JUNK)
    for _ in range(90):
        tree = ObjectTree(object_id=JUNK, children=[tree])
    return [(reply, ObjectTree(object_id=reply.object_id, children=[tree] * 1000))]


def a_question_within(reply: Message) -> list[tuple[Message, ObjectTree]]:
    """The question would stay in memory with the answer, and an answer within an answer, too."""
    inner = ObjectTree(object_id=reply.metadata.reply_to_message_id)
    return [(reply, ObjectTree(object_id=reply.object_id, children=[inner]))]


def no_question(reply: Message) -> list[tuple[Message, ObjectTree]]:
    tree = get_object_tree(reply)
    reply.metadata.__dict__["_reply_to_message_id"] = "x" * 100_000
    return [(reply, tree)]


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (two_messages, 400),
        (no_message, 400),
        (another_root, 400),
        (odd_ids, 400),
        (too_many_objects, 413),
        (too_deep, 413),
        (a_question_within, 400),
        (no_question, 400),
    ],
    ids=lambda value: getattr(value, "__name__", "").replace("_", " "),
)
def test_an_announcement_that_is_not_one_answer_is_refused_at_the_door(
    grid: CoordinatorGrid,
    consortium: Consortium,
    sites: dict[str, Site],
    make: object,
    status: int,
) -> None:
    log = consortium.folder / "superlink.log"
    node = sites[BAD].node.node_id
    records = wire.pack(Greeting("{}"))
    (sent,) = grid.push_messages([Message(records, dst_node_id=node, message_type="query", ttl=5)])
    found = sites[BAD].connection._client.PullMessages(PullMessagesRequest(node=sites[BAD].node))
    assert found.messages_list[0].metadata.message_id == sent  # not confirmed: it is still stored
    question = Message(records, dst_node_id=node, message_type="query", ttl=5)
    question.metadata.__dict__.update(_message_id=sent, _run_id=grid.run.run_id)
    before = log.stat().st_size
    assert sites[BAD].announce(*make(honest_to(question))) == status  # type: ignore[operator]
    assert f"refused of {BAD}: " in log.read_text()[before:]
    assert log.stat().st_size - before < 200


# Answers that fill the memory


def chunks(num: int, num_bytes: int) -> list[bytes]:
    return [b"ArrayChunk  %d\x00" % num_bytes + bytes([k]) * num_bytes for k in range(num)]


def of_chunks(question: Message, pieces: list[bytes]) -> tuple[Message, ObjectTree]:
    reply, tree, _ = raw(question, honest_to(question).deflate(), *pieces)
    return reply, tree


def test_an_answer_stores_no_more_than_the_largest_honest_one(
    grid: CoordinatorGrid, sites: dict[str, Site]
) -> None:
    pieces = chunks(8, 5 << 20)
    most = MAX_UPLOAD_BYTES // len(pieces[0])
    statuses = []

    def hostile() -> None:
        question = sites[BAD].question()
        reply, tree = of_chunks(question, pieces)
        assert sites[BAD].announce((reply, tree)) == 200
        statuses.extend(sites[BAD].push(reply, each) for each in pieces)

    with answering(hostile, sites[GOOD].answer):
        assert asked(grid, deadline_s=3) == {GOOD: HONEST}
    assert statuses == [200] * most + [413] + [410] * (len(pieces) - most - 1)


def test_what_nobody_asked_for_is_not_stored(grid: CoordinatorGrid, sites: dict[str, Site]) -> None:
    def hostile() -> None:
        question = sites[BAD].question()
        reply = honest_to(question)
        (piece,) = chunks(1, 100)
        assert sites[BAD].push(reply, piece) == 410
        assert sites[BAD].announce((reply, get_object_tree(reply))) == 200
        assert sites[BAD].push(reply, piece) == 410

    with answering(hostile):
        assert asked(grid, (BAD,), deadline_s=1) == {}


# What a site says is the host, and the log


@pytest.mark.parametrize("host", ["[1:2]", "[", "x/v1/fleet?", "x#", "a b", "\x7f"])
def test_what_a_site_says_is_the_host_changes_nothing(
    consortium: Consortium, sites: dict[str, Site], host: str
) -> None:
    caller, log = site_of(consortium, BAD), consortium.folder / "superlink.log"
    before = log.stat().st_size
    for node, status in ((sites[BAD].node, 200), (sites[GOOD].node, 401)):
        body = PullMessagesRequest(node=node).SerializeToString()
        headers = {**node_headers(caller.identity), "host": host}
        assert caller.ask(request(PULL, body, headers=headers)).status in {status, 400}
    assert log.stat().st_size - before < 500


def test_the_log_has_a_bound(consortium: Consortium, tmp_path: Path) -> None:
    full = tmp_path / "superlink.log"
    full.write_bytes(b"x" * (16 << 20))
    told = replace(told_of(consortium), port=0)
    with SuperLink.start(told, full) as started:
        stranger = replace(site_of(consortium, "stranger"), port=started.public_port)
        assert stranger.ask(request("/health", method="GET")).status == 403
    assert 0 < full.stat().st_size < 1000
    assert full.with_name("superlink.log.1").stat().st_size == 16 << 20


def test_a_question_that_is_never_fetched_is_deleted_when_its_time_is_over(
    grid: CoordinatorGrid, sites: dict[str, Site]
) -> None:
    """Every round's model would stay for a member that fetches none."""
    (sent,) = ask_flower(grid, sites[BAD], ttl=1)
    assert not is_gone(grid, sent)
    time.sleep(1.1)
    ask_flower(grid, sites[GOOD], ttl=1)
    assert is_gone(grid, sent)


def test_a_question_that_is_answered_is_deleted_whatever_the_site_confirms(
    grid: CoordinatorGrid, sites: dict[str, Site]
) -> None:
    (sent,) = ask_flower(grid, sites[BAD], ttl=10)
    found = sites[BAD].connection._client.PullMessages(PullMessagesRequest(node=sites[BAD].node))
    assert found.messages_list[0].metadata.message_id == sent
    question = Message(RecordDict(), dst_node_id=1, message_type="query", ttl=10)
    question.metadata.__dict__.update(
        _message_id=sent, _run_id=grid.run.run_id, _dst_node_id=sites[BAD].node.node_id
    )
    sites[BAD].connection.push(Message(wire.pack(HONEST), reply_to=question))
    replies = {one.metadata.reply_to_message_id: one for one in grid.pull_messages([sent])}
    assert wire.unpack(replies[sent].content) == HONEST
    end = time.monotonic() + 5
    while not is_gone(grid, sent):
        assert time.monotonic() < end


def is_gone(grid: CoordinatorGrid, message_id: str) -> bool:
    return not grid._is_kept(message_id)


def ask_flower(grid: CoordinatorGrid, site: Site, ttl: float) -> list[str]:
    node = site.node.node_id
    content = wire.pack(Greeting(f"{{{next(NUMBERS)}}}"))
    return list(grid.push_messages([Message(content, node, message_type="query", ttl=ttl)]))
