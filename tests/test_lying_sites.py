"""What a coordinator refuses from a site: the liar is named, its lie is kept, the sum is exact.

Every run is compared with one in which nobody lies and the same sites take part.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from faulty_network import FaultyNetwork
from hostile import (
    BAD_SHARES,
    LOW_ORDER,
    by_title,
    exchanged,
    flipped,
    on_unknown_curve,
    plain,
    rebound,
    stranger,
    swapped,
    with_row,
    wrong_share,
)
from liars import Hospitals, Liar, Lie, Run

from client.readers import phantom as phantoms
from common.audit import GENESIS
from common.authority import Authority
from common.errors import RoundAborted
from common.identity import Identity, Role
from common.manifest import Manifest
from common.messages import (
    Agreement,
    Encapsulated,
    Message,
    RoundTask,
    Shares,
    SiteKeys,
    Upload,
    Vote,
    digest_of_model,
)
from common.phantom import draw_patient
from common.secagg.header import Header
from common.signing import sign
from common.statement import Statement
from common.throwaway import coordinator_credentials
from server.network import Enough, never


@pytest.fixture
def make_hospitals(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Hospitals]:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test here cuts the power
    monkeypatch.setattr(phantoms, "draw_patient", drawn_once)
    return lambda num_sites=4, **more: Hospitals(
        tmp_path_factory.mktemp("hospitals"), num_sites, **more
    )


drawn_once = functools.cache(draw_patient)
HONEST_RUNS: dict[tuple[Any, ...], str] = {}


@pytest.fixture
def honest(make_hospitals: Callable[..., Hospitals]) -> Callable[..., str]:
    """The final model of a run in which nobody lies.

    ``silent`` sites miss the first sum; ``absent`` ones never take part; ``leaving`` ones are
    revoked after the first sum, or after it was void.
    """

    def final(
        num_sites: int = 4,
        *,
        silent: tuple[str, ...] = (),
        absent: tuple[str, ...] = (),
        leaving: tuple[str, ...] = (),
        num_rounds: int = 1,
    ) -> str:
        known = (num_sites, silent, absent, leaving, num_rounds)
        if known not in HONEST_RUNS:
            hospitals = make_hospitals(num_sites, num_rounds=num_rounds).silent(*silent)
            hospitals.network.absent = set(absent)
            watcher = hospitals.watcher
            watcher.voided = watcher.finished_round = lambda _: hospitals.revoke(*leaving)
            HONEST_RUNS[known] = hospitals.run().final
        return HONEST_RUNS[known]

    return final


def check_kept(run: Run, liar: Liar, rule: str) -> None:
    """The coordinator has kept the lie, with whose it is and why it was refused."""
    found = [line for line in run.evidence if line["from"] == liar.site.name]
    assert found
    assert {line["rule"] for line in found} == {rule}
    assert [line["message"] for line in found] == [plain(reply) for reply in liar.said]


# Keys


def keys_with(**changes: Any) -> Lie:
    return lambda liar, _, reply: sign(replace(reply, **changes), liar.identity)


def keys_of(certificate: Callable[[Liar], Identity]) -> Lie:
    """Keys under another certificate, signed with its key."""

    def lie(liar: Liar, _: Message, reply: Message) -> Message:
        identity = certificate(liar)
        return sign(replace(reply, certificate=identity.certificate), identity)

    return lie


def certified(
    liar: Liar, *, by: Authority | None = None, role: Role = "site", days_ago: int = 0
) -> Identity:
    """The liar's key with another certificate."""
    key, issued = liar.identity.key, datetime.now(UTC) - timedelta(days=days_ago)
    certificate = (by or liar.authority).issue(
        liar.site.name, role, key.public_key(), issued, days=30
    )
    return replace(liar.identity, certificate=certificate.public_bytes(Encoding.DER))


