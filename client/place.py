"""Where the coordinator is, how it is known, and the line to it: whom a site trusts on the network.

No Flower here. What it calls and what it reads is bounded on this side: a coordinator decides
neither whom this machine calls nor how much memory an answer takes.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from client.config import SiteConfig, deployed
from common.errors import ConfigError, RemoteProtocolError
from common.identity import Identity, read_certificate, read_certified
from common.issued import read_list

NODE_ID, NEWEST_LIST = "node-id", "revoked.crl"  # in the state folder
TIMEOUT_S = 30.0  # of one operation on a socket
MAX_ANSWER_BYTES = 32 << 20  # one object: a piece of 5 MB, or all small values of one message


@dataclass(frozen=True)
class Place:
    """Where the coordinator is, how it is known, and who calls."""

    address: str  # host:port
    ca: Path
    certificate: Path
    key: Path
    node_file: Path  # node id of the last connection: a killed process takes it up again
    newest_list: Path | None = None  # the newest revocation list that this site has seen

    @classmethod
    def of(cls, config: SiteConfig) -> Self:
        """As the site file says.

        Raises:
          ConfigError: It lacks what a deployment needs.
        """
        files = deployed(config)
        return cls(
            address=config.coordinator or "",  # deployed() has looked
            ca=files.ca,
            certificate=files.cert,
            key=files.key,
            node_file=config.state_dir / NODE_ID,
            newest_list=config.state_dir / NEWEST_LIST,
        )

    def identity(self) -> Identity:
        """Read anew for every connection: a renewed certificate needs no restart.

        Raises:
          ConfigError: The files cannot be read, or do not belong together.
        """
        return Identity.load(self.certificate, self.key)

    def tls(self) -> ssl.SSLContext:
        """TLS 1.3; the coordinator shows a certificate of this CA, and this site its own.

        Raises:
          ConfigError: A file cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        try:
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.certificate, self.key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"{self.ca}, {self.certificate} or {self.key} cannot be used for TLS "
                f"({error.strerror or type(error).__name__}); fl-client check says which"
            ) from None
        return context

    def stamp(self) -> int | None:
        """Changes when the certificate is renewed; None while there is no file."""
        try:
            return self.certificate.stat().st_mtime_ns
        except OSError:
            return None

    def has_newer_than(self, stamp: int | None) -> bool:
        """Whether another certificate lies there whole: one that is being copied does not yet."""
        if self.stamp() in (None, stamp):
            return False
        try:
            self.identity()
        except ConfigError:
            return False
        return True

    def check_coordinator(self, shown: bytes) -> None:
        """Hold a certificate, whose chain TLS has verified, against its role and the newest list.

        Raises:
          RemoteProtocolError: R3. It is a site's, or was revoked.
          ConfigError: The list cannot be read.
        """
        certified = read_certified(shown)
        if certified.role != "coordinator":
            raise RemoteProtocolError("the other side is certified as a site", rule="R3")
        if self.newest_list is None or not self.newest_list.exists():
            return
        # Also a list that is stale by now: whom it names stays revoked.
        listed = read_list(self.newest_list, read_certificate(self.ca))
        if listed.get_revoked_certificate_by_serial_number(certified.serial_number) is not None:
            raise RemoteProtocolError("the coordinator's certificate was revoked", rule="R3")


def open_line(place: Place) -> httpx.Client:
    """An HTTP client that calls the coordinator and nobody else.

    Guarantees:
      Redirects are not followed. Before the first byte of a request, the certificate behind every
      new TLS connection was found to be a coordinator's that is not revoked. An answer has at most
      ``MAX_ANSWER_BYTES`` and is never unpacked. Proxies are the environment's: TLS goes through
      them end to end.

    Raises:
      ConfigError: A file of this site cannot be used.
    """
    tls = place.tls()
    watch = _Watch(place, tls)
    return httpx.Client(
        verify=tls,
        timeout=TIMEOUT_S,
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
        event_hooks={"request": [watch.follow], "response": [watch.bound]},
    )


class _Watch:
    """Looks at every connection and every answer of one client."""

    def __init__(self, place: Place, tls: ssl.SSLContext) -> None:
        self._place, self._tls = place, tls
        self._has_seen_coordinator = False

    def follow(self, request: httpx.Request) -> None:
        """Be told what happens under this request."""
        request.extensions = {**request.extensions, "trace": self._on_event}

    def bound(self, response: httpx.Response) -> None:
        """Refuse what would have to be unpacked; stop reading where it is too much.

        Raises:
          RemoteProtocolError: The answer is packed, or came past the check of its sender.
        """
        if not self._has_seen_coordinator:
            raise RemoteProtocolError("an answer came over a line that was not checked")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RemoteProtocolError("the answer is packed, and that was not asked for")
        assert isinstance(response.stream, httpx.SyncByteStream)  # noqa: S101 - a sync client's
        response.stream = _Bounded(response.stream)

    def _on_event(self, name: str, info: Mapping[str, Any]) -> None:
        if not name.endswith("start_tls.complete"):
            return
        stream = info["return_value"]
        line = stream.get_extra_info("ssl_object")
        if line.context is not self._tls:
            return  # TLS to a proxy; the one to the coordinator comes inside it
        try:
            self._place.check_coordinator(line.getpeercert(True))
        except BaseException:
            stream.close()
            raise
        self._has_seen_coordinator = True


class _Bounded(httpx.SyncByteStream):
    """The body of an answer, up to a number of bytes."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        num_bytes = 0
        for piece in self._stream:
            num_bytes += len(piece)
            if num_bytes > MAX_ANSWER_BYTES:
                raise RemoteProtocolError(
                    f"an answer has more than {MAX_ANSWER_BYTES} bytes, the most that is read"
                )
            yield piece

    def close(self) -> None:
        self._stream.close()
