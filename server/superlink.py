"""Flower's SuperLink, started, watched and stopped; the only file here that knows its insides.

The SuperLink runs in a process of its own (``python -m server.superlink``) with two listeners over
one app: the public one of server.listener, and an admin one on loopback that asks every caller for
a secret. Stock Flower serves both on one port, where whoever can reach it may start code on every
site. The process ends when its standard input does, so it never outlives its coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import httpx
import uvicorn
from flwr.app import Message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
)
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.main import create_app
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from common.errors import ConfigError, RoundAborted
from common.identity import Certified
from server.listener import (
    FLEET,
    GRACE_S,
    App,
    Doorkeeper,
    PublicListener,
    after,
    public_config,
    tls_context,
)

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
ADMIN_HEADER = "x-consilium-admin"
PUSH_MESSAGES = FLEET + "push-messages"
START_S = 60.0
STOP_S = 5.0
HEARTBEAT_S = 20.0  # the coordinator's token lives 60 s without one
RETRY_S = 10  # the SuperLink is on this machine: silent for so long, it is dead
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.01, 0.2
FAB = """\
[project]
name = "consilium"
version = "1.0.0"
description = "Sites run the code they installed; this bundle holds none."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "consilium"

[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
"""

log = logging.getLogger("consilium.superlink")


@dataclass(frozen=True)
class Listening:
    """What the SuperLink's process is told, on its standard input."""

    host: str
    port: int
    ca: str
    certificate: str
    key: str
    revocation_list: str
    members: dict[str, str]  # fingerprint by name
    about: dict[str, str]  # what /health says
    health: str  # host:port of Flower's gRPC health service; empty for none
    secret: str


class SuperLink:
    """A running SuperLink; use as a context manager."""

    def __init__(
        self, process: subprocess.Popen[str], ports: Mapping[str, int], secret: str
    ) -> None:
        self._process = process
        self._secret = secret
        self.public_port = ports["public"]
        self._admin = f"127.0.0.1:{ports['admin']}"

    @classmethod
    def start(cls, told: Listening, log_file: Path) -> Self:
        """Start the process and wait until both listeners answer.

        Raises:
          ConfigError: It does not come up; the message ends with the last line of its log.
        """
        with log_file.open("a") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "server.superlink"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is for the coordinator, which then stops it
            )
        assert process.stdin is not None  # noqa: S101 - asked for above
        assert process.stdout is not None  # noqa: S101
        process.stdin.write(json.dumps(asdict(told)) + "\n")
        process.stdin.flush()
        line = _first_line(process.stdout)
        if not line:
            process.kill()
            process.communicate()  # which closes both pipes
            last = (log_file.read_text().strip().splitlines() or ["no output"])[-1]
            raise ConfigError(
                f"Flower's SuperLink did not start on {told.host}:{told.port}: {last}; see "
                f"{log_file}"
            )
        return cls(process, json.loads(line), told.secret)

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process."""
        self.stop()

    def stop(self) -> None:
        """End the process: its standard input is closed, and it is killed if that is too slow."""
        assert self._process.stdin is not None  # noqa: S101 - asked for at the start
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Of the SuperLink's process."""
        return self._process.pid

    def open_grid(self) -> CoordinatorGrid:
        """Start a run of Flower's whose messages this process sends."""
        fab = _fab()
        with ControlHttpClient(f"http://{self._admin}", interceptors=self._interceptors()) as admin:
            run_id = admin.StartRun(StartRunRequest(fab=Fab(hash_str="", content=fab))).run_id
        superexec = SuperExecAuthHttpInterceptor(
            master_secret=self._secret.encode(),
            protected_methods=["/flwr.proto.Runtime/AcquireTask"],
        )
        interceptors = [superexec, *self._interceptors()]
        with RuntimeHttpClient(f"http://{self._admin}", interceptors=interceptors) as client:
            request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            acquired = client.AcquireTask(request)
        if not run_id or acquired.task.run_id != run_id:
            raise ConfigError("Flower's SuperLink did not start a run; see its log")
        TaskIdentity.run_id = run_id
        TaskIdentity.task_id = acquired.task.task_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        return CoordinatorGrid(self._admin, acquired.token, self._interceptors())

    def _interceptors(self) -> list[Any]:
        return [RuntimeVersionHttpInterceptor("flwr-serverapp"), _Secret(self._secret)]


