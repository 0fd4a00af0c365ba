"""What is relied on inside Flower, against a real SuperLink: an upgrade must pass this."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from callers import GOOD, found_with_stranger, place_of, site_of, told_of
from deployment import Consortium
from flwr.app import Array, ArrayRecord, Message, RecordDict

import client.runtime
from client.place import Place
from client.runtime import Connection, serve
from server.superlink.grid import CoordinatorGrid, SuperLinkDied
from server.superlink.launcher import SuperLink

ROOT = Path(__file__).parent.parent
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp")  # documented, with a promise
AT_THE_EDGE = {"client/app.py", "common/wire.py", "server/app.py"}
ADAPTERS = {
    "common/objects.py",
    "client/runtime.py",
    "server/superlink/arrival.py",
    "server/superlink/asking.py",
    "server/superlink/calls.py",
    "server/superlink/grid.py",
    "server/superlink/object_store.py",
    "server/superlink/launcher.py",
    "server/superlink/service.py",
    "server/superlink/uploads.py",
}
SOON_S = 20.0  # it takes a second or two
INSIDE = {
    "client/runtime.py": """
        flwr.app.message.arraychunk.ArrayChunk
        flwr.app.message.remove_content_from_message
        flwr.common.constant.HEARTBEAT_DEFAULT_INTERVAL
        flwr.common.serde.message_from_proto
        flwr.common.serde.message_to_proto
        flwr.proto.fleet_pb2.ActivateNodeRequest
        flwr.proto.fleet_pb2.DeactivateNodeRequest
        flwr.proto.fleet_pb2.PullMessagesRequest
        flwr.proto.fleet_pb2.PushMessagesRequest
        flwr.proto.heartbeat_pb2.SendNodeHeartbeatRequest
        flwr.proto.message_pb2.ConfirmMessageReceivedRequest
        flwr.proto.node_pb2.Node
        flwr.supercore.inflatable.inflatable_object.get_all_nested_objects
        flwr.supercore.inflatable.inflatable_object.get_object_tree
        flwr.supercore.inflatable.inflatable_object.iterate_object_tree
        flwr.supercore.inflatable.inflatable_object.no_object_id_recompute
        flwr.supercore.inflatable.inflatable_protobuf_utils.make_pull_object_fn_protobuf
        flwr.supercore.inflatable.inflatable_protobuf_utils.make_push_object_fn_protobuf
        flwr.supercore.inflatable.inflatable_utils.ObjectPullError
        flwr.supercore.inflatable.inflatable_utils.ObjectPushError
        flwr.supercore.inflatable.inflatable_utils.pull_objects
        flwr.supercore.interceptors.RuntimeVersionHttpInterceptor
        flwr.supercore.primitives.asymmetric.public_key_to_bytes
        flwr.supercore.protobuf.client.ProtobufCall
        flwr.supercore.protobuf.client.ProtobufRequestContext
        flwr.supernode.fleet_http_client.FleetHttpClient
        flwr.supernode.node_auth_http_interceptor.NodeAuthHttpInterceptor
    """,
    "common/objects.py": """
        flwr.app.message.arraychunk.ArrayChunk
        flwr.supercore.constant.HEAD_BODY_DIVIDER
        flwr.supercore.inflatable.inflatable_object.InflatableObject
        flwr.supercore.inflatable.inflatable_object.get_object_body
        flwr.supercore.inflatable.inflatable_object.get_object_head_values_from_object_content
        flwr.supercore.inflatable.inflatable_utils.inflate_object_from_contents
    """,
    "server/superlink/asking.py": "",
    "server/superlink/arrival.py": """
        flwr.app.message.make_message
        flwr.app.metadata.Metadata
        flwr.common.constant.ErrorCode
        flwr.proto.message_pb2.ObjectTree
        flwr.supercore.inflatable.inflatable_object.iterate_object_tree
    """,
    "server/superlink/calls.py": """
        flwr.proto.message_pb2.ObjectTree
        flwr.proto.message_pb2.PullObjectResponse
        flwr.proto.message_pb2.PushObjectRequest
        flwr.proto.message_pb2.PushObjectResponse
        flwr.proto.task_pb2.Task
        flwr.supercore.constant.TASK_TOKEN_HEADER
        flwr.supercore.dependencies.task.authenticate_task
        flwr.supercore.error.http_error_translator
        flwr.supercore.inflatable.inflatable_object.UnexpectedObjectContentError
        flwr.supercore.protobuf.constants.PROTOBUF_MEDIA_TYPE
        flwr.supercore.protobuf.translation.PROTOBUF_REQUEST_TYPES
        flwr.supercore.protobuf.translation.ProtobufTranslationMiddleware
        flwr.superlink.routers.fleet.node_auth.authenticate_node
        flwr.superlink.servicer.fleet.fleet_handlers
        flwr.superlink.servicer.runtime.runtime_handlers
    """,
    "server/superlink/grid.py": """
        flwr.app.message.make_message
        flwr.app.message.remove_content_from_message
        flwr.common.constant.ErrorCode
        flwr.common.serde.message_to_proto
        flwr.common.serde.run_from_proto
        flwr.common.serde_utils.metadata_from_proto
        flwr.proto.message_pb2.ConfirmMessageReceivedRequest
        flwr.proto.message_pb2.ObjectTree
        flwr.proto.message_pb2.PullObjectRequest
        flwr.proto.message_pb2.PushObjectResponse
        flwr.proto.runtime_pb2.PullAppMessagesRequest
        flwr.proto.runtime_pb2.PullTaskInputRequest
        flwr.proto.runtime_pb2.PushAppMessagesRequest
        flwr.proto.runtime_pb2.PushTaskOutputRequest
        flwr.proto.runtime_pb2.SendTaskHeartbeatRequest
        flwr.supercore.inflatable.inflatable_object.InflatableObject
        flwr.supercore.inflatable.inflatable_object.get_all_nested_objects
        flwr.supercore.inflatable.inflatable_object.get_object_tree
        flwr.supercore.interceptors.RuntimeTokenHttpInterceptor
        flwr.supercore.protobuf.client.ProtobufClient
        flwr.supercore.retry.RetryInvoker
        flwr.supercore.retry.exponential
        flwr.supercore.runtime.RuntimeHttpClient
        flwr.superlink.grid.http_grid.HttpGrid
    """,
    "server/superlink/object_store.py": """
        flwr.proto.message_pb2.ObjectTree
        flwr.supercore.inflatable.inflatable_object.get_object_id
        flwr.supercore.inflatable.inflatable_object.iterate_object_tree
        flwr.supercore.inflatable.inflatable_utils.validate_object_content
        flwr.supercore.object_store.NoObjectInStoreError
        flwr.supercore.object_store.in_memory_object_store.InMemoryObjectStore
    """,
    "server/superlink/launcher.py": """
        flwr.common.constant.SUPERLINK_NODE_ID
        flwr.proto.control_pb2.StartRunRequest
        flwr.proto.fab_pb2.Fab
        flwr.proto.runtime_pb2.AcquireTaskRequest
        flwr.supercore.constant.TaskType
        flwr.supercore.control.control_http_client.ControlHttpClient
        flwr.supercore.interceptors.RuntimeVersionHttpInterceptor
        flwr.supercore.interceptors.SuperExecAuthHttpInterceptor
        flwr.supercore.protobuf.client.ProtobufCall
        flwr.supercore.protobuf.client.ProtobufRequestContext
        flwr.supercore.runtime.RuntimeHttpClient
        flwr.supercore.task_identity.TaskIdentity
    """,
    "server/superlink/service.py": """
        flwr.common.constant.HEARTBEAT_DEFAULT_INTERVAL
        flwr.common.constant.NOOP_ACCOUNT_NAME
        flwr.common.constant.NOOP_FLWR_AID
        flwr.supercore.constant.FLWR_IN_MEMORY_DB_NAME
        flwr.supercore.primitives.asymmetric.public_key_to_bytes
        flwr.superlink.auth_plugin.NoOpControlAuthnPlugin
        flwr.superlink.cli.flower_superlink.SuperLinkLifespan
        flwr.superlink.config_loader.SuperLinkLifespanConfig
        flwr.superlink.main.create_app
    """,
    "server/superlink/uploads.py": """
        flwr.proto.fleet_pb2.PushMessagesRequest
        flwr.proto.message_pb2.PushObjectRequest
        flwr.supercore.inflatable.inflatable_object.iterate_object_tree
    """,
}
SITE = """
import sys, threading
from pathlib import Path
from flwr.app import Message
from client.place import Place
from client.runtime import Connection, serve
address, *files = sys.argv[1:]
place = Place(address, *map(Path, files))
serve(place, lambda message: Message(message.content, reply_to=message), threading.Event())
"""


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return found_with_stranger(tmp_path_factory.mktemp("consortium"))


@pytest.fixture
def place(consortium: Consortium, tmp_path: Path) -> Place:
    return place_of(site_of(consortium, GOOD), tmp_path / "node")


@contextmanager
def started(consortium: Consortium) -> Iterator[SuperLink]:
    with SuperLink.start(told_of(consortium), consortium.folder / "superlink.log") as superlink:
        yield superlink


@contextmanager
def opened(superlink: SuperLink) -> Iterator[CoordinatorGrid]:
    grid = superlink.open_grid()
    try:
        yield grid
    finally:
        grid.finish()


@contextmanager
def serving(place: Place) -> Iterator[None]:
    """A site in a thread that sends back what it gets."""
    stopped = threading.Event()
    thread = threading.Thread(target=serve, args=(place, _echo, stopped))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(30)
    assert not thread.is_alive()


def _echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def until(happened: Callable[[], object], timeout_s: float = SOON_S) -> float:
    """Seconds until something is true."""
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < timeout_s, "it never happened"
        time.sleep(0.02)
    return time.monotonic() - start


def echoed(grid: CoordinatorGrid, node: int, content: RecordDict) -> RecordDict:
    """What a site sends back."""
    (sent,) = grid.push_messages([Message(content, dst_node_id=node, message_type="query", ttl=60)])
    replies: list[Message] = []
    until(lambda: replies.extend(grid.pull_messages([sent])) or replies)
    (reply,) = replies
    assert reply.metadata.reply_to_message_id == sent
    assert reply.metadata.src_node_id == node
    assert not reply.has_error()
    return reply.content


def packed(data: bytes) -> RecordDict:
    return RecordDict({"x": ArrayRecord({"x": Array("uint8", (len(data),), "raw", data)})})


def data_of(content: RecordDict) -> bytes:
    record = content["x"]
    assert isinstance(record, ArrayRecord)
    return bytes(record["x"].data)


def test_a_question_that_is_taken_back_leaves_the_connection_as_it_is(
    consortium: Consortium, place: Place
) -> None:
    with (
        started(consortium) as superlink,
        opened(superlink) as grid,
        Connection(place) as connection,
    ):
        until(lambda: GOOD in grid.connected())
        there = grid.connected()[GOOD]
        question = Message(packed(b"x"), dst_node_id=there.node_id, message_type="query")
        grid.forget(grid.push_messages([question]))
        assert connection.pull() is None
        (sent,) = grid.push_messages(
            [Message(packed(b"y"), dst_node_id=there.node_id, message_type="query", ttl=60)]
        )
        asked = connection.pull()
        assert asked is not None
        assert asked.metadata.message_id == sent
        connection.push(_echo(asked))
        until(lambda: list(grid.pull_messages([sent])))
        assert grid.connected()[GOOD] == there


def test_messages_of_12_mb_arrive_whole_in_both_directions(
    consortium: Consortium, place: Place, rng: np.random.Generator
) -> None:
    data = rng.bytes(12 << 20)  # three of Flower's pieces
    with started(consortium) as superlink, opened(superlink) as grid, serving(place):
        until(lambda: GOOD in grid.connected())
        node = grid.connected()[GOOD].node_id
        assert data_of(echoed(grid, node, packed(data))) == data
        assert data_of(echoed(grid, node, packed(b"then a small one"))) == b"then a small one"
        assert int(place.node_file.read_text()) == node


def test_a_killed_superlink_is_an_error_soon_and_sites_find_its_successor_by_themselves(
    consortium: Consortium, place: Place
) -> None:
    with serving(place):
        with started(consortium) as first:
            grid = first.open_grid()
            until(lambda: GOOD in grid.connected())
            node = grid.connected()[GOOD].node_id
            os.kill(first.pid, signal.SIGKILL)
            asked = time.monotonic()
            for ask in (
                grid.connected,
                partial(
                    grid.push_messages,
                    [Message(packed(b"x"), dst_node_id=node, message_type="query", ttl=60)],
                ),
                lambda: list(grid.pull_messages(["0" * 64])),
            ):
                with pytest.raises(SuperLinkDied, match=r"SuperLink does not answer.*--resume"):
                    ask()
            assert time.monotonic() - asked < 3 * 5
            grid.finish()
        with started(consortium) as second, opened(second) as grid:
            assert second.public_port == first.public_port
            until(lambda: GOOD in grid.connected())
            node = grid.connected()[GOOD].node_id
            assert data_of(echoed(grid, node, packed(b"again"))) == b"again"


def test_a_killed_site_takes_up_its_node_while_the_superlink_still_counts_on_it(
    consortium: Consortium, place: Place
) -> None:
    files = place.ca, place.certificate, place.key, place.node_file
    command = [sys.executable, "-c", SITE, place.address, *map(str, files)]
    with started(consortium) as superlink, opened(superlink) as grid:
        nodes, since = [], ""
        for words in (b"before", b"after"):
            site = subprocess.Popen(command, cwd=ROOT)
            try:
                until(partial(_has_connected_after, grid, since))
                since = grid.connected()[GOOD].since
                nodes.append(grid.connected()[GOOD].node_id)
                assert data_of(echoed(grid, nodes[-1], packed(words))) == words
            finally:
                site.kill()
                site.wait()
        assert nodes[0] == nodes[1]


def _has_connected_after(grid: CoordinatorGrid, since: str) -> bool:
    one = grid.connected().get(GOOD)
    return one is not None and one.since != since


def test_a_site_whose_node_file_is_lost_is_told_that_its_lease_is_still_held(
    consortium: Consortium, place: Place
) -> None:
    with started(consortium), client.runtime.Connection(place) as _:
        other = replace(place, node_file=place.node_file.with_name("lost"))
        with (
            pytest.raises(client.runtime.Disconnected, match="killed"),
            client.runtime.Connection(other),
        ):
            pass


def test_a_run_that_ends_says_nothing_of_flowers(consortium: Consortium) -> None:
    said: list[str] = []
    flower = logging.getLogger("flwr")
    listener, level = logging.Handler(), flower.level
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    flower.addHandler(listener)
    flower.setLevel(logging.DEBUG)
    try:
        with started(consortium) as superlink, opened(superlink) as grid:
            assert grid.connected() == {}
    finally:
        flower.removeHandler(listener)
        flower.setLevel(level)
    assert said == []


def test_the_superlink_ends_with_its_coordinator(consortium: Consortium) -> None:
    """Its standard input ends when the coordinator does, however that ends."""
    start = (
        "import json, sys, time; from pathlib import Path\n"
        "from server.superlink.launcher import Listening, SuperLink\n"
        "told = Listening(**json.loads(sys.stdin.readline()))\n"
        "superlink = SuperLink.start(told, Path(sys.argv[1]))\n"
        "print(superlink.pid, flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", start, str(consortium.folder / "superlink.log")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as coordinator:
        assert coordinator.stdin is not None
        assert coordinator.stdout is not None
        coordinator.stdin.write(json.dumps(asdict(told_of(consortium))) + "\n")
        coordinator.stdin.flush()
        pid = int(coordinator.stdout.readline())
        assert is_open(consortium.port)
        coordinator.kill()
    until(lambda: not is_open(consortium.port))
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in _state(pid))


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_flower_is_of_the_version_that_this_was_written_for() -> None:
    """Its insides have no promise: read the adapters again before this line changes."""
    assert version("flwr").startswith("1.41.")


@pytest.mark.parametrize("file", sorted(ADAPTERS))
def test_every_name_taken_from_flowers_inside_is_known_and_there(file: str) -> None:
    names = set(imported(ROOT / file))
    inside = {name for name in names if name.rpartition(".")[0] not in PUBLIC}
    assert inside == set(INSIDE[file].split())
    for name in names:
        module, _, what = name.rpartition(".")
        is_there = hasattr(importlib.import_module(module), what)
        assert is_there or importlib.util.find_spec(name), name


def test_flower_is_imported_by_the_adapters_and_at_the_edge_only() -> None:
    files = [
        path for part in ("client", "common", "server") for path in (ROOT / part).rglob("*.py")
    ]
    users = {str(path.relative_to(ROOT)): imported(path) for path in files}
    assert {file for file, names in users.items() if names} == AT_THE_EDGE | ADAPTERS
    for file in AT_THE_EDGE:
        assert {name.rpartition(".")[0] for name in users[file]} <= set(PUBLIC), file


def imported(path: Path) -> list[str]:
    """Names that a file imports from Flower, in full; also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == "flwr"]
    return names
