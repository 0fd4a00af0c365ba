"""``Network``: how the coordinator reaches the sites. The one seam between rounds and transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from common.messages import Message

Answer = Callable[[Message], Message]
Enough = Callable[[], bool]


def never() -> bool:
    """Wait for everybody."""
    return False


class Network(Protocol):
    """A way to ask sites and to hear from them."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that can be asked now."""
        ...

    def ask(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        """Send each site its message; yield (site, reply) as replies arrive.

        A site that is silent for ``deadline_s`` is missing from what is yielded. Once ``enough``
        says so, nobody is waited for; what has arrived is still yielded.
        """
        ...


class LoopbackNetwork:
    """Sites in this process: asking one is calling a function."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self._answers = dict(answers)

    def sites(self) -> Sequence[str]:
        """Every site, always."""
        return list(self._answers)

    def ask(
        self,
        messages: Mapping[str, Message],
        deadline_s: float,  # noqa: ARG002 - nobody is waited for here
        enough: Enough = never,  # noqa: ARG002
    ) -> Iterator[tuple[str, Message]]:
        """Ask one site after the other."""
        for site, message in messages.items():
            yield site, self._answers[site](message)
