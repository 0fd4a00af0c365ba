"""What a site checks before it votes for survivors, and before it unmasks: R9 to R12."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import RemoteProtocolError
from common.identity import Identity
from common.messages import Survivors, Unmask, Vote
from common.secagg.header import Header
from common.secagg.view import check_view, check_votes, digest_of_view
from common.signing import sign

RUN, TASK = b"r" * 32, b"t" * 32
NUM_SITES, THRESHOLD, OWN, SUM = 5, 3, 1, 4

Keys = Sequence[ec.EllipticCurvePublicKey]


@pytest.fixture(scope="session")
def keys(members: Sequence[Identity]) -> Keys:
    return [member.key.public_key() for member in members]


@pytest.fixture(scope="session")
def headers(members: Sequence[Identity]) -> list[Header]:
    """Every site's header of one sum, signed."""
    return [header_of(site).signed(member) for site, member in enumerate(members)]


def header_of(site: int, **changed: Any) -> Header:
    header = Header(
        run=RUN, sum_number=SUM, task=TASK, site=site, body=bytes([site]) * 32,
        statement=b"s" * 32, commitments=b"c" * 32 * NUM_SITES, rows=b"w" * 32,
    )  # fmt: skip
    return dataclasses.replace(header, **changed)


def view_of(headers: Sequence[Header], survivors: Sequence[int]) -> Survivors:
    content = tuple(headers[site].encode() for site in survivors)
    return Survivors(RUN.hex(), SUM, tuple(survivors), content)


def unmask_of(view: Survivors, voters: Sequence[int] = (), votes: Sequence[bytes] = ()) -> Unmask:
    return Unmask(
        view.run, view.sum_number, view.survivors, view.headers,
        tuple(voters), tuple(votes), (), (), (),
    )  # fmt: skip


