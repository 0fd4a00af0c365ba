"""A disk of a few megabytes that a test fills and empties: a real one, in memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = 4096  # the disk gives away no less
BALLAST = "ballast"


@dataclass(frozen=True)
class SmallDisk:
    """A folder on a disk of its own."""

    folder: Path

    def fill(self, leave: int = 0) -> None:
        """Take all room but ``leave`` bytes, rounded up to a page."""
        self.empty()
        with (self.folder / BALLAST).open("wb") as file:
            while (size := (os.statvfs(self.folder).f_bavail - -(-leave // PAGE)) * PAGE) > 0:
                with suppress(OSError):  # somebody was faster: look again
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)

    def empty(self) -> None:
        """Give it back."""
        (self.folder / BALLAST).unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[SmallDisk]:
    """A disk at ``folder``, which is not there yet; without the right to mount, a test skips."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={num_bytes},mode=700", "consilium-test"]
    if not _ran("mount", *options, str(folder)):
        pytest.skip("no disk can be mounted here: run this as root, or inside `unshare -Urm`")
    try:
        yield SmallDisk(folder)
    finally:
        _ran("umount", "--lazy", str(folder))


def _ran(*command: str) -> bool:
    """Whether a command is there and succeeded."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
