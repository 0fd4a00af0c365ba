"""The coordinator's public door: who may call, which calls, how much and how fast.

In front of Flower's SuperLink stands this: TLS 1.3 with a certificate of the consortium CA, held
against the revocation list at every request; the calls that a site needs, everything else is 404;
bodies of bounded size that must arrive in bounded time. Flower's own node authentication comes
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
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from uvicorn import Config

from common.errors import FederationError
from common.identity import Certified, fingerprint
from server.superlink.asgi import App, Receive, Scope, Send, after, declared_length, reply
from server.superlink.doorkeeper import Doorkeeper
from server.superlink.link_test import LINK_TEST, LinkTest
from server.superlink.peer_protocol import PeerProtocol

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
OWN = frozenset({HEALTH, LINK_TEST})  # answered here: Flower is not reached
NODE_KEY = b"flwr-public-key"
SITE = "consilium.site"  # in the scope of a request: the name of who asks
MAX_BODY_BYTES = 6 << 20  # an object is one chunk of 5 MB at most
BODY_S = 180.0  # for a whole body; 28 kB/s for a full chunk
PAUSE_S = 20.0  # between two pieces of it
MAX_TOGETHER = 16  # requests of one site, whose bodies are in memory; Flower pushes by twos
MAX_CONNECTIONS = 1024
KEEP_ALIVE_S = 75
WATCH_S = 0.5  # between two looks at whom the list has come to name
GRACE_S = 1  # for requests that are under way when it stops

log = logging.getLogger("consilium.listener")


class Nodes(Protocol):
    """What Flower has to know of the members."""

    def register(self, site: Certified) -> None:
        """A member calls, maybe not for the first time."""
        ...

    def leave(self, name: str) -> None:
        """A member may not call any more."""
        ...


class PublicListener:
    """An ASGI app before Flower's."""

    def __init__(
        self,
        app: App,
        doorkeeper: Doorkeeper,
        nodes: Nodes,
        about: Mapping[str, str],
    ) -> None:
        self._app = app
        self._doorkeeper = doorkeeper
        self._nodes = nodes
        self._about = dict(about)
        self._link_test = LinkTest()
        self._here: dict[str, bytes] = {}  # certificate by name
        self._together: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        if path not in CALLS | OWN:
            await reply(send, 404, "no such call")
            return
        certificate = scope["state"]["peer_certificate"]
        try:
            site = self._doorkeeper.admit(certificate)
        except (FederationError, OSError) as error:
            log.warning("refused at the door: %s", error)
            await reply(send, 403, "certificate refused")
            return
        if path == HEALTH:
            await reply(send, 200, json.dumps({**self._about, "time": time.time()}))
        elif path == LINK_TEST:
            await self._link_test.answer(site.name, scope, receive, send)
        elif scope["method"] != "POST" or not _is_key_of(scope, site):
            await reply(send, 401, "the node's key is not the certificate's")
        elif self._together[site.name] >= MAX_TOGETHER:
            await reply(send, 429, "too many requests at once")
        else:
            self._nodes.register(site)
            self._here[site.name] = certificate
            self._together[site.name] += 1
            try:
                await self._pass_on({**scope, SITE: site.name}, receive, send)
            finally:
                self._together[site.name] -= 1

    async def watch(self) -> None:
        """Tell Flower at once of a member that was revoked; it would wait a minute for it."""
        while True:
            await asyncio.sleep(WATCH_S)
            for name, certificate in list(self._here.items()):
                try:
                    self._doorkeeper.admit(certificate)
                except (FederationError, OSError) as error:
                    log.warning("%s has to leave: %s", name, error)
                    del self._here[name]
                    self._nodes.leave(name)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body first: Flower sees only requests that are complete."""
        length = declared_length(scope)
        if length is None:
            # Nothing bounds what may stand between and after pieces; Flower's clients send none.
            await reply(send, 411, "a length is needed")
            return
        if length > MAX_BODY_BYTES:
            await reply(send, 413, "too large")
            return
        try:
            body = await asyncio.wait_for(_body(receive), BODY_S)
        except TimeoutError:
            await reply(send, 408, "too slow")
            return
        whole = {"type": "http.request", "body": body, "more_body": False}
        try:
            await self._app(_without_host(scope), after(whole, receive), send)
        except Exception as error:  # noqa: BLE001 - whatever a body does to Flower; it has answered
            log.error("%s at %s: %s", scope[SITE], scope["path"], type(error).__name__)  # noqa: TRY400


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


def _without_host(scope: Scope) -> Scope:
    """Flower makes an URL of what a caller says is the host, and some fail or lead elsewhere."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    return {**scope, "headers": [*headers, (b"host", b"superlink")]}


def _is_key_of(scope: Scope, site: Certified) -> bool:
    """Whether the key of Flower's node authentication is the certificate's."""
    given = next((v for k, v in scope["headers"] if k == NODE_KEY), b"")
    try:
        key = serialization.load_pem_public_key(b64decode(given, validate=True))
    except (ValueError, binascii.Error):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and fingerprint(key) == site.fingerprint
