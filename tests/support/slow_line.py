"""A slow line between a coordinator and a hospital: two network namespaces and real TCP.

Each end is a TUN device in a namespace of its own. What a device may send a second is bounded by
``tc`` (a token bucket, which any kernel has); what it sent is held for half the round trip and
handed to the other one by a thread here, because not every kernel can delay packets.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import select
import struct
import subprocess
import sys
import threading
import time
import tomllib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.hazmat.primitives import serialization
from deployment import DAYS, Consortium

from common.authority import Authority
from common.config import load
from common.identity import Identity
from common.study import Study

TUN = Path("/dev/net/tun")
SET_INTERFACE, IS_TUN, NO_HEADER = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
QUEUE_S = 0.1  # that packets wait at the narrow place before they are dropped
BURST_BYTES = 3000  # two packets
MAX_PACKET_BYTES = 1 << 16
LOOK_S = 0.2  # between two looks whether to end
NUMBERS = itertools.count()


@dataclass(frozen=True)
class End:
    """A machine at one end of the line."""

    namespace: str
    address: str

    def command(self, *arguments: object) -> list[str]:
        """A command that runs there."""
        return ["ip", "netns", "exec", self.namespace, *map(str, arguments)]


@dataclass(frozen=True)
class SlowLine:
    """A line, and who is at its ends."""

    coordinator: End
    hospital: End


def why_not() -> str:
    """Why this machine can have no slow line; empty where it can."""
    if not sys.platform.startswith("linux") or not TUN.exists():
        return "a slow line needs Linux with TUN devices"
    if os.geteuid() != 0:
        return "a slow line needs root: it makes network namespaces"
    return ""


@contextlib.contextmanager
def slow_line(rate_mbit: float, round_trip_s: float) -> Iterator[SlowLine]:
    """Two machines with a slow line between them, each way at this rate.

    Raises:
      CalledProcessError: This machine permits no namespace, or no ``tc``.
    """
    number = next(NUMBERS)
    names = [f"cs{os.getpid()}{which}{number}" for which in "ch"]
    ends = [End(name, f"10.91.{number % 256}.{k}") for k, name in enumerate(names, 1)]
    stopped = threading.Event()
    with contextlib.ExitStack() as stack:
        for end in ends:
            run("ip", "netns", "add", end.namespace)
            stack.callback(run, "ip", "netns", "delete", end.namespace)
        devices = [stack.enter_context(device(end, rate_mbit)) for end in ends]
        for source, target in (devices, devices[::-1]):
            arguments = (source, target, round_trip_s / 2, stopped)
            carrier = threading.Thread(target=carry, args=arguments)
            carrier.start()
            stack.callback(carrier.join)
        stack.callback(stopped.set)
        yield SlowLine(*ends)


@contextlib.contextmanager
def device(end: End, rate_mbit: float) -> Iterator[int]:
    """The end's way out: a file of whole packets."""
    name = end.namespace
    packets = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    try:
        wanted = struct.pack("16sH22x", name.encode(), IS_TUN | NO_HEADER)
        fcntl.ioctl(packets, SET_INTERFACE, wanted)
        run("ip", "link", "set", name, "netns", name)
        run("ip", "-n", name, "address", "add", f"{end.address}/24", "dev", name)
        run("ip", "-n", name, "link", "set", name, "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        shape = ["tbf", "rate", f"{rate_mbit}mbit", "burst", f"{BURST_BYTES}"]
        shape += ["latency", f"{QUEUE_S * 1000:.0f}ms"]
        run(*end.command("tc", "qdisc", "replace", "dev", name, "root", *shape))
        yield packets
    finally:
        os.close(packets)


def carry(source: int, target: int, delay_s: float, stopped: threading.Event) -> None:
    """Hand over every packet after a while, in order."""
    held: deque[tuple[float, bytes]] = deque()
    while not stopped.is_set():
        wait_s = held[0][0] - time.monotonic() if held else LOOK_S
        came, _, _ = select.select([source], [], [], max(0.0, min(wait_s, LOOK_S)))
        if came:
            held.append((time.monotonic() + delay_s, os.read(source, MAX_PACKET_BYTES)))
        while held and held[0][0] <= time.monotonic():
            with contextlib.suppress(OSError):  # a queue is full: lost, as on any line
                os.write(target, held.popleft()[1])


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def move(made: Consortium, address: str) -> None:
    """Let a consortium's coordinator listen on another address, and its sites call it there.

    Its key stays the one that the study names; its certificate is issued anew for the address.
    """
    here = f"{address}:{made.port}"
    change(made.folder / "coordinator.toml", listen=here)
    for name in made.names:
        change(made.site(name), coordinator=here)
    own = made.folder / "coordinator"
    key = Identity.load(own / "certificate.pem", own / "key.pem").key.public_key()
    issued = Authority.load(made.folder / "ca").issue(
        "coordinator", "coordinator", key, datetime.now(UTC), days=DAYS, hosts=[address]
    )
    (own / "certificate.pem").write_bytes(issued.public_bytes(serialization.Encoding.PEM))
    assert load(made.study, Study).coordinator is not None


def change(file: Path, **values: Any) -> None:
    file.write_text(tomli_w.dumps({**tomllib.loads(file.read_text()), **values}))
