"""What a check found: one line, and the exit code if it is a fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from common.config import printable
from common.errors import FederationError

Level = Literal["ok", "warning", "FAULT"]


@dataclass(frozen=True)
class Finding:
    """One line of ``fl-client check``; of a fault it ends with the remedy."""

    level: Level
    text: str
    exit_code: int = 0  # of the error's class, where it is a fault

    def __str__(self) -> str:
        return f"{self.level:<7}  {one_line(self.text)}"


def ok(text: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", text)


def warning(text: str) -> Finding:
    """It works; somebody should know."""
    return Finding("warning", text)


def fault(error: FederationError) -> Finding:
    """It does not work until somebody did what the text says."""
    return Finding("FAULT", str(error), error.exit_code)


def has_fault(findings: Iterable[Finding]) -> bool:
    """Whether one of them is a fault."""
    return any(finding.level == "FAULT" for finding in findings)


def one_line(text: str) -> str:
    """A message of several lines as one; what does not print is ``?``: a peer may have sent it."""
    first, *rest = text.split("\n")
    joined = f"{first} {'; '.join(line.strip() for line in rest)}" if rest else first
    return printable(joined)
