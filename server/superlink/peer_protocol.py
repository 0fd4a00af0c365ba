"""HTTP at the public listener: it knows the peer's certificate and bounds what comes first."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 20.0  # from the first byte of a request, or of a connection, to the end of the head
MAX_HEAD_BYTES = 1 << 16  # beyond what one read brings
MAX_FROM_ONE = 64  # connections with one certificate


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
