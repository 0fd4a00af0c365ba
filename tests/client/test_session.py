"""A sum is answered once: what is said was on disk before, and is said again bit for bit."""

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.journal import Journal
from client.session import Session, digest_of
from common.errors import LocalProtocolError, RemoteProtocolError
from common.manifest import Manifest
from common.messages import Purpose, RoundTask, Upload
from common.quantize import Ring
from common.secagg.masking import unmask, unpack
from common.update import QuantizedUpdate

NUM_PARAMS, NUM_TENSORS, NUM_SUMS = 6, 2, 9
MANIFEST = Manifest(
    epoch=1,
    study="a" * 64,
    members=("site-1", "site-2", "site-3"),
    num_sums=NUM_SUMS,
    num_params=NUM_PARAMS,
    num_tail=5,
    schema_digest="b" * 64,
    first_model="c" * 64,
    exponents=(-10, -10),
    ring_bits=24,
    weight_cap=100,
    code="0.1.0",
    nonce="d" * 32,
)
TASK = RoundTask(
    run=MANIFEST.digest(),
    sum_number=0,
    round_number=1,
    purpose=Purpose.TRAIN,
    exponents=(-10, -10),
    model=np.linspace(-1, 1, NUM_PARAMS, dtype=np.float32),
)
UPDATE = QuantizedUpdate(
    np.array([0, 1, -1, 5, -300, 8_000], np.int32), np.array([12, 0, 1, -7, 9], np.int64)
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def open_journal(path: Path) -> Callable[[], Journal]:
    return lambda: Journal(path)


@pytest.fixture
def session(open_journal: Callable[[], Journal]) -> Session:
    return Session.begin(MANIFEST, open_journal())


def task(sum_number: int = 0, **changes: Any) -> RoundTask:
    return replace(TASK, sum_number=sum_number, **changes)


def answer(session: Session, asked: RoundTask, update: QuantizedUpdate = UPDATE) -> Upload:
    assert session.accept(asked) is None
    return session.mask(update)


def same(one: Upload, other: Upload) -> bool:
    return (one.run, one.sum_number, one.body.tobytes(), one.tail.tobytes()) == (
        other.run,
        other.sum_number,
        other.body.tobytes(),
        other.tail.tobytes(),
    )


def test_an_upload_holds_the_packed_update_and_the_tail(session: Session) -> None:
    upload = answer(session, task())
    assert (upload.run, upload.sum_number) == (MANIFEST.digest(), 0)
    assert (upload.body.dtype, upload.body.size) == (np.uint8, NUM_PARAMS * 3)
    residues = unpack(upload.body, bits=24)
    assert unmask(residues, bits=24).tolist() == UPDATE.values.tolist()
    assert upload.tail.view(np.int64).tolist() == UPDATE.tail.tolist()


def test_a_task_that_was_answered_gets_the_stored_bytes_again(session: Session) -> None:
    first = answer(session, task())
    for _ in range(2):
        again = session.accept(task())
        assert again is not None
        assert same(again, first)


def test_the_stored_bytes_survive_a_restart(
    session: Session, open_journal: Callable[[], Journal]
) -> None:
    first = answer(session, task(3))
    reopened = Session.current(open_journal())
    assert reopened.manifest == MANIFEST
    again = reopened.accept(task(3))
    assert again is not None
    assert same(again, first)
    assert again.body.dtype == np.uint8
    assert again.tail.dtype == np.uint64


def test_an_answer_without_an_update_is_stored_too(
    session: Session, open_journal: Callable[[], Journal]
) -> None:
    counts = QuantizedUpdate(np.empty(0, np.int32), UPDATE.tail)
    asked = task(purpose=Purpose.VALIDATE)
    first = answer(session, asked, counts)
    assert first.body.shape == (0,)
    again = Session.current(open_journal()).accept(asked)
    assert again is not None
    assert same(again, first)


OTHER_CONTENT = {
    "another model": {"model": TASK.model + 1},
    "one bit of the model": {"model": np.nextafter(TASK.model, np.float32(9))},
    "another purpose": {"purpose": Purpose.TEST},
    "another round": {"round_number": 2},
    "other exponents": {"exponents": (-10, -9)},
}


@pytest.mark.parametrize("title", OTHER_CONTENT)
def test_another_task_with_an_answered_number_is_refused(title: str, session: Session) -> None:
    first = answer(session, task(4))
    with pytest.raises(RemoteProtocolError, match="sum 4: sums after 4 and before 9 are due"):
        session.accept(task(4, **OTHER_CONTENT[title]))
    with pytest.raises(LocalProtocolError):
        session.mask(UPDATE)  # nothing was accepted
    again = session.accept(task(4))
    assert again is not None
    assert same(again, first)


def test_older_numbers_are_refused_also_after_a_restart(
    session: Session, open_journal: Callable[[], Journal]
) -> None:
    for sum_number in (0, 2, 5):
        answer(session, task(sum_number))
    for again in (session, Session.current(open_journal())):
        for sum_number in (0, 2, 3, 4):
            with pytest.raises(RemoteProtocolError, match="sums after 5"):
                again.accept(task(sum_number))
        assert again.accept(task(6)) is None


@pytest.mark.parametrize("sum_number", [-1, -(2**62), NUM_SUMS, 2**62])
def test_numbers_outside_the_manifest_are_refused(sum_number: int, session: Session) -> None:
    with pytest.raises(RemoteProtocolError, match="are due"):
        session.accept(task(sum_number))


WRONG_TASKS = {
    "another run": ({"run": "e" * 64}, "task of another run"),
    "no run": ({"run": ""}, "task of another run"),
    "a shorter model": ({"model": TASK.model[1:]}, "model has 5 parameters, the manifest 6"),
    "an empty model": ({"model": TASK.model[:0]}, "model has 0 parameters"),
    "a model of another form": ({"model": TASK.model.reshape(2, 3)}, "the manifest 6"),
    "too few exponents": ({"exponents": (-10,)}, "1 exponents, the manifest has 2"),
    "no exponents": ({"exponents": ()}, "0 exponents"),
}


@pytest.mark.parametrize("title", WRONG_TASKS)
def test_a_task_that_does_not_fit_the_manifest_is_refused(title: str, session: Session) -> None:
    changes, sentence = WRONG_TASKS[title]
    with pytest.raises(RemoteProtocolError, match=sentence):
        session.accept(task(**changes))
    assert session.accept(task()) is None  # a refusal spends no number


def test_masking_without_an_accepted_task_is_our_own_mistake(session: Session) -> None:
    with pytest.raises(LocalProtocolError, match="no accepted task"):
        session.mask(UPDATE)


def test_one_accepted_task_is_masked_once(session: Session) -> None:
    answer(session, task())
    with pytest.raises(LocalProtocolError):
        session.mask(UPDATE)
    assert session.accept(task()) is not None  # a stored answer is not a task to answer
    with pytest.raises(LocalProtocolError):
        session.mask(UPDATE)


def test_a_crash_between_training_and_answering_leaves_the_sum_unanswered(
    session: Session, open_journal: Callable[[], Journal]
) -> None:
    assert session.accept(task()) is None
    assert Session.current(open_journal()).accept(task()) is None


def test_a_task_before_the_first_invitation_is_refused(
    open_journal: Callable[[], Journal],
) -> None:
    with pytest.raises(RemoteProtocolError, match="before an invitation"):
        Session.current(open_journal())


def test_the_same_invitation_again_changes_nothing(
    session: Session, open_journal: Callable[[], Journal]
) -> None:
    first = answer(session, task())
    again = Session.begin(MANIFEST, open_journal())
    stored = again.accept(task())
    assert stored is not None
    assert same(stored, first)


def test_a_new_epoch_has_its_own_sums_and_forgets_the_old_ones(
    session: Session, open_journal: Callable[[], Journal]
) -> None:
    answer(session, task(5))
    other = MANIFEST.model_copy(update={"nonce": "f" * 32})
    second = Session.begin(other, open_journal())
    assert second.run != session.run
    with pytest.raises(RemoteProtocolError, match="another run"):
        second.accept(task(5))
    assert second.accept(task(0, run=second.run)) is None
    current = Session.current(open_journal())
    assert current.manifest == other


def test_the_journal_is_for_this_user_alone(
    session: Session, path: Path, open_journal: Callable[[], Journal]
) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    answer(session, task())
    open_journal()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()}
    assert kept == {path.name: 0o600, "answer-0.bin": 0o600}


