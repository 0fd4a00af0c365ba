"""Malformed messages at the doors of both sides: nothing comes out but a refusal, nothing gets in.

``FUZZ_MESSAGES`` says how many (a full run: 100000), ``FUZZ_SEED`` which, and ``FUZZ_CASE`` repeats
one case of a seed. With ``-s`` each test says how fast it went and how deep the refusals lie.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from doors import Door, doors_of_coordinator, doors_of_site
from flwr.app import Array, RecordDict
from mutate import (
    Draw,
    Forger,
    Material,
    changed_bytes,
    changed_parts,
    changed_text,
    damaged_records,
)
from recorded import Recording, recorded

from client import unmasking
from client.session import Session
from common import identity, signing, wire
from common.errors import RemoteProtocolError
from common.identity import check_certificate, read_certified, read_revocation_list
from common.manifest import Manifest
from common.messages import FromCoordinator, Message, Reason, Refusal
from common.secagg import header
from common.secagg.encoding import decode, encode
from common.secagg.header import Header
from common.statement import Statement
from server import collected

NUM_MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "5000"))
USUAL_SEED = "20240607"
SEED = os.environ.get("FUZZ_SEED", USUAL_SEED)
ONLY_CASE = os.environ.get("FUZZ_CASE")
SHARE = {"site": 0.45, "coordinator": 0.35, "records": 0.1, "parts": 0.1}
MANY_FAULTS = 30  # different ones; then it stops

pytestmark = [
    pytest.mark.timeout(300 + NUM_MESSAGES // 20),
    # The library says this of some numbers that it reads in malformed certificates.
    pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning"),
]


@dataclass
class Tally:
    """What became of the messages of one test."""

    group: str
    refused: int = 0
    signed: int = 0  # of those, by their sender, after they were changed
    passed: int = 0  # legitimate after all: see support/permitted.py
    rules: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    thrown: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)  # what, and each case of it

    def blame(self, what: str, case: str) -> None:
        self.faults.setdefault(what, []).append(case)

    def table(self) -> str:
        """How many, how fast, and by which rule."""
        rules = ", ".join(f"{rule or 'form'} {n}" for rule, n in sorted(self.rules.items()))
        counts = f"{self.refused} refused, {self.signed} of them signed; {self.passed} legitimate"
        lines = [f"{self.group}: {counts}", f"  {rules}"]
        for title, number in sorted(self.thrown.items()):
            lines.append(f"  {number / self.seconds[title]:7.0f}/s {number:7d}  {title}")
        return "\n".join(lines)

    def report(self) -> str:
        """Each fault with its first case."""
        lines = [f"{len(self.faults)} faults; FUZZ_SEED={SEED} FUZZ_CASE=<number> repeats one"]
        for what, cases in self.faults.items():
            lines += [f"* {what}", f"    {len(cases)} cases, the first: {cases[0]}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Attempt:
    """One message to be thrown."""

    title: str  # where it goes
    notes: str  # what was done to it
    act: Callable[[], None]  # ends with RemoteProtocolError where the message is refused
    passed: Callable[[], Sequence[str]]  # after it got in: what is wrong with it
    is_signed: bool = False
    door: Door | None = None


AttemptOf = Callable[[Draw], Attempt]


def throw(group: str, attempt_of: AttemptOf, *, messages: int) -> Tally:
    """Draw and throw until so many messages were refused.

    Legitimate messages are not counted: a change may be one that the sender is free to make.
    """
    tally, number = Tally(group), -1
    while tally.refused < messages and len(tally.faults) < MANY_FAULTS:
        number = int(ONLY_CASE) if ONLY_CASE else number + 1
        started = time.perf_counter()
        attempt = attempt_of(Draw(f"{SEED}/{group}/{number}"))
        case = f"case {number}: {attempt.title}: {attempt.notes}"
        if ONLY_CASE:
            sys.stdout.write(f"\n{case}\n")
        _try(attempt, tally, case)
        tally.thrown[attempt.title] += 1
        tally.seconds[attempt.title] += time.perf_counter() - started
        if ONLY_CASE:
            break
    sys.stdout.write(f"\n{tally.table()}\n")
    return tally


def _try(attempt: Attempt, tally: Tally, case: str) -> None:
    before = attempt.door.state() if attempt.door else None
    try:
        attempt.act()
    except RemoteProtocolError as error:
        tally.refused += 1
        tally.signed += attempt.is_signed
        tally.rules[error.rule] += 1
        if attempt.door and attempt.door.state() != before:
            tally.blame(f"{attempt.title}: a refusal changed what was kept", case)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if ONLY_CASE:
            raise
        tally.blame(f"{type(error).__name__} at {_place(error)}", f"{case}: {str(error)[:200]}")
    else:
        tally.passed += 1
        if wrong := attempt.passed():
            tally.blame(f"accepted with {', '.join(sorted(set(wrong)))}", case)
    if attempt.door:
        attempt.door.restore()


def _place(error: BaseException) -> str:
    """The last line of this project's own code, as every crash comes from there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [at for at in frames if ".venv" not in at.filename and at.filename != __file__]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "a library"


