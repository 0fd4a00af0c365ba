"""Flower's SuperLink, started, watched and stopped.

It runs in a process of its own, see ``service``; ``grid`` reaches the sites through it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import subprocess
import sys
import threading
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

import httpx
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from common.errors import ConfigError
from server.superlink.grid import CoordinatorGrid, direct, is_alive
from server.superlink.shelf import OBJECTS, Shelf

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
ADMIN_HEADER = "x-consilium-admin"
START_S = 60.0
STOP_S = 5.0
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
    max_upload_bytes: int = 64 << 20  # of one answer of a site


class SuperLink:
    """A running SuperLink; use as a context manager."""

    def __init__(self, told: Listening, log_file: Path) -> None:
        self._told = told
        self._log_file = log_file
        self._process, ports = _launched(told, log_file)
        self.public_port = ports["public"]
        self._admin = f"127.0.0.1:{ports['admin']}"

    @classmethod
    def start(cls, told: Listening, log_file: Path) -> Self:
        """Start the process and wait until both listeners answer.

        Raises:
          ConfigError: It does not come up; the message ends with the last line of its log.
        """
        return cls(told, log_file)

    def revived(self) -> CoordinatorGrid:
        """A new process in the place of one that died, on the same port; and its grid.

        Raises:
          ConfigError: It does not come up.
          SuperLinkDied: It dies again at once.
        """
        self.stop()
        told = replace(self._told, port=self.public_port)
        self._process, ports = _launched(told, self._log_file)
        self._admin = f"127.0.0.1:{ports['admin']}"
        with is_alive():
            return self.open_grid()

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
        address, shown = f"http://{self._admin}", self._interceptors()
        with direct(ControlHttpClient(address, interceptors=shown)) as admin:
            run_id = admin.StartRun(StartRunRequest(fab=Fab(hash_str="", content=fab))).run_id
        superexec = SuperExecAuthHttpInterceptor(
            master_secret=self._told.secret.encode(),
            protected_methods=["/flwr.proto.Runtime/AcquireTask"],
        )
        with direct(RuntimeHttpClient(address, interceptors=[superexec, *shown])) as client:
            request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            acquired = client.AcquireTask(request)
        if not run_id or acquired.task.run_id != run_id:
            raise ConfigError("Flower's SuperLink did not start a run; see its log")
        TaskIdentity.run_id = run_id
        TaskIdentity.task_id = acquired.task.task_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        shelf = Shelf(self._log_file.parent / OBJECTS)
        return CoordinatorGrid(
            self._admin, acquired.token, shown, shelf, self._told.max_upload_bytes
        )

    def _interceptors(self) -> list[Any]:
        return [RuntimeVersionHttpInterceptor("flwr-serverapp"), _Secret(self._told.secret)]


def _launched(told: Listening, log_file: Path) -> tuple[subprocess.Popen[str], dict[str, int]]:
    """The process, and the ports of its listeners once both answer."""
    with log_file.open("a") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own program, and a path
            [sys.executable, "-m", "server.superlink.service", str(log_file)],
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
            f"Flower's SuperLink did not start on {told.host}:{told.port}: {last}; see {log_file}"
        )
    return process, json.loads(line)


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
