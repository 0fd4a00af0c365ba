"""What was refused is on disk, whole, for its reader alone, and never fills the disk."""

from __future__ import annotations

import json
import os
import stat
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from common.errors import RemoteProtocolError
from common.evidence import FILE, Evidence
from common.messages import Upload, Vote
from common.record import from_table

VOTE = Vote("ab", 3, 1, b"view", b"signature")
ERROR = RemoteProtocolError("a vote for other survivors came", rule="R11")


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_a_refused_message_is_kept_whole_with_the_rule_it_broke(
    tmp_path: Path, now: datetime
) -> None:
    Evidence(tmp_path).keep(VOTE, ERROR, now=now, by="site-2")
    (line,) = lines_of(tmp_path)
    table = line.pop("message")
    assert line == {
        "time": "2031-05-17T12:00:00+00:00",
        "rule": "R11",
        "reason": "a vote for other survivors came [R11]",
        "from": "site-2",
    }
    assert isinstance(table, dict)
    assert from_table(table, Vote) == VOTE


def test_a_header_is_kept_as_it_was_signed(tmp_path: Path, now: datetime) -> None:
    Evidence(tmp_path).keep_header(4, b"\x01header", ERROR, now=now, by="site-4")
    (line,) = lines_of(tmp_path)
    assert line["message"] == {"kind": "Header", "site": 4, "header": b"\x01header".hex()}


def test_refusals_are_appended_also_by_a_later_process(tmp_path: Path, now: datetime) -> None:
    for site in range(3):
        Evidence(tmp_path).keep(VOTE, ERROR, now=now, by=f"site-{site}")
    assert [line["from"] for line in lines_of(tmp_path)] == ["site-0", "site-1", "site-2"]


@pytest.mark.parametrize("text", ["two\nlines", "\u2028", '"}', "\ud800", "\0"])
def test_no_text_breaks_the_line_it_stands_in(tmp_path: Path, now: datetime, text: str) -> None:
    evidence = Evidence(tmp_path)
    evidence.keep(Vote(text, 3, 1, b"", b""), RemoteProtocolError(text), now=now, by=text)
    evidence.keep(VOTE, ERROR, now=now)
    content = (tmp_path / FILE).read_bytes()
    assert content.count(b"\n") == 2
    first = json.loads(content.split(b"\n")[0])
    assert (first["message"]["run"], first["reason"], first["from"]) == (text, text, text)


def test_an_array_is_kept_as_its_digest(tmp_path: Path, now: datetime) -> None:
    upload = Upload("ab", 1, b"", (), (), np.zeros(1 << 20, np.uint8))
    Evidence(tmp_path).keep(upload, ERROR, now=now)
    assert (tmp_path / FILE).stat().st_size < 1000


def test_the_file_is_for_this_user_alone_and_flushed_to_disk(
    tmp_path: Path, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flushed = tmp_path / "new", []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", watched)
    Evidence(folder).keep(VOTE, ERROR, now=now)
    file = folder / FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert flushed == [file.stat().st_size]


def test_the_file_stops_growing_at_its_bound(
    tmp_path: Path, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = Evidence(tmp_path)
    evidence.keep(VOTE, ERROR, now=now)
    size = (tmp_path / FILE).stat().st_size
    monkeypatch.setattr("common.evidence.MAX_BYTES", 3 * size)
    for _ in range(9):
        evidence.keep(VOTE, ERROR, now=now)
    assert len(lines_of(tmp_path)) == 3
    assert (tmp_path / FILE).stat().st_size == 3 * size
