"""A disk that fills up costs time and nothing else: no update, no charge, no line of a book."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from deployment import Consortium, running
from federation import answers_of, federate, open_sites, tiny_study
from light_run import (
    faults_until_the_end,
    founded,
    start_again,
    start_all,
    wait_until,
)
from moments import Moment
from outcome import Outcome, faults_of, json_lines
from small_disk import BALLAST, PAGE, SmallDisk, small_disk

import client.room
import server.cli
import server.deployed
from client.journal import EpochMemory, Journal, Releases, SumMemory
from client.ledger import Ledger
from client.room import SPARE_BYTES, Room, Stopped
from common.accounting import Event
from common.audit import AuditLog, verify
from common.charges import LEDGERS, Charge
from common.config import load
from common.disk import append, has_room, is_full, replace_file
from common.errors import DataError, DiskFull
from common.messages import Message
from common.secagg.phases import Phase
from common.study import Study
from server.network import LoopbackNetwork

MB = 1 << 20
PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "example_clip_norm": 0.5, "randomness": "seeded"}
EVENT = Event(1.0, 0.05, 50)
# Bytes that are left on a disk: few steps where much is, since then all of a message fits.
LEFT = [n * PAGE for n in (*range(10), *range(10, 40, 3), *range(40, 1000, 20))]
SOON_S = 120.0  # it takes a moment; a program's start on a busy machine, more
OUTAGE_S = 1.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 4 * MB) as made:
        yield made


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def as_room_is_made(disk: SmallDisk, step: Callable[[], Any], failed: Callable[[], None]) -> Any:
    """Take a step with more and more room, until it succeeds; ``failed`` looks after every try."""
    for left in LEFT:
        disk.fill(left)
        try:
            return step()
        except OSError as error:
            if not is_full(error):
                raise
            failed()
        finally:
            disk.empty()
    raise AssertionError("the disk is too small for this test")


def has_room_for(step: Callable[[], Any]) -> bool:
    """Whether a step could be taken."""
    try:
        step()
    except OSError as error:
        if not is_full(error):
            raise
        return False
    return True


# One file


class NearlyFull(io.FileIO):
    """A file on a disk that has room up to ``end`` of it."""

    end = 0

    def write(self, content: Any) -> int:
        taken = bytes(content)[: max(0, self.end - self.tell())]
        return super().write(taken) if taken else no_room()


@pytest.mark.parametrize("torn", [b"", b"half", b"half of a long line"])
def test_what_does_not_fit_whole_is_not_there_at_all(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "book"
    path.write_bytes(b"one\n" + torn)
    with NearlyFull(path, "r+b") as file:
        file.end = 4 + max(10, len(torn))
        with pytest.raises(OSError, match=f"No space left on device: '{path}'") as caught:
            append(file, b"two, which is too long\n", instead_of=torn)
        assert is_full(caught.value)
        assert path.read_bytes() == b"one\n" + torn
        append(file, b"two\n", instead_of=torn)
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_file_that_cannot_be_replaced_stays_and_nothing_beside_it(disk: SmallDisk) -> None:
    path = disk.folder / "state"
    replace_file(path, b"before")
    disk.fill(PAGE)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        replace_file(path, bytes(10 * PAGE))
    assert path.read_bytes() == b"before"
    assert {each.name for each in disk.folder.iterdir()} == {"state", BALLAST}


def test_room_is_what_can_be_written_now(disk: SmallDisk) -> None:
    disk.fill(8 * PAGE)
    assert has_room(disk.folder, 8 * PAGE)
    assert not has_room(disk.folder, 9 * PAGE)
    assert {each.name for each in disk.folder.iterdir()} == {BALLAST}


# The books


def test_a_debit_is_whole_or_not_there(disk: SmallDisk) -> None:
    path = disk.folder / "ledgers" / "xrays.jsonl"
    ledger, num_full = Ledger(path, "xrays", None), 0
    for number in range(100):  # some of the lines begin in one page and end in the next
        disk.fill()
        charge = partial(ledger.debit, "run", number, EVENT, num_rounds=200)
        if not has_room_for(charge):
            num_full += 1
            assert len(ledger.events_of("run")) == number
            disk.empty()
            charge()
        assert len(Ledger(path, "xrays", None).events_of("run")) == number + 1
    assert num_full > 2


def test_a_line_of_the_audit_log_is_whole_or_not_there(disk: SmallDisk) -> None:
    path = disk.folder / "audit.jsonl"
    log, num_full = AuditLog(path, lambda: datetime(2026, 11, 21, tzinfo=UTC)), 0
    for number in range(100):
        disk.fill()
        tell = partial(log.append, "received", number=number)
        if not has_room_for(tell):
            num_full += 1
            disk.empty()
            tell()
    assert num_full > 2
    assert verify(path).num_lines == 100  # none of them says that another was torn


EPOCH = EpochMemory(manifest="m" * 3 * PAGE, phase=Phase.READY)
SUM = SumMemory(
    sum_number=0, task=b"", model_digest="m" * 64, purpose="train", round_number=1, header=b"",
    sealed=(bytes(2 * PAGE),) * 3, share_commitments=(), statement="", own_share=b"",
)  # fmt: skip
BODY = np.arange(6 * PAGE, dtype=np.uint8)


def test_a_journal_says_all_of_it_or_nothing_at_every_amount_of_room(disk: SmallDisk) -> None:
    folder = disk.folder / "study"

    def opened() -> Journal:
        return Journal(folder / "journal.sqlite", disk.folder / "released.sqlite")

    journal = as_room_is_made(disk, opened, lambda: None)
    steps: list[Callable[[], None]] = [
        lambda: journal.begin_epoch(EPOCH, "digest", "run", is_new_run=True),
        lambda: journal.go_on(EPOCH),
        lambda: journal.record_upload(EPOCH, SUM, BODY),
        lambda: journal.record_answer(EPOCH, SUM, Releases("run", {"update": 1})),
        lambda: journal.record_upload(EPOCH, replace_number(1), BODY[::-1].copy()),
    ]
    num_full = 0
    for step in steps:
        before = journal.epoch(), journal.sum(), journal.has_released("m" * 64, "update")

        def failed(before: Any = before) -> None:
            nonlocal num_full
            num_full += 1
            journal.check()
            now = journal.epoch(), journal.sum(), journal.has_released("m" * 64, "update")
            again = opened()
            assert (again.epoch(), again.sum()) == now[:2]
            again.close()
            if now != before:  # it was said, and only its mark had no room
                return
            bodies = {path.name for path in folder.glob("answer-*")}
            assert bodies == ({f"answer-{now[1].sum_number}.bin"} if now[1] else set())

        as_room_is_made(disk, step, failed)
    assert num_full > 20
    journal.close()
    last = opened()
    assert last.sum() == replace_number(1)
    np.testing.assert_array_equal(last.body(1), BODY[::-1])
    assert last.has_released("m" * 64, "update")
    assert [path.name for path in folder.glob("answer-*")] == ["answer-1.bin"]


def replace_number(number: int) -> SumMemory:
    return SUM.model_copy(update={"sum_number": number})


def test_half_a_body_that_a_crash_left_goes_when_the_journal_is_opened(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.record_upload(EPOCH, SUM, BODY)
    journal.close()
    (tmp_path / "answer-1.4711").write_bytes(b"half")
    (tmp_path / "answer-1.bin").write_bytes(b"of a sum that the journal does not know")
    again = Journal(tmp_path / "journal.sqlite")
    assert [path.name for path in tmp_path.glob("answer-*")] == ["answer-0.bin"]
    np.testing.assert_array_equal(again.body(0), BODY)


# A whole run, every message with no room, then a little, then more, until it is answered


def test_a_site_whose_disk_is_full_at_every_step_of_every_message_gives_the_same_model(
    tmp_path: Path,
) -> None:
    study = tiny_study(privacy=PRIVACY, num_rounds=2)
    undisturbed = federate(study, tmp_path / "undisturbed")
    name, num_full = "site-1", 0
    with small_disk(tmp_path / "run" / "sites" / name, 4 * MB) as disk:
        sites = open_sites(study, tmp_path / "run")
        answers = answers_of(sites)
        at_once = answers[name]

        def patiently(message: Message) -> Message:
            nonlocal num_full

            def failed() -> None:
                nonlocal num_full
                num_full += 1

            return as_room_is_made(disk, lambda: at_once(message), failed)

        answers[name] = patiently
        summary = federate(
            study,
            tmp_path / "elsewhere",
            network=LoopbackNetwork(answers),
            sites_in=tmp_path / "run",
        )
        assert verify(disk.folder / "audit.jsonl").num_lines > 20
        homes = {each: sites[each].home for each in sites}
        charges = {each: charges_of(home) for each, home in homes.items()}
    assert num_full > 50
    assert summary["final_model_sha256"] == undisturbed["final_model_sha256"]
    assert summary["privacy"] == undisturbed["privacy"]
    assert [one.event for one in charges[name]] == [one.event for one in charges["site-2"]]
    assert [one.sum_number for one in charges[name]] == [0, 1]


def charges_of(home: Path) -> list[Charge]:
    return Ledger(home / LEDGERS / "phantoms.jsonl", "phantoms", None).charges()


# Waiting


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.room, "RETRY_S", 0.01)
    monkeypatch.setattr(server.cli, "RETRY_S", 0.01)


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


@pytest.mark.usefixtures("quick")
def test_a_step_is_taken_again_until_there_is_room_and_told_of_in_two_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with small_disk(tmp_path / "state", 8 * MB) as disk:
        room, steps = Room(disk.folder, threading.Event()), []

        def step() -> str:
            steps.append(1)
            replace_file(disk.folder / "book", bytes(2 * PAGE))
            return "done"

        result: list[str] = []
        disk.fill()
        thread = threading.Thread(target=lambda: result.append(room.wait_through(step)))
        thread.start()
        until(lambda: caplog.records)
        time.sleep(0.1)
        assert steps == []  # without room it is not even begun
        disk.empty()
        thread.join(SOON_S)
    assert (result, steps) == (["done"], [1])
    warned, again = (record.getMessage() for record in caplog.records)
    assert warned.startswith(f"{disk.folder}: the disk is full (0.0 MB free)")
    assert "until 4.2 MB are free; make room, this site then goes on by itself" in warned
    assert again.startswith(f"{disk.folder}: there is room again after")


@pytest.mark.usefixtures("quick")
def test_what_met_a_full_disk_half_way_is_done_again_from_its_beginning(tmp_path: Path) -> None:
    left = [no_room, no_room, lambda: "done"]

    def step() -> Any:
        return left.pop(0)()

    assert Room(tmp_path, threading.Event()).wait_through(step) == "done"
    assert left == []


def test_another_failure_is_nothing_to_wait_for(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        Room(tmp_path, threading.Event()).wait_through(fail)


@pytest.mark.usefixtures("quick")
def test_nobody_waits_longer_than_the_coordinator_does(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="until nobody waited for this answer any more"):
        Room(tmp_path, threading.Event()).wait_through(no_room, within_s=0.05)


@pytest.mark.usefixtures("quick")
def test_a_disk_that_stays_full_over_many_messages_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with small_disk(tmp_path / "state", 8 * MB) as disk:
        room = Room(disk.folder, threading.Event())
        disk.fill()
        for _ in range(3):
            with pytest.raises(DataError):
                room.wait_through(no_room, within_s=0.05)
        disk.empty()
        assert room.wait_through(lambda: "done") == "done"
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, logging.INFO]


def test_a_program_that_is_stopped_waits_no_more_and_answers_nothing(tmp_path: Path) -> None:
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(Stopped):
        Room(tmp_path, stopped).wait_through(no_room)
    assert not issubclass(Stopped, Exception)  # what catches every defect must not answer for it


def test_room_is_asked_for_a_whole_upload_before_a_training_begins(tmp_path: Path) -> None:
    began = []
    with small_disk(tmp_path / "state", 8 * MB) as disk:
        stopped = threading.Event()
        stopped.set()
        room = Room(disk.folder, stopped)
        room.wait_through(lambda: began.append("fits"), num_bytes=8 * MB - SPARE_BYTES)
        with pytest.raises(Stopped):
            room.wait_through(lambda: began.append("does not"), num_bytes=8 * MB)
    assert began == ["fits"]


# The coordinator


def study_file(folder: Path, table: dict[str, Any]) -> Path:
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps(table))
    return path


@pytest.fixture
def arguments(
    tmp_path: Path, tiny_study_table: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Of ``fl-server``, whose own file is not looked at here."""
    own = type("Own", (), {"state_dir": tmp_path / "state"})
    monkeypatch.setattr(server.cli, "start_logging", lambda _: None)
    study = load(study_file(tmp_path, tiny_study_table()), Study)
    return {"planned": study, "own": own, "run_dir": tmp_path / "run"}


