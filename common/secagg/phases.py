"""The order of messages at a site, as a table; whatever is not in it is an error."""

from __future__ import annotations

from enum import StrEnum

from common.errors import RemoteProtocolError
from common.messages import FromCoordinator, Invitation, Roster, RoundTask, Survivors, Unmask


class Phase(StrEnum):
    """Where a site stands in an epoch."""

    NEW = "new"  # no epoch yet
    KEYS = "keys"  # its keys were sent
    READY = "ready"  # everybody's keys are known, no upload waits to be unmasked
    MASKED = "masked"  # an upload was sent
    VOTED = "voted"  # and a view of the survivors was seen

    def after(self, message: FromCoordinator) -> Phase:
        """The phase that a message leads to.

        Raises:
          RemoteProtocolError: It must not come now.
        """
        kind = type(message)
        if kind not in NEXT[self]:
            due = ", ".join(allowed.__name__ for allowed in NEXT[self])
            rule = "R14" if kind in (Survivors, Unmask) else "R7"
            raise RemoteProtocolError(f"{kind.__name__} came where {due} may come", rule=rule)
        return NEXT[self][kind]


NEXT: dict[Phase, dict[type, Phase]] = {
    Phase.NEW: {Invitation: Phase.KEYS},
    Phase.KEYS: {Roster: Phase.READY, Invitation: Phase.KEYS},
    Phase.READY: {RoundTask: Phase.MASKED, Invitation: Phase.KEYS},
    Phase.MASKED: {
        Survivors: Phase.VOTED,
        Unmask: Phase.READY,
        RoundTask: Phase.MASKED,  # the last sum was void
        Invitation: Phase.KEYS,
    },
    Phase.VOTED: {Unmask: Phase.READY, RoundTask: Phase.MASKED, Invitation: Phase.KEYS},
}  # a site answers one view per sum; only the identical answer may be repeated