@pytest.fixture(scope="module")
def recording() -> Iterator[Recording]:
    with recorded() as found:
        yield found


@pytest.fixture(scope="module")
def forger(recording: Recording) -> Forger:
    refusals = [Refusal(recording.epoch.run.hex(), Reason.BUSY)]
    return Forger(Material([*recording.messages(), *refusals], recording.odd))


@pytest.fixture(scope="module")
def doors(recording: Recording) -> dict[str, list[Door]]:
    return {
        "site": doors_of_site(recording),
        "coordinator": doors_of_coordinator(recording),
    }


def attempts_at(doors: Sequence[Door], forger: Forger, others: Sequence[Message]) -> AttemptOf:
    """Change the message that is due, or any other, and deliver it as Flower would."""
    kinds: dict[type, list[Message]] = {}
    for message in others:
        kinds.setdefault(type(message), []).append(message)

    def attempt_of(draw: Draw) -> Attempt:
        door = draw.pick(doors)
        other = draw.pick(kinds[draw.pick(list(kinds))])
        base = draw.pick((*[door.due] * 6, *[door.before] * 2, other, other))
        while True:
            forged = forger.change(draw, base)
            if draw.chance(0.86):
                door.hostile.sign(forged, deep=draw.chance(0.6))
            if records := forged.records():
                break
        arrived: list[Message] = []

        def act() -> None:
            message = wire.unpack(records)
            arrived.append(message)
            door.deliver(message)

        notes = f"{type(base).__name__}: {', '.join(forged.notes)}"
        return Attempt(
            door.title,
            notes,
            act,
            lambda: door.unforeseen(arrived[0]),
            is_signed=forged.is_signed,
            door=door,
        )

    return attempt_of


@pytest.mark.parametrize("group", ["site", "coordinator"])
def test_a_malformed_message_is_refused_and_changes_nothing(
    group: str, doors: dict[str, list[Door]], forger: Forger, recording: Recording
) -> None:
    attempt_of = attempts_at(doors[group], forger, recording.messages())
    tally = throw(group, attempt_of, messages=int(NUM_MESSAGES * SHARE[group]))
    assert not tally.faults, tally.report()
    if not ONLY_CASE and NUM_MESSAGES >= 5000:
        assert tally.signed > 0.625 * tally.refused  # half of all, with those that nobody signs
        assert deep_rules(group) <= set(tally.rules)


def deep_rules(group: str) -> set[str]:
    """Rules that only a message with good signatures reaches; R6 is about the site's own disk."""
    if group == "site":
        return {f"R{k}" for k in range(1, 15)} - {"R6"}
    return {"R3", "R4", "R7", "R8", "R11", "R12", "R13"}


def accept_any_signature(patch: pytest.MonkeyPatch) -> None:
    for module in (identity, signing, header):
        patch.setattr(module, "check_signature", lambda *_: True)


