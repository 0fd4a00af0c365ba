"""A site's half of an epoch: said once, on disk before it is said, and said again bit for bit."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_site import MODEL, SITE, is_exact, refused, same
from protocol import NUM_PARAMS, NUM_SUMS, NUM_TAIL, Bare, Cast, summed

from client.journal import Journal
from common.errors import LocalProtocolError
from common.messages import Agreement, Message, Purpose, SiteKeys, Upload
from common.secagg.masking import signed, split_body, unpack
from common.secagg.task import digest_of_task

# What an upload is


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_one_upload_says_nothing_and_the_sum_of_all_is_exact(bits: int, tmp_path: Path) -> None:
    cast = Cast.bare(tmp_path, 3, ring_bits=bits, num_params=700).enrol()
    uploads = cast.uploads()
    for member, upload in zip(cast.members, uploads.values(), strict=True):
        assert upload.body.dtype == np.uint8
        assert upload.body.size == 700 * bits // 8 + 8 * NUM_TAIL
        packed, tail = split_body(upload.body, 700, bits=bits)
        values = signed(unpack(packed, bits=bits).copy(), bits=bits)
        assert np.mean(values == member.update.values) < 0.01
        assert not set(tail.view(np.int64).tolist()) & set(member.update.tail.tolist())
    assert is_exact(cast, uploads, cast.shares(uploads))


def test_an_evaluation_sends_no_weights_and_its_tail_is_exact(cast: Cast) -> None:
    uploads = cast.enrol().uploads(purpose=Purpose.VALIDATE)
    assert {upload.body.size for upload in uploads.values()} == {8 * NUM_TAIL}
    total = cast.total(uploads, cast.shares(uploads))
    assert total.values.shape == (0,)
    assert np.array_equal(total.tail, summed(cast.members).tail)


def test_the_same_update_is_never_sent_under_the_same_mask(cast: Cast) -> None:
    cast.enrol()
    sent = [cast.uploads(number)[SITE] for number in range(3)]
    assert len({upload.body.tobytes() for upload in sent}) == 3
    assert len({upload.sealed for upload in sent}) == 3


# Answered once


STEPS = ["invitation", "roster", "task", "survivors", "unmask"]


def steps(cast: Cast, dropout: int = 3) -> Iterator[tuple[str, Message, Callable[[Message], None]]]:
    """What one site is asked in an epoch with one sum, just before it is; the answer is kept."""
    others = [k for k in cast.sites if k != SITE]
    invitation = cast.invitation()
    for k in others:
        cast.keys[k] = cast.ask(k, invitation, SiteKeys)
    yield "invitation", invitation, lambda reply: cast.keys.__setitem__(SITE, reply)
    roster = cast.roster()
    for k in others:
        cast.agreements[k] = cast.ask(k, roster, Agreement)
    yield "roster", roster, lambda reply: cast.agreements.__setitem__(SITE, reply)
    survivors = [k for k in others if k != dropout]
    uploads = cast.uploads(sites=survivors)
    yield "task", cast.task(SITE), lambda reply: uploads.__setitem__(SITE, reply)
    votes = cast.votes(uploads, survivors)
    yield "survivors", cast.view(uploads), lambda reply: votes.__setitem__(SITE, reply)
    shares = cast.shares(uploads, votes, survivors)
    yield (
        "unmask",
        cast.request(SITE, uploads, votes),
        lambda reply: shares.__setitem__(SITE, reply),
    )
    assert is_exact(cast, uploads, shares)


@pytest.mark.parametrize("is_restarted", [False, True], ids=["running on", "restarted"])
def test_every_message_that_comes_again_gets_the_same_answer(
    is_restarted: bool, cast: Cast, site: Bare
) -> None:
    asked = []
    for title, message, keep in steps(cast):
        first = site.answer(message)
        asked.append(title)
        for _ in range(2):
            if is_restarted:
                site.restart()
            assert same(site.answer(message), first)
        keep(first)
    assert asked == STEPS


class FullDiskError(OSError):
    """What a write gets when there is no room."""


def fails_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose n-th call fails."""
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise FullDiskError(28, "No space left on device")
        return function(*arguments)

    return counted


