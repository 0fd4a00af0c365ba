"""``fl-client`` whose memory is noted and whose model is made up; its optimizer is the study's.

``python -m our_rounds.memory_site NUM_PARAMS PEAKS`` and then the arguments of ``fl-client``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from our_rounds.peaks import Gauge
from our_rounds.site import pretend

import client.hospital
import client.round
import client.runtime
from client import cli
from client.journal import Journal
from client.session import Session


def watch(gauge: Gauge) -> None:
    """Note the steps of a round that handle models."""
    gauge.watch(client.hospital, "open_site")
    gauge.watch(client.runtime.Connection, "pull")
    for name in ("evaluate", "train", "quantize"):
        gauge.watch(client.round, name)
    gauge.watch(Session, "mask")
    gauge.watch(Journal, "record_upload")
    gauge.watch(client.runtime.Connection, "push")


def watch_from_idle(path: Path, name: str) -> None:
    """Begin when this site has said that it takes part: no model was made yet."""
    push = client.runtime.Connection.push

    def pushed(*args: Any) -> None:
        push(*args)
        client.runtime.Connection.push = push
        gauge = Gauge(path, {name: os.getpid()})
        gauge.idle()
        watch(gauge)

    client.runtime.Connection.push = pushed


if __name__ == "__main__":
    params, peaks, *arguments = sys.argv[1:]
    pretend(int(params))
    watch_from_idle(Path(peaks), Path(peaks).stem)
    sys.argv = ["fl-client", *arguments]
    cli.main()