@dataclass(frozen=True)
class Connected:
    """A site's connection."""

    node_id: int
    since: str  # when it was made, by the SuperLink's clock


class CoordinatorGrid(HttpGrid):
    """Flower's grid, polled as fast as replies come; a dead SuperLink is an error, not a wait."""

    def __init__(self, address: str, token: str, interceptors: list[Any]) -> None:
        super().__init__(address, insecure=True, token=token)
        self._client = RuntimeHttpClient(
            f"http://{address}",
            interceptors=[*interceptors, RuntimeTokenHttpInterceptor(token)],
            retry_invoker=RetryInvoker(
                lambda: exponential(base_delay=0.05, max_delay=1),
                httpx.TransportError,
                max_tries=None,
                max_time=RETRY_S,
            ),
        )
        self.set_run(run_from_proto(self._client.PullTaskInput(PullTaskInputRequest()).run))
        self._stopped = threading.Event()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See ``HttpGrid``.

        Raises:
          RoundAborted: The SuperLink died.
        """
        with _is_alive():
            return super().push_messages(messages)

    def connected(self) -> dict[str, Connected]:
        """The sites that are connected, by name.

        Raises:
          RoundAborted: The SuperLink died.
        """
        with _is_alive():
            nodes = self.get_nodes()
        return {node.name: Connected(node.node_id, node.last_activated_at) for node in nodes}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See ``HttpGrid``; that one waits a second whenever a reply is seen before its objects.

        Raises:
          RoundAborted: The SuperLink died.
        """
        with _is_alive():
            client = self._runtime_client
            found = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
            pull = make_pull_object_fn_protobuf(client.PullObject, self.node, self.run.run_id)
            messages = []
            for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                whole = proto.metadata.message_id
                contents = pull_objects(
                    [node.object_id for node in iterate_object_tree(tree)],
                    pull,
                    initial_backoff=FIRST_BACKOFF_S,
                    backoff_cap=LONGEST_BACKOFF_S,
                    max_tries_per_object=None,
                )
                client.ConfirmMessageReceived(
                    ConfirmMessageReceivedRequest(
                        node=self.node, run_id=self.run.run_id, message_object_id=whole
                    )
                )
                message = inflate_object_from_contents(whole, contents)
                assert isinstance(message, Message)  # noqa: S101 - the tree is a message's
                messages.append(message)
            return messages

    def finish(self) -> None:
        """End Flower's run, so that sites stop waiting for it."""
        self._stopped.set()
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            self._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed"))
        self.close()

    def _send_heartbeats(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                self._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except httpx.HTTPError as error:
                log.warning("no heartbeat reached the SuperLink: %s", type(error).__name__)


@contextlib.contextmanager
def _is_alive() -> Any:
    try:
        yield
    except (httpx.TransportError, httpx.HTTPStatusError) as error:
        raise RoundAborted(
            f"Flower's SuperLink does not answer ({type(error).__name__}): see superlink.log in "
            "the run folder; fl-server --resume goes on from the last round"
        ) from None


class _Secret:
    """Shows the admin secret with every call."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[ADMIN_HEADER] = self._secret
        return call_next(context)


def _fab() -> bytes:
    """The bundle that Flower wants for a run; ours holds no code."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as bundle:
        bundle.writestr("pyproject.toml", FAB)
    return content.getvalue()


def _first_line(stream: IO[str]) -> str:
    """The first line of a process, or nothing where it ended or is too slow."""
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(START_S)
    return lines[0] if lines else ""


# The SuperLink's own process


class AdminListener:
    """An ASGI app before Flower's that asks every caller for the secret."""

    def __init__(self, app: App, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(ADMIN_HEADER.encode(), b"")
            if not hmac.compare_digest(given, self._secret):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"the secret is missing"})
                return
        await self._app(scope, receive, send)