@pytest.mark.parametrize("survivors", [(0, 1, 2, 3, 4), (0, 1, 4), (1, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("kind", ["vote", "unmask"])
def test_a_good_view_gives_every_survivors_header(
    headers: list[Header], keys: Keys, survivors: tuple[int, ...], kind: str
) -> None:
    view: Survivors | Unmask = view_of(headers, survivors)
    if kind == "unmask":
        view = unmask_of(view)
    found = check_view(view, own=headers[OWN], threshold=THRESHOLD, keys=keys)
    assert found == {site: headers[site] for site in survivors}


Change = Callable[[list[Header], Sequence[Identity]], Survivors]


def with_header(site: int, /, **changed: Any) -> Change:
    """A view with one header that its own site signed and that says something else."""

    def make(headers: list[Header], members: Sequence[Identity]) -> Survivors:
        other = dataclasses.replace(headers[site], **changed).signed(members[site])
        return view_of([*headers[:site], other, *headers[site + 1 :]], (0, 1, 2, 3))

    return make


def with_content(site: int, change: Callable[[bytes], bytes]) -> Change:
    """A view with other bytes in the place of one header."""

    def make(headers: list[Header], members: Sequence[Identity]) -> Survivors:
        view = view_of(headers, (0, 1, 2, 3))
        content = [change(one) if k == site else one for k, one in enumerate(view.headers)]
        return dataclasses.replace(view, headers=tuple(content))

    return make


def of_sites(*survivors: int, named: tuple[int, ...] = ()) -> Change:
    """The headers of some sites, under these or under other names."""

    def make(headers: list[Header], members: Sequence[Identity]) -> Survivors:
        return dataclasses.replace(view_of(headers, survivors), survivors=named or survivors)

    return make


def unsigned(content: bytes) -> bytes:
    return dataclasses.replace(Header.decode(content), signature=b"").encode()


def last_bit_flipped(content: bytes) -> bytes:
    return bytes([*content[:-1], content[-1] ^ 1])


def signed_by_another(headers: list[Header], members: Sequence[Identity]) -> Survivors:
    forged = dataclasses.replace(headers[3], signature=b"").signed(members[2])
    return view_of([*headers[:3], forged, headers[4]], (0, 1, 2, 3))


BAD_VIEWS: dict[str, tuple[Change, str, str]] = {
    "survivors are not sorted": (of_sites(0, 2, 1), "R9", "not sorted"),
    "a survivor is there twice": (of_sites(0, 1, 1, 2), "R9", "there twice"),
    "a survivor beyond the members": (
        of_sites(0, 1, 2, named=(0, 1, NUM_SITES)), "R9", "none of the 5 members",
    ),
    "a survivor below the members": (
        of_sites(0, 1, 2, named=(-1, 0, 1)), "R9", "none of the 5 members",
    ),
    "a header is missing": (of_sites(0, 1, 2, named=(0, 1, 2, 3)), "R9", "one header for each"),
    "a header too many": (of_sites(0, 1, 2, 3, named=(0, 1, 2)), "R9", "one header for each"),
    "nobody survived": (of_sites(), "R10", "0 survivors, 3 are needed"),
    "one survivor fewer than the threshold": (of_sites(0, 1), "R10", "2 survivors, 3 are needed"),
    "this site's own header is missing": (of_sites(0, 2, 3), "R10", "own header is missing"),
    "this site's own header stands under another name": (
        of_sites(0, 1, 3, named=(0, 2, 3)), "R10", "own header is missing",
    ),
    "this site's own header is altered": (
        with_content(OWN, last_bit_flipped), "R10", "altered",
    ),
    "this site signed another header for the sum": (
        with_header(OWN, body=b"x" * 32), "R10", "altered",
    ),
    "this site's header in the place of another": (
        of_sites(0, 1, 1, named=(0, 1, 2)), "R11", "site 2 did not sign",
    ),
    "two survivors' headers are swapped": (
        of_sites(2, 1, 0, named=(0, 1, 2)), "R11", "site 0 did not sign",
    ),
    "a header that another site signed": (signed_by_another, "R11", "site 3 did not sign"),
    "a header that nobody signed": (with_content(2, unsigned), "R11", "site 2 did not sign"),
    "a header that is none": (with_content(2, lambda _: b"header"), "R11", "in the middle"),
    "an empty header": (with_content(2, lambda _: b""), "R11", "no header of this version"),
    "a header of another run": (with_header(2, run=b"x" * 32), "R11", "of another sum"),
    "a header of an older sum": (with_header(2, sum_number=SUM - 1), "R11", "of another sum"),
    "a header for another task": (with_header(2, task=b"x" * 32), "R11", "another task"),
    "a header that names another site": (with_header(2, site=3), "R11", "site 2"),
    "a header with a slot too few": (
        with_header(2, commitments=b"c" * 32 * (NUM_SITES - 1)), "R11", "site 2",
    ),
    "a header with a slot too many": (
        with_header(2, commitments=b"c" * 32 * (NUM_SITES + 1)), "R11", "site 2",
    ),
    "a header without commitments": (with_header(2, commitments=b""), "R11", "site 2"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "rule", "words"), BAD_VIEWS.values(), ids=BAD_VIEWS)
@pytest.mark.parametrize("kind", ["vote", "unmask"])
def test_a_bad_view_is_refused(
    headers: list[Header], members: Sequence[Identity], keys: Keys, kind: str,
    change: Change, rule: str, words: str,
) -> None:  # fmt: skip
    view: Survivors | Unmask = change(headers, members)
    if kind == "unmask":
        view = unmask_of(view)
    with pytest.raises(RemoteProtocolError, match=words) as error:
        check_view(view, own=headers[OWN], threshold=THRESHOLD, keys=keys)
    assert error.value.rule == rule


def test_a_view_is_refused_below_each_threshold_and_taken_at_it(
    headers: list[Header], keys: Keys
) -> None:
    for threshold, size in itertools.product(range(1, 6), range(1, 6)):
        view = view_of(headers, sorted([OWN, 0, 2, 3, 4][:size]))
        if size >= threshold:
            assert len(check_view(view, own=headers[OWN], threshold=threshold, keys=keys)) == size
            continue
        with pytest.raises(RemoteProtocolError) as error:
            check_view(view, own=headers[OWN], threshold=threshold, keys=keys)
        assert error.value.rule == "R10"


def test_different_survivors_headers_or_sums_are_different_views(headers: list[Header]) -> None:
    content = [header.encode() for header in headers]
    views = [
        digest_of_view(RUN, SUM, TASK, list(chosen))
        for size in range(6)
        for chosen in itertools.combinations(content, size)
    ]
    views += [
        digest_of_view(b"x" * 32, SUM, TASK, content),
        digest_of_view(RUN, SUM + 1, TASK, content),
        digest_of_view(RUN, SUM, b"x" * 32, content),
        digest_of_view(RUN, SUM, TASK, content[::-1]),
        digest_of_view(RUN, SUM, TASK, [b"".join(content)]),
    ]
    assert len(set(views)) == len(views) == 37


@pytest.fixture(scope="session")
def voted(
    headers: list[Header], members: Sequence[Identity]
) -> Callable[..., tuple[Unmask, bytes]]:
    """A request to unmask with votes, and the digest of its view."""

    def make(
        survivors: Sequence[int], voters: Sequence[int], **changed: Any
    ) -> tuple[Unmask, bytes]:
        view = view_of(headers, survivors)
        about = digest_of_view(RUN, SUM, TASK, view.headers)
        votes = []
        for site in voters:
            vote = Vote(view.run, SUM, site, about)
            signer = members[changed.get("signer", site)]
            votes.append(sign(dataclasses.replace(vote, **changed.get("vote", {})), signer))
        return unmask_of(view, voters, [vote.signature for vote in votes]), about

    return make


@pytest.mark.parametrize(
    ("survivors", "voters"),
    [
        pytest.param((0, 1, 2, 3), (0, 1, 2, 3), id="everybody who survived"),
        pytest.param((0, 1, 2, 3), (0, 2, 3), id="just enough, without this site"),
        pytest.param((0, 1, 2, 3), (3, 0, 2), id="in any order"),
        pytest.param((0, 1, 2, 3, 4), (), id="no votes where nobody dropped"),
    ],
)
def test_enough_votes_of_survivors_are_taken(
    voted: Callable[..., tuple[Unmask, bytes]],
    keys: Keys,
    survivors: tuple[int, ...],
    voters: tuple[int, ...],
) -> None:
    request, view = voted(survivors, voters)
    check_votes(request, view=view, threshold=THRESHOLD, keys=keys)


BAD_VOTES: dict[str, tuple[tuple[int, ...], dict[str, Any], str]] = {
    "nobody voted": ((), {}, "0 votes, 3 are needed"),
    "one vote fewer than the threshold": ((0, 1), {}, "2 votes, 3 are needed"),
    "a site votes twice": ((0, 1, 1), {}, "votes twice"),
    "a dropout votes": ((0, 1, 4), {}, "not among the survivors"),
    "a site beyond the members votes": ((0, 1, 2, 9), {"signer": 0}, "not among the survivors"),
    "votes that one site signed for all": ((0, 1, 2), {"signer": 0}, "signature of site 1"),
    "votes for other survivors": ((0, 1, 2), {"vote": {"view": b"v" * 32}}, "signature of site 0"),
    "votes of another sum": ((0, 1, 2), {"vote": {"sum_number": SUM - 1}}, "signature of site 0"),
    "votes of another run": ((0, 1, 2), {"vote": {"run": "ab"}}, "signature of site 0"),
    "votes in another site's name": ((0, 1, 2), {"vote": {"site": 3}}, "signature of site 0"),
}


@pytest.mark.parametrize(("voters", "changed", "words"), BAD_VOTES.values(), ids=BAD_VOTES)
def test_bad_votes_are_refused(
    voted: Callable[..., tuple[Unmask, bytes]],
    keys: Keys,
    voters: tuple[int, ...],
    changed: dict[str, Any],
    words: str,
) -> None:
    request, view = voted((0, 1, 2, 3), voters, **changed)
    with pytest.raises(RemoteProtocolError, match=words) as error:
        check_votes(request, view=view, threshold=THRESHOLD, keys=keys)
    assert error.value.rule == "R12"


def test_votes_must_be_as_many_as_voters(
    voted: Callable[..., tuple[Unmask, bytes]], keys: Keys
) -> None:
    request, view = voted((0, 1, 2, 3), (0, 1, 2, 3))
    for votes in (request.votes[:-1], (*request.votes, b"")):
        altered = dataclasses.replace(request, votes=votes)
        with pytest.raises(RemoteProtocolError, match="one vote for each voter") as error:
            check_votes(altered, view=view, threshold=THRESHOLD, keys=keys)
        assert error.value.rule == "R12"


def test_one_bad_vote_among_enough_good_ones_is_refused(
    voted: Callable[..., tuple[Unmask, bytes]], keys: Keys
) -> None:
    request, view = voted((0, 1, 2, 3), (0, 1, 2, 3))
    altered = dataclasses.replace(request, votes=(*request.votes[:3], request.votes[0]))
    with pytest.raises(RemoteProtocolError, match="signature of site 3") as error:
        check_votes(altered, view=view, threshold=THRESHOLD, keys=keys)
    assert error.value.rule == "R12"


def test_votes_for_one_view_do_not_serve_another(
    voted: Callable[..., tuple[Unmask, bytes]], keys: Keys
) -> None:
    request, _ = voted((0, 1, 2, 3), (0, 1, 2))
    _, smaller = voted((0, 1, 2), ())
    with pytest.raises(RemoteProtocolError) as error:
        check_votes(request, view=smaller, threshold=THRESHOLD, keys=keys)
    assert error.value.rule == "R12"
