"""The Flower ClientApp: a record in, ``round.answer``, a record out. The door for bytes to leave.

Under Flower's simulation engine a site is rebuilt from the run folder in whichever worker gets the
message; its images are kept in the worker between messages.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.room import Room
from client.round import answer
from client.simulated import simulated_site
from client.site import Site
from common import wire
from common.config import load
from common.errors import (
    BudgetExhausted,
    DataError,
    FederationError,
    PolicyError,
    VersionMismatch,
)
from common.facts import sizes
from common.messages import Greeting, Introduction, Reason, Refusal
from common.messages import Message as Reply
from common.simulation import SIMULATION, STUDY, Simulation, run_folder
from common.study import Study

MAX_SITES_KEPT = 16  # a worker sees every site sooner or later; images of so many stay in memory
UNEXPECTED = 1000  # Flower error code: a defect here, described in the site's own log only

REASONS: dict[type[FederationError], Reason] = {
    BudgetExhausted: Reason.BUDGET,
    DataError: Reason.DATA,
    PolicyError: Reason.POLICY,
    VersionMismatch: Reason.VERSION,
}

log = logging.getLogger("consilium.site")
app = ClientApp()


@app.query()
def on_message(message: Message, context: Context) -> Message:
    """Answer one message of a simulation."""
    return reply_to(message, partial(_answer, context=context))


def reply_to(message: Message, answered: Callable[[Reply], Reply]) -> Message:
    """Answer one message; whatever goes wrong, only a fixed word leaves the site."""
    try:
        return Message(wire.pack(answered(wire.unpack(message.content))), reply_to=message)
    except FederationError as error:
        log.error("refused: %s: %s", type(error).__name__, error)  # noqa: TRY400 - no traceback
        reason = reason_of(error)
        return Message(wire.pack(Refusal(run=_run_of(message), reason=reason)), reply_to=message)
    except Exception:
        # An exception's text may hold a path or a patient: it must not travel.
        log.exception("defect while answering")
        return Message(Error(code=UNEXPECTED, reason="see the site's log"), reply_to=message)


def reply_with_room(message: Message, answered: Callable[[Reply], Reply], room: Room) -> Message:
    """The same; where the disk is full, as soon as there is room, while somebody waits for it."""
    ends = message.metadata.created_at + message.metadata.ttl

    def answer_once(request: Reply) -> Reply:
        return room.wait_through(
            partial(answered, request),
            num_bytes=sum(sizes(request).values()),  # an upload is no longer than the model
            within_s=ends - time.time(),
        )

    return reply_to(message, answer_once)


def reason_of(error: FederationError) -> Reason:
    """The one word that leaves the site."""
    words = (word for kind, word in REASONS.items() if isinstance(error, kind))
    return next(words, Reason.PROTOCOL)


def _answer(request: Reply, context: Context) -> Reply:
    index = int(context.node_config["partition-id"])
    if isinstance(request, Greeting):
        return Introduction(index)
    return answer(request, _site(run_folder(context.run_config), index))


@functools.lru_cache(maxsize=MAX_SITES_KEPT)
def _site(folder: Path, index: int) -> Site:
    study = load(folder / STUDY, Study)
    simulation = load(folder / SIMULATION, Simulation)
    return simulated_site(study, simulation, index, run_dir=folder)


def _run_of(message: Message) -> str:
    try:
        request = wire.unpack(message.content)
    except FederationError:
        return ""
    return getattr(request, "run", "")
