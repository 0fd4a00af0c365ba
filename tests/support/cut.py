"""A site's line to the coordinator, on loopback, and what can happen to it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 12

Pair = tuple[socket.socket, socket.socket]  # to the site, to the coordinator


class Line:
    """Passes everything on until it is cut; ``mend`` ends every cut.

    Args:
      target: The coordinator's port.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: list[Pair] = []
        self._lost: list[Pair] = []
        self._passes = threading.Event()
        self._passes.set()
        self._num_up = 0  # bytes that the site sent so far
        self._planned: tuple[int, Callable[[], None]] | None = None
        self.was_cut = threading.Event()  # as planned
        self._listen(0)
        self.port: int = self._listening.getsockname()[1]

    def hold(self) -> None:
        """Nothing arrives, and nothing is lost: TCP sends it again when the cut ends."""
        self._passes.clear()

    def lose(self) -> None:
        """Nothing arrives, and somebody on the way forgets every connection; no end is told."""
        self._passes.clear()
        self._lost += self._pairs

    def refuse(self) -> None:
        """Every connection is reset, and no new one is taken."""
        _close(self._listening)
        for pair in self._pairs:
            _reset(pair)

    def plan(self, num_bytes: int, cut: Callable[[], None]) -> None:
        """Do one of these when the site has sent so much more."""
        self._planned = self._num_up + num_bytes, cut
        self.was_cut.clear()

    def mend(self) -> None:
        """Pass everything on again, but over connections that were lost."""
        self._passes.set()
        if self._listening.fileno() < 0:
            self._listen(self.port)

    def close(self) -> None:
        """Leave nothing open."""
        self.refuse()
        self._passes.set()
        for pair in self._pairs:
            for end in pair:
                end.close()

    def _listen(self, port: int) -> None:
        self._listening = socket.create_server((HOST, port))
        threading.Thread(target=self._take, args=[self._listening], daemon=True).start()

    def _take(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):  # no new one is taken
            while True:
                site, _ = listening.accept()
                self._passes.wait()
                self._connect(site)

    def _connect(self, site: socket.socket) -> None:
        try:
            pair = site, socket.create_connection((HOST, self._target))
        except OSError:  # the coordinator is away
            site.close()
            return
        self._pairs.append(pair)
        for source, sink in (pair, pair[::-1]):
            threading.Thread(target=self._pass_on, args=[pair, source, sink], daemon=True).start()

    def _pass_on(self, pair: Pair, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was reset
            while content := source.recv(CHUNK_BYTES):
                if source is pair[0]:
                    self._count(len(content))
                self._passes.wait()
                if pair in self._lost:
                    return
                sink.sendall(content)
        _reset(pair)

    def _count(self, num_bytes: int) -> None:
        self._num_up += num_bytes
        if self._planned is not None and self._num_up >= self._planned[0]:
            cut, self._planned = self._planned[1], None
            cut()
            self.was_cut.set()


def _close(listening: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listening.shutdown(socket.SHUT_RDWR)  # which wakes who accepts
    listening.close()


def _reset(pair: Pair) -> None:
    for end in pair:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def line_to(port: int) -> Iterator[Line]:
    """A line to the coordinator for as long as the block runs."""
    line = Line(port)
    try:
        yield line
    finally:
        line.close()
