"""What a hostile coordinator or network asks of a site: it is refused, kept, and changes nothing.

Every case ends with an honest coordinator that goes on from there: the sum must still be exact.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import (
    LOW_ORDER,
    MODEL,
    OTHER_MODEL,
    OTHER_RUN,
    START,
    Federation,
    by_title,
    evidence_in,
    exchanged,
    federations,
    flipped,
    of_unknown_version,
    on_unknown_curve,
    plain,
    split,
    stranger,
    swapped,
)

from common.errors import RemoteProtocolError
from common.identity import Identity
from common.messages import (
    Agreement,
    Encapsulated,
    Message,
    Purpose,
    Refusal,
    Roster,
    RoundTask,
    Shares,
    SiteKeys,
    Survivors,
    Unmask,
    Upload,
    Vote,
    digest_of_model,
)
from common.roster import Credentials
from common.secagg.header import Header, row_digest
from common.secagg.keys import EpochKeys
from common.signing import sign

Play = Callable[[Federation], tuple[int, Message]]  # what is done; which message goes to whom
Cases = dict[str, dict[str, Play]]  # by rule and title


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    with federations(tmp_path, monkeypatch) as make:
        yield make()


# K1: who proposes what


def proposed(**changes: Any) -> Play:
    """An invitation with other values in its manifest."""
    return lambda fed: (0, fed.proposal(fed.altered(**changes)))


def proposed_members(choose: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> Play:
    def play(fed: Federation) -> tuple[int, Message]:
        members = json.loads(fed.manifest.canonical())["members"]
        return 0, fed.proposal(fed.altered(members=choose(members)))

    return play


def invited_by(identity: Callable[[Federation], Identity], **changes: Any) -> Play:
    """An invitation of somebody whose key the manifest names."""

    def play(fed: Federation) -> tuple[int, Message]:
        sender = identity(fed)
        text = fed.altered(coordinator=sender.fingerprint)
        return 0, fed.proposal(text, by=sender, **changes)

    return play


def reissued(fed: Federation, **changes: Any) -> Identity:
    """The coordinator's key with another certificate."""
    return fed.issue("coordinator", "coordinator", key=fed.credentials.identity.key, **changes)


def invited_with_revoked(revoked: Callable[[Federation], bytes]) -> Play:
    return lambda fed: (0, fed.proposal(fed.manifest.canonical(), revoked=revoked(fed)))


def stale(fed: Federation) -> bytes:
    """A list of revoked certificates that was good last week."""
    revoked = fed.revoked()
    fed.clock += timedelta(days=8)
    return revoked


def same_manifest_again(fed: Federation) -> tuple[int, Message]:
    invitation = fed.invitation()
    fed.enrol()
    return 0, invitation


def earlier_epoch_again(fed: Federation) -> tuple[int, Message]:
    _, invitation = same_manifest_again(fed)
    fed.next_epoch().enrol()
    return 0, invitation


def old_run_again(fed: Federation) -> tuple[int, Message]:
    run = fed.manifest.run
    fed.enrol()
    fed.next_epoch(OTHER_RUN).enrol()
    return 0, fed.proposal(fed.altered(run=run, epoch=3, nonce="f" * 32))


INVITATIONS: Cases = {
    "R1": {
        "a manifest that was answered comes again": same_manifest_again,
        "the manifest of an earlier epoch comes again": earlier_epoch_again,
        "a run that another one followed comes again under a new nonce": old_run_again,
    },
    "R2": {
        "a threshold of one": proposed(threshold=1),
        "a threshold one below the default": proposed(threshold=2),
        "a threshold above the default": proposed(threshold=4),
        "a ring of 20 bits": proposed(ring_bits=20),
        "a ring of 16 bits where people approved 32": proposed(ring_bits=16),
        "more sums than the study has": proposed(num_sums=1000),
        "a cap on weights that nobody approved": proposed(weight_cap=1),
        "steps that nobody approved": proposed(exponents=[0, 0]),
        "a longer tail, for counts that nobody approved": proposed(num_tail=9999),
        "statistics that nobody approved": proposed(num_statistics=9999),
        "another first model": proposed(first_model="0" * 64),
        "another order of the parameters": proposed(schema_digest="0" * 64),
        "another study": proposed(study="0" * 64),
        "another program": proposed(code="0" * 64),
        "another version of the protocol": proposed(version=2),
        "a value that this version does not know": proposed(plain=True),
        "a manifest that has expired": proposed(valid_until=0),
        "a manifest for next year": proposed(valid_from=2**35, valid_until=2**36),
        "two members only": proposed_members(lambda known: known[:2]),
        "one member only": proposed_members(lambda known: known[:1]),
        "no members": proposed_members(lambda _: []),
        "a member twice": proposed_members(lambda known: [*known, known[-1]]),
        "members in another order": proposed_members(lambda known: known[::-1]),
        "an epoch that this site is no member of": proposed_members(lambda known: known[1:]),
        "an invented member": proposed_members(
            lambda known: [*known, {"name": "site-5", "key": "5" * 64}]
        ),
        "a member under an invented name": proposed_members(
            lambda known: [*known[:3], {**known[3], "name": "site-5"}]
        ),
        "a member with another key": proposed_members(
            lambda known: [*known[:3], {**known[3], "key": "5" * 64}]
        ),
        "a member with the key of another one": proposed_members(
            lambda known: [*known[:3], {**known[3], "key": known[2]["key"]}]
        ),
    },
    "R3": {
        "a site that plays the coordinator": invited_by(lambda fed: fed.identities[3]),
        "another coordinator of the same authority": invited_by(
            lambda fed: fed.issue("coordinator", "coordinator")
        ),
        "a manifest that names another coordinator": proposed(coordinator="0" * 64),
        "a coordinator certified by an authority of the same name": invited_by(
            lambda fed: reissued(fed, by=stranger())
        ),
        "a coordinator certified by another authority": invited_by(
            lambda fed: reissued(fed, by=stranger("elsewhere"))
        ),
        "a coordinator whose certificate has expired": invited_by(
            lambda fed: reissued(fed, at=START - timedelta(days=60))
        ),
        "a coordinator whose certificate is not valid yet": invited_by(
            lambda fed: reissued(fed, at=START + timedelta(days=1))
        ),
        "a coordinator without a certificate": invited_by(
            lambda fed: replace(fed.credentials.identity, certificate=b"")
        ),
        "a coordinator whose certificate is on an unknown curve": invited_by(
            lambda fed: on_unknown_curve(fed.credentials.identity)
        ),
        "a coordinator whose certificate is of an unknown version": invited_by(
            lambda fed: of_unknown_version(fed.credentials.identity)
        ),
        "a coordinator that was revoked": invited_with_revoked(
            lambda fed: fed.revoked(fed.credentials.identity)
        ),
        "a stale list of the revoked": invited_with_revoked(stale),
        "no list of the revoked": invited_with_revoked(lambda _: b""),
        "a list of the revoked signed by an authority of the same name": invited_with_revoked(
            lambda fed: fed.revoked(by=stranger())
        ),
        "a list of the revoked that begins tomorrow": invited_with_revoked(
            lambda fed: fed.authority.revocation_list([], START + timedelta(days=1), days=7)
        ),
    },
}


