"""The tree of things that can go wrong, ordered by who must act.

Each class has an exit code and one sentence that says whose move it is. Checks that protect someone
raise one of these; only the command line catches them, prints one line and exits.
"""

from __future__ import annotations

from typing import ClassVar


class FederationError(Exception):
    """The root of everything that this project raises on purpose.

    Attributes:
      rule: ``R1`` to ``R14`` where a rule of the secure sum was broken, else empty.
    """

    exit_code: ClassVar[int] = 1
    who_acts: ClassVar[str] = "See the message."

    def __init__(self, message: str = "", *, rule: str = "") -> None:
        super().__init__(f"{message} [{rule}]" if rule else message)
        self.rule = rule


class ConfigError(FederationError):
    """A file or an argument is wrong."""

    exit_code = 2
    who_acts = "The operator corrects the file or the argument and starts again."


class DataError(FederationError):
    """An image or a label cannot be used."""

    exit_code = 3
    who_acts = "The site repairs or removes the file that the message names."


class BudgetExhausted(FederationError):  # noqa: N818 - the house's word for it
    """The privacy budget of a data set does not cover this round."""

    exit_code = 4
    who_acts = "The data owner at the site decides whether the budget may grow."


class ProtocolError(FederationError):
    """A message came at the wrong time or with the wrong content."""

    exit_code = 5
    who_acts = "The developers look at the log of both sides."


class LocalProtocolError(ProtocolError):
    """This program took a step out of order."""

    who_acts = "The developers: this is a defect in this program."


class RemoteProtocolError(ProtocolError):
    """The peer sent a message that is not allowed now."""

    who_acts = "The peer's operator: the message is refused and kept as evidence."


class VersionMismatch(RemoteProtocolError):  # noqa: N818 - what it is
    """The coordinator runs another version of this program."""

    who_acts = "Both sides install the same version."


class PolicyError(FederationError):
    """The study asks for what this site does not permit."""

    exit_code = 6
    who_acts = "The site's owner approves the study or leaves it."


class RoundAborted(FederationError):  # noqa: N818 - the house's word for it
    """Too few sites survived; nothing was learned."""

    exit_code = 7
    who_acts = "The coordinator brings the missing sites back and resumes the run."


class DiskFull(FederationError):  # noqa: N818 - what it is
    """A disk has no room for what has to be kept."""

    exit_code = 8
    who_acts = "The operator makes room on the disk that the message names and starts again."
