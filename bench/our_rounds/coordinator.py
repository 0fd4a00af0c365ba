"""``fl-server`` whose steps are timed and whose model is made up.

``python -m our_rounds.coordinator NUM_PARAMS NOTES`` and then the arguments of ``fl-server``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from our_rounds.made_up import network_of
from our_rounds.notes import Ids, Notebook

import server.cohort
import server.coordinator
import server.deployed
from common.models.flat import FlatNetwork
from common.study import Study
from server import cli
from server.run_dir import RunDir
from server.superlink.grid import CoordinatorGrid


def pretend(num_params: int) -> None:
    """A model of any size."""

    def build_network(study: Study, *_: Any) -> FlatNetwork:
        return network_of(num_params, study)

    server.coordinator.build_network = server.deployed.build_network = build_network


def watch(notebook: Notebook) -> None:
    """Note what the coordinator does in a round, which begins and ends where a task is made."""
    notebook.watch(server.cohort, "exchange_keys")
    notebook.watch(server.coordinator, "training_task")
    notebook.watch(server.coordinator, "validation_task")
    notebook.watch(CoordinatorGrid, "push_messages")
    notebook.watch_each(CoordinatorGrid, "pull_messages", pulled_id)
    notebook.watch(RunDir, "save_pending")
    notebook.watch(server.coordinator, "secure_sum")
    notebook.watch(RunDir, "save")


def pulled_id(reply: Any) -> Ids:
    """Of the message whose reply came."""
    return [reply.metadata.reply_to_message_id]


if __name__ == "__main__":
    params, notes, *arguments = sys.argv[1:]
    pretend(int(params))
    watch(Notebook(Path(notes)))
    sys.argv = ["fl-server", *arguments]
    cli.main()
