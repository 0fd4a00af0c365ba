"""The coordinator's public door: who may call, which calls, how much and how fast.

In front of Flower's SuperLink stands this: TLS 1.3 with a certificate of the consortium CA, held
against the revocation list at every request; the nine calls that a site needs, everything else is
404; bodies of bounded size that must arrive in bounded time. Flower's own node authentication comes
behind it, and must name the same key as the certificate.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import logging
import ssl
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.errors import FederationError, RemoteProtocolError
from common.identity import (
    Certified,
    check_certificate,
    fingerprint,
    read_certificate,
    read_revocation_list,
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET = "/v1/fleet/"
CALLS = frozenset(
    FLEET + name
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
HEALTH = "/health"
NODE_KEY = b"flwr-public-key"
MAX_BODY_BYTES = 6 << 20  # an object is one chunk of 5 MB at most
BODY_S = 180.0  # for a whole body; 28 kB/s for a full chunk
PAUSE_S = 20.0  # between two pieces of it
HEAD_S = 20.0  # from the first byte of a request, or of a connection, to the end of the head
MAX_HEAD_BYTES = 1 << 16  # beyond what one read brings
MAX_TOGETHER = 32  # requests of one site
MAX_FROM_ONE = 64  # connections with one certificate
MAX_CONNECTIONS = 1024
KEEP_ALIVE_S = 75
GRACE_S = 1  # for requests that are under way when it stops
CHECKED_FOR_S = 10.0  # a certificate is held against the clock again after so long

log = logging.getLogger("consilium.listener")


class Doorkeeper:
    """Decides whether a certificate may come in, at this moment."""

    def __init__(self, ca: Path, revocation_list: Path, members: Mapping[str, str]) -> None:
        self._ca = read_certificate(ca)
        self._revocation_list = revocation_list
        self._members = dict(members)  # fingerprint by name
        self._admitted: dict[bytes, tuple[int, float, Certified]] = {}

    def admit(self, certificate: bytes) -> Certified:
        """Who calls.

        Raises:
          RemoteProtocolError: R3. The certificate is none of this CA, ended, was revoked, or is
            of nobody in this study; or the revocation list is not valid now.
          OSError: The list cannot be read: nobody comes in.
        """
        stamp = self._revocation_list.stat().st_mtime_ns
        known, until, site = self._admitted.get(certificate, (0, 0.0, None))
        if site is None or known != stamp or time.monotonic() > until:
            site = self._check(certificate)
            self._admitted = {k: v for k, v in self._admitted.items() if v[0] == stamp}
            self._admitted[certificate] = stamp, time.monotonic() + CHECKED_FOR_S, site
        return site

    def _check(self, certificate: bytes) -> Certified:
        now = datetime.now(UTC)
        revoked = read_revocation_list(self._revocation_list.read_bytes(), self._ca, now)
        site = check_certificate(certificate, self._ca, revoked, now)
        if self._members.get(site.name) != site.fingerprint or site.role != "site":
            raise RemoteProtocolError(f"{site.name} is not a member of this study", rule="R3")
        return site


class PublicListener:
    """An ASGI app before Flower's."""

    def __init__(
        self,
        app: App,
        doorkeeper: Doorkeeper,
        register: Callable[[Certified], None],
        about: Mapping[str, str],
    ) -> None:
        self._app = app
        self._doorkeeper = doorkeeper
        self._register = register  # tells Flower a member's key, when it first calls
        self._about = dict(about)
        self._known: set[str] = set()
        self._together: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        if path not in CALLS and path != HEALTH:
            await _reply(send, 404, "no such call")
            return
        try:
            site = self._doorkeeper.admit(scope["state"]["peer_certificate"])
        except (FederationError, OSError) as error:
            log.warning("refused at the door: %s", error)
            await _reply(send, 403, "certificate refused")
            return
        if path == HEALTH:
            await _reply(send, 200, json.dumps({**self._about, "time": time.time()}))
        elif scope["method"] != "POST" or not _is_key_of(scope, site):
            await _reply(send, 401, "the node's key is not the certificate's")
        elif self._together[site.name] >= MAX_TOGETHER:
            await _reply(send, 429, "too many requests at once")
        else:
            if site.name not in self._known:
                self._register(site)
                self._known.add(site.name)
            self._together[site.name] += 1
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self._together[site.name] -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body first: Flower sees only requests that are complete."""
        length = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        if not length.isdigit():
            # Nothing bounds what may stand between and after pieces; Flower's clients send none.
            await _reply(send, 411, "a length is needed")
            return
        if int(length) > MAX_BODY_BYTES:
            await _reply(send, 413, "too large")
            return
        try:
            body = await asyncio.wait_for(_body(receive), BODY_S)
        except TimeoutError:
            await _reply(send, 408, "too slow")
            return
        whole = {"type": "http.request", "body": body, "more_body": False}
        await self._app(scope, after(whole, receive), send)


def after(event: MutableMapping[str, Any], receive: Receive) -> Receive:
    """``receive`` with an event before it that was taken from it already."""
    pending = [event]

    async def again() -> MutableMapping[str, Any]:
        return pending.pop() if pending else await receive()

    return again


class PeerProtocol(HttpToolsProtocol):
    """HTTP that tells the app which certificate the peer showed, and that bounds what comes first.

    Uvicorn bounds neither the size of a request's head nor the time it takes. TLS lets in every
    certificate of the CA, also a revoked one: what the app would refuse must not use up memory or
    the connections before the app is asked.
    """

    _certificate = b""
    _head_bytes: int | None = None  # of the head that is being received
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note the certificate of a connection: TLS has checked that the peer holds its key."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        self._certificate = (tls.getpeercert(binary_form=True) if tls is not None else None) or b""
        self.app_state = {**self.app_state, "peer_certificate": self._certificate}
        self._wait_for_head()
        if self._num_alike() > MAX_FROM_ONE:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and hang up where a head has no end."""
        before = self._head_bytes
        super().data_received(data)
        if before is not None and self._head_bytes is not None:
            self._head_bytes = before + len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_bytes = 0
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        """Its head is there; the app bounds its body."""
        self._stop_waiting()
        self._head_bytes = None
        super().on_headers_complete()

    def _num_alike(self) -> int:
        """Connections with this certificate, this one included."""
        others = (getattr(each, "_certificate", b"") for each in self.connections)
        return sum(other == self._certificate for other in others)

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()


