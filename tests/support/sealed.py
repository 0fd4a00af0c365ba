"""Seal a run folder again: whoever changes a file and holds the coordinator's key can do that."""

from __future__ import annotations

from pathlib import Path

from common.identity import Identity
from common.throwaway import CA
from server.run_dir import RunDir


def coordinator_of(folder: Path) -> Identity:
    """The coordinator of a simulation."""
    own = folder / CA / "coordinator"
    return Identity.load(own / "certificate.pem", own / "key.pem")


def seal_again(folder: Path) -> None:
    RunDir(folder).seal(coordinator_of(folder))
