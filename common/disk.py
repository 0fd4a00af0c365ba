"""Make a file and its name survive a power cut, and a disk that has no room left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO

from common.errors import DiskFull

FULL = (errno.ENOSPC, errno.EDQUOT)
LITTLE_BYTES = 1 << 20  # more than SQLite needs for one transaction
BESIDE = ".new-"  # begins the name of a file that is not in its place yet


def is_full(error: BaseException) -> bool:
    """Whether a disk, or somebody's share of it, had no room for what was written."""
    return isinstance(error, OSError) and error.errno in FULL


def has_room(folder: Path, num_bytes: int) -> bool:
    """Whether so many bytes can be written in a folder now. It is tried: of quotas nobody tells."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if is_full(error):
            return False
        raise
    return True


@contextmanager
def sqlite_room(path: Path) -> Iterator[None]:
    """SQLite has words of its own for a full disk: the operating system's are raised."""
    try:
        yield
    except sqlite3.OperationalError as error:
        is_full = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL
        if not is_full and has_room(path.parent, LITTLE_BYTES):
            raise
        raise OSError(errno.ENOSPC, str(error), str(path)) from None


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, which may not be there yet."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def disk_full(error: OSError, *, then: str, folder: Path | None = None) -> DiskFull:
    """What a person is told of an error that ``is_full``.

    Args:
      error: It may say which file had no room.
      then: What to do when there is room.
      folder: Where it was if the error does not say.
    """
    where = Path(error.filename).absolute().parent if error.filename else folder
    if where is None:
        return DiskFull(f"a disk is full ({error.strerror}); make room, then {then}")
    free = megabytes(free_bytes(where))
    return DiskFull(
        f"{where}: the disk is full ({error.strerror}; {free} free); make room, then {then}"
    )


def megabytes(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 1e6:.1f} MB"


def sync_folder(folder: Path) -> None:
    """Flush a folder: a file that was created or renamed in it is found after a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(file: FileIO, content: bytes, *, instead_of: bytes = b"") -> None:
    """Add to the end of a file; on disk when this returns.

    Args:
      file: Unbuffered, and the caller's alone.
      content: What to add.
      instead_of: The last bytes of the file, which go.

    Raises:
      OSError: It was not added, nor a part of it: the file is as it was.
    """
    start = file.seek(0, os.SEEK_END) - len(instead_of)
    try:
        if instead_of:
            file.truncate(start)
        file.seek(start)
        _write_all(file, content)
        os.fsync(file.fileno())
    except BaseException as error:
        file.truncate(start)
        with contextlib.suppress(OSError):  # the disk may have no room for them any more
            file.seek(start)
            _write_all(file, instead_of)
        name_file(error, Path(os.fsdecode(file.name)))
        raise


def replace_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Put a whole file in the place of another; on disk when this returns."""
    with replacing(path, mode=mode) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, *, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """A file to write into that takes its place only when it is complete and on disk."""
    beside = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=BESIDE, delete=False) as file:
            beside = Path(file.name)
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
        sync_folder(path.parent)
    except BaseException as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        name_file(error, path)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left beside its place; call it where no other one writes."""
    for path in folder.rglob(f"{BESIDE}*"):
        path.unlink()


def hold_lock(path: Path, owner: object) -> bool:
    """Keep other processes out for as long as ``owner`` lives; False where one is in already."""
    held = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    weakref.finalize(owner, os.close, held)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write_all(file: FileIO, content: bytes) -> None:
    """A disk that is nearly full takes a part, and refuses the rest with an error."""
    while content:
        content = content[file.write(content) :]


def name_file(error: BaseException, path: Path) -> None:
    """Say where it happened: of a write, the operating system tells only what."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)
