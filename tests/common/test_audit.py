"""The audit log: what was written stays as it was, or somebody can tell."""

import fcntl
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import audit
from common.audit import GENESIS, AuditLog, Verified, verify
from common.errors import DataError, LocalProtocolError
from common.secagg.encoding import digest

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
NUM_LINES = 6

names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True).filter(
    lambda name: name not in {"n", "time", "event", "prev", "hash", "self"}
)
values = st.text(max_size=1000) | st.integers(-(1 << 63), (1 << 63) - 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path: Path) -> AuditLog:
    return _log(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that every example of a property writes anew."""
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The lines of an intact log."""
    return _filled(tmp_path_factory.mktemp("intact") / "audit.jsonl")


def _log(path: Path) -> AuditLog:
    return AuditLog(path, lambda: NOON)


def _filled(path: Path) -> list[bytes]:
    log = _log(path)
    for number in range(NUM_LINES):
        log.append("received", type="RoundTask", bytes=44_000_000 + number, peer="coordinator")
    return path.read_bytes().splitlines(keepends=True)


def _following(line: bytes, event: str) -> bytes:
    """A line that whoever knows this file could put after ``line``, with hashes that fit."""
    entry = json.loads(line)
    body = {"n": entry["n"] + 1, "time": entry["time"], "event": event, "prev": entry["hash"]}
    return _with_hash(body)


def _with_hash(body: dict[str, str | int]) -> bytes:
    text = json.dumps(body, separators=(",", ":"))
    stated = digest("audit line", bytes.fromhex(str(body["prev"])), text).hex()
    return f'{text[:-1]},"hash":"{stated}"}}\n'.encode()


def _refused(path: Path, content: bytes, *, reason: str = "audit log .*line [0-9]+: ") -> str:
    """The message with which ``verify`` refuses this content."""
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as refusal:
        verify(path)
    return str(refusal.value)


def test_a_line_is_json_that_anybody_can_check_without_this_program(log, path):
    first = log.append("received", type="RoundTask", bytes=12, digest="ab" * 32, peer="troms\u00f8")
    second = log.append("refused", rule="R5", reason='sum 3 came "twice"\n')
    one, two = path.read_text("ascii").splitlines()
    assert json.loads(one) == {
        "n": 1,
        "time": "2026-11-21T12:00:00+00:00",
        "event": "received",
        "type": "RoundTask",
        "bytes": 12,
        "digest": "ab" * 32,
        "peer": "troms\u00f8",
        "prev": GENESIS,
        "hash": first,
    }
    assert json.loads(two)["prev"] == first
    assert json.loads(two)["hash"] == second
    # The hash, from nothing but hashlib: lengths and parts, then SHA-256.
    parts = (
        b"msum1/audit line",
        bytes.fromhex(first),
        re.sub(r',"hash":"[0-9a-f]{64}"\}$', "}", two).encode(),
    )
    encoded = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    assert hashlib.sha256(encoded).hexdigest() == second


def test_times_are_written_in_utc_and_may_step_back(path):
    clock = iter([NOON.astimezone(timezone(timedelta(hours=2))), NOON - timedelta(hours=1)])
    log = AuditLog(path, lambda: next(clock))
    log.append("started")
    head = log.append("stopped")
    expected = Verified(2, head, "2026-11-21T12:00:00+00:00", "2026-11-21T11:00:00+00:00")
    assert verify(path) == expected


def test_nothing_is_opened_before_the_first_line(tmp_path):
    path = tmp_path / "state" / "audit.jsonl"
    log = _log(path)
    assert (log.head(), log.holds(GENESIS), log.holds("5" * 64)) == (GENESIS, True, False)
    assert not path.parent.exists()
    log.append("started")
    assert verify(path).num_lines == 1


def test_an_empty_log_is_intact_and_a_missing_one_is_not(path):
    with pytest.raises(DataError, match=r"no audit log .*audit\.jsonl.* restore it"):
        verify(path)
    path.touch()
    assert verify(path) == Verified(0, GENESIS, None, None)


@pytest.mark.parametrize("mode", [None, 0o644], ids=["a new file", "a file that was opened up"])
def test_the_file_is_this_users_alone(log, path, mode):
    if mode is not None:
        path.touch()
        path.chmod(mode)
    log.append("started")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_head_that_there_was_is_held_and_no_other(log):
    heads = [log.append("sent", number=number) for number in range(5)]
    assert log.head() == heads[-1]
    assert all(log.holds(head) for head in [GENESIS, *heads])
    assert not log.holds("5" * 64)
    assert not log.holds(heads[2].upper())


def test_a_log_is_continued_by_the_next_process(log, path):
    log.append("started")
    head = _log(path).append("stopped")
    assert log.head() == head
    assert verify(path).num_lines == 2


@given(st.lists(st.tuples(values.map(str), st.dictionaries(names, values, max_size=4)), max_size=4))
def test_any_facts_make_an_intact_log_and_are_read_back(scratch, events):
    scratch.unlink(missing_ok=True)
    scratch.touch()
    log = _log(scratch)
    heads = [log.append(event, **facts) for event, facts in events]
    assert verify(scratch).num_lines == len(events)
    assert verify(scratch).head == log.head() == (heads or [GENESIS])[-1]
    for line, (event, facts) in zip(scratch.read_bytes().splitlines(), events, strict=True):
        entry = json.loads(line)
        assert [entry.pop(key) for key in ("event", "time")] == [event, NOON.isoformat()]
        assert {key: entry[key] for key in entry if key not in {"n", "prev", "hash"}} == facts


@given(st.data())
def test_any_changed_byte_is_found_in_the_line_that_it_is_in(scratch, lines, data):
    content = bytearray(b"".join(lines))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    number = 1 + b"".join(lines).count(b"\n", 0, place)
    assert f"audit.jsonl, line {number}: " in _refused(scratch, bytes(content))


def test_every_single_byte_counts(scratch, lines):
    content = b"".join(lines)
    for place, byte in enumerate(content):
        changed = bytes([byte ^ 1])
        _refused(scratch, content[:place] + changed + content[place + 1 :])


@given(st.data())
def test_any_byte_that_was_put_in_or_taken_out_is_found(scratch, lines, data):
    content = b"".join(lines)
    place = data.draw(st.integers(0, len(content) - 1))
    added = data.draw(st.binary(min_size=1, max_size=3))
    _refused(scratch, content[:place] + content[place + 1 :])
    _refused(scratch, content[:place] + added + content[place:])
    _refused(scratch, content + added)


@pytest.mark.parametrize("gone", range(NUM_LINES - 1))
def test_a_removed_line_is_found_where_it_is_missing(scratch, lines, gone):
    message = _refused(scratch, b"".join(lines[:gone] + lines[gone + 1 :]))
    assert f"line {gone + 1}: it carries number {gone + 2}: lines were removed" in message


@given(st.permutations(range(NUM_LINES)).filter(lambda order: order != sorted(order)))
def test_any_other_order_is_found_at_the_first_line_out_of_place(scratch, lines, order):
    first = next(place for place, line in enumerate(order) if place != line)
    message = _refused(scratch, b"".join(lines[line] for line in order))
    assert f"line {first + 1}: it carries number {order[first] + 1}: " in message


@given(place=st.integers(0, NUM_LINES), copied=st.integers(0, NUM_LINES - 1))
def test_a_copied_line_is_found_wherever_it_is_put(scratch, lines, place, copied):
    _refused(scratch, b"".join([*lines[:place], lines[copied], *lines[place:]]))


@pytest.mark.parametrize("place", range(1, NUM_LINES))
def test_a_line_whose_own_hash_fits_is_found_by_the_line_after_it(scratch, lines, place):
    forged = _following(lines[place - 1], "decided")
    put_in = b"".join([*lines[:place], forged, *lines[place:]])
    assert f"line {place + 2}: it carries number {place + 1}" in _refused(scratch, put_in)
    if place + 1 < NUM_LINES:
        exchanged = b"".join([*lines[:place], forged, *lines[place + 1 :]])
        message = _refused(scratch, exchanged)
        assert f"line {place + 2}: it does not follow from the line before" in message


def test_a_log_that_does_not_begin_at_the_beginning_is_refused(scratch, lines):
    body = json.loads(lines[0])
    del body["hash"]
    assert _with_hash(body) == lines[0]
    _refused(scratch, _with_hash(body | {"prev": "5" * 64}), reason="line 1: it does not follow")
    _refused(scratch, _with_hash(body | {"n": 2}), reason="line 1: it carries number 2")


def test_a_message_names_the_file_what_is_wrong_and_the_next_move(scratch, lines):
    changed = b"".join(lines).replace(b"44000003", b"44000013")
    assert _refused(scratch, changed) == (
        f"audit log {scratch}, line 4: its hash does not fit: it was changed; keep the file as it "
        "is and compare it with its backup and with the last signed statement"
    )


@pytest.mark.parametrize("kept", range(NUM_LINES))
def test_lines_cut_off_the_end_are_found_by_a_head_that_was_stated(scratch, lines, kept):
    heads = [json.loads(line)["hash"] for line in lines]
    scratch.write_bytes(b"".join(lines[:kept]))
    assert verify(scratch).num_lines == kept  # the chain alone does not tell
    log = _log(scratch)
    assert [log.holds(head) for head in heads] == [place < kept for place in range(NUM_LINES)]
    log.append("started")  # nor does going on bring the head back
    assert [log.holds(head) for head in heads] == [place < kept for place in range(NUM_LINES)]


def test_a_log_that_was_written_anew_holds_no_head_of_the_old_one(log, path):
    old = [log.append("decided", rule="largest-epsilon", value=9) for _ in range(3)]
    path.unlink()
    for _ in range(4):
        log.append("decided", rule="largest-epsilon", value=2)
    assert verify(path).num_lines == 4
    assert not any(log.holds(head) for head in old)


def test_a_head_is_not_held_because_its_digits_stand_in_some_line(log, path, lines):
    wanted = json.loads(lines[0])["hash"]
    path.write_bytes(lines[0].replace(b"44000000", b"44000001"))
    with pytest.raises(DataError, match="line 1: its hash does not fit"):
        log.holds(wanted)
    path.unlink()
    log.append("received", digest=wanted)
    assert not log.holds(wanted)


@pytest.mark.parametrize(
    ("place", "reason"),
    [(3, "its hash does not fit"), (-3, "not a line as this log writes them")],
    ids=["its content", "its form"],
)
def test_nothing_is_appended_after_a_changed_last_line(log, path, lines, place, reason):
    last = bytearray(lines[-1])
    last[last.index(b"4400") if place > 0 else place] ^= 1
    content = b"".join(lines[:-1]) + bytes(last)
    path.write_bytes(content)
    for step in (lambda: log.append("started"), log.head):
        with pytest.raises(DataError, match=rf"last line: .*{reason}.*keep.*run `audit verify`"):
            step()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "tail",
    [b"x" * audit.MAX_LINE_BYTES, b"x" * (3 * audit.MAX_LINE_BYTES), b"x" * 200_000 + b"\n", b"\n"],
    ids=["a line's bound", "more than is read", "more than is read, ended", "an empty line"],
)
@pytest.mark.parametrize("num_lines", [0, NUM_LINES])
def test_what_no_crash_leaves_is_refused_and_not_cut(log, path, lines, tail, num_lines):
    content = b"".join(lines[:num_lines]) + tail
    message = _refused(path, content)
    assert f"line {num_lines + 1}: it is not a line as this log writes them" in message
    with pytest.raises(DataError, match="last line"):
        log.append("started")
    assert path.read_bytes() == content


