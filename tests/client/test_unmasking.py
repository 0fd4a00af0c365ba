"""What a site says at the end of a sum: one vote, one answer, about one view of the survivors."""

from dataclasses import replace

from one_site import MODEL, SITE, is_exact, refused, same
from protocol import Bare, Cast


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
