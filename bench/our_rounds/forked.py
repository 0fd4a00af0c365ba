"""Many sites of which each is a small process: forks of one, which share what they do not write to.

``python -m our_rounds.forked NUM_PARAMS FOLDER NAME...`` runs the ``fl-client`` of each of these
members. Their steps are timed; they do not train, and their one made-up update is everybody's.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch
from our_rounds.made_up import Vector
from our_rounds.notes import Notebook
from our_rounds.site import pretend_training, watch

import client.app
import client.dataset
import client.place
import client.site
from client import cli
from common.models.flat import FlatNetwork


def fork_site(folder: Path, name: str) -> None:
    """Start one."""
    if os.fork():
        return
    watch(Notebook(folder / f"{name}.jsonl"))
    sys.argv = ["fl-client", "--site-config", str(folder / "sites" / name / "site.toml")]
    cli.main()


if __name__ == "__main__":
    params, where, *names = sys.argv[1:]
    network = FlatNetwork(Vector(int(params), num_outputs=1), torch.device("cpu"))
    client.site.build_network = lambda *_: network  # nobody trains, so nobody writes to it
    pretend_training(int(params), number=1)
    gc.freeze()  # the collector would write to what was made so far, and so copy it
    for name in names:
        fork_site(Path(where), name)
    while names:
        os.wait()
        names.pop()
