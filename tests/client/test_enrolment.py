"""How a site enters an epoch: one answer to each invitation and roster, with fresh keys."""

from dataclasses import replace

import pytest
from one_site import MODEL, SITE, is_exact, refused
from protocol import Bare, Cast

from common.quantize import Ring
from common.secagg.phases import Phase
from common.signing import sign


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
