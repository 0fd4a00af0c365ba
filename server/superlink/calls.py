"""Flower's calls, answered by Flower's own functions without its web framework.

Nine tenths of what a call costs in Flower's SuperLink are ten layers of middleware and the way into
a thread and back: with many sites that decides how long a round takes. What those layers check is
checked here, by the same functions. Calls that come once in a run go on through all of them.

Flower's functions say whether an object is taken or given; its bytes go past them, to and from the
shelf.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from mmap import mmap
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import (
    PROTOBUF_REQUEST_TYPES,
    ProtobufTranslationMiddleware,
)
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from server.superlink.asgi import Receive, Scope, Send
from server.superlink.object_store import ON_SHELF, FlatStore
from server.superlink.shelf import SHELVED

FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
PUSH, PULL = "/push-object", "/pull-object"
PARSED = "consilium.parsed"  # in the scope of a request: its message, and an object apart from it
LARGE_BYTES = 1 << 16  # of an object: to hash it, or to write it, would hold up the others
PART_BYTES = 1 << 18  # of an object on its way out: the rest of it stays where it lies
CONTENT = PullObjectResponse.DESCRIPTOR.fields_by_name["object_content"].number << 3 | 2

Handler = Callable[..., Any]
OF_SITES: dict[str, Handler] = {
    "activate-node": fleet_handlers.activate_node,
    "deactivate-node": fleet_handlers.deactivate_node,
    "send-node-heartbeat": fleet_handlers.send_node_heartbeat,
    "pull-messages": fleet_handlers.pull_messages,
    "push-messages": fleet_handlers.push_messages,
    "push-object": fleet_handlers.push_object,
    "pull-object": fleet_handlers.pull_object,
    "confirm-message-received": fleet_handlers.confirm_message_received,
}
WITH_STORE = {"pull-messages", "confirm-message-received"}  # of the sites' calls


def shelved(session: ObjectTree, state: Any, task: Task) -> PushObjectResponse:
    """Take in what the coordinator laid on the shelf itself: the parts of a session."""
    parts = [each.object_id for each in session.children]
    stored = [state.store_object(task.run_id, session.object_id, each, ON_SHELF) for each in parts]
    return PushObjectResponse(stored=all(stored))


OF_COORDINATOR: dict[str, Handler] = {
    "push-messages": runtime_handlers.push_messages,
    SHELVED.removeprefix(RUNTIME): shelved,
    "pull-messages": runtime_handlers.pull_messages,
    "pull-object": runtime_handlers.pull_object,
    "confirm-message-received": runtime_handlers.confirm_message_received,
    "get-nodes": runtime_handlers.get_nodes,
}
REQUESTS = {**PROTOBUF_REQUEST_TYPES, ("POST", SHELVED): ObjectTree}

log = logging.getLogger("consilium.superlink")


class Calls:
    """An ASGI app before Flower's: it answers the calls of a round, and passes others on."""

    def __init__(self, app: FastAPI, state: Any, store: FlatStore) -> None:
        """Answer from Flower's state and store, where the app keeps them, too."""
        self._app = app
        self._state = state
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        handler = _handler(scope["path"]) if scope["type"] == "http" else None
        if handler is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request({**scope, "app": self._app}, receive)
        response = await http_error_translator(request, partial(self._answer, handler))
        await response(scope, receive, send)

    async def _answer(self, handler: Handler, request: Request) -> Any:
        path = request.scope["path"]
        message, content = await _read(request, path)
        if path.startswith(FLEET):
            request.state.protobuf_request = message
            authenticate_node(request)  # that it is signed, and by the node that it names
            more = [self._store] if path.removeprefix(FLEET) in WITH_STORE else []
        else:
            token = request.headers.get(TASK_TOKEN_HEADER)
            more = [authenticate_task(request, token, self._state)]
        is_push, is_pull = path.endswith(PUSH), path.endswith(PULL)
        if is_push and not await self._has_received(message.object_id, content):
            return _written(PushObjectResponse(stored=False))
        answer = handler(message, self._state, *more)
        if is_push and not answer.stored:
            self._store.drop_unwanted(message.object_id)
        if is_pull and answer.object_available:
            return self._from_shelf(message.object_id)
        return _written(answer)

    async def _has_received(self, object_id: str, content: bytes) -> bool:
        """Lay an object on the shelf; False where it is not what its id stands for."""
        try:
            if len(content) < LARGE_BYTES:
                self._store.receive(object_id, content)
            else:
                await asyncio.to_thread(self._store.receive, object_id, content)
        except (ValueError, UnexpectedObjectContentError):
            return False
        except OSError as error:
            log.error("what was sent cannot be kept: %s; whoever sent it tries again", error)  # noqa: TRY400
            raise HTTPException(503) from None
        return True

    def _from_shelf(self, object_id: str) -> Any:
        try:
            content = self._store.shelf.open(object_id)
        except FileNotFoundError:  # deleted since
            return _written(PullObjectResponse(object_found=False))
        found = PullObjectResponse(object_found=True, object_available=True)
        return Sent(found.SerializeToString() + bytes([CONTENT]) + _varint(len(content)), content)


class Sent:
    """An answer with an object at its end, which is sent from where it lies."""

    def __init__(self, head: bytes, content: mmap) -> None:
        self._head = head
        self._content = content

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        """Send it as fast as it is taken."""
        length = len(self._head) + len(self._content)
        headers = [
            (b"content-type", PROTOBUF_MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % length),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with self._content as content:
            part = self._head + content[: PART_BYTES - len(self._head)]
            for start in range(PART_BYTES - len(self._head), len(content), PART_BYTES):
                await send({"type": "http.response.body", "body": part, "more_body": True})
                part = content[start : start + PART_BYTES]
        await send({"type": "http.response.body", "body": part})


def _handler(path: str) -> Handler | None:
    if path.startswith(FLEET):
        return OF_SITES.get(path.removeprefix(FLEET))
    return OF_COORDINATOR.get(path.removeprefix(RUNTIME))


async def _read(request: Request, path: str) -> tuple[Any, bytes]:
    """What a request says, and the object that it brings."""
    ProtobufTranslationMiddleware._check_request_media_type(request)  # noqa: SLF001
    if PARSED in request.scope:
        message, content = request.scope[PARSED]
        return message, content
    body = await request.body()
    message = ProtobufTranslationMiddleware._parse_request(body, REQUESTS["POST", path])  # noqa: SLF001
    return message, taken_out(message) if path.endswith(PUSH) else b""


def taken_out(request: PushObjectRequest) -> bytes:
    """The object that a request brings; it leaves it, so that it is in memory once."""
    content: bytes = request.object_content
    request.object_content = ON_SHELF
    return content


def _written(answer: Any) -> Response:
    return Response(answer.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)


def _varint(number: int) -> bytes:
    """As protobuf writes a length: seven bits at a time, the low ones first."""
    written = bytearray()
    while number > 0x7F:  # noqa: PLR2004
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])
