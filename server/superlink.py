"""Flower's SuperLink, started, watched and stopped, and the grid that reaches the sites through it.

The SuperLink runs in a process of its own, server.superlink_service. These two files are the only
ones of the coordinator that know Flower's insides.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import secrets
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

import httpx
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from common.errors import ConfigError, RoundAborted

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
ADMIN_HEADER = "x-consilium-admin"
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
                [sys.executable, "-m", "server.superlink_service"],
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


def new_secret() -> str:
    """For the admin listener; it is told on standard input and never written down."""
    return secrets.token_hex(32)
