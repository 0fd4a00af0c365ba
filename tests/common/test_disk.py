"""What a process that is killed in the middle of a write leaves, and who removes it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from federation import tiny_study

from common.disk import remove_leftovers, replacing
from common.errors import ConfigError
from server.run_dir import RunDir


def killed_while_it_writes(path: Path) -> None:
    child = os.fork()
    if not child:
        with replacing(path) as file:
            file.write(b"half of a model")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_killed_write_leaves_the_old_file_and_its_leftover_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "models" / "model"
    path.parent.mkdir()
    path.write_bytes(b"old")
    (tmp_path / ".lock").touch()
    killed_while_it_writes(path)
    assert len(list(path.parent.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == b"old"
    assert (tmp_path / ".lock").exists()


def test_a_resumed_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    study, folder = tiny_study(), tmp_path / "run"
    first = RunDir.open(folder, study, resume=False)
    first._write("epoch-1.json", b"{}")
    del first
    killed_while_it_writes(folder / "models" / "round-0001.safetensors")
    RunDir.open(folder, study, resume=True)
    assert list((folder / "models").iterdir()) == []


def test_a_folder_whose_disk_was_full_at_the_start_takes_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "models").mkdir(parents=True)
    RunDir.open(tmp_path / "run", tiny_study(), resume=False)
    with pytest.raises(ConfigError, match="holds no run to resume"):
        RunDir.open(tmp_path / "other", tiny_study(), resume=True)


def test_a_start_that_was_killed_between_the_keys_and_the_manifest_takes_a_new_run(
    tmp_path: Path,
) -> None:
    first = RunDir.open(tmp_path / "run", tiny_study(), resume=False)
    first._write("keys-1.json", b"[]")
    del first
    RunDir.open(tmp_path / "run", tiny_study(), resume=False)