def copied(name: str) -> Lie:
    """Another site's key, which the two share or the coordinator passed on."""

    def lie(liar: Liar, _: Message, reply: Message) -> Message:
        other = {name: getattr(liar.heard["site-1", SiteKeys], name)}
        return sign(replace(reply, **other), liar.identity)

    return lie


KEY_LIES = by_title(
    {
        "R3": {
            "unsigned": lambda _, __, reply: replace(reply, signature=b""),
            "signed by another site": lambda liar, _, reply: sign(reply, liar.key_of("site-1")),
            "of another epoch": keys_with(run="0" * 64),
            "with an X25519 key of 31 bytes": keys_with(public_key=bytes(31)),
            "with an ML-KEM key of 1183 bytes": keys_with(kem_key=bytes(1183)),
            "without a nonce": keys_with(nonce=b""),
            "with another site's certificate": keys_of(lambda liar: liar.key_of("site-1")),
            "with a certificate of another authority": keys_of(
                lambda liar: certified(liar, by=stranger())
            ),
            "with a certificate that has expired": keys_of(
                lambda liar: certified(liar, days_ago=60)
            ),
            "with the certificate of a coordinator": keys_of(
                lambda liar: certified(liar, role="coordinator")
            ),
            "with a certificate on an unknown curve": keys_of(
                lambda liar: on_unknown_curve(liar.identity)
            ),
            "with a point of low order": keys_with(public_key=LOW_ORDER["of order eight"]),
            "with an ML-KEM key that is none": keys_with(kem_key=b"\xff" * 1184),
            "with the X25519 key of another site": copied("public_key"),
            "with the ML-KEM key of another site": copied("kem_key"),
        },
        "": {"of another site": lambda liar, *_: liar.heard["site-1", SiteKeys]},
    }
)