def test_a_line_over_the_bound_is_refused_though_its_own_hash_fits(log, path, lines):
    for size, fits in ((audit.MAX_LINE_BYTES, True), (audit.MAX_LINE_BYTES + 1, False)):
        added = _following(lines[-1], "x" * (size - len(_following(lines[-1], ""))))
        assert len(added) == size
        path.write_bytes(b"".join([*lines, added]))
        for step in (lambda: verify(path), log.head, lambda: log.append("started")):
            if fits:
                step()
            else:
                with pytest.raises(DataError, match="not a line as this log writes them"):
                    step()


def test_a_line_is_flushed_to_disk_before_its_head_is_given_away(log, path, monkeypatch):
    flushed = []

    def watched(descriptor: int) -> None:
        status = os.fstat(descriptor)
        flushed.append((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fsync", watched)
    log.append("started")
    file, *folders = flushed
    assert file == (path.stat().st_ino, path.stat().st_size)
    assert [number for number, _ in folders] == [path.parent.stat().st_ino]  # the file's name
    log.append("stopped")
    assert flushed[2:] == [(path.stat().st_ino, path.stat().st_size)]


def test_a_reader_waits_until_a_line_that_is_being_written_is_whole(log, path, lines):
    path.write_bytes(b"".join(lines[:-1]))
    wanted = json.loads(lines[-1])["hash"]
    with ThreadPoolExecutor() as pool, path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(lines[-1][:50])
        reading = [pool.submit(verify, path), pool.submit(log.holds, wanted), pool.submit(log.head)]
        assert not wait(reading, timeout=0.2).done
        file.write(lines[-1][50:])
        fcntl.flock(file, fcntl.LOCK_UN)
        verified, held, head = (future.result(timeout=60) for future in reading)
    assert (verified.num_lines, verified.head, held, head) == (NUM_LINES, wanted, True, wanted)


def test_a_write_torn_anywhere_is_reported_then_cut_off_and_recorded(log, path, lines):
    intact, whole = b"".join(lines[:-1]), lines[-1]
    for size in range(1, len(whole)):
        torn = whole[:size]
        message = _refused(path, intact + torn)
        assert f"line {NUM_LINES}: the last line is torn ({size} bytes" in message
        assert "start the program again" in message
        assert log.head() == json.loads(lines[-2])["hash"]
        assert log.holds(log.head())
        assert not log.holds("5" * 64)

        head = log.append("started")

        assert verify(path).head == head
        content = path.read_bytes()
        assert content.startswith(intact)
        repaired, started = map(json.loads, content[len(intact) :].splitlines())
        assert (repaired["event"], started["event"]) == ("repaired", "started")
        assert (repaired["bytes"], repaired["sha256"]) == (size, hashlib.sha256(torn).hexdigest())


def test_a_torn_first_line_is_repaired_too(log, path):
    path.write_bytes(b'{"n":1,"ti')
    assert log.head() == GENESIS
    log.append("started")
    assert verify(path).num_lines == 2
    assert json.loads(path.read_bytes().splitlines()[0])["event"] == "repaired"


FULL_DISK = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from common.audit import AuditLog
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY))
try:
    AuditLog(path, lambda: datetime.now(UTC)).append("sent", type="Upload")