def test_a_coordinator_whose_disk_is_full_says_where_and_what_goes_on(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = arguments["run_dir"] / "models"
    models.mkdir(parents=True)

    def coordinate(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(models / "round-1"))

    monkeypatch.setattr(server.deployed, "coordinate", coordinate)
    with pytest.raises(DiskFull) as ended:
        server.cli.serve(**arguments)
    told = str(ended.value)
    assert told.startswith(f"{models}: the disk is full (No space left on device; ")
    assert told.endswith(f"then fl-server --resume --run-dir {arguments['run_dir']} goes on")
    assert DiskFull.exit_code not in {0, 2}  # deploy/consilium-coordinator.service starts it again


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("which", ["run", "state"])
def test_a_coordinator_that_is_started_on_a_full_disk_waits(
    which: str,
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    began = []
    monkeypatch.setattr(server.deployed, "coordinate", lambda *_, **__: began.append(1) or {})
    monkeypatch.setattr("server.progress.print_summary", lambda *_: None)
    with small_disk(tmp_path / which, 16 * MB) as disk:
        disk.fill()
        thread = threading.Thread(target=server.cli.serve, kwargs=arguments)
        monkeypatch.setattr(server.cli.signal, "signal", lambda *_: None)  # not of this thread
        thread.start()
        until(lambda: "the disk is full" in caplog.text)
        assert began == []
        disk.empty()
        thread.join(SOON_S)
    assert began == [1]
    assert caplog.text.count("the disk is full") == caplog.text.count("room again") == 1


# Over TLS


@contextmanager
def moved_to_a_disk(folder: Path, num_bytes: int) -> Iterator[SmallDisk]:
    """What lies in a folder is on a disk of its own from now on."""
    before = folder.rename(folder.with_suffix(".before"))
    with small_disk(folder, num_bytes) as disk:
        shutil.copytree(before, folder, dirs_exist_ok=True)
        yield disk


def line_of(book: str, *words: str) -> Moment:
    return Moment(f"sites/site-1/state/{book}", words)


def filled_up(made: Consortium, disk: SmallDisk, num_times: int, leave: int = 0) -> None:
    """The site's disk is full for a while; it says so once, and goes on."""
    disk.fill(leave)
    log = partial(made.log, "site-1")
    until(lambda: log().count("the disk is full") == num_times)
    time.sleep(OUTAGE_S)
    disk.empty()
    until(lambda: log().count("there is room again") == num_times)
    assert log().count("the disk is full") == num_times


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    made = founded(tmp_path_factory.mktemp("undisturbed"))
    with running(made):
        start_all(made)
        return ended(made)


def ended(made: Consortium) -> Outcome:
    """What a run came to, in which nothing went wrong."""
    assert list(faults_until_the_end(made)) == [], made.log("coordinator")[-3000:]
    assert list(faults_of(made)) == []
    return Outcome.of(made)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_site_whose_disk_fills_up_again_and_again_changes_nothing(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    made = founded(tmp_path)
    task, charge, sent = '"received"', '"run"', '"sent"'
    moments = [
        (line_of("audit.jsonl", task, '"Invitation"'), 0),
        (line_of("audit.jsonl", task, '"RoundTask"', '"sum_number":0,'), 0),
        (line_of("ledgers/phantoms.jsonl", charge, '"sum":1,'), 0),
        (line_of("audit.jsonl", task, '"RoundTask"', '"sum_number":2,'), 4 * PAGE),
        (line_of("audit.jsonl", task, '"RoundTask"', '"sum_number":3,'), 12 * PAGE),
        (line_of("audit.jsonl", sent, '"Upload"', '"sum_number":4,'), 0),
        (line_of("audit.jsonl", task, '"Unmask"', '"sum_number":5,'), 0),
    ]
    with moved_to_a_disk(made.state("site-1"), 16 * MB) as disk, running(made):
        disk.fill()
        start_all(made)
        filled_up(made, disk, 1)
        for number, (moment, leave) in enumerate(moments):
            assert wait_until(made, moment)
            filled_up(made, disk, number + 2, leave)
        assert list(ended(made).differences(undisturbed)) == []
        made.stop()
        events = [line["event"] for line in json_lines(disk.folder / "audit.jsonl")]
        assert not {"refused", "repaired"} & set(events)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_coordinator_whose_disk_fills_up_ends_and_is_resumed_to_the_same_model(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    made = founded(tmp_path)
    moments = [
        Moment("run/audit.jsonl", ('"sent"', '"RoundTask"', '"site-4"', '"sum_number":1,')),
        Moment("run/audit.jsonl", ('"received"', '"Upload"', '"site-2"', '"sum_number":4,')),
    ]
    with small_disk(made.run_dir, 24 * MB) as disk, running(made):
        start_all(made)
        for number, moment in enumerate(moments):
            assert wait_until(made, moment)
            disk.fill()
            assert made.wait("coordinator") == DiskFull.exit_code
            told = made.log("coordinator")
            assert f"DiskFull: {made.run_dir}" in told
            assert f"fl-server --resume --run-dir {made.run_dir} goes on" in told
            start_again(made, "coordinator")
            until(lambda num=number: made.log("coordinator").count("waiting until") == num + 1)
            disk.empty()
        assert list(ended(made).differences(undisturbed)) == []
