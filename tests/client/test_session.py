"""A site's half of an epoch: said once, on disk before it is said, and said again bit for bit."""

import base64
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protocol import NUM_PARAMS, NUM_SUMS, NUM_TAIL, Bare, Cast, summed

from client.journal import Journal
from common.errors import DataError, FederationError, LocalProtocolError, RemoteProtocolError
from common.messages import (
    Agreement,
    Message,
    Purpose,
    Shares,
    SiteKeys,
    Upload,
)
from common.quantize import Ring
from common.secagg.masking import signed, split_body, unpack
from common.secagg.phases import Phase
from common.secagg.task import digest_of_task
from common.signing import sign

SITE = 1  # one with sites before and after it


@pytest.fixture
def cast(tmp_path: Path) -> Cast:
    """Four members, three of which recover a secret."""
    return Cast.bare(tmp_path, 4)


@pytest.fixture
def site(cast: Cast) -> Bare:
    member = cast.members[SITE]
    assert isinstance(member, Bare)
    return member


def refused(rule: str, says: str = "") -> Any:
    """The rule stands in the message, and the peer is to blame."""
    return pytest.raises(RemoteProtocolError, match=rf"{says}.*\[{rule}\]$")


def same(one: Message, other: Message) -> bool:
    """Equal in every field, arrays bit for bit and in their type."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return type(one) is type(other) and all(
        (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()) if isinstance(a, np.ndarray) else a == b
        for a, b in pairs
    )


def is_exact(cast: Cast, uploads: dict[int, Upload], shares: dict[int, Shares]) -> bool:
    total, wanted = cast.total(uploads, shares), summed([cast.members[k] for k in uploads])
    return np.array_equal(total.values, wanted.values) and np.array_equal(total.tail, wanted.tail)


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


def test_an_upload_is_stored_whole(cast: Cast, site: Bare) -> None:
    upload = cast.enrol().uploads()[SITE]
    site.restart()
    last = site.journal.sum()
    assert last is not None
    assert (last.header, last.sealed) == (upload.header, upload.sealed)
    assert last.share_commitments == upload.share_commitments
    assert np.array_equal(site.journal.body(0), upload.body)


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


MODEL = np.linspace(-1, 1, NUM_PARAMS, dtype=np.float32)
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


# Enrolment


def test_nothing_is_answered_before_the_first_invitation(cast: Cast, site: Bare) -> None:
    with refused("R7", "before an invitation"):
        site.session()


@pytest.mark.parametrize("run", ["", "the manifest's digest"])
def test_no_task_is_taken_before_the_roster(run: str, cast: Cast, site: Bare) -> None:
    cast.invite()
    with refused("R7"):
        site.answer(cast.task(SITE, run=run and cast.manifest.digest()))
    cast.agree()
    uploads = cast.uploads()
    assert is_exact(cast, uploads, cast.shares(uploads))


def test_a_manifest_is_answered_once_and_never_after_another_one(cast: Cast, site: Bare) -> None:
    cast.enrol()
    with refused("R1", "this manifest was answered before"):  # its keys are in use
        site.answer(cast.invitation())
    second = cast.renewed().enrol()
    for old in (cast, second):
        with refused("R1", "this manifest was answered before"):
            site.answer(old.invitation())


def test_a_run_that_another_one_followed_does_not_come_again(cast: Cast, site: Bare) -> None:
    cast.enrol()
    other = cast.renewed(run="f" * 32).enrol()
    with refused("R1", "a run that another one has followed"):
        site.answer(cast.renewed(epoch=7).invitation())
    uploads = other.uploads()  # the run that came between goes on
    assert is_exact(other, uploads, other.shares(uploads))


def test_every_epoch_has_fresh_keys(cast: Cast) -> None:
    one, other = (epoch.enrol().keys[SITE] for epoch in (cast, cast.renewed()))
    assert one.public_key != other.public_key
    assert one.kem_key != other.kem_key
    assert one.nonce != other.nonce


def test_a_second_roster_is_refused(cast: Cast, site: Bare) -> None:
    cast.enrol()
    other = cast.sign(replace(cast.roster(), nonces=cast.roster().nonces[::-1]))
    with refused("R7", "Roster came where"):
        site.answer(other)
    uploads = cast.uploads()
    assert is_exact(cast, uploads, cast.shares(uploads))


def test_a_roster_with_this_sites_keys_altered_is_refused(cast: Cast, site: Bare) -> None:
    cast.invite()
    # Another signature over the same keys is as good as the first, and yet not what was sent.
    again = sign(cast.keys[SITE], site.credentials.identity).signature
    signatures = (*cast.roster().signatures[:SITE], again, *cast.roster().signatures[SITE + 1 :])
    with refused("R3", "this site's own keys were altered"):
        site.answer(cast.sign(replace(cast.roster(), signatures=signatures)))
    cast.agree()
    assert site.session().epoch.phase == Phase.READY


def test_a_new_epoch_goes_on_counting_sums_and_a_new_run_begins_anew(
    cast: Cast, site: Bare
) -> None:
    cast.enrol().uploads(5)
    second = cast.renewed().enrol()
    with refused("R7", "task of another run"):
        site.answer(cast.task(SITE, 6))
    with refused("R4", "sum 5 was answered since"):
        site.answer(second.task(SITE, 4))
    uploads = second.uploads(6)
    assert is_exact(second, uploads, second.shares(uploads))
    third = cast.renewed(run="f" * 32).enrol()
    uploads = third.uploads(0, model=MODEL + 1)
    assert is_exact(third, uploads, third.shares(uploads))


def test_the_next_epoch_may_have_fewer_members(cast: Cast, site: Bare) -> None:
    cast.enrol().uploads(0)
    rest = cast.renewed([cast.members[k] for k in (0, 1, 3)]).enrol()
    assert site.session().index == 1
    assert cast.members[3].session().index == 2
    uploads = rest.uploads(1)
    assert is_exact(rest, uploads, rest.shares(uploads))


def test_the_ring_of_the_manifest_is_that_of_its_members(cast: Cast) -> None:
    assert cast.manifest.ring == Ring(24, 4)


# Unmasking


def test_nobody_is_asked_for_a_vote_when_everybody_is_there(cast: Cast) -> None:
    uploads = cast.enrol().uploads()
    for trio in ([0, 1, 2], [1, 2, 3]):
        assert is_exact(cast, uploads, cast.shares(uploads, sites=trio))


def test_a_site_votes_on_one_view_per_sum(cast: Cast, site: Bare) -> None:
    uploads = cast.enrol().uploads()
    three = {k: uploads[k] for k in (0, 1, 2)}
    votes = cast.votes(three, [SITE])
    for other in ({k: uploads[k] for k in (1, 2, 3)}, uploads):
        with refused("R11", "this site has voted for other survivors"):
            site.answer(cast.view(other))
        with refused("R11", "this site has voted for other survivors"):
            site.answer(cast.request(SITE, other, votes))
        site.restart()
    assert same(site.answer(cast.view(three)), votes[SITE])
    votes = cast.votes(three)
    assert is_exact(cast, three, cast.shares(three, votes))


def test_a_site_answers_one_view_per_sum(cast: Cast, site: Bare) -> None:
    uploads = cast.enrol().uploads()
    first = cast.shares(uploads)[SITE]
    three = {k: uploads[k] for k in (0, 1, 2)}
    site.restart()
    with refused("R8", "sum 0 was answered for other survivors"):
        site.answer(cast.request(SITE, three))
    with refused("R14", "Survivors came where"):
        site.answer(cast.view(three))
    assert same(site.answer(cast.request(SITE, uploads)), first)


def test_a_request_is_the_same_whichever_votes_come_with_it(cast: Cast, site: Bare) -> None:
    cast.enrol()
    uploads = cast.uploads(sites=[0, 1, 2])
    votes = cast.votes(uploads)
    first = site.answer(cast.request(SITE, uploads, votes))
    assert same(site.answer(cast.request(SITE, uploads, {})), first)


def test_without_enough_votes_nothing_is_unmasked_for_fewer_than_all(
    cast: Cast, site: Bare
) -> None:
    cast.enrol()
    uploads = cast.uploads(sites=[0, 1, 2])
    votes = cast.votes(uploads)
    for missing in votes:
        some = {k: vote for k, vote in votes.items() if k != missing}
        with refused("R12", "2 votes, 3 are needed"):
            site.answer(cast.request(SITE, uploads, some))
    assert site.journal.sum().shares == ""


def test_shares_hold_the_slots_of_survivors_and_dropouts_and_nothing_else(cast: Cast) -> None:
    cast.enrol()
    everybody = cast.uploads(0)
    assert [len(share) for share in cast.shares(everybody)[SITE].shares] == [32] * 4
    three = cast.uploads(1, [0, 1, 2], model=MODEL + 1)
    shares = cast.shares(three, cast.votes(three))
    assert [len(share) for share in shares[SITE].shares] == [64] * 3
    assert shares[SITE].complaints == ()


def test_a_site_that_dropped_is_not_asked_and_answers_nothing_about_it(
    cast: Cast, site: Bare
) -> None:
    cast.enrol()
    uploads = cast.uploads(sites=[0, 2, 3])
    with refused("R14", "a request about sum 0; this site's last is none"):
        site.answer(cast.view(uploads))
    votes = cast.votes(uploads)
    with refused("R14", "this site's last is none"):
        site.answer(cast.request(SITE, uploads, votes))


def test_a_late_upload_is_not_unmasked(cast: Cast, site: Bare) -> None:
    """Its site uploaded, the others have gone on without it."""
    uploads = cast.enrol().uploads()
    rest = {k: uploads[k] for k in (0, 2, 3)}
    votes = cast.votes(rest)
    for message in (cast.view(rest), cast.request(SITE, rest, votes)):
        with refused("R10", "own header is missing or altered"):
            site.answer(message)
    assert is_exact(cast, rest, cast.shares(rest, votes))


def test_after_the_next_task_nothing_is_said_about_the_sum_before(cast: Cast, site: Bare) -> None:
    uploads = cast.enrol().uploads(0)
    cast.shares(uploads)
    request, view = cast.request(SITE, uploads), cast.view(uploads)
    cast.uploads(1, model=MODEL + 1)
    for message in (request, view):
        with refused("R14", "a request about sum 0; this site's last is 1"):
            site.answer(message)


def test_after_the_next_roster_nothing_is_said_about_the_epoch_before(
    cast: Cast, site: Bare
) -> None:
    uploads = cast.enrol().uploads(0)
    request = cast.request(SITE, uploads)
    second = cast.renewed()
    second.invite()
    with refused("R7", "a request of another run"):
        site.answer(request)
    second.agree()
    with refused("R7", "a request of another run"):
        site.answer(request)
    renamed = cast.sign(replace(request, run=second.run.hex()))
    with refused("R14", "a sum of another epoch"):
        site.answer(renamed)


def test_a_model_is_answered_once_for_each_purpose(cast: Cast, site: Bare) -> None:
    cast.enrol()
    cast.shares(cast.uploads(0))
    cast.uploads(1, purpose=Purpose.VALIDATE)  # another purpose
    site.restart()
    with refused("R4", r"helped to unmask a sum over this model before \(train\)"):
        site.answer(cast.task(SITE, 2))
    second = cast.renewed().enrol()
    with refused("R4", r"helped to unmask a sum over this model before \(train\)"):
        site.answer(second.task(SITE, 2))
    assert site.session().accept(second.task(SITE, 2, model=MODEL + 1)) is None


def test_a_void_sum_may_be_trained_again_under_another_number(cast: Cast) -> None:
    cast.enrol().uploads(0)
    uploads = cast.uploads(1)
    assert is_exact(cast, uploads, cast.shares(uploads))


# Secrets


def pieces(secret: bytes) -> set[bytes]:
    """Parts of a secret as the journal writes it; a page of the file may end anywhere in it."""
    text = base64.urlsafe_b64encode(secret)
    return {text[k : k + 10] for k in range(len(text) - 10)}


def on_disk(site: Bare) -> bytes:
    """Everything in the site's folder but its long-lived key."""
    files = [path for path in site.state_dir.rglob("*") if path.is_file()]
    return b"\n".join(path.read_bytes() for path in files if path.name != "key.pem")