except OSError:
    sys.exit(42)
"""


@pytest.mark.parametrize("torn", [b"", b'{"n":2,"ti'])
def test_a_disk_that_fills_up_in_a_line_leaves_the_log_as_it_was(log, path, torn):
    log.append("started")
    before = path.read_bytes() + torn
    path.write_bytes(before)
    full = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], check=False)
    assert full.returncode == 42
    assert path.read_bytes() == before
    log.append("stopped")
    events = [json.loads(line)["event"] for line in path.read_bytes().splitlines()]
    assert events == ["started", *(["repaired"] if torn else []), "stopped"]
    assert verify(path).num_lines == len(events)


APPEND_MANY = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from common.audit import AuditLog
log = AuditLog(Path(sys.argv[1]), lambda: datetime.now(UTC))
print("ready", flush=True)
sys.stdin.readline()
for number in range(200):
    log.append("sent", peer=sys.argv[2], number=number)
"""


def test_two_processes_that_append_at_once_write_one_chain(log, path):
    path.write_bytes(b'{"n":1,"ti')  # and one of them repairs
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", APPEND_MANY, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        if log.head() != GENESIS:
            verify(path)  # a reader never sees half a line
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    entries = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert verify(path).num_lines == len(entries) == 401
    for name in ("one", "two"):
        numbers = [entry["number"] for entry in entries if entry.get("peer") == name]
        assert numbers == list(range(200))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"reason": "x" * 1001}, "'reason' of the audit log has 1001 characters, at most 1000"),
        ({f"fact_{n}": "x" * 1000 for n in range(66)}, "at most 65024 make a line"),
        ({"prev": "0" * 64}, "a fact is named 'prev'"),
        ({"hash": "0" * 64}, "a fact is named 'hash'"),
        ({"n": 1}, "a fact is named 'n'"),
        ({"time": "noon"}, "a fact is named 'time'"),
    ],
    ids=["too long a value", "too many facts", "prev", "hash", "n", "time"],
)
def test_what_does_not_make_a_line_is_our_own_mistake_and_writes_nothing(log, path, facts, reason):
    with pytest.raises(LocalProtocolError, match=re.escape(reason)):
        log.append("refused", **facts)
    assert not path.exists()


