"""``fl-client`` whose steps are timed and whose training is made up.

``python -m our_rounds.site NUM_PARAMS NOTES`` and then the arguments of ``fl-client``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from our_rounds.made_up import Trainer, network_of
from our_rounds.notes import Ids, Notebook

import client.hospital
import client.round
import client.runtime
import client.site
from client import cli
from client.contents import Contents
from client.journal import Journal
from client.session import Session
from common.models.flat import FlatNetwork
from common.study import Study


def pretend(num_params: int) -> None:
    """A model of any size."""

    def build_network(study: Study, *_: Any) -> FlatNetwork:
        return network_of(num_params, study)

    client.site.build_network = build_network


def pretend_training(num_params: int, number: int) -> None:
    """No training, and no images."""
    trainer = Trainer(num_params, number)
    client.round.train, client.round.evaluate = trainer.train, trainer.evaluate
    client.hospital.load_site_data = no_images


def watch(notebook: Notebook) -> None:
    """Note what a site does with a message."""
    notebook.watch(client.runtime.Connection, "pull", pulled_id)
    notebook.watch(client.round, "quantize")
    notebook.watch(Session, "mask")
    notebook.watch(Journal, "record_upload")
    notebook.watch(Journal, "record_answer")
    notebook.watch(client.runtime.Connection, "push", answered_id)


def pulled_id(message: Any, *_: Any) -> Ids | None:
    """Of the message that came, if one did."""
    return None if message is None else [message.metadata.message_id]


def answered_id(_: None, __: Any, reply: Any) -> Ids:
    """Of the message that is answered."""
    return [reply.metadata.reply_to_message_id]


class NoImages:
    """In the place of a site's data set."""

    train = validation = test = None

    contents = Contents("0" * 64, 0, frozenset())

    def to(self, _: Any) -> NoImages:
        """Wherever the model is."""
        return self


def number_of(notes: Path) -> int:
    """3 of site-3."""
    return int(notes.stem.rpartition("-")[2])


def no_images(*_: Any, **__: Any) -> NoImages:
    """In the place of reading a data set."""
    return NoImages()


if __name__ == "__main__":
    params, notes, *arguments = sys.argv[1:]
    pretend(int(params))
    pretend_training(int(params), number_of(Path(notes)))
    watch(Notebook(Path(notes)))
    sys.argv = ["fl-client", *arguments]
    cli.main()
