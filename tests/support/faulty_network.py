"""A network in this process that records every message and fails as it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum

from common.errors import BudgetExhausted, DataError, FederationError, PolicyError
from common.messages import Message, Reason, Refusal
from server.network import Answer, Enough, never

REASONS = {
    BudgetExhausted: Reason.BUDGET,
    DataError: Reason.DATA,
    PolicyError: Reason.POLICY,
}


class Fault(Enum):
    """What goes wrong with one message."""

    SILENT = "the site never sees the message"
    LATE = "the site answers after the deadline"


class Killed(BaseException):
    """The process ends here; nothing may catch it."""


Faults = Callable[[str, Message], Fault | None]


def no_fault(_site: str, _message: Message) -> Fault | None:
    return None


class FaultyNetwork:
    """Sites in this process.

    Attributes:
      faults: What goes wrong with which message; a test may replace it at any time.
      order: The order in which replies arrive.
      absent: Sites that cannot be asked at all.
      hurried: Whether the coordinator stops listening as soon as it has enough.
      sent, received: Every message, also those to silent sites, and late answers.
      refused: What sites refused, and why.
      die_at: The moment at which the coordinator is killed. Every message to a site has two: before
        the site gets it, and after it has answered.
    """

    def __init__(self, answers: Mapping[str, Answer], faults: Faults = no_fault) -> None:
        self.answers = dict(answers)
        self.faults = faults
        self.order: Callable[[Sequence[str]], Sequence[str]] = list
        self.absent: set[str] = set()
        self.hurried = False
        self.sent: list[tuple[str, Message]] = []
        self.received: list[tuple[str, Message]] = []
        self.refused: list[tuple[str, FederationError]] = []
        self.num_moments = 0
        self.die_at: int | None = None

    def sites(self) -> Sequence[str]:
        return [site for site in self.answers if site not in self.absent]

    def ask(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        for site in self.order(list(messages)):
            message = messages[site]
            self.sent.append((site, message))
            fault = self.faults(site, message)
            if fault == Fault.SILENT or site in self.absent:
                continue
            self._moment()
            reply = self._answered(site, message)
            self.received.append((site, reply))
            if fault == Fault.LATE:
                continue
            self._moment()
            yield site, reply
            if self.hurried and enough():
                return

    def of(self, *kinds: type[Message]) -> list[tuple[str, Message]]:
        """What was sent of some kinds."""
        return [(site, message) for site, message in self.sent if isinstance(message, kinds)]

    def forget(self) -> None:
        """Start the record anew."""
        self.sent, self.received, self.refused = [], [], []
        self.num_moments = 0

    def _answered(self, site: str, message: Message) -> Message:
        """A site that refuses says one word, as it does over a wire."""
        try:
            return self.answers[site](message)
        except FederationError as error:
            self.refused.append((site, error))
            reason = REASONS.get(type(error), Reason.PROTOCOL)
            return Refusal(getattr(message, "run", ""), reason)

    def _moment(self) -> None:
        if self.num_moments == self.die_at:
            raise Killed
        self.num_moments += 1
