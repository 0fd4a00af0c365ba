"""What people approved, and what a coordinator may leave here to be read."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client import approvals as module
from client.approvals import MAX_PROPOSED, MAX_STUDY_CHARS, Approvals
from common.config import MAX_KEYS_NAMED
from common.errors import RemoteProtocolError
from common.study import Study

NOW = datetime(2026, 3, 1, tzinfo=UTC)
KEYS = {"coordinator": {"key": "c" * 64}}


@pytest.fixture
def study(make_study) -> Study:
    members = [{"name": f"site-{k}", "key": str(k) * 64} for k in (1, 2, 3)]
    return make_study({"members": members}, **KEYS)


@pytest.fixture
def approvals(tmp_path: Path) -> Approvals:
    return Approvals(tmp_path / "state")


def as_text(study: Study, **changes: object) -> str:
    return json.dumps({**study.as_table(), **changes})


def propose_many(approvals: Approvals, study: Study, num: int = MAX_PROPOSED) -> None:
    for seed in range(num):
        approvals.propose(as_text(study, seed=1000 + seed))


def test_proposals_cannot_crowd_out_an_approved_study(approvals: Approvals, study: Study) -> None:
    approvals.approve(study, by="Test", now=NOW)
    propose_many(approvals, study)
    found, path = approvals.propose(as_text(study))
    assert found == study
    assert path.parent.name == "approved"


def test_the_proposal_that_was_made_longest_ago_makes_room(
    approvals: Approvals, study: Study, tmp_path: Path
) -> None:
    folder = tmp_path / "state" / "proposed"
    propose_many(approvals, study)
    for age, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, ns=(10**18 - age, 10**18 - age))
    *_, second, oldest = sorted(folder.iterdir())
    approvals.propose(json.dumps(approvals.proposed(oldest.stem).as_table()))  # so it is new again
    approvals.propose(as_text(study, seed=5))
    assert len(list(folder.iterdir())) == MAX_PROPOSED
    assert oldest.exists()
    assert not second.exists()


def test_what_was_approved_meanwhile_makes_room_first(
    approvals: Approvals, study: Study, tmp_path: Path
) -> None:
    folder = tmp_path / "state" / "proposed"
    propose_many(approvals, study, MAX_PROPOSED - 1)
    _, path = approvals.propose(as_text(study))  # the newest
    approvals.approve(study, by="Test", now=NOW)
    approvals.propose(as_text(study, seed=5))
    assert not path.exists()
    assert len(list(folder.iterdir())) == MAX_PROPOSED


def test_a_proposal_is_read_once_and_nothing_is_suggested(approvals: Approvals) -> None:
    started = time.monotonic()
    keys = {f"seex{k:04}": 1 for k in range(4000)}
    with pytest.raises(RemoteProtocolError, match="and 3996 more") as caught:
        approvals.propose(json.dumps(keys))
    assert time.monotonic() - started < 1  # it took hours
    assert len(str(caught.value)) < 100 * MAX_KEYS_NAMED


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 30_000 + "]" * 30_000, id="nested lists"),
        pytest.param('{"a":' * 2000 + "1" + "}" * 2000, id="nested tables"),
        pytest.param("not JSON", id="no JSON"),
        pytest.param("[]", id="a list"),
        pytest.param('{"' + "x" * MAX_STUDY_CHARS + '": 1}', id="too long"),
        pytest.param('{"\\u001b[8m\\n": 1}', id="a key that steers a terminal"),
    ],
)
def test_what_is_no_study_is_refused_and_not_kept(
    approvals: Approvals, tmp_path: Path, text: str
) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        approvals.propose(text)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "state" / "proposed").exists()


def test_a_long_proposal_is_not_even_parsed(
    approvals: Approvals, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "parse_message", None)
    with pytest.raises(RemoteProtocolError, match="at most 65536 are read"):
        approvals.propose(as_text(study) + " " * MAX_STUDY_CHARS)


def test_values_that_conflict_are_no_study(approvals: Approvals, study: Study) -> None:
    twice = [{"name": "site-1", "key": "1" * 64}] * 3
    with pytest.raises(RemoteProtocolError, match="members"):
        approvals.propose(as_text(study, members=twice))


def test_a_study_of_as_many_members_as_there_may_be_is_short_enough(
    approvals: Approvals, study: Study
) -> None:
    members = [{"name": f"{k:03}" + "x" * 60, "key": "a" * 64} for k in range(255)]
    found, _ = approvals.propose(as_text(study, members=members))
    assert len(found.members) == 255


def test_people_who_approve_at_the_same_time_are_all_recorded(
    approvals: Approvals, study: Study, tmp_path: Path
) -> None:
    def approve(name: str) -> None:
        Approvals(tmp_path / "state").approve(study, by=name, now=NOW)

    names = [f"person {k}" for k in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(approve, names))
    assert sorted(line["by"] for line in approvals.lines()) == sorted(names)


def test_folders_and_files_are_this_users_alone(
    approvals: Approvals, study: Study, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        approvals.approve(study, by="Test", now=NOW)
        approvals.propose(as_text(study, seed=5))
    finally:
        os.umask(before)
    home = tmp_path / "state"
    assert {path.stat().st_mode & 0o077 for path in (home, *home.rglob("*"))} == {0}


def test_an_approved_study_that_was_changed_is_no_witness_of_keys(
    approvals: Approvals, study: Study, tmp_path: Path
) -> None:
    approvals.approve(study, by="Test", now=NOW)
    newer = study.model_copy(update={"seed": 9})
    approvals.approve(newer, by="Test", now=NOW)
    assert [one.study.seed for one in approvals.earlier()] == [9, 3]
    path = tmp_path / "state" / "approved" / f"{newer.digest()}.toml"
    path.write_text(path.read_text().replace("seed = 9", "seed = 8"))
    assert [one.study.seed for one in approvals.earlier()] == [3]