# K2: everybody's keys


def roster_with(site: int, **changes: Any) -> Play:
    """The coordinator puts something else in the place of a member's keys."""

    def play(fed: Federation) -> tuple[int, Message]:
        fed.invite()
        return 0, fed.roster_with(replace(fed.keys[site], **changes))

    return play


def roster_signed(site: int, **changes: Any) -> Play:
    """The same with the member's help: it signs what comes in the place of its keys."""

    def play(fed: Federation) -> tuple[int, Message]:
        fed.invite()
        return 0, fed.roster_with(fed.keys_signed(site, **changes))

    return play


def roster_of(identity: Callable[[Federation], Identity]) -> Play:
    """Member 2 comes with a certificate, and signs its keys with that key."""

    def play(fed: Federation) -> tuple[int, Message]:
        fed.invite()
        member = identity(fed)
        return 0, fed.roster_with(fed.keys_signed(2, by=member, certificate=member.certificate))

    return play


def roster_altered(change: Callable[[Federation, Roster], dict[str, Any]]) -> Play:
    def play(fed: Federation) -> tuple[int, Message]:
        fed.invite()
        roster = fed.roster()
        return 0, fed.resigned(roster, **change(fed, roster))

    return play


def in_every_list(roster: Roster, change: Callable[[tuple[Any, ...]], Any]) -> dict[str, Any]:
    lists = ("public_keys", "kem_keys", "nonces", "certificates", "signatures")
    return {name: change(getattr(roster, name)) for name in lists}


def certified_again(fed: Federation, **changes: Any) -> Identity:
    """Member 2, its own key, another certificate."""
    return fed.issue("site-3", key=fed.identities[2].key, **changes)


def keys_of_an_earlier_epoch(fed: Federation) -> tuple[int, Message]:
    fed.enrol()
    old = fed.keys[2]
    fed.next_epoch().invite()
    return 0, fed.roster_with(replace(old, run=fed.keys[2].run))


def same_key_twice(name: str) -> Play:
    """Two members that help the coordinator send one key."""

    def play(fed: Federation) -> tuple[int, Message]:
        fed.invite()
        shared = {name: getattr(fed.keys[1], name)}
        return 0, fed.roster_with(fed.keys_signed(2, **shared))

    return play


def second_roster(fed: Federation) -> tuple[int, Message]:
    fed.enrol()
    return 0, fed.roster_with(fed.keys_signed(3, public_key=EpochKeys.generate().public_key))


def roster_of_an_earlier_epoch(fed: Federation) -> tuple[int, Message]:
    fed.enrol()
    roster = fed.roster()
    fed.next_epoch().invite()
    return 0, roster


def roster_without_invitation(fed: Federation) -> tuple[int, Message]:
    return 0, fed.sign(Roster(fed.manifest.digest(), (), (), (), (), (), b""))


def split_roster_then_one_task(fed: Federation) -> tuple[int, Message]:
    fed, _ = split(fed)
    task = fed.task(2)
    fed.next_epoch()
    return 2, task


def split_roster_then_two_tasks(fed: Federation) -> tuple[int, Message]:
    fed, _ = split(fed)
    task = fed.task(2, run=fed.agreements[2].run)
    fed.next_epoch()
    return 2, task


