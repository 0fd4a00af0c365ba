"""What this site has already said in a run, on disk before it is said.

A sum is answered once. A request that comes twice, because the coordinator or the site was
restarted, gets the stored bytes again; nothing is trained twice for one sum.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.manifest import Manifest
from common.messages import Upload

SCHEMA = """
CREATE TABLE IF NOT EXISTS epoch (manifest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answer (
    sum_number INTEGER PRIMARY KEY, task TEXT NOT NULL, tail BLOB NOT NULL,
    statement TEXT NOT NULL
);
"""


class Journal:
    """One site's memory of one run: the manifest it agreed to and its last answer."""

    def __init__(self, path: Path) -> None:
        """Open the journal at ``path``, or start one.

        Raises:
          DataError: The file is damaged; what was already said is unknown.
        """
        self._folder = path.parent
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute("PRAGMA secure_delete = ON")
            self._database.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            text = f"journal {path} is damaged ({error}): this site must leave the run"
            raise DataError(text) from None
        path.chmod(0o600)

    def manifest(self) -> Manifest | None:
        """The manifest of the epoch this site takes part in, or None before the first."""
        row = self._database.execute("SELECT manifest FROM epoch").fetchone()
        return Manifest.parse(row[0]) if row else None

    def begin_epoch(self, manifest: Manifest) -> None:
        """Remember a manifest; a new one forgets the answers of the old one."""
        if self.manifest() == manifest:
            return
        with self._transaction():
            self._database.execute("DELETE FROM epoch")
            self._database.execute("DELETE FROM answer")
            self._database.execute("INSERT INTO epoch VALUES (?)", (manifest.canonical(),))

    def last_sum(self) -> int:
        """Number of the last answered sum; -1 before the first."""
        row = self._database.execute("SELECT max(sum_number) FROM answer").fetchone()
        return -1 if row[0] is None else int(row[0])

    def stored(self, run: str, sum_number: int, task_digest: str) -> Upload | None:
        """The answer that was given to exactly this task, or None."""
        row = self._database.execute(
            "SELECT tail, statement FROM answer WHERE sum_number = ? AND task = ?",
            (sum_number, task_digest),
        ).fetchone()
        if row is None:
            return None
        body = np.fromfile(self._body(sum_number), np.uint8)
        return Upload(run, sum_number, body, np.frombuffer(row[0], np.uint64), row[1])

    def record(self, upload: Upload, task_digest: str) -> None:
        """Keep an answer in the place of the one before; on disk when this returns."""
        path = self._body(upload.sum_number)
        with path.open("wb") as file:  # a large blob would cost a database twice its size in writes
            os.fchmod(file.fileno(), 0o600)
            file.write(upload.body.data)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)  # the name too must survive a power cut
        os.close(folder)
        row = (upload.sum_number, task_digest, upload.tail.tobytes(), upload.statement)
        with self._transaction():
            self._database.execute("DELETE FROM answer")
            self._database.execute("INSERT INTO answer VALUES (?, ?, ?, ?)", row)
        for old in self._folder.glob("answer-*.bin"):
            if old != path:
                old.unlink()

    def _body(self, sum_number: int) -> Path:
        return self._folder / f"answer-{sum_number}.bin"

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database)


class _Transaction:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")