def check_no_view(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(unmasking, "check_view", lambda view, **_: dict.fromkeys(view.survivors))


def write_before_checking(patch: pytest.MonkeyPatch) -> None:
    check = Session.check_sender

    def write(session: Session, message: FromCoordinator) -> None:
        session.journal.go_on(session.epoch)
        check(session, message)

    patch.setattr(Session, "check_sender", write)


def take_any_upload(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collected, "_check", lambda site, reply, *_, **__: reply)


@pytest.mark.skipif(bool(ONLY_CASE), reason="one case is repeated")
@pytest.mark.parametrize(
    ("group", "plant", "found"),
    [
        ("site", accept_any_signature, "signature"),
        ("coordinator", accept_any_signature, "signature"),
        ("site", check_no_view, "AttributeError at"),
        ("site", write_before_checking, "a refusal changed what was kept"),
        ("coordinator", take_any_upload, "Error at"),
    ],
)
def test_a_planted_hole_is_found(
    group: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    found: str,
    doors: dict[str, list[Door]],
    forger: Forger,
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "SEED", USUAL_SEED)  # with any seed 300 may miss it
    plant(monkeypatch)
    tally = throw(group, attempts_at(doors[group], forger, recording.messages()), messages=300)
    assert any(found in fault for fault in tally.faults)


def test_records_that_are_no_message_are_refused(forger: Forger, recording: Recording) -> None:
    said = recording.messages()

    def attempt_of(draw: Draw) -> Attempt:
        while True:
            forged = forger.change(draw, draw.pick(said))
            if records := forged.records():
                break
        if draw.chance(0.3):
            records = damaged_records(draw, records)
        read: list[Message] = []
        return Attempt(
            "records",
            ", ".join(forged.notes),
            lambda: read.append(wire.unpack(records)),
            lambda: [] if written(wire.pack(read[0])) == written(records) else ["other content"],
        )

    tally = throw("records", attempt_of, messages=int(NUM_MESSAGES * SHARE["records"]))
    assert not tally.faults, tally.report()


def written(records: RecordDict) -> dict[str, str]:
    """What stands in records, types included."""
    return {
        f"{part}.{name}": repr((type(value), *_parts_of(value)))
        for part, record in records.items()
        for name, value in record.items()
    }


def _parts_of(value: object) -> tuple[object, ...]:
    """What is equal in equal values: the bytes of an array, in whatever memory they lie."""
    if not isinstance(value, Array):
        return (value,)
    return (value.dtype, value.shape, value.stype, bytes(value.data))


def test_a_malformed_part_is_refused_or_read_as_what_it_is(recording: Recording) -> None:
    parts = parts_of(recording)

    def attempt_of(draw: Draw) -> Attempt:
        title = draw.pick(list(parts))
        change, contents, read, wrong = parts[title]
        content = change(draw, draw.pick(contents))
        if draw.chance(0.2):
            content = change(draw, content)
        found: list[Any] = []
        return Attempt(
            title,
            repr(content[:300]),
            lambda: found.append(read(content)),
            lambda: [title] if wrong(found[0], content) else [],
        )

    tally = throw("parts", attempt_of, messages=int(NUM_MESSAGES * SHARE["parts"]))
    assert not tally.faults, tally.report()


Part = tuple[
    Callable[[Draw, Any], Any],  # changes
    Sequence[Any],  # what is changed
    Callable[[Any], Any],  # reads
    Callable[[Any, Any], bool],  # whether what was read is unlike what came
]


def parts_of(recording: Recording) -> dict[str, Part]:
    """The decoders inside messages."""
    said, now = recording.messages(), recording.now
    trust = recording.credentials.trust
    headers = [one.header for one in said if hasattr(one, "header")]
    statements = [one.statement for one in said if hasattr(one, "statement")]
    certificates = {one for good in recording.good_certificates.values() for one in good}
    certificates |= set(recording.odd["certificate"])  # some of them the CA's, for somebody else
    lists = recording.good_lists | set(recording.odd["revoked"])
    revoked = read_revocation_list(recording.credentials.revoked(), trust.ca, now)
    return {
        "encoded list": (
            changed_parts,
            headers,
            decode,
            lambda parts, content: encode(*parts) != content,
        ),
        "header": (
            changed_parts,
            headers,
            Header.decode,
            lambda header, content: header.encode() != content,
        ),
        "manifest": (
            changed_text,
            [recording.manifest.canonical()],
            Manifest.parse,
            lambda manifest, text: manifest.canonical() != text,
        ),
        "statement": (
            changed_text,
            statements,
            Statement.parse,
            lambda found, text: numbers_of(found.model_dump_json()) != numbers_of(text),
        ),
        "certificate": (
            changed_bytes,
            sorted(certificates),
            lambda content: check_certificate(content, trust.ca, revoked, now),
            lambda _, content: content not in certificates,
        ),
        "certificate, form alone": (
            changed_bytes,
            sorted(certificates),
            read_certified,
            lambda *_: False,
        ),
        "revocation list": (
            changed_bytes,
            sorted(lists),
            lambda content: read_revocation_list(content, trust.ca, now),
            lambda _, content: content not in lists,
        ),
    }


def numbers_of(text: str) -> Any:
    """JSON with every number as a fraction: a statement says epsilon 8 as it says 8.0."""
    return json.loads(text, parse_int=float)