ROSTERS: Cases = {
    "R3": {
        "another X25519 key in the place of a member's": roster_with(
            2, public_key=EpochKeys.generate().public_key
        ),
        "another ML-KEM key in the place of a member's": roster_with(
            2, kem_key=EpochKeys.generate().kem_key
        ),
        "another nonce in the place of a member's": roster_with(2, nonce=bytes(16)),
        "another certificate of the same authority": roster_of(lambda fed: fed.issue("site-3")),
        "a member's key certified by an authority of the same name": roster_of(
            lambda fed: certified_again(fed, by=stranger())
        ),
        "a certificate of another authority for a stranger of the same name": roster_of(
            lambda fed: fed.issue("site-3", by=stranger())
        ),
        "another member in the place of one": roster_of(lambda fed: fed.identities[3]),
        "a member's key certified under another name": roster_of(
            lambda fed: fed.issue("site-9", key=fed.identities[2].key)
        ),
        "a member certified as a coordinator": roster_of(
            lambda fed: fed.issue("site-3", "coordinator", key=fed.identities[2].key)
        ),
        "a member whose certificate has expired": roster_of(
            lambda fed: certified_again(fed, at=START - timedelta(days=60))
        ),
        "a member whose certificate is not valid yet": roster_of(
            lambda fed: certified_again(fed, at=START + timedelta(days=1))
        ),
        "a member that was revoked": roster_altered(
            lambda fed, _: {"revoked": fed.revoked(fed.identities[2])}
        ),
        "a member without a certificate": roster_signed(2, certificate=b""),
        "a member whose certificate is on an unknown curve": roster_of(
            lambda fed: on_unknown_curve(fed.identities[2])
        ),
        "this site's own X25519 key altered": roster_with(
            0, public_key=EpochKeys.generate().public_key
        ),
        "this site's own keys altered by somebody who has its signing key": roster_signed(
            0, public_key=EpochKeys.generate().public_key
        ),
        "a member's keys of an earlier epoch": keys_of_an_earlier_epoch,
        "two members in each other's place": roster_altered(
            lambda _, roster: in_every_list(roster, lambda entries: swapped(entries, 1, 2))
        ),
        "a member left out": roster_altered(
            lambda _, roster: in_every_list(roster, lambda entries: entries[:-1])
        ),
        "a member more": roster_altered(
            lambda _, roster: in_every_list(roster, lambda entries: (*entries, entries[-1]))
        ),
        "one signature too few": roster_altered(
            lambda _, roster: {"signatures": roster.signatures[:-1]}
        ),
        "two members with the same X25519 key": same_key_twice("public_key"),
        "two members with the same ML-KEM key": same_key_twice("kem_key"),
        **{
            f"a member's X25519 key is a point of low order: {name}": roster_signed(
                2, public_key=point
            )
            for name, point in LOW_ORDER.items()
        },
        "a member's ML-KEM key is none": roster_signed(2, kem_key=b"\xff" * 1184),
        "an X25519 key of 31 bytes": roster_signed(2, public_key=bytes(31)),
        "an ML-KEM key of 1185 bytes": roster_signed(2, kem_key=bytes(1185)),
        "a nonce of 15 bytes": roster_signed(2, nonce=bytes(15)),
        "a stale list of the revoked with the roster": roster_altered(
            lambda fed, _: {"revoked": stale(fed)}
        ),
        "a list of the revoked from another authority with the roster": roster_altered(
            lambda fed, _: {"revoked": fed.revoked(by=stranger())}
        ),
        "a split roster, and a task for each half": split_roster_then_two_tasks,
    },
    "R7": {
        "the roster of an earlier epoch": roster_of_an_earlier_epoch,
        "a second roster, of keys that a member signed too": second_roster,
        "a roster before an invitation": roster_without_invitation,
        "a split roster, and the task of the other half's run": split_roster_then_one_task,
    },
}


# Exchange 1: a task


def tasked(site: int = 2, **changes: Any) -> Play:
    """A task with other values, for a site that waits for two ciphertexts."""
    return lambda fed: (site, fed.enrol().task(site, **changes))


def task_altered(change: Callable[[Federation, RoundTask], dict[str, Any]]) -> Play:
    def play(fed: Federation) -> tuple[int, Message]:
        task = fed.enrol().task(2)
        return 2, fed.resigned(task, **change(fed, task))

    return play


def task_after_uploads(sum_number: int = 0, **changes: Any) -> Play:
    """Everybody answered the sum; then another task for the same sum comes."""

    def play(fed: Federation) -> tuple[int, Message]:
        fed.enrol().settle()
        return 2, fed.task(2, sum_number, **changes)

    return play


def older_sum(fed: Federation) -> tuple[int, Message]:
    """Sum 0 was skipped: nothing was said in it, and nothing ever will be."""
    fed.enrol().settle(sum_number=1)
    return 2, fed.task(2, 0, model=OTHER_MODEL)


def replayed_task(fed: Federation) -> tuple[int, Message]:
    task = fed.enrol().task(2)
    fed.shares(fed.uploads())
    fed.settle(sum_number=1, model=OTHER_MODEL)
    return 2, task


def model_again(fed: Federation) -> tuple[int, Message]:
    fed.enrol()
    fed.shares(fed.uploads())
    fed.due = 1, {"model": OTHER_MODEL}
    return 2, fed.task(2, 1, round_number=2)


def model_again_after_a_sum_without_somebody(fed: Federation) -> tuple[int, Message]:
    uploads = fed.enrol().settle(0, 1, 2)
    fed.shares(fed.settled, fed.votes(fed.settled))
    fed.settled, fed.due = {}, (1, {"model": OTHER_MODEL})
    assert len(uploads) == 4
    return 2, fed.task(2, 1)