def holds(site: Bare, secret: bytes) -> bool:
    content = on_disk(site)
    return any(piece in content for piece in pieces(secret))


def test_the_keys_of_an_epoch_are_erased_as_soon_as_the_pairs_have_agreed(
    cast: Cast, site: Bare
) -> None:
    cast.invite()
    epoch = site.journal.epoch()
    assert holds(site, epoch.dh)
    assert holds(site, epoch.kem)
    cast.agree()
    assert not holds(site, epoch.dh)
    assert holds(site, epoch.kem)  # it waits for the ciphertexts of the first task
    (exchanged, *_) = site.journal.epoch().exchanged
    assert holds(site, exchanged)
    cast.uploads()
    assert not holds(site, epoch.kem)
    assert not holds(site, exchanged)


def test_the_first_site_waits_for_nobody(cast: Cast) -> None:
    first = cast.members[0]
    cast.invite()
    epoch = first.journal.epoch()
    cast.agree()
    assert not holds(first, epoch.dh)
    assert not holds(first, epoch.kem)
    assert not any(first.journal.epoch().exchanged)


def chains(site: Bare) -> Sequence[bytes]:
    return [chain for chain in site.journal.epoch().chains if chain]


def test_what_opens_a_sum_is_erased_with_the_answer(cast: Cast, site: Bare) -> None:
    uploads = cast.enrol().uploads(2)
    before, own_share = chains(site), site.journal.sum().own_share
    assert len(before) == 3
    assert all(holds(site, secret) for secret in (*before, own_share))
    cast.shares(uploads)
    assert not any(holds(site, secret) for secret in (*before, own_share))
    assert site.journal.sum().own_share == b""
    slots = [own_share[k : k + 32].hex().encode() for k in range(0, len(own_share), 32)]
    assert [slot in on_disk(site) for slot in slots] == [k == SITE for k in cast.sites]  # returned


