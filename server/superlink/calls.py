"""Flower's calls, answered by Flower's own functions without its web framework.

Nine tenths of what a call costs in Flower's SuperLink are ten layers of middleware and the way into
a thread and back: with many sites that decides how long a round takes. What those layers check is
checked here, by the same functions. Calls that come once in a run go on through all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.error import http_error_translator
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import (
    PROTOBUF_REQUEST_TYPES,
    ProtobufTranslationMiddleware,
)
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from server.superlink.asgi import Receive, Scope, Send

FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
LARGE_BYTES = 1 << 16  # of a body: what is done with it would hold up the others

Handler = Callable[..., Any]
Answered = Callable[[Request, bytes, Any], Response]
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
OF_COORDINATOR: dict[str, Handler] = {
    "push-messages": runtime_handlers.push_messages,
    "pull-messages": runtime_handlers.pull_messages,
    "push-object": runtime_handlers.push_object,
    "pull-object": runtime_handlers.pull_object,
    "confirm-message-received": runtime_handlers.confirm_message_received,
    "get-nodes": runtime_handlers.get_nodes,
}


class Calls:
    """An ASGI app before Flower's: it answers the calls of a round, and passes others on."""

    def __init__(self, app: FastAPI, state: Any) -> None:
        """Answer from Flower's state, where the app keeps it, too."""
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        answered = _answered_by(scope)
        if answered is None:
            await self._app(scope, receive, send)
            return

        async def answer(request: Request) -> Response:
            ProtobufTranslationMiddleware._check_request_media_type(request)  # noqa: SLF001
            body = await request.body()
            if len(body) < LARGE_BYTES:
                return answered(request, body, self._state)
            return await asyncio.to_thread(answered, request, body, self._state)

        request = Request({**scope, "app": self._app}, receive)
        response = await http_error_translator(request, answer)
        await response(scope, receive, send)


def _answered_by(scope: Scope) -> Answered | None:
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    path = scope["path"]
    if path.startswith(FLEET) and path.removeprefix(FLEET) in OF_SITES:
        return _for_site
    if path.startswith(RUNTIME) and path.removeprefix(RUNTIME) in OF_COORDINATOR:
        return _for_coordinator
    return None


def _for_site(request: Request, body: bytes, state: Any) -> Response:
    message = request.state.protobuf_request = _read(request, body)
    authenticate_node(request)  # that it is signed, and by the node that it names
    call = request.scope["path"].removeprefix(FLEET)
    more = [state.object_store] if call in WITH_STORE else []
    return _written(OF_SITES[call](message, state, *more))


def _for_coordinator(request: Request, body: bytes, state: Any) -> Response:
    task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)
    call = request.scope["path"].removeprefix(RUNTIME)
    return _written(OF_COORDINATOR[call](_read(request, body), state, task))


def _read(request: Request, body: bytes) -> Any:
    kind = PROTOBUF_REQUEST_TYPES["POST", request.scope["path"]]
    return ProtobufTranslationMiddleware._parse_request(body, kind)  # noqa: SLF001


def _written(answer: Any) -> Response:
    return Response(answer.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)
