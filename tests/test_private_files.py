"""What the programs write is their user's alone, whatever mask they are started with."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

import client.cli
import server.cli


@pytest.mark.parametrize("program", [client.cli, server.cli], ids=["fl-client", "fl-server"])
def test_a_program_starts_with_a_mask_that_keeps_others_out(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "start", lambda _: (tmp_path / "written").touch(0o666))
    before = os.umask(0)
    try:
        program.main()
    finally:
        os.umask(before)
    assert (tmp_path / "written").stat().st_mode & 0o777 == 0o600
