"""The audit log: everything a party received, decided and sent, one hash-chained JSON line each.

    {"n":12,"time":"2026-11-21T18:00:00+00:00","event":"sent",...,"prev":<hex>,"hash":<hex>}

``n`` counts from 1 and is the number of the line in the file. ``hash`` is over ``prev``, the hash
of the line before, and over the text of the line without its ``hash`` entry. The hash of the last
line is the head: it stands for the whole log. Times are the clock's, which may be set back.

What belongs in a line: kinds, sizes and digests of messages, names of sites, studies, runs and
rules, the values and bounds of a decision. Never patient data: nothing from an image or a label,
no path of either, no update.

What the chain finds: a line that was changed, removed, moved or put in between. What it does not
find alone: whoever can write the file can write all of it anew from any line on, or cut lines off
its end. That is why heads leave the party in signed statements: ``AuditLog.holds`` tells whether a
head that was stated is still in the log. Lines after the last statement are not covered.

A crash in the middle of a write leaves a torn last line, one without a line break. Nobody was told
its hash, so it may go: ``verify`` reports it while it is the last; the next ``append`` cuts it off
and says so in a line of its own, ``repaired``, with the length and the SHA-256 of what was cut. (A
second crash, between the cut and that line, loses the trace.) A disk that fills up tears no line:
what it took of one is cut off at once. Any other damage stops the party.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from common.disk import append, sync_folder
from common.errors import DataError, LocalProtocolError
from common.secagg.encoding import digest

GENESIS = "0" * 64  # the head of an empty log

MAX_VALUE_CHARS = 1000
MAX_LINE_BYTES = 1 << 16  # bounds what append reads: two lines
MAX_FACTS_BYTES = MAX_LINE_BYTES - 512  # the number, the time and the hashes take under 300

_MODE = 0o600
_OWN_KEYS = frozenset({"n", "time", "event", "prev", "hash"})
_REPAIRED = "repaired"
_FORM = re.compile(
    rb'(\{"n":([1-9][0-9]{0,17}),"time":"([0-9T:+-]{25})",.*"prev":"([0-9a-f]{64})")'
    rb',"hash":"([0-9a-f]{64})"\}\n'
)
_KEEP = "keep the file as it is and compare it with its backup and with the last signed statement"

Facts = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Verified:
    """What an intact log amounts to."""

    num_lines: int
    head: str  # 64 hex digits
    first_time: str | None  # ISO 8601, UTC; none in an empty log
    last_time: str | None


@dataclass(frozen=True)
class _Line:
    text: bytes  # with its line break
    number: int
    time: str
    prev: str
    hash: str


_START = _Line(b"", 0, "", "", GENESIS)


class AuditLog:
    """One party's log; every process of the party may append to it."""

    def __init__(self, path: Path, now: Callable[[], datetime]) -> None:
        """Say where the log lies; nothing is opened.

        Args:
          path: The file. It and its folder are made by the first line.
          now: The clock, with a time zone.
        """
        self._path = path
        self._now = now

    def append(self, event: str, **facts: str | float) -> str:
        """Add one line; on disk when this returns.

        Args:
          event: What happened: received, decided, sent, refused, started, stopped.
          **facts: What is said of it, in this order; see the module for what belongs here.

        Returns:
          The new head; 64 hex digits.

        Guarantees:
          Only the end of the file is read, however long it is. The file is this user's alone. Where
          the disk has no room for the line, an OSError says so and the file is as it was.

        Raises:
          LocalProtocolError: A fact is too long or has a name of the log's own; nothing is written.
          DataError: The last line is damaged: what happened is unknown, and the party must stop.
        """
        _check_facts(event, facts)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b", buffering=0) as file:
            # Several processes of one party may append: finding the last line and adding to it
            # are one step.
            fcntl.flock(file, fcntl.LOCK_EX)
            os.fchmod(file.fileno(), _MODE)
            last, torn = _read_end(file, self._path)
            lines = list(self._lines_after(last, torn, event, facts))
            append(file, b"".join(line.text for line in lines), instead_of=torn)
            if last is _START:
                sync_folder(self._path.parent)
        return lines[-1].hash

    def head(self) -> str:
        """The hash of the last whole line; ``GENESIS`` where there is none.

        Raises:
          DataError: The last line is damaged.
        """
        if not self._path.exists():
            return GENESIS
        with self._path.open("rb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            last, _ = _read_end(file, self._path)
        return last.hash

    def holds(self, head: str) -> bool:
        """Whether this was ever the head: not so after a cut or a return to an older copy.

        Reads and checks every line up to that head; later lines are for ``verify``.

        Raises:
          DataError: A line before that head is damaged.
        """
        if head == GENESIS:
            return True
        if not self._path.exists():
            return False
        whole = (text for text in _read_lines(self._path) if not _is_torn(text))
        return any(line.hash == head for line in _chain(whole, self._path))

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every line, oldest first, each checked as ``verify`` does.

        Raises:
          DataError: A line is damaged, or the last one torn.
        """
        if self._path.exists():
            for line in _chain(_read_lines(self._path), self._path):
                yield json.loads(line.text)

    def _lines_after(self, last: _Line, torn: bytes, event: str, facts: Facts) -> Iterator[_Line]:
        """The line to be added, after one about torn bytes where there are any."""
        if torn:
            cut: Facts = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
            last = _next(last, self._now(), _REPAIRED, cut)
            yield last
        yield _next(last, self._now(), event, facts)


def verify(path: Path) -> Verified:
    """Check every line of a log, as it was when this began; others may go on appending.

    Guarantees:
      Any byte that was changed, and any line that was removed, moved or put in between, is found;
      lines cut off the end, and a file written anew, are not: ask ``AuditLog.holds`` for a head
      that was stated.

    Raises:
      DataError: Names the file, the first line that is wrong, what is wrong, and the next move.
    """
    if not path.is_file():
        raise DataError(
            f"there is no audit log {path}: if this party ever started, restore it from a backup"
        )
    first, last = None, _START
    for last in _chain(_read_lines(path), path):
        first = first or last
    return Verified(
        num_lines=last.number,
        head=last.hash,
        first_time=first.time if first else None,
        last_time=last.time if first else None,
    )


def _chain(lines: Iterable[bytes], path: Path) -> Iterator[_Line]:
    """Every line, each checked against the one before."""
    before = _START
    for text in lines:
        try:
            before = _follow(before, text)
        except ValueError as error:
            raise DataError(f"audit log {path}, line {before.number + 1}: {error}") from None
        yield before


def _follow(before: _Line, text: bytes) -> _Line:
    """The line in ``text``, which must come right after ``before``."""
    if _is_torn(text):
        raise ValueError(
            f"the last line is torn ({len(text)} bytes without a line break), as a crash leaves "
            "it; start the program again: it cuts these bytes off and records that"
        )
    line = _parse(text)
    if line.number != before.number + 1:
        raise ValueError(
            f"it carries number {line.number}: lines were removed, moved or put in here; {_KEEP}"
        )
    if line.prev != before.hash:
        raise ValueError(f"it does not follow from the line before, which was exchanged; {_KEEP}")
    return line


def _next(last: _Line, now: datetime, event: str, facts: Facts) -> _Line:
    """The line that follows ``last``."""
    time = now.astimezone(UTC).isoformat(timespec="seconds")
    entry = {"n": last.number + 1, "time": time, "event": event, **facts, "prev": last.hash}
    content = json.dumps(entry, separators=(",", ":")).encode()
    return _parse(content[:-1] + f',"hash":"{_hash(last.hash, content)}"}}\n'.encode())


def _parse(text: bytes) -> _Line:
    """The parts of one line, whose own hash must fit."""
    found = _FORM.fullmatch(text)
    if found is None or len(text) > MAX_LINE_BYTES:
        raise ValueError(f"it is not a line as this log writes them: it was changed; {_KEEP}")
    content, number, time, prev, stated = found.groups()
    line = _Line(text, int(number), time.decode(), prev.decode(), stated.decode())
    if _hash(line.prev, content + b"}") != line.hash:
        raise ValueError(f"its hash does not fit: it was changed; {_KEEP}")
    return line


def _hash(prev: str, content: bytes) -> str:
    return digest("audit line", bytes.fromhex(prev), content).hex()


def _is_torn(text: bytes) -> bool:
    """Whether this is all that a crash may leave; a longer piece was written by somebody else."""
    return not text.endswith(b"\n") and len(text) < MAX_LINE_BYTES


def _read_lines(path: Path) -> Iterator[bytes]:
    """The lines of the file as it is now; a line that is too long comes in pieces."""
    with path.open("rb") as file:
        # What is on disk under the lock was not caught in the middle of a write, and nobody
        # changes it later; so appending need not wait until all is read.
        fcntl.flock(file, fcntl.LOCK_SH)
        left = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        while text := file.readline(min(MAX_LINE_BYTES, left)):
            left -= len(text)
            yield text


def _read_end(file: FileIO, path: Path) -> tuple[_Line, bytes]:
    """The last whole line, and the torn bytes after it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2 * MAX_LINE_BYTES))
    tail = file.read()
    end = tail.rfind(b"\n") + 1
    start = tail.rfind(b"\n", 0, max(0, end - 1)) + 1
    text, torn = tail[start:end], tail[end:]
    if not text and _is_torn(torn):
        return _START, torn
    try:
        return _parse(text if _is_torn(torn) else torn), torn
    except ValueError as error:
        raise DataError(
            f"audit log {path}, last line: {error}; nothing goes on without the log: run "
            "`audit verify`, which names the first line that is wrong"
        ) from None


def _check_facts(event: str, facts: Facts) -> None:
    """Refuse what would not make one bounded line."""
    if taken := _OWN_KEYS & facts.keys():
        raise LocalProtocolError(f"a fact is named {min(taken)!r}, as a part of every line is")
    for name, value in {"event": event, **facts}.items():
        if isinstance(value, str) and len(value) > MAX_VALUE_CHARS:
            raise LocalProtocolError(
                f"fact {name!r} of the audit log has {len(value)} characters, at most "
                f"{MAX_VALUE_CHARS} are allowed; log its digest and length"
            )
    num_bytes = len(json.dumps([event, facts]))
    if num_bytes > MAX_FACTS_BYTES:
        raise LocalProtocolError(
            f"the facts of {event!r} take {num_bytes} bytes, at most {MAX_FACTS_BYTES} make a line "
            "of the audit log; log fewer"
        )
