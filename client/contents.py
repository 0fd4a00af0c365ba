"""What a data set held when it was read, as digests: kept at the site, never sent.

One person's privacy is paid for out of one budget. Files that are renamed, added or exported again
stay under the data set's name; a second name for the same people is found here.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from common.disk import replace_file, sqlite_room
from common.errors import DataError

PATIENTS, KEY = "patients.sqlite", "patients.key"  # beside the ledgers


@dataclass(frozen=True)
class Contents:
    """Private.

    Attributes:
      digest: Of every image and target that was read, whatever their files are called.
      num_images: How many they are.
      units: What tells people apart: ids where the data set has them, else their images.
    """

    digest: str
    num_images: int
    units: frozenset[bytes]

    @classmethod
    def together(cls, parts: Iterable[Contents]) -> Contents:
        """Of several data sets as one: where their ids are equal, their people are not."""
        parts = list(parts)
        digest = hashlib.sha256("/".join(part.digest for part in parts).encode()).hexdigest()
        units = (f"{k}/".encode() + unit for k, part in enumerate(parts) for unit in part.units)
        return cls(digest, sum(part.num_images for part in parts), frozenset(units))


@dataclass
class Intake:
    """Notes every image as it is read."""

    names_patients: bool
    images: list[bytes] = field(default_factory=list)
    units: set[bytes] = field(default_factory=set)

    def note(self, pixels: NDArray[Any], target: NDArray[Any], patient: str, row: str = "") -> None:
        """One image with its row of a table, or a row alone, as the files have it."""
        is_grey = len(pixels) == 1 or bool((pixels == pixels[:1]).all())  # a study may repeat it
        grey = pixels[:1] if is_grey else pixels
        cells = hashlib.sha256(row.encode()).digest() if row else b""
        image = _digest(grey) if pixels.size else cells
        whole = image + _digest(target) + cells + patient.encode()
        self.images.append(hashlib.sha256(whole).digest())
        self.units.add(b"id " + patient.encode() if self.names_patients else b"image " + image)

    def contents(self) -> Contents:
        """Of all that was noted, in whichever order."""
        digest = hashlib.sha256(b"".join(sorted(self.images))).hexdigest()
        return Contents(digest, len(self.images), frozenset(self.units))


class Patients:
    """Whose budget pays for whom: keyed hashes of patients, each under one data set's name.

    The key and the hashes stay in the site's state folder. An id cannot be read from a hash, and
    without the key not even guessed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def claim(self, data_name: str, units: frozenset[bytes]) -> None:
        """Put people under a data set's name, for good; on disk when this returns.

        Raises:
          DataError: Some of them stand under another name, or the file is damaged.
        """
        key = self._key()
        path = self._folder / PATIENTS
        if not path.exists() and any(self._read_before()):
            raise DataError(
                f"{path} is gone: whether two budgets pay for one patient is unknown; restore it "
                "from a backup"
            )
        marks = [hmac.digest(key, unit, "sha256") for unit in units]
        try:
            with (
                sqlite_room(path),
                closing(sqlite3.connect(path, isolation_level=None)) as database,
            ):
                path.chmod(0o600)
                others = _claim(database, data_name, marks)
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{path} is damaged ({error}): whether two budgets pay for one patient is unknown; "
                "restore it from a backup"
            ) from None
        if others:
            named = ", ".join(f"{name} ({number})" for name, number in others)
            raise DataError(
                f"data set {data_name} holds patients of another data set of this site: {named}; "
                "one patient's privacy is paid for out of one budget: give both one data.name"
            )

    def _read_before(self) -> Iterator[bool]:
        """Of each ledger, whether it says that data was read."""
        for ledger in self._folder.glob("*.jsonl"):
            yield b'"event":"data"' in ledger.read_bytes()

    def _key(self) -> bytes:
        path = self._folder / KEY
        if not path.exists():
            if (self._folder / PATIENTS).exists():
                raise DataError(f"{path} is gone: restore it from a backup; no patient is known")
            replace_file(path, secrets.token_bytes(32))
        return path.read_bytes()


def _claim(
    database: sqlite3.Connection, data_name: str, marks: list[bytes]
) -> list[tuple[str, int]]:
    """Names of other data sets that hold some of these patients, and how many; else claim them."""
    database.execute("PRAGMA synchronous = EXTRA")
    database.execute("BEGIN IMMEDIATE")
    database.execute("CREATE TABLE IF NOT EXISTS patient (mark BLOB PRIMARY KEY, data TEXT)")
    database.execute("CREATE TEMP TABLE now (mark BLOB PRIMARY KEY)")
    database.executemany("INSERT INTO now VALUES (?)", [(mark,) for mark in marks])
    query = "SELECT data, count(*) FROM patient JOIN now USING (mark) WHERE data != ? GROUP BY data"
    others = database.execute(query, (data_name,)).fetchall()
    if others:
        database.execute("ROLLBACK")
        return others
    database.execute("INSERT OR IGNORE INTO patient SELECT mark, ? FROM now", (data_name,))
    database.execute("COMMIT")
    return []


def _digest(values: NDArray[Any]) -> bytes:
    """Of shape and numbers."""
    head = f"{values.dtype.str}{values.shape}".encode()
    return hashlib.sha256(head + values.tobytes()).digest()