def model_again_in_another_run(fed: Federation) -> tuple[int, Message]:
    fed.enrol()
    fed.shares(fed.uploads())
    fed.next_epoch(OTHER_RUN).enrol()
    fed.due = 0, {"model": OTHER_MODEL}
    return 2, fed.task(2)


def ciphertext_altered(fed: Federation, task: RoundTask) -> dict[str, Any]:
    return {"ciphertexts": exchanged(task.ciphertexts, 0, flipped(task.ciphertexts[0]))}


def ciphertext_for_another(fed: Federation, task: RoundTask) -> dict[str, Any]:
    """What member 0 sent to member 3."""
    sent = fed.agreements[0]
    return {
        "ciphertexts": exchanged(task.ciphertexts, 0, sent.ciphertexts[2]),
        "ciphertext_signatures": exchanged(
            task.ciphertext_signatures, 0, sent.ciphertext_signatures[2]
        ),
    }


def ciphertext_signed(fed: Federation, task: RoundTask, ciphertext: bytes) -> dict[str, Any]:
    """Member 0 helps: it signs what it is told."""
    message = Encapsulated(task.run, 0, 2, ciphertext)
    signature = sign(message, fed.identities[0]).signature
    return {
        "ciphertexts": exchanged(task.ciphertexts, 0, ciphertext),
        "ciphertext_signatures": exchanged(task.ciphertext_signatures, 0, signature),
    }


def task_without_invitation(fed: Federation) -> tuple[int, Message]:
    task = RoundTask(
        run="",
        sum_number=0,
        round_number=1,
        purpose=Purpose.TRAIN,
        exponents=fed.manifest.exponents,
        model_digest=digest_of_model(MODEL),
        ciphertexts=(),
        ciphertext_signatures=(),
        revoked=fed.revoked(),
        model=MODEL,
    )
    return 0, fed.sign(task)


def task_before_the_roster(run: str | None = None) -> Play:
    def play(fed: Federation) -> tuple[int, Message]:
        fed.invite()
        return 0, fed.task(0, **({} if run is None else {"run": run}))

    return play


def task_of_an_earlier_epoch(fed: Federation) -> tuple[int, Message]:
    task = fed.enrol().task(2)
    fed.next_epoch().enrol()
    return 2, task


def task_after_its_epoch(fed: Federation) -> tuple[int, Message]:
    until = int(START.timestamp()) + 86_400
    fed.manifest = fed.manifest.model_copy(update={"valid_until": until})
    fed.enrol()
    fed.wait(days=2)
    return 2, fed.task(2)


def task_after_the_coordinators_certificate(fed: Federation) -> tuple[int, Message]:
    fed.enrol()
    fed.wait(days=31)
    return 2, fed.task(2)


def task_after_a_members_certificate(fed: Federation) -> tuple[int, Message]:
    older = fed.issue("site-2", key=fed.identities[1].key, at=START - timedelta(days=20))
    fed.members[1] = replace(fed.members[1], credentials=lambda: Credentials(older, fed.trust))
    fed.enrol()
    fed.wait(days=11)
    return 2, fed.task(2)


TASKS: Cases = {
    "R3": {
        "a ciphertext altered": task_altered(ciphertext_altered),
        "two ciphertexts in each other's place": task_altered(
            lambda _, task: {
                "ciphertexts": task.ciphertexts[::-1],
                "ciphertext_signatures": task.ciphertext_signatures[::-1],
            }
        ),
        "a ciphertext that was sent to another member": task_altered(ciphertext_for_another),
        "a ciphertext that is too short, signed by its sender": task_altered(
            lambda fed, task: ciphertext_signed(fed, task, task.ciphertexts[0][:-1])
        ),
        "a ciphertext that the coordinator signed itself": task_altered(
            lambda fed, task: {
                "ciphertext_signatures": exchanged(
                    task.ciphertext_signatures,
                    0,
                    fed.sign(Encapsulated(task.run, 0, 2, task.ciphertexts[0])).signature,
                )
            }
        ),
        "one ciphertext too few": task_altered(
            lambda _, task: {"ciphertexts": task.ciphertexts[:1]}
        ),
        "no ciphertexts": tasked(ciphertexts=(), ciphertext_signatures=()),
        "a member was revoked since": task_altered(
            lambda fed, _: {"revoked": fed.revoked(fed.identities[0])}
        ),
        "the coordinator was revoked since": task_altered(
            lambda fed, _: {"revoked": fed.revoked(fed.credentials.identity)}
        ),
        "a stale list of the revoked with a task": task_altered(
            lambda fed, _: {"revoked": stale(fed)}
        ),
        "no list of the revoked with a task": tasked(revoked=b""),
        "a list of the revoked from another authority with a task": task_altered(
            lambda fed, _: {"revoked": fed.revoked(by=stranger())}
        ),
        "a task after the coordinator's certificate expired": (
            task_after_the_coordinators_certificate
        ),
        "a task after a member's certificate expired": task_after_a_members_certificate,
    },
    "R2": {
        "a task after its epoch has ended": task_after_its_epoch,
    },
    "R4": {
        "a sum beyond the last": tasked(sum_number=99),
        "the sum just beyond the last": lambda fed: (2, fed.enrol().task(2, fed.manifest.num_sums)),
        "a sum before the first": tasked(sum_number=-1),
        "a sum before the last one answered": older_sum,
        "a task of an earlier sum comes again": replayed_task,
        "a model that was answered comes again": model_again,
        "the same model again, for the one who dropped": model_again_after_a_sum_without_somebody,
        "a model that was answered comes again in another run": model_again_in_another_run,
        "a model that is too short": tasked(model=MODEL[:-1]),
        "a model that is too long": tasked(model=np.append(MODEL, MODEL)),
        "a model unlike its digest": tasked(model_digest=digest_of_model(OTHER_MODEL)),
        "a model without a digest": tasked(model_digest=""),
        "a model of NaN": tasked(model=MODEL * np.float32(np.nan)),
        "a model with one infinity": tasked(model=np.append(MODEL[:-1], np.float32(np.inf))),
        "one step too few": tasked(exponents=(-10,)),
        "one step too many": tasked(exponents=(-10, -10, -10)),
        "a step so large that updates become zero": tasked(exponents=(-10, 61)),
        "a step so small that everything is clipped": tasked(exponents=(-121, -10)),
        "training for a round beyond the study": tasked(round_number=4),
        "training for round 0": tasked(round_number=0),
    },
    "R5": {
        "a second task for one sum: another model": task_after_uploads(model=OTHER_MODEL),
        "a second task for one sum: other steps": task_after_uploads(exponents=(-9, -9)),
        "a second task for one sum: another purpose": task_after_uploads(purpose=Purpose.VALIDATE),
        "a second task for one sum: another round": task_after_uploads(round_number=2),
    },
    "R7": {
        "a task of another run": tasked(run="0" * 64),
        "a task of no run": tasked(run=""),
        "a task of an earlier epoch": task_of_an_earlier_epoch,
        "a task before an invitation": task_without_invitation,
        "a task before the roster": task_before_the_roster(),
        "a task of no run before the roster": task_before_the_roster(run=""),
    },
}


