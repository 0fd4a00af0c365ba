"""A folder that holds what messages consist of: the SuperLink and the coordinator both see it.

In memory it would grow with the number of sites that send at once. Nothing of it has to survive: a
file that was just written is read from the page cache, and is gone before a disk would see it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import tempfile
from pathlib import Path

from common.disk import has_room

PIECE_BYTES = 6 << 20  # of an object at most: Flower cuts arrays into pieces of 5 MB
OBJECTS = "objects"  # in the folder of the SuperLink
SHELVED = "/v1/runtime/shelved"  # the coordinator's call: these objects of a session are there
ID = re.compile(r"[0-9a-f]{64}")  # of an object: the SHA-256 of its bytes


class Shelf:
    """Objects in files under their ids: one is there as a whole, or not at all."""

    def __init__(self, folder: Path) -> None:
        """Look into a folder that may not be there yet."""
        self._folder = folder

    def clear(self) -> None:
        """Begin with an empty one: a process that was killed leaves its objects behind."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for left in self._folder.iterdir():
            left.unlink()

    def put(self, object_id: str, content: bytes) -> None:
        """Keep an object.

        Raises:
          OSError: The disk is full; nothing was kept.
        """
        path = self._path(object_id)
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            beside = Path(file.name)
            try:
                file.write(content)
                file.flush()
            except BaseException:
                beside.unlink()
                raise
        beside.rename(path)

    def num_bytes(self, object_id: str) -> int | None:
        """How long an object is; None where it is not there."""
        try:
            return self._path(object_id).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, object_id: str) -> mmap.mmap:
        """An object where it lies; it may be deleted while it is read.

        Raises:
          FileNotFoundError: It is not there.
        """
        with self._path(object_id).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def check_room(self) -> None:
        """See whether another piece would fit.

        Raises:
          OSError: The disk is full.
        """
        if not has_room(self._folder, PIECE_BYTES):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def delete(self, object_id: str) -> None:
        """Forget an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._path(object_id).unlink()

    def _path(self, object_id: str) -> Path:
        if not ID.fullmatch(object_id):
            raise ValueError("an object is named by 64 hexadecimal digits")
        return self._folder / object_id