def test_the_journal_keeps_one_answer_and_overwrites_the_one_before(
    session: Session, path: Path, open_journal: Callable[[], Journal]
) -> None:
    large = QuantizedUpdate(np.full(9_000, 0x422317, np.int32), UPDATE.tail)
    answer(session, task(0), large)
    first = path.parent / "answer-0.bin"
    assert b"\x17\x23\x42" in first.read_bytes()
    answer(session, task(1, purpose=Purpose.TEST), replace(UPDATE, values=np.empty(0, np.int32)))
    assert not first.exists()
    assert open_journal().last_sum() == 1


def test_an_update_is_on_disk_before_it_is_returned(
    session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "record", full_disk)
    assert session.accept(task()) is None
    with pytest.raises(OSError, match="No space left"):
        session.mask(UPDATE)
    monkeypatch.undo()
    assert Journal(path).last_sum() == -1


def test_a_journal_that_was_closed_can_be_opened_again(
    open_journal: Callable[[], Journal],
) -> None:
    journal = open_journal()
    journal.begin_epoch(MANIFEST)
    journal.close()
    assert open_journal().manifest() == MANIFEST


def test_the_digest_of_a_task_depends_on_all_it_says() -> None:
    others = [
        task(1), task(run="e" * 64), *(task(**changes) for changes in OTHER_CONTENT.values())
    ]  # fmt: skip
    assert len({digest_of(one) for one in (TASK, *others)}) == 1 + len(others)
    assert digest_of(TASK) == digest_of(replace(TASK, model=TASK.model.copy()))


def test_the_ring_of_the_manifest_is_that_of_its_members() -> None:
    assert MANIFEST.ring == Ring(24, 3)
