"""Which studies the people of this hospital approved: the whole study, who, and when.

A study is known by its digest. What the coordinator proposes is kept for people to read; nothing is
approved by a program.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import tomli_w

from common.config import load, parse_message
from common.disk import replace_file
from common.errors import ConfigError, RemoteProtocolError
from common.study import Study

MAX_PROPOSED = 64  # studies that a coordinator may leave here to be read
MAX_STUDY_CHARS = 64 << 10  # of one; 255 members take 40,000
LOCK = ".approvals.lock"


@dataclass(frozen=True)
class Approval:
    """A study that was approved here before, and when."""

    study: Study
    time: str  # ISO 8601


class Approvals:
    """The folder with this hospital's approved studies."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._approved, self._proposed = home / "approved", home / "proposed"
        self._log = home / "approvals.jsonl"

    def approve(self, study: Study, *, by: str, now: datetime) -> None:
        """Keep a study as approved; who approved it stays at the hospital.

        Raises:
          ConfigError: The study pins no keys: anybody could take part in it.
        """
        study.check_pinned()
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._approved.mkdir(mode=0o700, exist_ok=True)
        digest = study.digest()
        line = {
            "time": now.isoformat(timespec="seconds"),
            "digest": digest,
            "study": study.name,
            "by": by,
        }
        with self._alone():
            before = self._log.read_bytes() if self._log.exists() else b""
            replace_file(self._log, before + json.dumps(line).encode() + b"\n")
            replace_file(self._file_of(digest), tomli_w.dumps(study.as_table()).encode())

    def study(self, digest: str) -> Study | None:
        """The approved study of a digest.

        Raises:
          ConfigError: Its file was changed since it was approved.
        """
        return _read(self._file_of(digest), digest)

    def earlier(self) -> Iterator[Approval]:
        """Every approval whose study can still be read, the newest first."""
        for line in reversed(self.lines()):
            try:
                study = self.study(line["digest"])
            except ConfigError:
                continue  # fl-client status names it
            if study is not None:
                yield Approval(study, line["time"])

    def propose(self, text: str) -> tuple[Study, Path]:
        """Keep what a coordinator proposes, for people to read, unless they approved it before.

        Args:
          text: The study as JSON, as it came over the wire.

        Returns:
          The study, and the file that people can read it in.

        Raises:
          RemoteProtocolError: It is no study of this version, or too long for one.
        """
        if len(text) > MAX_STUDY_CHARS:
            raise RemoteProtocolError(
                f"a proposed study of {len(text)} characters; at most {MAX_STUDY_CHARS} are read"
            )
        study = parse_message(text, Study, what="study")
        digest = study.digest()
        if (approved := self._file_of(digest)).exists():
            return study, approved
        path = self._proposed / f"{digest}.toml"
        self._proposed.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            os.utime(path)
        else:
            self._make_room()
            replace_file(path, tomli_w.dumps(study.as_table()).encode())
        return study, path

    def proposed(self, digest: str) -> Study | None:
        """A study that was proposed and not approved by anybody."""
        return _read(self._proposed / f"{digest}.toml", digest)

    def lines(self) -> list[dict[str, str]]:
        """Every approval, oldest first."""
        content = self._log.read_text() if self._log.exists() else ""
        return [json.loads(line) for line in content.splitlines()]

    def _file_of(self, digest: str) -> Path:
        return self._approved / f"{digest}.toml"

    def _make_room(self) -> None:
        """Remove what was approved meanwhile, then what was proposed longest ago."""
        waiting = sorted(
            self._proposed.glob("*.toml"),
            key=lambda path: (not self._file_of(path.stem).exists(), path.stat().st_mtime_ns),
        )
        for path in waiting[: max(0, len(waiting) + 1 - MAX_PROPOSED)]:
            path.unlink()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two people may approve at the same time; both lines are kept."""
        with (self._home / LOCK).open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _read(path: Path, digest: str) -> Study | None:
    if not path.exists():
        return None
    study = load(path, Study)
    if study.digest() != digest:
        raise ConfigError(f"{path} was changed since it was written; approve the study again")
    return study