def test_what_opens_a_void_sum_is_erased_with_the_next_upload(cast: Cast, site: Bare) -> None:
    cast.enrol().uploads(0)
    before, own_share = chains(site), site.journal.sum().own_share
    cast.uploads(3)
    assert not any(holds(site, secret) for secret in (*before, own_share))


def test_a_new_epoch_erases_the_keys_of_the_one_before(cast: Cast, site: Bare) -> None:
    cast.enrol().uploads(0)
    before = chains(site)
    cast.renewed().invite()
    assert not any(holds(site, secret) for secret in before)


def test_the_chain_keys_move_on_with_the_answer(cast: Cast, site: Bare) -> None:
    uploads = cast.enrol().uploads(0)
    before = chains(site)
    cast.shares(uploads)
    assert set(before).isdisjoint(chains(site))
    assert site.journal.epoch().chain_step == 1


# The journal's files


def modes(site: Bare) -> dict[str, int]:
    files = [path for path in site.state_dir.iterdir() if path.suffix != ".pem"]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}


def test_the_journal_is_for_this_user_alone(cast: Cast, site: Bare) -> None:
    assert modes(site) == {"journal.sqlite": 0o600}
    uploads = cast.enrol().uploads()
    private = {"journal.sqlite": 0o600, "journal.mark": 0o600, "answer-0.bin": 0o600}
    assert modes(site) == private
    cast.shares(uploads)
    site.restart()
    assert modes(site) == private


