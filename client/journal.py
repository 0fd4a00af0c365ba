"""What this site has already said in a study, on disk before it is said.

SQLite with full synchronisation, its folder's too. Secrets that are no longer needed are
overwritten (secure_delete); on an SSD, and in the copies a file system keeps, erasure is best
effort. A counter in a file of its own notices a journal that was put back from a backup: such a
site would say things twice.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from common.config import Frozen
from common.disk import name_file, replace_file, sqlite_room, sync_folder
from common.errors import DataError, LocalProtocolError
from common.secagg.phases import Phase

SCHEMA = """
CREATE TABLE IF NOT EXISTS manifest (digest TEXT PRIMARY KEY, run TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answered (
    run TEXT, what TEXT, round INTEGER, model TEXT, PRIMARY KEY (run, what, round)
);
CREATE TABLE IF NOT EXISTS hospital.released (model TEXT, what TEXT, PRIMARY KEY (model, what));
CREATE TABLE IF NOT EXISTS memory (name TEXT PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counter (writes INTEGER NOT NULL);
"""
JOURNAL, RELEASED = "journal.sqlite", "released.sqlite"
LEAVE = "what was already said is unknown: this site must leave the run"

log = logging.getLogger("consilium.site")


class Memory(Frozen):
    """Binary values are base64 in the journal."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


class EpochMemory(Memory):
    """Private. What the site holds of the current epoch."""

    manifest: str
    phase: Phase
    dh: bytes = b""  # own secrets, empty once erased
    kem: bytes = b""
    request: str = ""  # digest of the last key message that was answered
    reply: str = ""  # and the answer, as JSON
    run: bytes = b""  # known from the roster on
    certificates: tuple[bytes, ...] = ()
    exchanged: tuple[bytes, ...] = ()  # by site: X25519 secrets that wait for a ciphertext
    chain_step: int = 0
    chains: tuple[bytes, ...] = ()  # chain keys by site, at ``chain_step``; empty where unknown


class SumMemory(Memory):
    """Private. The last upload; its body lies in a file of its own."""

    sum_number: int
    task: bytes
    model_digest: str  # or the study's, where the sum is of its images
    purpose: str
    round_number: int
    header: bytes
    sealed: tuple[bytes, ...]
    share_commitments: tuple[bytes, ...]
    statement: str
    own_share: bytes  # empty once answered
    view: bytes = b""  # that was voted for, or answered
    vote: str = ""
    shares: str = ""


@dataclass(frozen=True)
class Releases:
    """What an unmasked sum lets the coordinator learn, each with its round; see client.session."""

    run: str
    items: Mapping[str, int]


class Journal:
    """One site's memory of one study."""

    def __init__(self, path: Path, released: Path | None = None) -> None:
        """Open the journal at ``path``, or start one.

        Args:
          path: Of this study's journal.
          released: What all studies of this site have in common: which models they helped to sum.
            Beside the journal if not given.

        Raises:
          DataError: R6. It is damaged, older than this site remembers, or gone.
          OSError: The disk is full.
        """
        self._folder, self._mark = path.parent, path.with_suffix(".mark")
        self._known = 0  # writes, when this process last read
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._mark.exists() and not path.exists():
            raise DataError(f"journal {path} is gone; {LEAVE}", rule="R6")
        common = released or path.with_name(RELEASED)
        try:
            with sqlite_room(self._folder / JOURNAL):
                self._open(path, common)
        except sqlite3.DatabaseError as error:
            raise DataError(f"journal {path} is damaged ({error}); {LEAVE}", rule="R6") from None
        self.check()
        self._check_released(common)
        self._remove_bodies()

    def _open(self, path: Path, common: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        # Attached, so that both are written in one transaction.
        self._database.execute("ATTACH DATABASE ? AS hospital", (str(common),))
        for schema in ("main", "hospital"):
            self._database.execute(f"PRAGMA {schema}.synchronous = EXTRA")
            self._database.execute(f"PRAGMA {schema}.secure_delete = ON")
        self._database.executescript(SCHEMA)
        path.chmod(0o600)
        common.chmod(0o600)

    def check(self) -> None:
        """Begin to read: refuse a journal that was put back from a backup.

        What is written next follows from what is read from here on: if another process of this site
        writes in between, it fails.

        Raises:
          DataError: R6.
        """
        written, marked = self._num_writes(), self._marked()
        if written < marked:
            raise DataError(
                f"journal in {self._folder} has {written} entries, this site wrote {marked}: it "
                f"was put back from a backup; {LEAVE}",
                rule="R6",
            )
        self._known = written
        if marked < written:
            self._put_mark()  # a crash, or a full disk, came between the two

    def _check_released(self, common: Path) -> None:
        query = (
            "SELECT count(*) FROM answered AS mine LEFT JOIN hospital.released AS ours "
            "ON mine.model = ours.model AND mine.what = ours.what WHERE ours.model IS NULL"
        )
        if self._database.execute(query).fetchone()[0]:
            raise DataError(
                f"{common} lacks sums that this site helped with: it was put back from a backup, "
                f"or is gone; {LEAVE}",
                rule="R6",
            )

    # What is known

    def epoch(self) -> EpochMemory | None:
        """The current epoch, or None before the first."""
        content = self._content("epoch")
        return EpochMemory.model_validate_json(content) if content else None

    def sum(self) -> SumMemory | None:
        """The last upload, or None before the first."""
        content = self._content("sum")
        return SumMemory.model_validate_json(content) if content else None

    def has_seen(self, manifest: str) -> bool:
        """Whether a manifest was answered before."""
        query = "SELECT 1 FROM manifest WHERE digest = ?"
        return self._database.execute(query, (manifest,)).fetchone() is not None

    def has_seen_run(self, run: str) -> bool:
        """Whether any manifest of a run was answered before."""
        query = "SELECT 1 FROM manifest WHERE run = ?"
        return self._database.execute(query, (run,)).fetchone() is not None

    def num_runs(self) -> int:
        """Runs of this study that this site was invited to."""
        return int(self._database.execute("SELECT count(DISTINCT run) FROM manifest").fetchone()[0])

    def has_released(self, model_digest: str, what: str) -> bool:
        """Whether any study of this site helped to sum this over this model, or of this study."""
        query = "SELECT 1 FROM hospital.released WHERE model = ? AND what = ?"
        return self._database.execute(query, (model_digest, what)).fetchone() is not None

    def last_round(self, run: str, what: str) -> int | None:
        """The last round of a run whose sum of this was unmasked; None before the first."""
        query = "SELECT max(round) FROM answered WHERE run = ? AND what = ?"
        (found,) = self._database.execute(query, (run, what)).fetchone()
        return None if found is None else int(found)

    def body(self, sum_number: int) -> NDArray[np.uint8]:
        """The body of the last upload, to be sent once more.

        Raises:
          DataError: R6. Its file is gone.
        """
        log.info("sum %d was answered before: the stored upload is sent again", sum_number)
        try:
            return np.fromfile(self._body(sum_number), np.uint8)
        except OSError:
            text = f"the body of sum {sum_number} is gone from {self._folder}; {LEAVE}"
            raise DataError(text, rule="R6") from None

    # Writing: what is written is on disk when a method returns. Where the disk is full, an OSError
    # says so, and nothing of it counts.

    def begin_epoch(self, epoch: EpochMemory, digest: str, run: str, *, is_new_run: bool) -> None:
        """Take part in an epoch: remember its manifest for good; a new run counts sums anew."""
        with self._transaction():
            self._database.execute("INSERT INTO manifest VALUES (?, ?)", (digest, run))
            self._put("epoch", epoch)
            if is_new_run:
                self._database.execute("DELETE FROM memory WHERE name = 'sum'")

    def go_on(self, epoch: EpochMemory, last: SumMemory | None = None) -> None:
        """Replace what is known of the epoch and of the last sum."""
        with self._transaction():
            self._put("epoch", epoch)
            if last is not None:
                self._put("sum", last)

    def record_upload(self, epoch: EpochMemory, last: SumMemory, body: NDArray[np.uint8]) -> None:
        """Keep a whole upload in the place of the one before."""
        path = self._body(last.sum_number)
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            with beside.open("wb") as file:  # a blob would cost a database twice its size in writes
                os.fchmod(file.fileno(), 0o600)
                file.write(body.data)
                file.flush()
                os.fsync(file.fileno())
            with self._transaction():
                beside.rename(path)
                sync_folder(self._folder)  # the name too must survive a power cut
                self._put("epoch", epoch)
                self._put("sum", last)
        except OSError as error:
            name_file(error, path)
            raise
        finally:
            self._remove_bodies()

    def record_answer(self, epoch: EpochMemory, last: SumMemory, releases: Releases) -> None:
        """Remember what a sum released, for this run and for every study of this site."""
        with self._transaction():
            for what, number in releases.items.items():
                row = (releases.run, what, number, last.model_digest)
                self._database.execute("INSERT OR IGNORE INTO answered VALUES (?, ?, ?, ?)", row)
                pair = (last.model_digest, what)
                self._database.execute("INSERT OR IGNORE INTO released VALUES (?, ?)", pair)
            self._put("epoch", epoch)
            self._put("sum", last)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def _remove_bodies(self) -> None:
        """All but the last upload's: what a crash or a full disk left of others, too."""
        with sqlite_room(self._folder / JOURNAL):
            last = self.sum()
        kept = self._body(last.sum_number) if last else None
        for path in self._folder.glob("answer-*"):
            if path != kept:
                path.unlink()

    def _body(self, sum_number: int) -> Path:
        return self._folder / f"answer-{sum_number}.bin"

    def _content(self, name: str) -> str:
        query = "SELECT content FROM memory WHERE name = ?"
        row = self._database.execute(query, (name,)).fetchone()
        return str(row[0]) if row else ""

    def _put(self, name: str, memory: Memory) -> None:
        row = (name, memory.model_dump_json())
        self._database.execute("INSERT OR REPLACE INTO memory VALUES (?, ?)", row)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing; the mark follows, so that it is never ahead of the journal."""
        with sqlite_room(self._folder / JOURNAL):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                number = self._next_number()
                yield
                self._database.execute("DELETE FROM counter")
                self._database.execute("INSERT INTO counter VALUES (?)", (number,))
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # else SQLite ended it: the disk was full
                    self._database.execute("ROLLBACK")
                raise
        self._known = number
        self._put_mark()

    def _next_number(self) -> int:
        number = self._num_writes() + 1
        if number != self._known + 1:
            raise LocalProtocolError(
                "another process of this site wrote to the journal meanwhile; run one only"
            )
        return number

    def _put_mark(self) -> None:
        """The number of writes, in a file of its own."""
        replace_file(self._mark, str(self._known).encode())

    def _num_writes(self) -> int:
        row = self._database.execute("SELECT writes FROM counter").fetchone()
        return int(row[0]) if row else 0

    def _marked(self) -> int:
        try:
            return int(self._mark.read_text()) if self._mark.exists() else 0
        except ValueError:
            raise DataError(f"{self._mark} is damaged; {LEAVE}", rule="R6") from None
