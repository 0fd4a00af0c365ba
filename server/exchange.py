"""One message to every member and its checked answers; whoever answers wrongly is named."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from common.audit import MAX_VALUE_CHARS, AuditLog
from common.errors import RemoteProtocolError
from common.evidence import Evidence
from common.facts import facts_of
from common.messages import Message, Reason, Refusal
from common.roster import CoordinatorCredentials
from common.study import Deadlines
from server.network import Enough, Network, never

SILENT = "silent"
Keep = Callable[[int, Message], None]  # site, reply; raises RemoteProtocolError
Barred = Callable[[], set[str]]
LOOK_S = 2.0  # between two looks at who is barred
log = logging.getLogger("consilium.coordinator")


def utc_now() -> datetime:
    """The coordinator's clock."""
    return datetime.now(UTC)


def nobody() -> set[str]:
    """No site is barred."""
    return set()


@dataclass(frozen=True)
class Exchange:
    """How the coordinator talks to the members of an epoch."""

    network: Network
    credentials: CoordinatorCredentials
    evidence: Evidence
    audit: AuditLog
    deadlines: Deadlines = field(default_factory=Deadlines)
    now: Callable[[], datetime] = utc_now

    def ask_all(
        self,
        names: Sequence[str],
        messages: Mapping[str, Message],
        keep: Keep,
        deadline_s: float,
        enough: Enough = never,
        barred: Barred = nobody,
    ) -> dict[str, str]:
        """Ask sites; hand each answer to ``keep``.

        Args:
          names: The epoch's members in order.
          messages: By name; some of the members.
          keep: Checks an answer and keeps what is needed of it.
          deadline_s: Of this phase, as the study says.
          enough: See ``Network.ask``.
          barred: Who is let in no more, and so is not waited for.

        Returns:
          Who gave no good answer, and why in a word; a wrong one is kept as evidence.
        """
        missing = dict.fromkeys(messages, SILENT)
        answered = set()
        for site, message in messages.items():
            self.audit.append("sent", peer=site, **facts_of(message))
        looked = time.monotonic()

        def is_over() -> bool:
            nonlocal looked
            if enough():
                return True
            if time.monotonic() < looked + LOOK_S:
                return False
            looked = time.monotonic()
            return {site for site, why in missing.items() if why == SILENT} <= barred()

        for site, reply in self.network.ask(messages, deadline_s, is_over):
            self.audit.append("received", peer=site, **facts_of(reply))
            if isinstance(reply, Refusal):
                missing[site] = reply.reason.value
                log.warning("%s refuses: %s", site, reply.reason.value)
                continue
            if site in answered or site not in messages:
                continue  # the first answer counts
            answered.add(site)
            try:
                keep(names.index(site), reply)
            except RemoteProtocolError as error:
                log.error("%s: %s", site, error)  # noqa: TRY400 - a sentence, not a traceback
                self.evidence.keep(reply, error, now=self.now(), by=site)
                reason = str(error)[:MAX_VALUE_CHARS]
                self.audit.append("refused", peer=site, rule=error.rule, reason=reason)
                missing[site] = Reason.PROTOCOL.value
            else:
                missing.pop(site, None)
            del reply  # a body: the next one comes in its place
        return missing
