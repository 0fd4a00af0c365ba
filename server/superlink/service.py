"""The process that Flower's SuperLink runs in: its app behind two listeners of our own.

The public one is in ``listener``; the admin one is on loopback and asks every caller for a secret.
Stock Flower serves both on one port, where whoever can reach it may start code on every site. The
process ends when its standard input does, so it never outlives its coordinator.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
)
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from common.identity import Certified
from server.superlink.asgi import App
from server.superlink.calls import Calls
from server.superlink.doorkeeper import Doorkeeper
from server.superlink.launcher import ADMIN_HEADER, Listening
from server.superlink.listener import (
    GRACE_S,
    PublicListener,
    public_config,
    tls_context,
)
from server.superlink.object_store import FlatStore
from server.superlink.shelf import OBJECTS, Shelf
from server.superlink.uploads import Uploads, let_answers_go_on

MAX_LOG_BYTES = 16 << 20  # twice: what a member can make it say must not fill the disk


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


class Members:
    """Flower's nodes of the members; their ids are new with every start of the SuperLink."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self._nodes: dict[str, int] = {}

    def register(self, site: Certified) -> None:
        """Tell Flower the key of a member when it first calls."""
        if site.name not in self._nodes:
            self._nodes[site.name] = self._state.create_node(
                owner_aid=NOOP_FLWR_AID,
                owner_name=NOOP_ACCOUNT_NAME,
                public_key=public_key_to_bytes(site.key),
                heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL,
                name=site.name,
            )

    def leave(self, name: str) -> None:
        """A member may not call any more: whoever waits for it is told so."""
        self._state.deactivate_node(self._nodes[name])


def flower_app(told: Listening, shelf: Shelf) -> tuple[App, Any, FlatStore]:
    """Flower's SuperLink, in memory: what must survive lies at the sites and the coordinator.

    Returned with what it knows of its nodes and what it keeps of messages.
    """
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
    app = create_app(config, SuperLinkLifespan)
    state, store = app.state.linkstate_factory.state(), FlatStore(shelf)
    state._object_store = store  # noqa: SLF001 - Flower takes no other store than its own
    let_answers_go_on(state, store)
    return Calls(app, state, store), state, store


async def serve(told: Listening, folder: Path) -> None:
    """Both listeners, until standard input ends; the folder is this process's own."""
    shelf = Shelf(folder / OBJECTS)
    shelf.clear()
    public = _bound(told.host, told.port)
    admin = _bound("127.0.0.1", 0)
    app, state, store = flower_app(told, shelf)
    doorkeeper = Doorkeeper(Path(told.ca), Path(told.revocation_list), told.members)
    context = tls_context(Path(told.ca), Path(told.certificate), Path(told.key))
    uploads = Uploads(app, store, told.max_upload_bytes)
    door = PublicListener(uploads, doorkeeper, Members(state), told.about)
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
    running.append(asyncio.create_task(door.watch()))
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
    running.pop().cancel()
    await asyncio.gather(*running)


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.create_server((host, port), family=_family(host), backlog=1024)
    # asyncio does this only for sockets that it made itself: without it every answer waits 40 ms
    # for an acknowledgement.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


if __name__ == "__main__":
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=[RotatingFileHandler(sys.argv[1], maxBytes=MAX_LOG_BYTES, backupCount=1)],
    )
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.WARNING)
    flower.handlers.clear()  # its colours do not belong in a file
    told = Listening(**json.loads(sys.stdin.readline()))
    uvloop.run(serve(told, Path(sys.argv[1]).parent))
