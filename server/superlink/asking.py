"""One message to each of several sites of a deployment, asked again until it is answered.

A question can be lost in three ways. The process that took it was killed: then its site connects
anew, and is asked again. The SuperLink was killed: then every question went with it. The site is
away: then Flower says so, and it is asked when it is back. A site that is connected and silent
works on its images, and is left alone; where a question needs none, something went wrong that
nobody knows of, and it is asked again after a while. Sites answer a question twice with the same
stored bytes, so it does no harm to ask once too often; it only takes their link's time, which is
why it is not done sooner.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message as FlowerMessage

from common import wire
from common.errors import RemoteProtocolError
from common.messages import Message, Reason, Refusal, RoundTask
from server.superlink.grid import CAME_TO_NOTHING, Connected, CoordinatorGrid

LOOK_S = 2.0  # between two looks at who is connected
AGAIN_S = 30.0  # until a site whose question came to nothing is asked again
PATIENCE_S = 60.0  # until one that needs no image for it is; then twice as long, and so on
AWAY_S = 5.0  # until it is said that a site is away: it connects within seconds after a hiccup

log = logging.getLogger("consilium.coordinator")


@dataclass
class Asked:
    """What is known of one site's questions."""

    connection: Connected  # over which it was asked last
    questions: list[str] = field(default_factory=list)  # ids that may still be answered
    again_at: float = math.inf  # no question is left: ask again then
    patience_s: float = math.inf  # until it is asked again although nothing is known to be wrong
    came_back: bool = False  # it connected anew, and may bring an answer that was ready before


