"""Which studies the people of this hospital approved: the whole study, who, and when.

A study is known by its digest. What the coordinator proposes is kept for people to read; nothing is
approved by a program.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import tomli_w

from common.config import load, validate
from common.disk import replace_file
from common.errors import ConfigError
from common.study import Study

MAX_PROPOSED = 64  # studies that a coordinator may leave here to be read


class Approvals:
    """The folder with this hospital's approved studies."""

    def __init__(self, home: Path) -> None:
        self._approved, self._proposed = home / "approved", home / "proposed"
        self._log = home / "approvals.jsonl"

    def approve(self, study: Study, *, by: str, now: datetime) -> None:
        """Keep a study as approved; who approved it stays at the hospital.

        Raises:
          ConfigError: The study pins no keys: anybody could take part in it.
        """
        if missing := list(study.unpinned()):
            lines = "".join(f"\n  {key}: {text}" for key, text in missing)
            raise ConfigError(f"study {study.name} cannot be deployed; it lacks:{lines}")
        self._approved.mkdir(parents=True, exist_ok=True)
        digest = study.digest()
        line = {
            "time": now.isoformat(timespec="seconds"),
            "digest": digest,
            "study": study.name,
            "by": by,
        }
        before = self._log.read_bytes() if self._log.exists() else b""
        replace_file(self._log, before + json.dumps(line).encode() + b"\n")
        replace_file(self._approved / f"{digest}.toml", tomli_w.dumps(study.as_table()).encode())

    def study(self, digest: str) -> Study | None:
        """The approved study of a digest.

        Raises:
          ConfigError: Its file was changed since it was approved.
        """
        return _read(self._approved / f"{digest}.toml", digest)

    def propose(self, table: dict[str, object]) -> tuple[Study, Path]:
        """Keep what a coordinator proposes, for people to read.

        Raises:
          ConfigError: It is no study of this version; or too many wait already.
        """
        study = validate(table, Study, source=Path("the proposed study"))
        path = self._proposed / f"{study.digest()}.toml"
        if not path.exists():
            self._proposed.mkdir(parents=True, exist_ok=True)
            if len(list(self._proposed.iterdir())) >= MAX_PROPOSED:
                raise ConfigError(
                    f"{MAX_PROPOSED} proposed studies wait in {self._proposed}; remove old ones"
                )
            replace_file(path, tomli_w.dumps(study.as_table()).encode())
        return study, path

    def proposed(self, digest: str) -> Study | None:
        """A study that was proposed and not approved by anybody."""
        return _read(self._proposed / f"{digest}.toml", digest)

    def lines(self) -> list[dict[str, str]]:
        """Every approval, oldest first."""
        content = self._log.read_text() if self._log.exists() else ""
        return [json.loads(line) for line in content.splitlines()]


def _read(path: Path, digest: str) -> Study | None:
    if not path.exists():
        return None
    study = load(path, Study)
    if study.digest() != digest:
        raise ConfigError(f"{path} was changed since it was written; approve the study again")
    return study
