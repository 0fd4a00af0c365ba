"""Attacks that are more than one message: a lost journal, a split view, one site told otherwise."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import (
    BAD_SHARES,
    OTHER_MODEL,
    SCHEMA,
    Federation,
    federations,
    flipped,
    plain,
    quick_journal,
    split,
    update_of,
)

from client import round as round_of_site
from client.round import answer
from client.site import Site
from common.errors import DataError, RemoteProtocolError
from common.messages import Message, RoundTask, Shares, SiteKeys, Upload
from common.secagg.header import Header, slot_of
from common.secagg.masking import Mask, add_masks, split_body
from common.secagg.sharing import recover
from common.update import LocalUpdate


@pytest.fixture
def make_federation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Federation]]:
    with federations(tmp_path, monkeypatch) as make:
        yield make


@pytest.fixture
def federation(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation()


# A journal that is not what the site remembers: R6


def put_back(fed: Federation, copy: Path) -> None:
    shutil.copyfile(copy, fed.members[2].state_dir / "journal.sqlite")


def put_back_while_stopped(fed: Federation, copy: Path) -> None:
    fed.members[2].journal.close()
    put_back(fed, copy)
    quick_journal(fed.members[2].state_dir)


def put_back_while_running(fed: Federation, copy: Path) -> None:
    put_back(fed, copy)
    fed.ask(2, fed.task(2, model=OTHER_MODEL), Upload)


def put_back_and_invited(fed: Federation, copy: Path) -> None:
    put_back(fed, copy)
    fed.ask(2, fed.invitation(epoch=2, nonce="f" * 32), SiteKeys)


def gone(fed: Federation, copy: Path) -> None:
    fed.members[2].journal.close()
    (fed.members[2].state_dir / "journal.sqlite").unlink()
    quick_journal(fed.members[2].state_dir)


def damaged(fed: Federation, copy: Path) -> None:
    fed.members[2].journal.close()
    (fed.members[2].state_dir / "journal.sqlite").write_bytes(b"no database" * 1000)
    quick_journal(fed.members[2].state_dir)


def counter_damaged(fed: Federation, copy: Path) -> None:
    (fed.members[2].state_dir / "journal.mark").write_text("many")
    fed.ask(2, fed.task(2), Upload)


def upload_gone(fed: Federation, copy: Path) -> None:
    (fed.members[2].state_dir / "answer-0.bin").unlink()
    fed.ask(2, fed.task(2), Upload)


def upload_damaged(fed: Federation, copy: Path) -> None:
    path = fed.members[2].state_dir / "answer-0.bin"
    path.write_bytes(flipped(path.read_bytes()))
    fed.ask(2, fed.task(2), Upload)


@pytest.mark.parametrize(
    "forget",
    [
        pytest.param(put_back_while_stopped, id="put back while the site was stopped"),
        pytest.param(put_back_while_running, id="put back, then a second task for the sum"),
        pytest.param(put_back_and_invited, id="put back, then a new epoch"),
        pytest.param(gone, id="gone"),
        pytest.param(damaged, id="damaged"),
        pytest.param(counter_damaged, id="its counter damaged"),
        pytest.param(upload_gone, id="the stored upload gone"),
        pytest.param(upload_damaged, id="the stored upload damaged"),
    ],
)
def test_a_site_that_has_lost_its_memory_leaves_and_the_others_go_on(
    forget: Callable[[Federation, Path], None], federation: Federation, tmp_path: Path
) -> None:
    federation.enrol()
    copy = tmp_path / "copy"
    shutil.copyfile(federation.members[2].state_dir / "journal.sqlite", copy)
    federation.settle(0, 1, 3)
    with pytest.raises(DataError) as refused:
        forget(federation, copy)
    assert refused.value.rule == "R6"
    federation.finish()


# An update that must not leave


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_stays_at_its_site(
    value: float, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(task: RoundTask, site: Site, _: object) -> LocalUpdate:
        update = update_of(task, site)
        update.values[3] = value
        return update

    federation.enrol()
    before = federation.memory(2)
    with monkeypatch.context() as patch:
        patch.setattr(round_of_site, "local_update", diverged)
        with pytest.raises(DataError, match="training diverged"):
            federation.ask(2, federation.task(2), Upload)
    assert federation.memory(2) == before
    federation.finish()


# One site is told something else


def test_two_halves_with_different_rosters_never_make_a_sum(federation: Federation) -> None:
    """Members 0 and 1 hold one run, member 2 another one; an honest coordinator sees it at once."""
    fed, _ = split(federation)
    runs = {fed.agreements[site].run for site in (0, 1, 2)}
    assert len(runs) == 2
    fed.next_epoch().finish()


def test_the_masks_of_a_site_that_got_another_model_do_not_cancel(federation: Federation) -> None:
    fed = federation.enrol()
    uploads = fed.uploads(sites=(0, 1, 2))
    fed.settled = dict(uploads)
    uploads[3] = fed.ask(3, fed.task(3, model=OTHER_MODEL), Upload)
    headers = {site: Header.decode(upload.header) for site, upload in uploads.items()}
    for one, other in itertools.combinations(headers, 2):
        agree = headers[one].commitment(other) == headers[other].commitment(one)
        assert agree == (other != 3)
    collected = fed.collected(fed.epoch(), fed.task(0))
    before = collected.values.tolist()
    with pytest.raises(RemoteProtocolError) as refused:
        collected.take(3, uploads[3], fed.epoch(), is_private=False)
    assert refused.value.rule == "R7"
    assert collected.values.tolist() == before
    fed.finish()


def test_a_site_sums_with_no_fewer_than_its_study_says(
    make_federation: Callable[..., Federation],
) -> None:
    federation = make_federation(5, cohort={"min_sites": 4})
    members = json.loads(federation.manifest.canonical())["members"]
    with pytest.raises(RemoteProtocolError, match="at least 4 are needed") as refused:
        federation.ask(0, federation.proposal(federation.altered(members=members[:3])), SiteKeys)
    assert refused.value.rule == "R2"
    federation.finish()


def test_a_second_upload_of_one_site_is_not_added(federation: Federation) -> None:
    uploads = federation.enrol().settle()
    epoch = federation.epoch()
    collected = federation.collected(epoch, federation.task(0))
    before = collected.values.tolist(), collected.tail.tolist()
    with pytest.raises(RemoteProtocolError) as refused:
        collected.take(1, uploads[1], epoch, is_private=False)
    assert refused.value.rule == "R5"
    assert (collected.values.tolist(), collected.tail.tolist()) == before
    federation.finish()


# A sealed share that its sender bound, and that is bad: named, and the sum is exact


@pytest.mark.parametrize("title", BAD_SHARES)
def test_a_site_names_who_sealed_a_bad_share_and_answers_the_rest(
    title: str, federation: Federation
) -> None:
    uploads = federation.enrol().settle()
    federation.settled[1] = BAD_SHARES[title](uploads[1], federation.members[1])
    request = federation.request(0, federation.settled)
    reply = federation.ask(0, request, Shares)
    assert reply.complaints == (1,)
    assert [len(share) for share in reply.shares] == [32, 0, 32, 32]
    (kept,) = federation.evidence(0)
    assert (kept["rule"], kept["message"]) == ("R13", plain(request))
    assert "site-2" in kept["reason"]
    assert federation.finish().disputes == (
        "site-1 cannot open the share that site-2 sealed for it",
    )


# Two views of one sum, and sites that help: c <= min(2t - N - 1, t - 2)


def split_views(
    fed: Federation, folder: Path, *, num_colluding: int, num_asked_for_everybody: int
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Ask for the sum over everybody and for the one without the last honest site.

    The last members collude: they answer both. The honest ones are asked for both too, some first
    for the one, some first for the other.

    Returns:
      The answers about either view.
    """
    uploads = fed.settle()
    num_honest = len(fed.members) - num_colluding
    fewer = {site: upload for site, upload in uploads.items() if site != num_honest - 1}
    twins = {
        site: fed.twin(site, folder / f"twin-{site}")
        for site in range(num_honest, len(fed.members))
    }
    first = set(range(num_honest - num_asked_for_everybody, num_honest))
    whole = answers_to(fed, first | set(twins), lambda site: fed.request(site, uploads))
    votes = answers_to(fed, set(fewer) - set(twins), lambda _: fed.view(fewer))
    votes |= {site: answer(fed.view(fewer), twin) for site, twin in twins.items()}
    part = answers_to(fed, set(fewer) - set(twins), lambda site: fed.request(site, fewer, votes))
    for site, twin in twins.items():
        try:
            part[site] = answer(fed.request(site, fewer, votes), twin)
        except RemoteProtocolError:
            assert len(votes) < fed.manifest.threshold
    rest = set(range(num_honest)) - first
    whole |= answers_to(fed, rest, lambda site: fed.request(site, uploads))
    for twin in twins.values():
        twin.journal.close()
    return whole, part