def test_the_journal_keeps_one_body(cast: Cast, site: Bare) -> None:
    first = cast.enrol().uploads(0)[SITE]
    assert (site.state_dir / "answer-0.bin").read_bytes() == first.body.tobytes()
    cast.uploads(1, purpose=Purpose.TEST)
    assert sorted(site.state_dir.glob("answer-*")) == [site.state_dir / "answer-1.bin"]
    site.restart()
    assert site.journal.sum().sum_number == 1


def leaves(says: str) -> Any:
    """The site must leave the run: what was said is unknown."""
    return pytest.raises(DataError, match=rf"{says}.* must leave the run \[R6\]$")


BACKUPS = {
    "before the upload": lambda cast: cast.uploads(0),
    "before the vote": lambda cast: cast.votes(cast.uploads(0, sites=[0, 1, 2])),
    "before the shares": lambda cast: cast.shares(cast.uploads(0)),
    "before a new epoch": lambda cast: cast.renewed().enrol(),
}


@pytest.mark.parametrize("title", BACKUPS)
def test_a_journal_that_was_put_back_is_refused(title: str, cast: Cast, site: Bare) -> None:
    cast.enrol()
    path = site.state_dir / "journal.sqlite"
    shutil.copy(path, site.state_dir / "backup")
    BACKUPS[title](cast)
    site.journal.close()
    shutil.copy(site.state_dir / "backup", path)
    with leaves("has 2 entries, this site wrote .* put back from a backup"):
        site.restart()