# Exchange 2: who survived

View = Callable[[Federation], tuple[tuple[int, ...], tuple[bytes, ...]]]


def arrived(fed: Federation) -> dict[int, bytes]:
    """Everybody's header; the upload of member 3 came too late."""
    uploads = fed.enrol().settle(0, 1, 2)
    return {site: upload.header for site, upload in uploads.items()}


def view_of(*survivors: int) -> View:
    """True headers, listed as the coordinator likes."""

    def view(fed: Federation) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        headers = arrived(fed)
        return survivors, tuple(headers[site % 4] for site in survivors)

    return view


def view_with(site: int, header: Callable[[Federation, dict[int, bytes]], bytes]) -> View:
    """A view in which one header was replaced."""

    def view(fed: Federation) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        headers = arrived(fed)
        headers[site] = header(fed, headers)
        survivors = (0, 1, 2) if site < 3 else (0, 1, 2, 3)
        return survivors, tuple(headers[k] for k in survivors)

    return view


def signed_by(signer: int, site: int, /, **changes: Any) -> View:
    """One header altered and signed again."""
    return view_with(
        site,
        lambda fed, headers: (
            replace(Header.decode(headers[site]), **changes).signed(fed.identities[signer]).encode()
        ),
    )


def one_header_too_few(fed: Federation) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    headers = arrived(fed)
    return (0, 1, 2), (headers[0], headers[1])


def one_header_too_many(fed: Federation) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    return (0, 1, 2), tuple(arrived(fed).values())


def header_of_the_last_sum(fed: Federation) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    old = fed.enrol().uploads()
    fed.settle(0, 1, 2, sum_number=1)
    return (0, 1, 2), (fed.settled[0].header, old[1].header, fed.settled[2].header)


def header_of_the_last_epoch(fed: Federation) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    old = fed.enrol().uploads()
    fed.next_epoch().enrol().settle(0, 1, 2, sum_number=1)
    return (0, 1, 2), (fed.settled[0].header, old[1].header, fed.settled[2].header)


def header_of_another_task(fed: Federation) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    """Member 1 was sent another model; its masks would not cancel."""
    fed.enrol()
    other = fed.ask(1, fed.task(1, model=OTHER_MODEL), Upload)
    fed.settled = {site: fed.ask(site, fed.task(site), Upload) for site in (0, 2, 3)}
    return (0, 1, 2), (fed.settled[0].header, other.header, fed.settled[2].header)


VIEWS: dict[str, dict[str, View]] = {
    "R9": {
        "survivors out of order": view_of(1, 0, 2),
        "a survivor twice": view_of(0, 1, 1, 2),
        "a survivor twice, to reach the threshold": view_of(0, 1, 1),
        "a survivor beyond the members": view_of(0, 1, 2, 7),
        "a survivor before the first": view_of(-1, 0, 1, 2),
        "one header too few": one_header_too_few,
        "one header too many": one_header_too_many,
    },
    "R10": {
        "fewer survivors than the threshold": view_of(0, 1),
        "this site alone": view_of(0),
        "nobody": view_of(),
        "this site's own upload called late": view_of(1, 2, 3),
        "this site's own header altered": view_with(0, lambda _, headers: flipped(headers[0], 200)),
        "this site's own header signed anew": signed_by(0, 0),
        "another site's header in this site's place": view_with(0, lambda _, known: known[1]),
    },
    "R11": {
        "another header altered": view_with(1, lambda _, known: flipped(known[1], 200)),
        "another header signed by a third site": signed_by(2, 1),
        "survivors padded with an invented header": signed_by(2, 3, body=bytes(32)),
        "another header in a third site's place": view_with(1, lambda _, known: known[2]),
        "a header that names another site": signed_by(1, 1, site=2),
        "a header that is none": view_with(1, lambda *_: b"header"),
        "no header": view_with(1, lambda *_: b""),
        "a header for fewer members": signed_by(1, 1, commitments=bytes(96)),
        "a header of the sum before": header_of_the_last_sum,
        "a header of the epoch before": header_of_the_last_epoch,
        "a header of another task": header_of_another_task,
    },
}


