"""Many sites of which each is a small process: forks of one, which share what they do not write to.

``python -m our_rounds.forked NUM_PARAMS TOGETHER FOLDER NAME...`` runs the ``fl-client`` of each of
these members. Their steps are timed; they do not train, and their one made-up update is
everybody's. At most ``TOGETHER`` of them are between a message and its answer at a time, where
there is no memory for more; answers are sent as they are ready.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import torch
from our_rounds.made_up import Vector
from our_rounds.notes import Notebook
from our_rounds.site import pretend_training, watch

import client.app
import client.dataset
import client.site
from client import cli
from client.hospital import Hospital
from client.runtime import Connection
from common.models.flat import FlatNetwork


def take_turns(turn: Semaphore) -> None:
    """Take a message only when there is a place; give it up when the answer is made."""
    pull, answer = Connection.pull, Hospital.answer

    def pulled(self: Connection) -> Any:
        turn.acquire()
        message = None
        try:
            message = pull(self)
        finally:
            if message is None:
                turn.release()
        return message

    def answered(self: Hospital, message: Any) -> Any:
        try:
            return answer(self, message)
        finally:
            turn.release()

    Connection.pull, Hospital.answer = pulled, answered


def fork_site(folder: Path, name: str) -> None:
    """Start one."""
    if os.fork():
        return
    watch(Notebook(folder / f"{name}.jsonl"))
    sys.argv = ["fl-client", "--site-config", str(folder / "sites" / name / "site.toml")]
    cli.main()


if __name__ == "__main__":
    params, together, where, *names = sys.argv[1:]
    network = FlatNetwork(Vector(int(params), num_outputs=1), torch.device("cpu"))
    client.site.build_network = lambda *_: network  # nobody trains, so nobody writes to it
    pretend_training(int(params), number=1)
    take_turns(multiprocessing.get_context("fork").Semaphore(int(together)))
    gc.freeze()  # the collector would write to what was made so far, and so copy it
    for name in names:
        fork_site(Path(where), name)
    while names:
        os.wait()
        names.pop()
