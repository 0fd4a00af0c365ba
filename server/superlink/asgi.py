"""What the apps before Flower's say to each other: requests, and answers in Flower's place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def declared_length(scope: Scope) -> int | None:
    """Bytes of the body that follows; None where its head does not say."""
    length = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
    return int(length) if length.isdigit() else None


def after(event: MutableMapping[str, Any], receive: Receive) -> Receive:
    """``receive`` with an event before it that was taken from it already."""
    pending = [event]

    async def again() -> MutableMapping[str, Any]:
        return pending.pop() if pending else await receive()

    return again


async def reply(send: Send, status: int, text: str) -> None:
    """Answer in Flower's place; after a refusal the connection ends."""
    content = text.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(content))]
    if status != 200:  # noqa: PLR2004
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