def shown(view: View, kind: type[Survivors | Unmask]) -> Play:
    """A view as a request to vote, or at once as one to unmask."""

    def play(fed: Federation) -> tuple[int, Message]:
        survivors, headers = view(fed)
        number, _ = fed.due
        if kind is Survivors:
            return 0, fed.sign(Survivors(fed.run.hex(), number, survivors, headers))
        request = fed.request(0, fed.settled)
        return 0, fed.resigned(request, survivors=survivors, headers=headers)

    return play


def about_another_run(kind: type[Survivors | Unmask]) -> Play:
    def play(fed: Federation) -> tuple[int, Message]:
        fed.enrol().settle(0, 1, 2)
        message = fed.view(fed.settled) if kind is Survivors else fed.request(0, fed.settled)
        return 0, fed.resigned(message, run="0" * 64)

    return play


def before_any_upload(fed: Federation) -> tuple[int, Message]:
    fed.enrol()
    return 0, fed.sign(Survivors(fed.run.hex(), 0, (0, 1, 2), (b"", b"", b"")))


def about_a_sum_to_come(fed: Federation) -> tuple[int, Message]:
    fed.enrol().settle(0, 1, 2)
    return 0, fed.resigned(fed.view(fed.settled), sum_number=1)


def about_the_last_sum(kind: type[Survivors | Unmask]) -> Play:
    """Sum 0 was void; nobody may be talked into it once sum 1 began."""

    def play(fed: Federation) -> tuple[int, Message]:
        old = fed.enrol().uploads()
        message = fed.view(old) if kind is Survivors else fed.request(0, old)
        fed.settle(sum_number=1)
        return 0, message

    return play


def about_a_sum_of_the_last_epoch(fed: Federation) -> tuple[int, Message]:
    old = fed.enrol().uploads()
    fed.next_epoch().enrol()
    fed.due = 1, {}
    return 0, fed.resigned(fed.request(0, old), run=fed.run.hex())


def vote_after_the_answer(fed: Federation) -> tuple[int, Message]:
    uploads = fed.enrol().settle()
    fed.shares(uploads)
    return 0, fed.view({site: uploads[site] for site in (0, 1, 2)})


def unmask_again_for_fewer(fed: Federation) -> tuple[int, Message]:
    uploads = fed.enrol().settle()
    fed.shares(uploads)
    fewer = {site: uploads[site] for site in (0, 1, 2)}
    return 0, fed.request(0, fewer)


def unmask_again_for_more(fed: Federation) -> tuple[int, Message]:
    uploads = fed.enrol().settle(0, 1, 2)
    fed.shares(fed.settled, fed.votes(fed.settled))
    return 0, fed.request(0, uploads)


def voted_then_another(kind: type[Survivors | Unmask], *others: int) -> Play:
    """Voted for members 0, 1 and 2; then asked about others."""

    def play(fed: Federation) -> tuple[int, Message]:
        uploads = fed.enrol().settle(0, 1, 2)
        fed.votes(fed.settled)
        other = {site: uploads[site] for site in others}
        return 0, fed.view(other) if kind is Survivors else fed.request(0, other)

    return play


SHOWN: Cases = {
    rule: {
        f"{kind.__name__}: {title}": shown(view, kind)
        for kind in (Survivors, Unmask)
        for title, view in views.items()
    }
    for rule, views in VIEWS.items()
}
REQUESTS: Cases = {
    "R7": {
        "Survivors: another run": about_another_run(Survivors),
        "Unmask: another run": about_another_run(Unmask),
    },
    "R8": {
        "unmasking a second time for fewer": unmask_again_for_fewer,
        "unmasking a second time for more": unmask_again_for_more,
    },
    "R11": {
        "a vote for some, then one for others": voted_then_another(Survivors, 0, 2, 3),
        "a vote for some, then one for everybody": voted_then_another(Survivors, 0, 1, 2, 3),
        "a vote for some, then unmasking others": voted_then_another(Unmask, 0, 2, 3),
        "a vote for some, then unmasking everybody": voted_then_another(Unmask, 0, 1, 2, 3),
    },
    "R14": {
        "a vote before any upload": before_any_upload,
        "a vote about a sum to come": about_a_sum_to_come,
        "a vote about the sum before": about_the_last_sum(Survivors),
        "unmasking the sum before": about_the_last_sum(Unmask),
        "unmasking a sum of the epoch before": about_a_sum_of_the_last_epoch,
        "a vote after the answer": vote_after_the_answer,
    },
}


def voted(change: Callable[[Federation, dict[int, Vote]], dict[str, Any]]) -> Play:
    """Member 3 dropped; the others voted, and the request to unmask holds other votes."""

    def play(fed: Federation) -> tuple[int, Message]:
        fed.enrol().settle(0, 1, 2)
        votes = fed.votes(fed.settled)
        request = fed.request(0, fed.settled, votes)
        return 0, fed.resigned(request, **change(fed, votes))

    return play


def listed(votes: Mapping[int, Vote]) -> dict[str, Any]:
    return {"voters": tuple(votes), "votes": tuple(vote.signature for vote in votes.values())}


