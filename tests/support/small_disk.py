"""A disk of a few megabytes that a test fills and empties: a real one, in memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
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
        found = os.statvfs(self.folder)
        pages = found.f_bavail - -(-leave // PAGE)
        if pages > 0:
            with (self.folder / BALLAST).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, pages * found.f_frsize)

    def empty(self) -> None:
        """Give it back."""
        (self.folder / BALLAST).unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[SmallDisk]:
    """A disk at ``folder``, which is not there yet; without the right to mount, a test skips."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={num_bytes},mode=700", "consilium-test"]
    folder.mkdir()
    if _ran("mount", *options, str(folder)):
        try:
            yield SmallDisk(folder)
        finally:
            _ran("umount", "--lazy", str(folder))
        return
    # Not root: mounted in a user namespace, and reached through a process that lives there.
    script = 'mount "$@" && echo ready && exec cat'
    command = ["unshare", "-Urm", "sh", "-c", script, "mount", *options, str(folder)]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert holder.stdout is not None
    try:
        if holder.stdout.readline() != b"ready\n":
            pytest.skip("no file system can be mounted here, not even in a user namespace")
        inside = Path(f"/proc/{holder.pid}/root{folder.resolve()}")
        folder.rmdir()
        folder.symlink_to(inside)
        yield SmallDisk(folder)
    finally:
        holder.communicate(b"")


def _ran(*command: str) -> bool:
    """Whether a command is there and succeeded."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