def tls_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3, with a client certificate of this CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    context.load_cert_chain(certificate, key)
    return context


def public_config(app: App, context: ssl.SSLContext) -> Config:
    """How uvicorn serves the public listener."""
    return Config(
        app,
        http=PeerProtocol,
        ws="none",
        lifespan="off",
        ssl_context_factory=lambda *_: context,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        log_config=None,
        access_log=False,
    )


async def _body(receive: Receive) -> bytes:
    """The whole body; the HTTP parser ends it at the length that its head declared."""
    body = bytearray()
    while True:
        event = await asyncio.wait_for(receive(), PAUSE_S)
        if event["type"] != "http.request":
            raise TimeoutError  # the site hung up; nobody reads the answer
        body += event.get("body", b"")
        if not event.get("more_body"):
            return bytes(body)


def _is_key_of(scope: Scope, site: Certified) -> bool:
    """Whether the key of Flower's node authentication is the certificate's."""
    given = next((v for k, v in scope["headers"] if k == NODE_KEY), b"")
    try:
        key = serialization.load_pem_public_key(b64decode(given, validate=True))
    except (ValueError, binascii.Error):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and fingerprint(key) == site.fingerprint


async def _reply(send: Send, status: int, text: str) -> None:
    content = text.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(content))]
    if status != 200:  # noqa: PLR2004
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