def voted_instead(site: int, signer: int, **changes: Any) -> Play:
    """One vote replaced by another one, signed by somebody."""
    return voted(
        lambda fed, votes: listed(
            {**votes, site: sign(replace(votes[site], **changes), fed.identities[signer])}
        )
    )


VOTES: Cases = {
    "R12": {
        "no votes": voted(lambda *_: {"voters": (), "votes": ()}),
        "one vote too few": voted(lambda _, votes: listed({k: votes[k] for k in (0, 1)})),
        "a vote counted twice": voted(
            lambda _, votes: {
                "voters": (0, 1, 1),
                "votes": tuple(votes[site].signature for site in (0, 1, 1)),
            }
        ),
        "the vote of a site that dropped": voted(
            lambda fed, votes: listed(
                {0: votes[0], 1: votes[1], 3: sign(replace(votes[1], site=3), fed.identities[3])}
            )
        ),
        "the vote of nobody": voted(
            lambda _, votes: listed({0: votes[0], 1: votes[1], 9: votes[2]})
        ),
        "a forged vote": voted(
            lambda _, votes: listed({**votes, 2: replace(votes[2], signature=bytes(70))})
        ),
        "an altered vote": voted(
            lambda _, votes: listed(
                {**votes, 2: replace(votes[2], signature=flipped(votes[2].signature, 30))}
            )
        ),
        "a vote signed by another site": voted_instead(2, 1),
        "a vote signed by the coordinator": voted(
            lambda fed, votes: listed({**votes, 2: fed.sign(votes[2])})
        ),
        "another site's vote in a site's place": voted(
            lambda _, votes: listed({**votes, 2: votes[1]})
        ),
        "a vote for other survivors": voted_instead(2, 2, view=bytes(32)),
        "a vote about another sum": voted_instead(2, 2, sum_number=1),
        "a vote of another run": voted_instead(2, 2, run="0" * 64),
        "one vote's signature missing": voted(
            lambda _, votes: {"votes": tuple(vote.signature for vote in votes.values())[:2]}
        ),
    },
}


def asked(change: Callable[[Unmask, dict[int, Upload]], dict[str, Any]]) -> Play:
    """Everybody is there; the request to unmask holds other shares."""

    def play(fed: Federation) -> tuple[int, Message]:
        uploads = fed.enrol().settle()
        request = fed.request(0, uploads)
        return 0, fed.resigned(request, **change(request, uploads))

    return play


def share_of_the_sum_before(fed: Federation) -> tuple[int, Message]:
    old = fed.enrol().uploads()
    uploads = fed.settle(sum_number=1)
    request = fed.request(0, uploads)
    return 0, fed.resigned(request, sealed=exchanged(request.sealed, 1, old[1].sealed[0]))


def relayed_with_its_commitments(request: Unmask, uploads: dict[int, Upload]) -> dict[str, Any]:
    """What member 1 sealed for member 2 comes to member 0."""
    return {
        "sealed": exchanged(request.sealed, 1, uploads[1].sealed[2]),
        "share_commitments": exchanged(
            request.share_commitments, 1, uploads[1].share_commitments[2]
        ),
    }


def relayed_with_its_digest(request: Unmask, uploads: dict[int, Upload]) -> dict[str, Any]:
    changed = relayed_with_its_commitments(request, uploads)
    own = row_digest(changed["share_commitments"][1], changed["sealed"][1])
    digests = own + request.row_digests[1][len(own) :]
    return {**changed, "row_digests": exchanged(request.row_digests, 1, digests)}


SHARES: Cases = {
    "R13": {
        "a sealed share altered": asked(
            lambda request, _: {"sealed": exchanged(request.sealed, 1, flipped(request.sealed[1]))}
        ),
        "a sealed share cut off": asked(
            lambda request, _: {"sealed": exchanged(request.sealed, 1, request.sealed[1][:-1])}
        ),
        "an empty sealed share": asked(
            lambda request, _: {"sealed": exchanged(request.sealed, 1, b"")}
        ),
        "two sealed shares in each other's place": asked(
            lambda request, _: {"sealed": swapped(request.sealed, 1, 2)}
        ),
        "two sealed shares with their commitments in each other's place": asked(
            lambda request, _: {
                "sealed": swapped(request.sealed, 1, 2),
                "share_commitments": swapped(request.share_commitments, 1, 2),
            }
        ),
        "a share that was sealed for another site": asked(
            lambda request, uploads: {"sealed": exchanged(request.sealed, 1, uploads[1].sealed[2])}
        ),
        "a share for another site with its commitments": asked(relayed_with_its_commitments),
        "a share for another site with its digest": asked(relayed_with_its_digest),
        "a share of the sum before": share_of_the_sum_before,
        "a commitment altered": asked(
            lambda request, _: {
                "share_commitments": exchanged(
                    request.share_commitments, 1, flipped(request.share_commitments[1])
                )
            }
        ),
        "a commitment cut off": asked(
            lambda request, _: {
                "share_commitments": exchanged(
                    request.share_commitments, 1, request.share_commitments[1][:-1]
                )
            }
        ),
        "a digest of another row altered": asked(
            lambda request, _: {
                "row_digests": exchanged(
                    request.row_digests, 1, flipped(request.row_digests[1], 100)
                )
            }
        ),
        "one digest too few": asked(
            lambda request, _: {
                "row_digests": exchanged(request.row_digests, 1, request.row_digests[1][:-32])
            }
        ),
        "one sealed share too few": asked(lambda request, _: {"sealed": request.sealed[1:]}),
        "one row of commitments too many": asked(
            lambda request, _: {"share_commitments": (*request.share_commitments, b"")}
        ),
        "no digests": asked(lambda *_: {"row_digests": ()}),
    },
}