class OwnReplies:
    """An ASGI app before Flower's: what a site pushes is a reply, and its own.

    Flower checks who pushes, and not whom a message says it is from: a member that learned another
    one's node id could send it instructions, or answer in its place.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request; the listener before this one gives its body in one piece."""
        if scope["type"] == "http" and scope["path"] == PUSH_MESSAGES:
            event = await receive()
            if not _are_own_replies(event["body"]):
                await send({"type": "http.response.start", "status": 400, "headers": []})
                await send({"type": "http.response.body", "body": b"not a reply of this site"})
                return
            receive = after(event, receive)
        await self._app(scope, receive, send)


def _are_own_replies(body: bytes) -> bool:
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    return all(
        message.metadata.src_node_id == request.node.node_id
        and message.metadata.reply_to_message_id
        for message in request.messages_list
    )


def flower_app(told: Listening) -> App:
    """Flower's SuperLink, in memory: what must survive lies at the sites and the coordinator."""
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=told.health or None,
        host="127.0.0.1",
        port=0,
        insecure=True,  # no listener of Flower's own is opened
        certificates=None,
        superexec_auth_secret=told.secret.encode(),
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation="process",
        runtime_dependency_install=False,
    )
    app: App = create_app(config, SuperLinkLifespan)
    return app


async def serve(told: Listening) -> None:
    """Both listeners, until standard input ends."""
    public = _bound(told.host, told.port)
    admin = _bound("127.0.0.1", 0)
    app = flower_app(told)
    doorkeeper = Doorkeeper(Path(told.ca), Path(told.revocation_list), told.members)
    register = partial(_register, app)
    context = tls_context(Path(told.ca), Path(told.certificate), Path(told.key))
    door = PublicListener(OwnReplies(app), doorkeeper, register, told.about)
    listeners = [
        uvicorn.Server(public_config(door, context)),
        uvicorn.Server(
            uvicorn.Config(
                AdminListener(app, told.secret),
                log_config=None,
                access_log=False,
                ws="none",
                timeout_graceful_shutdown=GRACE_S,
            )
        ),
    ]
    sockets = [public, admin]
    running = [
        asyncio.create_task(listener._serve([each]))  # noqa: SLF001 - serve() takes the signals
        for listener, each in zip(listeners, sockets, strict=True)
    ]
    while not all(listener.started for listener in listeners):
        if any(task.done() for task in running):
            await asyncio.gather(*running)
            raise RuntimeError("a listener ended at its start")
        await asyncio.sleep(0.01)
    ports = {"public": public.getsockname()[1], "admin": admin.getsockname()[1]}
    print(json.dumps(ports), flush=True)  # noqa: T201 - the answer
    await asyncio.to_thread(sys.stdin.read)
    for listener in listeners:
        listener.should_exit = True
    await asyncio.gather(*running)


def _register(app: Any, site: Certified) -> None:
    """Tell Flower the key of a member; its node id is new with every start of the SuperLink."""
    app.state.linkstate_factory.state().create_node(
        owner_aid=NOOP_FLWR_AID,
        owner_name=NOOP_ACCOUNT_NAME,
        public_key=public_key_to_bytes(site.key),
        heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL,
        name=site.name,
    )


def _bound(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=_family(host), backlog=1024)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def new_secret() -> str:
    """For the admin listener; it is told on standard input and never written down."""
    return secrets.token_hex(32)


if __name__ == "__main__":
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.WARNING)
    flower.handlers.clear()  # its colours do not belong in a file
    asyncio.run(serve(Listening(**json.loads(sys.stdin.readline()))))