def test_the_longest_line_there_can_be_is_written_torn_and_repaired(log, path):
    facts = {f"fact_{n}": "\U0001f40d" * 1000 for n in range(5)}  # 12 bytes each in JSON
    facts["last"] = "x" * 1000
    room = audit.MAX_FACTS_BYTES - len(json.dumps(["sent", facts]))
    facts |= {f"more_{n}": "x" * 900 for n in range(room // 1000)}
    head = log.append("sent", **facts)
    longest = path.read_bytes()
    assert audit.MAX_LINE_BYTES - 2000 < len(longest) <= audit.MAX_LINE_BYTES
    path.write_bytes(longest + longest[:-1])
    assert log.head() == head
    log.append("sent", **facts)
    log.append("stopped")
    assert verify(path).num_lines == 4


def _median_s(append: Callable[[], object]) -> float:
    """The usual time of one append, in seconds; the first flushes what the test wrote."""
    append()
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        append()
        times.append(time.perf_counter() - begin)
    return median(times)


def test_a_log_of_a_million_lines_is_appended_to_as_fast_as_one_of_ten(tmp_path):
    short, long = _log(tmp_path / "short.jsonl"), _log(tmp_path / "long.jsonl")
    head = [short.append("sent", type="Upload", round=number) for number in range(10)][-1]
    line = (tmp_path / "short.jsonl").read_bytes().splitlines(keepends=True)[-1]
    with (tmp_path / "long.jsonl").open("wb") as file:
        for _ in range(100):
            file.write(line * 10_000)
    try:
        assert long.head() == head  # nothing but the last line counts for appending
        assert _median_s(lambda: long.append("sent")) < 5 * _median_s(lambda: short.append("sent"))
    finally:
        (tmp_path / "long.jsonl").unlink()  # 230 MB