@pytest.mark.parametrize("title", KEY_LIES)
def test_who_sends_wrong_keys_is_left_out(
    title: str, make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    lie, rule = KEY_LIES[title]
    hospitals = make_hospitals()
    liar = hospitals.lie("site-4", SiteKeys, lie)
    run = hospitals.run()
    check_kept(run, liar, rule)
    assert run.members == [["site-1", "site-2", "site-3"]]
    assert run.final == honest(absent=("site-4",))


def agreement_with(**changes: Any) -> Lie:
    return lambda liar, _, reply: sign(replace(reply, **changes), liar.identity)


def ciphertexts_with(change: Callable[[bytes], bytes], *, is_signed: bool) -> Lie:
    """Other ciphertexts for everybody."""

    def lie(liar: Liar, _: Message, reply: Message) -> Message:
        assert isinstance(reply, Agreement)
        ciphertexts = tuple(map(change, reply.ciphertexts))
        signatures = reply.ciphertext_signatures
        if is_signed:
            signatures = tuple(
                sign(Encapsulated(reply.run, reply.site, k, one), liar.identity).signature
                for k, one in enumerate(ciphertexts, reply.site + 1)
            )
        changes = {"ciphertexts": ciphertexts, "ciphertext_signatures": signatures}
        return sign(replace(reply, **changes), liar.identity)

    return lie


AGREEMENT_LIES = by_title(
    {
        "R7": {
            "to another roster": agreement_with(run="0" * 64),
        },
        "R3": {
            "unsigned": lambda _, __, reply: replace(reply, signature=b""),
            "signed by another site": lambda liar, _, reply: sign(reply, liar.key_of("site-2")),
            "without ciphertexts": agreement_with(ciphertexts=(), ciphertext_signatures=()),
            "with ciphertexts that it did not sign": ciphertexts_with(flipped, is_signed=False),
            "with ciphertexts that are too short": ciphertexts_with(
                lambda content: content[:-1], is_signed=True
            ),
        },
    }
)


@pytest.mark.parametrize("title", AGREEMENT_LIES)
def test_who_agrees_to_something_else_is_left_out(
    title: str, make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    lie, rule = AGREEMENT_LIES[title]
    hospitals = make_hospitals()
    liar = hospitals.lie("site-1", Agreement, lie)
    run = hospitals.run()
    check_kept(run, liar, rule)
    assert run.members == [["site-2", "site-3", "site-4"]]
    assert run.final == honest(absent=("site-1",))


# Uploads


def bound(header: dict[str, Any] | None = None, **changes: Callable[[Any], Any]) -> Lie:
    """An upload with changed parts, which its header binds."""
    return lambda liar, _, reply: rebound(
        reply,
        liar.site,
        header or {},
        **{name: change(getattr(reply, name)) for name, change in changes.items()},
    )


def loose(**changes: Callable[[Any], Any]) -> Lie:
    """An upload with changed parts, unlike its header."""
    return lambda _, __, reply: replace(
        reply, **{name: change(getattr(reply, name)) for name, change in changes.items()}
    )


def with_header(header: Callable[[Liar, Upload], bytes]) -> Lie:
    return lambda liar, _, reply: replace(reply, header=header(liar, reply))


def stated(**changes: Any) -> Lie:
    """A statement about privacy with the upload."""

    def lie(liar: Liar, _: Message, reply: Message) -> Message:
        epoch = liar.site.journal.epoch()
        assert epoch is not None
        manifest = Manifest.parse(epoch.manifest)
        statement = Statement(
            run=manifest.run,
            study=manifest.study,
            site=liar.site.name,
            sum_number=reply.sum_number,
            epsilon=1.0,
            delta=1e-5,
            unit="patient",
            noise_multiplier=1.0,
            sampling_probability=0.1,
            steps=1,
            accountant="prv",
            randomness="os",
            audit=GENESIS,
            ledger=GENESIS,
        ).model_copy(update=changes)
        text = statement.signed(liar.site.party().identity).model_dump_json()
        return rebound(reply, liar.site, statement=text)

    return lie


UPLOAD_LIES = by_title(
    {
        "R4": {
            "its body is a byte short": bound(body=lambda body: body[:-1]),
            "its body is eight bytes too long": bound(body=lambda body: np.append(body, body[:8])),
            "it has no body": bound(body=lambda body: body[:0]),
        },
        "R11": {
            "its body is altered": loose(body=lambda body: body ^ 1),
            "its body is garbage": loose(
                body=lambda body: np.random.default_rng(1).integers(0, 256, body.size, np.uint8)
            ),
            "a sealed share is altered": loose(
                sealed=lambda sealed: exchanged(sealed, 0, flipped(sealed[0]))
            ),
            "two sealed shares are in each other's place": loose(
                sealed=lambda sealed: swapped(sealed, 0, 1)
            ),
            "a commitment is altered": loose(
                share_commitments=lambda rows: exchanged(rows, 0, flipped(rows[0]))
            ),
            "its statement is altered": loose(statement=lambda _: "{}"),
            "its header is altered": with_header(lambda _, upload: flipped(upload.header, 200)),
            "its header is another site's": with_header(
                lambda liar, _: liar.heard["site-1", Upload].header
            ),
            "its header is signed by another site": with_header(
                lambda liar, upload: (
                    Header.decode(upload.header).signed(liar.key_of("site-1")).encode()
                )
            ),
            "its header is none": with_header(lambda *_: b"header"),
            "its header is missing": with_header(lambda *_: b""),
            "all of it is another site's": lambda liar, *_: liar.heard["site-1", Upload],
        },
        "R7": {
            "its header names another site": bound({"site": 0}),
            "its header names no site": bound({"site": 9}),
            "its header is about another sum": bound({"sum_number": 1}),
            "its header is about another run": bound({"run": bytes(32)}),
            "its header is about another task": bound({"task": bytes(32)}),
            "its header is for three members": bound({"commitments": bytes(96)}),
            "it names another sum": loose(sum_number=lambda number: number + 1),
            "it names another run": loose(run=lambda _: "0" * 64),
            "it is no upload": lambda liar, *_: liar.heard["site-1", Agreement],
        },
        "R13": {
            "it has no sealed shares": bound(sealed=lambda _: (b"",) * 4),
            "a sealed share is cut off": bound(
                sealed=lambda sealed: exchanged(sealed, 0, sealed[0][:-1])
            ),
            "it sealed a share for itself": bound(
                sealed=lambda sealed: exchanged(sealed, 3, sealed[0])
            ),
            "a row of commitments is cut off": bound(
                share_commitments=lambda rows: exchanged(rows, 0, rows[0][:-1])
            ),
        },
        "": {
            "it states a privacy that nobody promised": stated(),
            "it states the privacy of another site": stated(site="site-1"),
            "it states the privacy of another run": stated(run="0" * 32),
            "its statement is none": bound(statement=lambda _: '{"epsilon": 0}'),
        },
    }
)


@pytest.mark.parametrize("title", UPLOAD_LIES)
def test_an_upload_that_is_not_as_it_must_be_is_left_out_of_the_sum(
    title: str, make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    lie, rule = UPLOAD_LIES[title]
    hospitals = make_hospitals()
    liar = hospitals.lie("site-4", Upload, lie, number=0)
    run = hospitals.run()
    check_kept(run, liar, rule)
    (line,) = run.rounds
    assert line["survivors"] == ["site-1", "site-2", "site-3"]
    assert line["refusals"] == {"site-4": "protocol"}
    assert run.final == honest(silent=("site-4",)) != honest()


def test_the_upload_of_a_site_that_got_another_model_is_left_out_of_the_sum(
    make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    hospitals = make_hospitals()
    coordinator = coordinator_credentials(
        hospitals.folder / "hospitals", hospitals.study.site_names
    ).identity
    ask = hospitals.network.answers["site-4"]
    said: list[Message] = []

    def another_model(message: Message) -> Message:
        if not isinstance(message, RoundTask) or message.sum_number:
            return ask(message)
        model = message.model + np.float32(1)
        other = replace(message, model=model, model_digest=digest_of_model(model))
        said.append(ask(sign(other, coordinator)))
        return said[-1]

    hospitals.network.answers["site-4"] = another_model
    run = hospitals.run()
    (kept,) = run.evidence
    assert (kept["from"], kept["rule"], kept["message"]) == ("site-4", "R7", plain(said[0]))
    assert run.final == honest(silent=("site-4",))


class Twice(FaultyNetwork):
    """Every answer arrives two times."""

    def ask(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        for answered in super().ask(messages, deadline_s, enough):
            yield from (answered, answered)


def test_an_answer_that_arrives_twice_counts_once(
    make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    hospitals = make_hospitals()
    hospitals.network = Twice(hospitals.network.answers)
    run = hospitals.run()
    assert run.rounds[0]["survivors"] == ["site-1", "site-2", "site-3", "site-4"]
    assert run.final == honest()


# Votes: seven sites, one of which dropped; another one lies, and is not needed


def vote_with(**changes: Any) -> Lie:
    return lambda liar, _, vote: sign(replace(vote, **changes), liar.identity)


VOTE_LIES = by_title(
    {
        "R11": {
            "for other survivors": vote_with(view=bytes(32)),
            "about another sum": vote_with(sum_number=1),
            "in another run": vote_with(run="0" * 64),
            "of another site": lambda liar, *_: liar.heard["site-1", Vote],
            "that is none": lambda liar, *_: liar.heard["site-1", Upload],
        },
        "R12": {
            "unsigned": lambda _, __, vote: replace(vote, signature=b""),
            "signed by another site": lambda liar, _, vote: sign(vote, liar.key_of("site-1")),
        },
    }
)


@pytest.mark.parametrize("title", VOTE_LIES)
def test_a_wrong_vote_does_not_count(
    title: str, make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    lie, rule = VOTE_LIES[title]
    hospitals = make_hospitals(7).silent("site-7")
    liar = hospitals.lie("site-6", Vote, lie, number=0)
    run = hospitals.run()
    check_kept(run, liar, rule)
    assert run.rounds[0]["survivors"] == [f"site-{k}" for k in range(1, 7)]
    assert run.final == honest(7, silent=("site-7",))


# Shares: one site's are not needed


def shares_with(change: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]) -> Lie:
    return lambda liar, _, reply: sign(replace(reply, shares=change(reply.shares)), liar.identity)


UNLIKE, WRONG_LENGTH = (
    "returned shares unlike their commitments",
    "returned shares of the wrong length",
)
SHARE_LIES: dict[str, tuple[Lie, str, str]] = {  # the rule, and of what the site is convicted
    "one of them altered": (
        shares_with(lambda shares: exchanged(shares, 0, flipped(shares[0]))),
        "R13",
        UNLIKE,
    ),
    "its own altered": (
        shares_with(lambda shares: exchanged(shares, 3, flipped(shares[3]))),
        "R13",
        UNLIKE,
    ),
    "all of them zero": (shares_with(lambda shares: (bytes(32),) * len(shares)), "R13", UNLIKE),
    "two in each other's place": (
        shares_with(lambda shares: swapped(shares, 0, 1)),
        "R13",
        UNLIKE,
    ),
    "one cut off": (
        shares_with(lambda shares: exchanged(shares, 0, shares[0][:-1])),
        "R13",
        WRONG_LENGTH,
    ),
    "one too few": (shares_with(lambda shares: shares[1:]), "R13", WRONG_LENGTH),
    "one too many": (shares_with(lambda shares: (*shares, bytes(32))), "R13", WRONG_LENGTH),
    "a complaint beside the share": (
        lambda liar, _, reply: sign(replace(reply, complaints=(0,)), liar.identity),
        "R13",
        WRONG_LENGTH,
    ),
    "unsigned": (lambda _, __, reply: replace(reply, signature=b""), "R13", ""),
    "signed by another site": (
        lambda liar, _, reply: sign(reply, liar.key_of("site-1")),
        "R13",
        "",
    ),
    "of another site": (lambda liar, *_: liar.heard["site-1", Shares], "R8", ""),
    "about other survivors": (
        lambda liar, _, reply: sign(replace(reply, view=bytes(32)), liar.identity),
        "R8",
        "",
    ),
    "that are an upload": (lambda liar, *_: liar.heard["site-1", Upload], "R8", ""),
}


@pytest.mark.parametrize("title", SHARE_LIES)
def test_who_returns_wrong_shares_is_named_and_the_sum_is_exact(
    title: str, make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    lie, rule, convicted = SHARE_LIES[title]
    hospitals = make_hospitals()
    liar = hospitals.lie("site-4", Shares, lie, number=0)
    run = hospitals.run()
    check_kept(run, liar, rule)
    (line,) = run.rounds
    assert line["convicted"] == ({"site-4": convicted} if convicted else {})
    assert run.members[1:] == ([["site-1", "site-2", "site-3"]] if convicted else [])
    assert run.final == honest()


def test_who_was_convicted_takes_no_part_in_the_next_round(
    make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    lie, _, convicted = SHARE_LIES["all of them zero"]
    hospitals = make_hospitals(num_rounds=2)
    hospitals.lie("site-4", Shares, lie, number=0)
    run = hospitals.run()
    assert [line["convicted"] for line in run.rounds] == [{"site-4": convicted}, {}]
    assert [len(line["survivors"]) for line in run.rounds] == [4, 3]
    assert run.final == honest(num_rounds=2, leaving=("site-4",)) != honest(num_rounds=2)


COMPLAINTS: dict[str, tuple[type[Message], Lie]] = {
    "a site that lies about it": (
        Shares,
        lambda liar, _, reply: sign(
            replace(reply, complaints=(0,), shares=exchanged(reply.shares, 0, b"")), liar.identity
        ),
    ),
    **{
        f"a share that is {title}": (
            Upload,
            lambda liar, _, reply, bad=bad: bad(reply, liar.site),
        )
        for title, bad in BAD_SHARES.items()
    },
}


@pytest.mark.parametrize("title", COMPLAINTS)
def test_a_complaint_names_the_pair_is_kept_and_the_sum_is_exact(
    title: str, make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    kind, lie = COMPLAINTS[title]
    hospitals = make_hospitals()
    hospitals.lie("site-4", kind, lie, number=0)
    run = hospitals.run()
    complains, sealed = ("site-4", "site-1") if kind is Shares else ("site-1", "site-4")
    (line,) = run.rounds
    assert line["disputes"] == [f"{complains} cannot open the share that {sealed} sealed for it"]
    assert line["convicted"] == {}
    assert run.final == honest()
    signed = [kept["message"] for kept in run.evidence if kept["rule"] == "R13"]
    assert [message["kind"] for message in signed] == ["Shares"]


def test_who_shared_a_wrong_secret_and_committed_to_it_is_convicted(
    make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    def lie(liar: Liar, _: Message, reply: Message) -> Message:
        assert isinstance(reply, Upload)
        sealed, commitments = wrong_share(reply, liar.site, 0)
        return with_row(reply, liar.site, 0, sealed=sealed, commitments=commitments)

    hospitals = make_hospitals()
    hospitals.lie("site-4", Upload, lie, number=0)
    run = hospitals.run()
    (line,) = run.rounds
    assert line["convicted"] == {"site-4": "shared a secret wrongly"}
    assert run.final == honest()
    assert [kept["from"] for kept in run.evidence if kept["rule"] == "R13"] == ["site-4"]


# Keys that a pair does not share: the sum is void, and the next epoch goes on without the liar


def commitments_with(*slots: int) -> Lie:
    """Other commitments to some of the pair keys."""

    def lie(liar: Liar, _: Message, reply: Message) -> Message:
        assert isinstance(reply, Upload)
        known = Header.decode(reply.header).commitments
        for slot in slots:
            known = flipped(known, 32 * slot)
        return rebound(reply, liar.site, {"commitments": known})

    return lie


def check_void(run: Run, *convicted: str) -> None:
    (void,) = run.watcher.voids
    assert tuple(void.convicted) == convicted
    kept = [(line["from"], line["message"]["kind"], line["rule"]) for line in run.evidence]
    assert {(site, "Header", "R13") for site in convicted} <= set(kept)


def test_who_sends_others_wrong_secrets_is_convicted_by_all_of_them(
    make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    hospitals = make_hospitals()
    hospitals.lie("site-1", Agreement, ciphertexts_with(flipped, is_signed=True))
    run = hospitals.run()
    check_void(run, "site-1")
    assert run.members[1:] == [["site-2", "site-3", "site-4"]]
    assert run.final == honest(silent=("site-1", "site-2"), leaving=("site-1",))


def test_who_commits_to_other_keys_than_its_peers_is_convicted(
    make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    hospitals = make_hospitals()
    hospitals.lie("site-4", Upload, commitments_with(0, 1), number=0)
    run = hospitals.run()
    check_void(run, "site-4")
    assert run.final == honest(silent=("site-3", "site-4"), leaving=("site-4",))


def test_of_two_that_disagree_with_each_other_alone_both_are_left_out(
    make_hospitals: Callable[..., Hospitals], honest: Callable[..., str]
) -> None:
    hospitals = make_hospitals(5)
    hospitals.lie("site-5", Upload, commitments_with(0), number=0)
    run = hospitals.run()
    check_void(run, "site-1", "site-5")
    assert run.members[1:] == [["site-2", "site-3", "site-4"]]
    assert run.final == honest(5, silent=("site-1", "site-5"), leaving=("site-1", "site-5"))


def test_a_run_ends_where_fewer_than_three_are_left(
    make_hospitals: Callable[..., Hospitals],
) -> None:
    hospitals = make_hospitals()
    hospitals.lie("site-4", Upload, commitments_with(0), number=0)
    with pytest.raises(RoundAborted, match="2 sites take part, 3 are needed"):
        hospitals.run()