FAULTS = {
    "a file cannot be brought to disk": ("client.journal.os.fsync", os.fsync),
    "the mark cannot be replaced": ("pathlib.Path.rename", Path.rename),
    "the database takes no row": ("client.journal.Journal._put", Journal._put),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("failing", STEPS)
def test_a_full_disk_at_any_write_says_nothing_and_leaves_the_sum_exact(
    failing: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, function = FAULTS[fault]
    for call in range(1, 9):
        cast = Cast.bare(tmp_path / str(call), 4)
        site = cast.members[SITE]
        num_failures = 0
        for title, message, keep in steps(cast):
            if title == failing:
                with monkeypatch.context() as patch:
                    patch.setattr(name, fails_at(call, function))
                    try:
                        site.answer(message)
                    except FullDiskError:
                        num_failures += 1
                site.restart()
            keep(site.answer(message))
        if not num_failures:
            break
    assert 1 < call < 8  # it failed at least once, and at the last every write went well


def test_a_crash_between_accepting_and_masking_leaves_the_sum_unanswered(
    cast: Cast, site: Bare
) -> None:
    cast.enrol()
    assert site.session().accept(cast.task(SITE)) is None
    site.restart()
    assert site.journal.sum() is None
    assert site.session().accept(cast.task(SITE)) is None
    uploads = cast.uploads()
    assert is_exact(cast, uploads, cast.shares(uploads))


OTHER_CONTENT = {
    "another model": {"model": np.zeros(NUM_PARAMS, np.float32)},
    "one bit of the model": {
        "model": np.nextafter(np.linspace(-1, 1, NUM_PARAMS, dtype=np.float32), np.float32(9))
    },
    "another purpose": {"purpose": Purpose.TEST},
    "another round": {"round_number": 2},
    "other exponents": {"exponents": (-10, -9)},
}


@pytest.mark.parametrize("title", OTHER_CONTENT)
def test_another_task_with_an_answered_number_is_refused(
    title: str, cast: Cast, site: Bare
) -> None:
    first = cast.enrol().uploads(4)[SITE]
    session = site.session()
    with refused("R5", "sum 4 was answered for another task; nothing is masked twice"):
        session.accept(cast.task(SITE, 4, **OTHER_CONTENT[title]))
    with pytest.raises(LocalProtocolError):
        session.mask(site.update)  # nothing was accepted
    assert same(cast.ask(SITE, cast.task(SITE, 4), Upload), first)


def test_a_task_is_the_same_whatever_is_relayed_with_it(cast: Cast, site: Bare) -> None:
    first = cast.enrol().uploads()[SITE]
    bare = replace(cast.task(SITE), ciphertexts=(), ciphertext_signatures=(), revoked=b"later")
    assert same(site.answer(cast.sign(bare)), first)


def test_the_digest_of_a_task_depends_on_all_that_the_answer_depends_on(cast: Cast) -> None:
    cast.enrol()
    others = [
        cast.task(SITE, 1),
        cast.task(SITE, run="e" * 64),
        *(cast.task(SITE, **changes) for changes in OTHER_CONTENT.values()),
    ]
    assert len({digest_of_task(one) for one in (cast.task(SITE), *others)}) == 1 + len(others)
    assert digest_of_task(cast.task(SITE)) == digest_of_task(cast.task(3))


def test_older_numbers_are_refused_also_after_a_restart(cast: Cast, site: Bare) -> None:
    cast.enrol()
    for sum_number in (0, 2, 5):
        cast.uploads(sum_number)
    for _ in range(2):
        for sum_number in (0, 2, 3, 4):
            with refused("R4", f"sum {sum_number}: sum 5 was answered since"):
                site.answer(cast.task(SITE, sum_number))
        site.restart()
    assert site.session().accept(cast.task(SITE, 6)) is None


@pytest.mark.parametrize("sum_number", [-1, -(2**62), NUM_SUMS, 2**62])
def test_numbers_outside_the_manifest_are_refused(sum_number: int, cast: Cast, site: Bare) -> None:
    cast.enrol()
    with refused("R4", f"sum {sum_number}: the manifest has sums 0 to {NUM_SUMS - 1}"):
        site.answer(cast.task(SITE, sum_number))


WRONG_TASKS = {
    "another run": ({"run": "e" * 64}, "R7", "task of another run"),
    "no run": ({"run": ""}, "R7", "task of another run"),
    "a round below 0": ({"round_number": -1}, "R4", "round -1 is none of a run of 9 sums"),
    "a round beyond all sums": ({"round_number": 10}, "R4", "round 10 is none of"),
    "a shorter model": ({"model": MODEL[1:]}, "R4", "5 parameters, the manifest 6"),
    "an empty model": ({"model": MODEL[:0]}, "R4", "0 parameters"),
    "a model of another form": ({"model": MODEL.reshape(2, 3)}, "R4", "the manifest 6"),
    "a model that is not the one signed": ({"model_digest": "0" * 64}, "R4", "not the one of"),
    "too few exponents": ({"exponents": (-10,)}, "R4", "1 exponents, the manifest has 2"),
    "no exponents": ({"exponents": ()}, "R4", "0 exponents"),
    "an exponent beyond all steps": ({"exponents": (-10, 61)}, "R4", "an exponent is outside"),
    "a ciphertext is missing": ({"ciphertexts": ()}, "R3", "does not bring every ciphertext"),
    "a ciphertext of nobody": ({"ciphertexts": (bytes(1088),)}, "R3", "signature of site-1"),
}  # fmt: skip


@pytest.mark.parametrize("title", WRONG_TASKS)
def test_a_task_that_does_not_fit_the_epoch_is_refused(title: str, cast: Cast, site: Bare) -> None:
    changes, rule, sentence = WRONG_TASKS[title]
    cast.enrol()
    with refused(rule, sentence):
        site.answer(cast.task(SITE, **changes))
    uploads = cast.uploads()  # a refusal spends no number and no key
    assert is_exact(cast, uploads, cast.shares(uploads))


def test_a_task_that_the_coordinator_did_not_sign_is_refused(cast: Cast, site: Bare) -> None:
    task = cast.enrol().task(SITE)
    for forged in (
        replace(task, signature=b""),
        replace(task, sum_number=1),
        replace(task, exponents=(2**80, 0)),
    ):
        with refused("R7", "signature of the coordinator is not good"):
            site.answer(forged)


def test_masking_without_an_accepted_task_is_our_own_mistake(cast: Cast, site: Bare) -> None:
    cast.enrol()
    with pytest.raises(LocalProtocolError, match="no accepted task"):
        site.session().mask(site.update)


def test_one_accepted_task_is_masked_once(cast: Cast, site: Bare) -> None:
    cast.enrol()
    session = site.session()
    assert session.accept(cast.task(SITE)) is None
    first = session.mask(site.update)
    with pytest.raises(LocalProtocolError):
        session.mask(site.update)
    stored = session.accept(cast.task(SITE))  # a stored answer is not a task to answer
    assert stored is not None
    assert same(stored, first)
    with pytest.raises(LocalProtocolError):
        session.mask(site.update)


def test_a_model_is_answered_once_for_each_purpose(cast: Cast, site: Bare) -> None:
    cast.enrol()
    cast.shares(cast.uploads(0))
    cast.uploads(1, purpose=Purpose.TEST)  # another split
    site.restart()
    with refused("R4", r"helped to sum the update of this model before"):
        site.answer(cast.task(SITE, 2))
    with refused("R4", r"helped to sum the validation of this model before"):
        site.answer(cast.task(SITE, 2, purpose=Purpose.VALIDATE))  # training had scored it
    second = cast.renewed().enrol()
    with refused("R4", r"helped to sum the update of this model before"):
        site.answer(second.task(SITE, 2))
    assert site.session().accept(second.task(SITE, 2, model=MODEL + 1)) is None


def test_a_void_sum_may_be_trained_again_under_another_number(cast: Cast) -> None:
    cast.enrol().uploads(0)
    uploads = cast.uploads(1)
    assert is_exact(cast, uploads, cast.shares(uploads))