def test_a_journal_that_is_put_back_while_the_site_runs_is_noticed(cast: Cast, site: Bare) -> None:
    cast.enrol()
    path = site.state_dir / "journal.sqlite"
    shutil.copy(path, site.state_dir / "backup")
    cast.uploads(0)
    shutil.copy(site.state_dir / "backup", path)
    with leaves("put back from a backup"):
        site.answer(cast.task(SITE, 1))
    with leaves("put back from a backup"):
        site.answer(cast.renewed().invitation())


def test_a_journal_that_is_gone_is_not_begun_anew(cast: Cast, site: Bare) -> None:
    cast.enrol()
    site.journal.close()
    (site.state_dir / "journal.sqlite").unlink()
    with leaves("is gone"):
        site.restart()
    assert not (site.state_dir / "journal.sqlite").exists()


@pytest.mark.parametrize("content", [b"no database", b"\0" * 4096])
def test_a_journal_that_is_damaged_stops_the_site(content: bytes, cast: Cast, site: Bare) -> None:
    cast.enrol()
    site.journal.close()
    (site.state_dir / "journal.sqlite").write_bytes(content)
    with leaves("is damaged"):
        site.restart()


@pytest.mark.parametrize("content", ["", "-", "many"])
def test_a_mark_that_is_damaged_stops_the_site(content: str, cast: Cast, site: Bare) -> None:
    cast.enrol()
    (site.state_dir / "journal.mark").write_text(content)
    with leaves("journal.mark is damaged"):
        site.restart()


def test_a_mark_that_a_crash_left_behind_its_journal_stops_nobody(cast: Cast, site: Bare) -> None:
    mark = site.state_dir / "journal.mark"
    cast.enrol()
    before = mark.read_text()
    uploads = cast.uploads()
    mark.write_text(before)
    site.restart()
    assert is_exact(cast, uploads, cast.shares(uploads))
    assert int(mark.read_text()) > int(before) + 1


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_stored_body_that_is_not_the_one_sent_is_not_sent(
    damage: str, cast: Cast, site: Bare
) -> None:
    upload = cast.enrol().uploads()[SITE]
    path = site.state_dir / "answer-0.bin"
    content = upload.body.tobytes()
    path.write_bytes(
        {"cut": content[:-1], "changed": content[:-1] + bytes([content[-1] ^ 1]), "gone": b""}[
            damage
        ]
    )
    if damage == "gone":
        path.unlink()
    with pytest.raises(FederationError, match=r"leave the run \[R6\]$"):
        site.answer(cast.task(SITE))


def test_a_journal_that_was_closed_can_be_opened_again(cast: Cast, site: Bare) -> None:
    cast.enrol()
    before = site.journal.epoch()
    site.restart()
    assert site.journal.epoch() == before
    assert site.session().manifest == cast.manifest


def test_an_unmasked_sum_can_be_asked_for_until_the_next_one(cast: Cast, site: Bare) -> None:
    """A coordinator that lost its answers in a crash gets the same bytes, upload and shares."""
    uploads = cast.enrol().uploads()
    shares = cast.shares(uploads)
    site.restart()
    assert same(site.answer(cast.task(SITE)), uploads[SITE])
    assert same(site.answer(cast.request(SITE, uploads)), shares[SITE])
