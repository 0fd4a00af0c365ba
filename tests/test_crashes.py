"""Processes that die, lines that are cut, machines that move: a run over TLS ends as without."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import tomli_w
from cut import line_to
from deployment import Consortium, free_port, running
from light_run import (
    RUN_S,
    SITES,
    faults_until_the_end,
    founded,
    start_again,
    start_all,
    wait_until,
)
from moments import Moment
from outcome import Outcome, faults_of, json_lines

from client.site import AUDIT
from common.authority import CERTIFICATE, REVOKED

ROOT = Path(__file__).parents[1]
OUTAGE_S = 3.0
LEAST_DEADLINE_S = 6.0
AMID_AN_UPLOAD = 12_000  # bytes; it has twice as many
RUN_LINE = re.compile(r"^ +\d+  (seeded|os)  .* equal$", re.MULTILINE)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def ended(made: Consortium) -> Outcome:
    """What the run came to; nothing is wrong with it."""
    assert list(faults_of(made)) == []
    return Outcome.of(made)


def finish(made: Consortium) -> None:
    assert list(faults_until_the_end(made)) == [], made.log("coordinator")[-3000:]


def in_training(site: str, sum_number: int) -> Moment:
    """When a site has got its task."""
    words = ('"received"', '"RoundTask"', f'"sum_number":{sum_number},')
    return Moment(f"sites/{site}/state/audit.jsonl", words)


def has_arrived(site: str, sum_number: int) -> Moment:
    words = ('"received"', '"Upload"', f'"{site}"', f'"sum_number":{sum_number},')
    return Moment("run/audit.jsonl", words)


def num_tasks(made: Consortium, site: str, sum_number: int) -> int:
    """How often a site was asked for its upload of one sum."""
    lines = json_lines(made.state(site) / AUDIT)
    asked = [line["sum_number"] for line in lines if line.get("type") == "RoundTask"]
    return asked.count(sum_number)


def round_done(number: int) -> Moment:
    return Moment("run/rounds.jsonl", (f'"round": {number},',))


def change(path: Path, **values: object) -> None:
    """Top-level keys of a TOML file."""
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """A run to which nothing happened."""
    made = founded(tmp_path_factory.mktemp("undisturbed"))
    with running(made):
        start_all(made)
        finish(made)
    assert ended(made).is_complete(SITES)
    return made


def test_a_process_of_each_kind_is_killed_and_every_run_ends_equal() -> None:
    kinds = ("coordinator", "superlink", "site")
    options = [word for kind in kinds for word in ("--victim", kind)]
    command = [ROOT / "scripts" / "crash-test", "--runs", "3", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as script:
        try:
            told = script.communicate()[0].decode()
        finally:
            script.terminate()  # where the test was given up: it ends what it started
    assert script.returncode == 0, told
    assert RUN_LINE.findall(told) == ["seeded", "os", "seeded"]
    assert told.endswith("\n3 of 3 equal\n")


def test_a_frozen_site_and_a_line_that_is_cut_in_three_ways_change_nothing(
    tmp_path: Path, undisturbed: Consortium
) -> None:
    made = founded(tmp_path)
    with running(made), line_to(made.port) as line:
        change(made.site("site-1"), coordinator=f"127.0.0.1:{line.port}")
        start_all(made)

        assert wait_until(made, in_training("site-2", 0))
        made.running["site-2"].send_signal(signal.SIGSTOP)
        time.sleep(OUTAGE_S)
        assert not has_arrived("site-2", 0).has_come(made)
        made.running["site-2"].send_signal(signal.SIGCONT)

        assert wait_until(made, in_training("site-1", 1))
        line.hold()
        time.sleep(OUTAGE_S)
        assert not has_arrived("site-1", 1).has_come(made)
        line.mend()

        for sum_number, cut in ((2, line.refuse), (3, line.lose)):
            assert wait_until(made, in_training("site-1", sum_number))
            line.plan(AMID_AN_UPLOAD, cut)
            assert line.was_cut.wait(RUN_S)
            time.sleep(OUTAGE_S)
            assert not has_arrived("site-1", sum_number).has_come(made)
            line.mend()
        finish(made)
        # The upload went on where it had stopped: nobody had to ask for it again.
        assert [num_tasks(made, "site-1", number) for number in range(4)] == [1, 1, 1, 1]
    assert list(ended(made).differences(ended(undisturbed))) == []


def test_a_site_that_is_away_beyond_the_deadline_is_left_out_and_taken_in_again(
    tmp_path: Path, undisturbed: Consortium
) -> None:
    summary = json.loads((undisturbed.run_dir / "summary.json").read_text())
    deadline_s = max(LEAST_DEADLINE_S, 3 * max(summary["wall_s"]["per_round"]))
    made = founded(tmp_path, {"deadlines.upload_s": deadline_s})
    with running(made):
        start_all(made)
        assert wait_until(made, in_training("site-4", 1))
        made.kill("site-4")
        assert wait_until(made, round_done(2))
        start_again(made, "site-4")
        finish(made)
    sums = ended(made).sums
    assert sums[1].survivors == SITES[:3]
    assert sums[-1].survivors == SITES
    assert all(set(one.survivors) >= set(SITES[:3]) for one in sums)


def test_a_coordinator_that_moved_goes_on_to_the_same_model_and_epsilon(
    tmp_path: Path, undisturbed: Consortium
) -> None:
    made = founded(tmp_path / "here")
    with running(made):
        start_all(made)
        assert wait_until(made, round_done(2))
        made.kill("coordinator")
        moved = move(made, tmp_path / "there")
        with running(moved):
            moved.start_coordinator("--resume")
            for name in SITES:
                made.running[name].terminate()
                made.wait(name)
                change(made.site(name), coordinator=f"127.0.0.1:{moved.port}")
                moved.start_site(name)
            finish(moved)
    assert list(ended(moved).differences(ended(undisturbed))) == []


def move(made: Consortium, there: Path) -> Consortium:
    """The coordinator's files on another machine; the sites' stay where they are."""
    there.mkdir()
    moved = Consortium(there, made.names, there / "study.toml", free_port())
    shutil.move(made.run_dir, moved.run_dir)
    shutil.move(made.folder / "coordinator", there / "coordinator")
    shutil.move(made.study, moved.study)
    (there / "ca").mkdir()
    for name in (CERTIFICATE, REVOKED):
        shutil.copy(made.folder / "ca" / name, there / "ca")
    text = (made.folder / "coordinator.toml").read_text()
    config = there / "coordinator.toml"
    config.write_text(text.replace(f"{made.folder}/", f"{there}/"))
    change(config, listen=f"127.0.0.1:{moved.port}")
    (there / "sites").symlink_to(made.folder / "sites")
    return moved