class Asking:
    """The questions of one exchange.

    Args:
      messages: By site.
      deadline_s: From now on.
    """

    def __init__(self, messages: Mapping[str, Message], deadline_s: float) -> None:
        self._unanswered = dict(messages)
        self._deadline_s = deadline_s
        self._end = time.monotonic() + deadline_s
        self._asked: dict[str, Asked] = {}
        self._away_since: dict[str, float] = {}
        self._missed: set[str] = set()  # sites of which it was said that they are away
        self._next_look = 0.0

    def is_over(self) -> bool:
        """Whether everybody answered, or it is too late."""
        return not self._unanswered or time.monotonic() >= self._end

    def left_s(self) -> float:
        """Until the deadline."""
        return max(0.0, self._end - time.monotonic())

    def look(self, grid: CoordinatorGrid) -> None:
        """Ask who is there and was not asked, or has lost the question; now and then.

        Raises:
          SuperLinkDied: It has to be started again.
          OSError: The disk is full.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        grid.check_room()
        there = grid.connected()
        due = {}
        for site in self._unanswered:
            if site not in there:
                self._miss(site, now)
            elif self._is_due(site, there[site], grid, now):
                due[site] = there[site]
        self._ask(due, grid)

    def answers(self, grid: CoordinatorGrid) -> Iterator[tuple[str, Message]]:
        """What is whole by now, one after the other; a site's first answer counts.

        Raises:
          SuperLinkDied: It has to be started again.
        """
        by_question = {each: site for site, one in self._asked.items() for each in one.questions}
        for reply in grid.pull_messages(by_question):
            question = reply.metadata.reply_to_message_id
            site = by_question.get(question, "")
            if site not in self._unanswered or question not in self._asked[site].questions:
                continue  # of an exchange before; or it was answered, or taken back, since
            asked = self._asked[site]
            message = _read(site, asked, reply)
            if message is None:
                asked.questions.remove(question)
                asked.again_at = time.monotonic() + AGAIN_S
                continue
            del self._unanswered[site]
            grid.forget([each for each in asked.questions if each != question])
            del reply
            yield site, message
            del message  # a body: the next one comes in its place
        self._drop_doubles(grid)

    def arriving(self, grid: CoordinatorGrid) -> dict[str, int]:
        """Bytes that came of the answers that are on their way, by site."""
        came = grid.num_bytes()
        return {
            site: came[question]
            for site in self._unanswered
            if site in self._asked
            for question in self._asked[site].questions
            if came.get(question)
        }

    def lost(self) -> None:
        """The SuperLink died, and every question with it."""
        self._asked.clear()
        self._next_look = 0.0

    def give_up(self, grid: CoordinatorGrid) -> None:
        """Nobody waits any more: sites must not train for a sum that is over.

        Raises:
          SuperLinkDied: Then nothing is left to take back.
        """
        for site in self._unanswered:
            if site in self._asked:
                grid.forget(self._asked[site].questions)

    def _is_due(self, site: str, connection: Connected, grid: CoordinatorGrid, now: float) -> bool:
        asked = self._asked.get(site)
        if asked is None:
            return True
        idle = [grid.idle_s(question) for question in asked.questions]
        if any(seconds is not None and seconds <= LOOK_S for seconds in idle):
            return False  # its answer is on the way
        if now >= asked.again_at:
            return True
        is_back = asked.connection != connection and asked.came_back
        asked.came_back |= asked.connection != connection  # asked at the next look
        return is_back

    def _ask(self, due: Mapping[str, Connected], grid: CoordinatorGrid) -> None:
        if not due:
            return
        packed = wire.pack_all(self._unanswered[site] for site in due)
        messages = [
            FlowerMessage(
                content, dst_node_id=one.node_id, message_type="query", ttl=max(1.0, self.left_s())
            )
            for one, content in zip(due.values(), packed, strict=True)
        ]
        sent = grid.push_messages(messages)
        now = time.monotonic()
        for (site, connection), question in zip(due.items(), sent, strict=True):
            before = self._asked.get(site)
            if before is not None and before.connection == connection:
                log.info("%s did not answer: asked again", site)
            elif before is not None or site in self._missed:
                log.info("%s is back: asked again", site)
            self._missed.discard(site)
            self._away_since.pop(site, None)
            patience_s = 2 * before.patience_s if before else self._patience_s(site)
            questions = [*(before.questions if before else []), question]
            self._asked[site] = Asked(connection, questions, now + patience_s, patience_s)

    def _patience_s(self, site: str) -> float:
        return math.inf if isinstance(self._unanswered[site], RoundTask) else PATIENCE_S

    def _miss(self, site: str, now: float) -> None:
        away_s = now - self._away_since.setdefault(site, now)
        if away_s >= AWAY_S and site not in self._missed:
            self._missed.add(site)
            log.warning(
                "%s is not connected: waiting for it, for %.0f s at most", site, self.left_s()
            )

    def _drop_doubles(self, grid: CoordinatorGrid) -> None:
        """Where an answer is on its way, take back the other questions of its site."""
        for site in self._unanswered:
            asked = self._asked.get(site)
            if asked is None or len(asked.questions) < 2:  # noqa: PLR2004
                continue
            idle = {each: grid.idle_s(each) for each in asked.questions}
            coming = [q for q, seconds in idle.items() if seconds is not None and seconds < LOOK_S]
            if coming:
                # The newest: an answer whose process died half way seems to come, too, when the
                # next one brings the pieces that both have in common.
                grid.forget([each for each in asked.questions if each != coming[-1]])
                asked.questions = coming[-1:]


def _read(site: str, asked: Asked, reply: FlowerMessage) -> Message | None:
    """An answer; one that cannot be read counts as a refusal. None where Flower answers instead.

    An error that comes from the site is a refusal, too: no site answers so, and its word ends no
    run.
    """
    try:
        if not reply.has_error():
            return wire.unpack(reply.content)
    except RemoteProtocolError as error:
        log.error("%s: %s", site, error)  # noqa: TRY400 - a sentence, not a traceback
        return Refusal(run="", reason=Reason.PROTOCOL)
    is_flowers = reply.metadata.src_node_id != asked.connection.node_id
    if is_flowers or reply.error.code == CAME_TO_NOTHING:
        return None  # the node is gone, or what it sent
    log.error("%s: its answer is no message", site)
    return Refusal(run="", reason=Reason.PROTOCOL)