def answers_to(
    fed: Federation, sites: set[int], message: Callable[[int], Message]
) -> dict[int, Any]:
    """Who answers; the others refuse."""
    given = {}
    for site in sorted(sites):
        try:
            given[site] = fed.ask(site, message(site), object)
        except RemoteProtocolError as error:
            if error.rule not in {"R8", "R10", "R11", "R12", "R14"}:
                raise
    return given


@pytest.mark.parametrize("num_asked_for_everybody", range(6))
def test_colluders_at_the_bound_cannot_get_two_sums(
    num_asked_for_everybody: int, make_federation: Callable[..., Federation], tmp_path: Path
) -> None:
    federation = make_federation(8).enrol()
    threshold, num_colluding = federation.manifest.threshold, 3
    assert num_colluding == min(2 * threshold - 8 - 1, threshold - 2)
    whole, part = split_views(
        federation,
        tmp_path,
        num_colluding=num_colluding,
        num_asked_for_everybody=num_asked_for_everybody,
    )
    assert min(len(whole), len(part)) < threshold


def test_one_colluder_more_gets_the_update_of_a_single_site(
    make_federation: Callable[..., Federation], tmp_path: Path
) -> None:
    federation = make_federation(8).enrol()
    threshold, victim = federation.manifest.threshold, 3
    whole, part = split_views(federation, tmp_path, num_colluding=4, num_asked_for_everybody=2)
    assert min(len(whole), len(part)) == threshold
    others = [site for site in federation.sites if site != victim]
    self_mask = recover(
        {site: reply.shares[victim] for site, reply in itertools.islice(whole.items(), threshold)}
    )
    pair_masks = {
        other: recover({site: slot_of(reply.shares[place], 1) for site, reply in part.items()})
        for place, other in enumerate(others)
    }
    masks = [Mask(self_mask, is_added=False)]
    masks += [Mask(key, is_added=other < victim) for other, key in pair_masks.items()]
    body = federation.settled[victim].body.copy()
    packed, _ = split_body(body, SCHEMA.num_params, bits=32)
    values = packed.view("<u4")
    add_masks(values, masks)
    hidden = federation.quantized(victim, federation.task(victim))
    assert values.view(np.int32).tolist() == hidden.values.tolist()


def test_all_but_one_of_a_smallest_sum_know_that_one(federation: Federation) -> None:
    """With c = t - 1 the sum itself is enough; the bound t - 2 leaves two honest sites in it."""
    federation.enrol().settle(0, 2, 3)
    total = federation.finish()
    task = federation.task(0)
    known = [federation.quantized(site, task).values for site in (2, 3)]
    assert (total.values - sum(known)).tolist() == federation.quantized(0, task).values.tolist()
