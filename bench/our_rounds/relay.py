"""A line to the coordinator that counts every byte it carries, as the sockets of both sides see it.

What the operating system wraps around the bytes of a connection (TCP, IP, Ethernet: 2 to 4 percent
on a network, next to nothing on loopback) is not in it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

HOST = "127.0.0.1"
PIECE = 1 << 18  # bytes, at most


class Carried(NamedTuple):
    """A piece that was passed on."""

    at: float  # on the monotonic clock
    is_up: bool  # from the site to the coordinator
    num_bytes: int


@dataclass
class Relay:
    """Passes connections on to the coordinator."""

    port: int  # where the site calls
    carried: list[Carried] = field(default_factory=list)

    def num_bytes(self, since: float, until: float, *, is_up: bool) -> int:
        """Of one direction in a stretch of time."""
        return sum(
            one.num_bytes for one in self.carried if one.is_up == is_up and since <= one.at < until
        )

    def serve(self, listening: socket.socket, port: int) -> None:
        """Accept connections until the socket is closed."""
        with contextlib.suppress(OSError):
            while True:
                site, _ = listening.accept()
                try:
                    coordinator = socket.create_connection((HOST, port))
                except OSError:  # it is not there yet
                    site.close()
                    continue
                pair = (site, coordinator)
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, site: socket.socket, coordinator: socket.socket) -> None:
        """One connection, until both sides have ended it."""
        with site, coordinator:
            for end in (site, coordinator):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            down = threading.Thread(target=self._pass_on, args=(coordinator, site, False))
            down.start()
            self._pass_on(site, coordinator, is_up=True)
            down.join()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_up: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                self.carried.append(Carried(time.monotonic(), is_up, len(piece)))
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relayed(port: int) -> Iterator[Relay]:
    """A relay to a port of this machine."""
    with socket.create_server((HOST, 0)) as listening:
        relay = Relay(listening.getsockname()[1])
        threading.Thread(target=relay.serve, args=[listening, port], daemon=True).start()
        try:
            yield relay
        finally:
            listening.shutdown(socket.SHUT_RDWR)  # accept() in the other thread returns