# Every kind of message, unsigned or signed by somebody else


def an_invitation(fed: Federation) -> tuple[Message, dict[str, Any]]:
    fed.clock += timedelta(minutes=1)
    return fed.invitation(), {"revoked": fed.revoked()}


def a_roster(fed: Federation) -> tuple[Message, dict[str, Any]]:
    fed.invite()
    fed.clock += timedelta(minutes=1)
    return fed.roster(), {"revoked": fed.revoked()}


def a_task(fed: Federation) -> tuple[Message, dict[str, Any]]:
    return fed.enrol().task(0), {"round_number": 2}


def a_view(fed: Federation) -> tuple[Message, dict[str, Any]]:
    uploads = fed.enrol().settle(0, 1, 2)
    everybody = fed.view(uploads)
    changes = {"survivors": everybody.survivors, "headers": everybody.headers}
    return fed.view(fed.settled), changes


def a_request(fed: Federation) -> tuple[Message, dict[str, Any]]:
    fed.enrol().settle(0, 1, 2)
    request = fed.request(0, fed.settled, fed.votes(fed.settled))
    return request, {"voters": request.voters[::-1], "votes": request.votes[::-1]}


HONEST = {
    "R3": {"an invitation": an_invitation},
    "R7": {
        "a roster": a_roster,
        "a task": a_task,
        "a view": a_view,
        "a request to unmask": a_request,
    },
}
FORGERIES: dict[str, Callable[[Federation, Any, dict[str, Any]], Message]] = {
    "unsigned": lambda _, message, __: replace(message, signature=b""),
    "with a signature that is none": lambda _, message, __: replace(message, signature=bytes(71)),
    "signed by a member": lambda fed, message, _: sign(message, fed.identities[3]),
    "signed by another coordinator": lambda fed, message, _: sign(
        message, fed.issue("coordinator", "coordinator")
    ),
    "altered after it was signed": lambda _, message, changes: replace(message, **changes),
}


def forged(honest: Callable[[Federation], tuple[Message, dict[str, Any]]], how: str) -> Play:
    def play(fed: Federation) -> tuple[int, Message]:
        message, changes = honest(fed)
        return 0, FORGERIES[how](fed, message, changes)

    return play


SIGNATURES: Cases = {
    rule: {
        f"{kind} {how}": forged(honest, how) for kind, honest in kinds.items() for how in FORGERIES
    }
    for rule, kinds in HONEST.items()
}


def an_answer(kind: type[Message]) -> Play:
    """What sites say does not come to a site."""

    def play(fed: Federation) -> tuple[int, Message]:
        uploads = fed.enrol().settle()
        said: dict[type, Message] = {
            SiteKeys: fed.keys[1],
            Agreement: fed.agreements[1],
            Upload: uploads[1],
            Refusal: Refusal(fed.run.hex(), "policy"),
        }
        return 0, said[kind]

    return play


ANSWERS: Cases = {
    "R7": {
        f"{kind.__name__} of another site, sent to a site": an_answer(kind)
        for kind in (SiteKeys, Agreement, Upload, Refusal)
    }
}

CASES = by_title(INVITATIONS, ROSTERS, TASKS, SHOWN, REQUESTS, VOTES, SHARES, SIGNATURES, ANSWERS)


@pytest.mark.parametrize("title", CASES)
def test_a_site_refuses_and_the_honest_sum_goes_on(title: str, federation: Federation) -> None:
    play, rule = CASES[title]
    site, message = play(federation)
    before = federation.memory(site)
    with pytest.raises(RemoteProtocolError) as refused:
        federation.ask(site, message, object)
    assert refused.value.rule == rule
    (kept,) = federation.evidence(site)
    assert (kept["rule"], kept["message"]) == (rule, plain(message))
    assert federation.memory(site) == before
    federation.finish()
    assert not evidence_in(federation.folder / "run")


def test_every_rule_about_messages_is_in_the_table() -> None:
    rules = {rule for _, rule in CASES.values()}
    assert rules == {f"R{number}" for number in range(1, 15)} - {"R6"}  # R6: the journal, below


# What is said again


def test_the_identical_message_gets_the_identical_answer(federation: Federation) -> None:
    fed = federation
    fed.enrol().settle(0, 1, 2)
    votes = fed.votes(fed.settled)
    request = fed.request(0, fed.settled, votes)
    said = fed.ask(0, request, Shares)
    assert fed.ask(0, request, Shares) == said
    assert fed.ask(0, fed.view(fed.settled), Vote) == votes[0]
    stored = fed.ask(0, fed.task(0), Upload)
    assert plain(stored) == plain(fed.settled[0])
    fed.next_epoch().enrol()
    assert fed.ask(0, fed.roster(), Agreement) == fed.agreements[0]
    fed.next_epoch().invite()
    assert fed.ask(0, fed.invitation(), SiteKeys) == fed.keys[0]
    assert not fed.evidence(0)


def test_a_renewed_certificate_of_the_same_key_is_no_stranger(federation: Federation) -> None:
    federation.invite()
    renewed = certified_again(federation)
    federation.keys[2] = federation.keys_signed(2, certificate=renewed.certificate)
    assert federation.ask(0, federation.roster(), Agreement).run == federation.run.hex()
