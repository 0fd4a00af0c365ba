"""Sums over sites that fall silent, and over programs that are killed: exact, or nothing at all."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faulty_network import Fault, FaultyNetwork, Killed
from federation import answers_of, federate, open_sites, tiny_study
from vectors_federation import VectorFederation, fast_folder, silent_when

from common.errors import RoundAborted
from common.manifest import default_threshold
from common.messages import (
    Message,
    Purpose,
    RoundTask,
    Shares,
    Survivors,
    Unmask,
    Upload,
    signed_content,
)
from server.collected import Collected
from server.coordinator import Summary
from server.network import never
from server.secure_sum import Total, Void

Silence = tuple[type[Message], ...]  # the messages that a site does not answer
Pattern = Mapping[int, Silence]  # by site

UPLOAD: Silence = (RoundTask,)
VOTE: Silence = (Survivors,)
UNMASK: Silence = (Unmask,)
FROM_VOTE: Silence = (Survivors, Unmask)

BITS = (16, 24, 32)
SMALL = (3, 4, 5, 6, 7, 8)
LARGE = {16: 20, 32: 8, 50: 3}  # sites: sampled patterns


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as path:
        yield path


def patterns(num_sites: int) -> list[Pattern]:
    """Every set of sites that may be silent, and every time at which each of them may be.

    Nobody votes where every upload arrived: to be silent then is to be silent at the unmasking.
    """
    found: list[Pattern] = [{}]
    for num_silent in range(1, num_sites - default_threshold(num_sites) + 1):
        for sites in itertools.combinations(range(num_sites), num_silent):
            times = itertools.product((UPLOAD, VOTE, UNMASK, FROM_VOTE), repeat=num_silent)
            with_votes = [each for each in times if UPLOAD in each]
            combined = [(UNMASK,) * num_silent, *with_votes]
            found += [dict(zip(sites, each, strict=True)) for each in combined]
    return found


def sampled_patterns(num_sites: int, number: int, rng: np.random.Generator) -> list[Pattern]:
    """As many silent sites as may be, at random times."""
    tolerated = num_sites - default_threshold(num_sites)
    times = (UPLOAD, VOTE, UNMASK, FROM_VOTE)
    return [
        {
            int(site): times[rng.integers(len(times))]
            for site in rng.choice(num_sites, tolerated, replace=False)
        }
        for _ in range(number)
    ]


def check_sum_with(federation: VectorFederation, pattern: Pattern) -> None:
    names = federation.names
    silences = {names[site]: silence for site, silence in pattern.items()}
    federation.network.faults = silent_when(
        lambda site, message: isinstance(message, silences.get(site, ()))
    )
    survivors = [name for name in names if silences.get(name) != UPLOAD]
    federation.check(federation.sum(federation.next_task()), survivors)
    assert not federation.network.refused


def shuffled(rng: np.random.Generator) -> Callable[[Sequence[str]], Sequence[str]]:
    return lambda sites: [sites[k] for k in rng.permutation(len(sites))]


# Who may be silent, and when


def test_the_patterns_are_all_there_are() -> None:
    assert [len(patterns(num_sites)) for num_sites in SMALL] == [1, 9, 11, 13, 183, 241]
    for num_sites in SMALL:
        listed = [tuple(sorted(p.items(), key=str)) for p in patterns(num_sites)]
        assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("num_sites", SMALL)
@pytest.mark.parametrize("bits", BITS)
def test_the_sum_over_the_survivors_is_exact_whoever_is_silent(
    num_sites: int, bits: int, folder: Path
) -> None:
    federation = VectorFederation(folder, num_sites, bits=bits)
    mine = patterns(num_sites)[BITS.index(bits) :: len(BITS)] or patterns(num_sites)
    for pattern in mine:
        check_sum_with(federation, pattern)


@pytest.mark.slow
@pytest.mark.parametrize("num_sites", SMALL)
@pytest.mark.parametrize("bits", BITS)
def test_the_sum_is_exact_in_every_ring_for_any_order_and_whoever_answers_first(
    num_sites: int, bits: int, folder: Path, rng: np.random.Generator
) -> None:
    federation = VectorFederation(folder, num_sites, bits=bits)
    federation.network.order, federation.network.hurried = shuffled(rng), True
    for pattern in patterns(num_sites):
        check_sum_with(federation, pattern)


@pytest.mark.slow
@pytest.mark.parametrize(("num_sites", "number"), LARGE.items())
def test_many_sites_of_which_as_many_as_may_be_are_silent(
    num_sites: int, number: int, folder: Path, rng: np.random.Generator
) -> None:
    federation = VectorFederation(folder, num_sites, bits=24)
    federation.network.order = shuffled(rng)
    check_sum_with(federation, {})
    for pattern in sampled_patterns(num_sites, number, rng):
        check_sum_with(federation, pattern)


@pytest.mark.parametrize("purpose", [Purpose.VALIDATE, Purpose.TEST])
def test_an_evaluation_sums_counts_alone(purpose: Purpose, folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    federation.network.faults = silent_when(
        lambda site, message: site == "site-3" and isinstance(message, RoundTask)
    )
    total = federation.sum(federation.next_task(purpose))
    federation.check(total, ["site-1", "site-2", "site-4"])
    assert total.values.size == 0


@pytest.mark.parametrize("num_params", [1, 3, 4, 5, (1 << 16) + 3])
@pytest.mark.parametrize("bits", BITS)
def test_vectors_of_any_length_are_summed_exactly(num_params: int, bits: int, folder: Path) -> None:
    federation = VectorFederation(folder, 4, bits=bits, num_params=num_params)
    for pattern in ({}, {1: UPLOAD}, {2: UNMASK}):
        check_sum_with(federation, pattern)


# The order of arrival


@pytest.mark.parametrize("bits", BITS)
def test_any_order_of_arrival_gives_identical_bytes(bits: int, folder: Path) -> None:
    federation = VectorFederation(folder, 4, bits=bits)
    task, network = federation.next_task(), federation.network
    masked, exact = set(), set()
    for order in itertools.permutations(federation.names):
        network.order = lambda sites, order=order: [one for one in order if one in sites]
        federation.run_dir.drop_pending()  # every upload is asked for again, and is the same
        total = federation.sum(task)
        federation.check(total, federation.names)
        pending = federation.run_dir.pending()
        masked.add(pending.values.tobytes() + pending.tail.tobytes())
        exact.add(total.values.tobytes() + total.counts.tobytes())
    assert len(masked) == len(exact) == 1
    assert masked != exact


@pytest.mark.parametrize("hurried", [False, True], ids=["all answer", "the first are enough"])
def test_any_order_of_arrival_gives_identical_bytes_with_a_dropout(
    hurried: bool, folder: Path
) -> None:
    federation = VectorFederation(folder, 5)
    task, network = federation.next_task(), federation.network
    network.faults = silent_when(
        lambda site, message: site == "site-2" and isinstance(message, RoundTask)
    )
    network.hurried = hurried
    survivors = [name for name in federation.names if name != "site-2"]
    masked = set()
    for order in itertools.permutations(survivors):
        network.order = lambda sites, order=order: [one for one in order if one in sites]
        federation.run_dir.drop_pending()
        federation.check(federation.sum(task), survivors)
        pending = federation.run_dir.pending()
        masked.add(pending.values.tobytes() + pending.tail.tobytes())
    assert len(masked) == 1


def test_an_answer_that_is_delivered_twice_counts_once(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    network, ask = federation.network, federation.network.ask
    network.faults = silent_when(
        lambda site, message: site == "site-4" and isinstance(message, RoundTask)
    )
    network.ask = lambda messages, deadline_s, enough=never: (
        answer for answer in ask(messages, deadline_s, enough) for _ in range(2)
    )
    federation.check(federation.sum(federation.next_task()), federation.names[:3])


# Too few


@pytest.mark.parametrize("num_sites", SMALL)
def test_with_fewer_uploads_than_the_threshold_nothing_is_revealed(
    num_sites: int, folder: Path
) -> None:
    federation = VectorFederation(folder, num_sites)
    for num_answers in range(federation.threshold):
        answering = federation.names[:num_answers]
        federation.network.faults = silent_when(
            lambda site, message, answering=answering: site not in answering
        )
        void = federation.sum(federation.next_task())
        assert isinstance(void, Void)
        assert void.survivors == tuple(answering)
        assert set(void.refusals) == set(federation.names) - set(answering)
    assert not federation.network.of(Survivors, Unmask)
    assert federation.run_dir.pending() is None


def test_after_a_void_sum_the_same_model_is_trained_anew_under_other_masks(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    federation.network.faults = silent_when(lambda site, message: site in ("site-1", "site-2"))
    assert isinstance(federation.sum(federation.next_task(model=7)), Void)
    federation.network.faults = silent_when(lambda site, message: False)
    federation.check(federation.sum(federation.next_task(model=7)), federation.names)
    uploads = [m for site, m in federation.network.received if isinstance(m, Upload)]
    assert len({upload.body.tobytes() for upload in uploads}) == len(uploads) == 2 + 4
    assert not federation.network.refused


@pytest.mark.parametrize("asked", [Survivors, Unmask])
@pytest.mark.parametrize(("num_sites", "dropouts"), [(4, 1), (6, 1), (8, 2), (8, 1)], ids=str)
def test_too_few_at_the_unmasking_end_the_run_and_the_sum_is_finished_later(
    num_sites: int, dropouts: int, asked: type[Message], folder: Path
) -> None:
    federation = VectorFederation(folder, num_sites)
    names, task, network = federation.names, federation.next_task(), federation.network
    dropped = names[:dropouts]
    kept = names[-federation.threshold + 1 :]  # one too few
    network.faults = silent_when(
        lambda site, message: (
            (site in dropped and isinstance(message, RoundTask))
            or (site not in kept and isinstance(message, asked))
        )
    )
    with pytest.raises(RoundAborted, match=rf"{len(kept)} .*{len(kept) + 1} are needed"):
        federation.sum(task)
    before = network.of(RoundTask)
    network.faults = silent_when(lambda site, message: False)
    federation.check(federation.sum(task), names[dropouts:])
    assert network.of(RoundTask) == before  # nobody was asked for an upload again
    assert not network.refused


def test_with_one_share_too_few_no_secret_is_recovered(folder: Path) -> None:
    federation = VectorFederation(folder, 5)
    kept = federation.names[:3]  # 4 are needed
    federation.network.faults = silent_when(
        lambda site, message: site not in kept and isinstance(message, Unmask)
    )
    with pytest.raises(RoundAborted, match="3 good shares of a secret came, 4 are needed"):
        federation.sum(federation.next_task())
    answered = {site for site, reply in federation.network.received if isinstance(reply, Shares)}
    assert answered == set(kept)


# A coordinator that is killed


def test_what_was_collected_is_on_disk_before_anybody_is_asked_to_unmask(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    kept: list[Collected] = []

    def fault(site: str, message: Message) -> Fault | None:
        if isinstance(message, Survivors | Unmask):
            kept.append(federation.run_dir.pending())
        return Fault.SILENT if site == "site-4" and isinstance(message, RoundTask) else None

    federation.network.faults = fault
    federation.check(federation.sum(federation.next_task()), federation.names[:3])
    assert len(kept) == 3 + 3
    assert all(one is not None and one.survivors == (0, 1, 2) for one in kept)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("num_sites", "silent"),
    [(4, ""), (4, "site-1"), (5, "site-3")],
    ids=["nobody drops", "the first of four drops", "one of five drops"],
)
def test_a_coordinator_killed_at_any_moment_ends_with_the_same_bytes(
    num_sites: int, silent: str, bits: int, folder: Path
) -> None:
    federation = VectorFederation(folder, num_sites, bits=bits)
    network = federation.network
    network.faults = silent_when(
        lambda site, message: site == silent and isinstance(message, RoundTask)
    )
    survivors = [name for name in federation.names if name != silent]
    num_moments = 2 * len(survivors) * (3 if silent else 2)
    for moment in range(num_moments):
        task = federation.next_task()
        network.forget()
        network.die_at = moment
        with pytest.raises(Killed):
            federation.sum(task)
        network.die_at = None
        finished = federation.sum(task)
        once_more = federation.sum(task)
        for total in (finished, once_more):
            federation.check(total, survivors)
        assert finished.values.tobytes() == once_more.values.tobytes()
        assert finished.counts.tobytes() == once_more.counts.tobytes()
        check_requests_are_identical(federation)
    network.forget()
    network.die_at = num_moments
    federation.check(federation.sum(federation.next_task()), survivors)  # it was every moment


def check_requests_are_identical(federation: VectorFederation) -> None:
    """Whatever was asked or answered twice was the same twice, byte for byte."""
    network = federation.network
    for kind in (RoundTask, Survivors, Unmask):
        asked: dict[str, set[bytes]] = {}
        for site, message in network.of(kind):
            asked.setdefault(site, set()).add(signed_content(message))
        assert all(len(contents) == 1 for contents in asked.values())
    for kind in (Upload, Shares):
        replies: dict[str, set[bytes]] = {}
        for site, reply in network.received:
            if isinstance(reply, kind):
                content = reply.body.tobytes() + reply.header if kind is Upload else reply.signature
                replies.setdefault(site, set()).add(content)
        assert all(len(contents) == 1 for contents in replies.values())
    assert not network.refused


def test_after_a_restart_other_sites_may_be_the_first_to_vote(folder: Path) -> None:
    federation = VectorFederation(folder, 8)
    network, task = federation.network, federation.next_task()
    network.faults = silent_when(
        lambda site, message: site == "site-1" and isinstance(message, RoundTask)
    )
    network.hurried = True
    network.num_moments, network.die_at = 0, 2 * (7 + 6 + 1)  # uploads, votes, one answer
    with pytest.raises(Killed):
        federation.sum(task)
    network.die_at, network.order = None, lambda sites: list(reversed(sites))
    federation.check(federation.sum(task), federation.names[1:])
    assert len({message.voters for _, message in network.of(Unmask)}) == 2
    assert not network.refused


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_coordinator_killed_while_it_settles_the_survivors(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = VectorFederation(folder, 4)
    network, rename = federation.network, Path.rename
    network.faults = silent_when(
        lambda site, message: site == "site-1" and isinstance(message, RoundTask)
    )

    def killed(self: Path, target: Path) -> None:
        if target.name == "pending-sum.safetensors":
            if moment == "after":
                rename(self, target)
            raise Killed
        rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        task = federation.next_task()
        with pytest.raises(Killed):
            federation.sum(task)
    assert not network.of(Survivors, Unmask)
    network.faults = silent_when(lambda site, message: False)
    # What was settled stays; what was not may still grow: nobody had been told of it.
    survivors = federation.names[1:] if moment == "after" else federation.names
    federation.check(federation.sum(task), survivors)


def test_an_upload_that_comes_after_the_survivors_are_settled_stays_out(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    network, task = federation.network, federation.next_task()

    def fault(site: str, message: Message) -> Fault | None:
        if isinstance(message, Unmask):
            return Fault.SILENT
        return Fault.LATE if site == "site-1" and isinstance(message, RoundTask) else None

    network.faults = fault
    with pytest.raises(RoundAborted):
        federation.sum(task)
    network.faults = silent_when(lambda site, message: False)
    federation.check(federation.sum(task), federation.names[1:])


@pytest.mark.slow
def test_a_run_killed_at_any_of_its_messages_ends_with_the_same_model(folder: Path) -> None:
    num_keys = 2 * (2 * 4)  # before keys are agreed on there is no run to resume
    digests = set()
    for moment in itertools.count(num_keys):
        network, begin = tiny_run(folder / str(moment))
        network.die_at = moment
        summary = killed_or_not(begin)
        if summary is not None:
            break
        network.die_at = None
        digests.add(begin(resume=True)["final_model_sha256"])
        assert not network.refused
    # three of four are asked three times in the training, all four twice in both evaluations
    assert moment == num_keys + 2 * (3 * 3 + 2 * 2 * 4)
    assert digests == {summary["final_model_sha256"]}


@pytest.mark.slow
def test_a_run_killed_before_or_after_any_of_its_files_is_written_ends_with_the_same_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, digests, written = Path.rename, set(), set()
    left: list[int] = []

    def frail(self: Path, target: Path) -> None:
        began = any((place / "epoch-1.json").exists() for place in target.parents[:2])
        if left and began and left.pop() == 0:
            raise Killed
        rename(self, target)
        written.add(target.name)
        if left and began and left.pop() == 0:
            raise Killed

    for moment in itertools.count():
        _, begin = tiny_run(folder / str(moment))
        left[:] = range(moment + 1)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", frail)
            summary = killed_or_not(begin)
        if summary is not None:
            break
        digests.add(begin(resume=True)["final_model_sha256"])
    assert {"pending-sum.safetensors", "state.safetensors", "summary.json", "SHA256SUMS"} <= written
    assert digests == {summary["final_model_sha256"]}


def tiny_run(path: Path) -> tuple[FaultyNetwork, Callable[..., Summary]]:
    """One round over four sites, of which one is silent in the training; and how to begin it."""
    study = tiny_study(num_rounds=1)
    network = FaultyNetwork(answers_of(open_sites(study, path / "sites")))
    network.faults = silent_when(
        lambda site, message: (
            site == "site-2" and isinstance(message, RoundTask) and message.purpose == Purpose.TRAIN
        )
    )
    return network, partial(federate, study, path / "run", network=network, sites_in=path / "sites")


def killed_or_not(begin: Callable[[], Summary]) -> Summary | None:
    try:
        return begin()
    except Killed:
        return None
    finally:
        gc.collect()  # a run that was killed still holds its folder


# Sites that are killed


@pytest.mark.parametrize("dropped", ["", "site-1"], ids=["nobody drops", "one drops"])
def test_sites_restarted_between_any_two_messages_change_nothing(
    dropped: str, folder: Path
) -> None:
    federation = VectorFederation(folder, 4)
    network = federation.network
    for name, site in federation.sites.items():

        def answer(message: Message, site=site) -> Message:
            site.restart()
            reply = site.answer(message)
            site.restart()
            return reply

        network.answers[name] = answer
    federation.open_epoch(2, federation.names)
    network.faults = silent_when(
        lambda site, message: site == dropped and isinstance(message, RoundTask)
    )
    for _ in range(3):
        survivors = [name for name in federation.names if name != dropped]
        federation.check(federation.sum(federation.next_task()), survivors)
    assert not network.refused


@pytest.mark.parametrize("asked", [RoundTask, Survivors, Unmask])
def test_a_site_killed_at_any_flush_of_its_journal_repeats_itself(
    asked: type[Message], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = VectorFederation(folder, 4)
    site, frail = federation.sites["site-2"], FrailDisk()
    monkeypatch.setattr(os, "fsync", frail.fsync)
    for flush in itertools.count():
        site_survived = sum_with_a_killed_site(federation, frail, asked, flush)
        if site_survived:
            break
    assert flush == {RoundTask: 4, Survivors: 2, Unmask: 2}[asked]
    assert site.journal.sum().sum_number == federation.sum_number


class FrailDisk:
    """Counts flushes while one site writes, and kills it at one of them."""

    def __init__(self) -> None:
        self.left: int | None = None
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        if self.left == 0:
            raise Killed
        if self.left is not None:
            self.left -= 1
        self._fsync(descriptor)


def sum_with_a_killed_site(
    federation: VectorFederation, frail: FrailDisk, asked: type[Message], flush: int
) -> bool:
    """One sum with a dropout, in which site-2 dies while it answers; whether it did not die."""
    network, site, task = federation.network, federation.sites["site-2"], federation.next_task()
    survived = []

    def answer(message: Message) -> Message:
        if not isinstance(message, asked):
            return site.answer(message)
        frail.left = flush
        try:
            reply = site.answer(message)
            survived.append(True)
        finally:
            frail.left = None
        return reply

    network.answers["site-2"] = answer
    network.faults = silent_when(
        lambda site, message: site == "site-4" and isinstance(message, RoundTask)
    )
    try:
        federation.sum(task)
    except Killed:
        site.restart()
    network.answers["site-2"] = site.answer
    federation.check(federation.sum(task), federation.names[:3])
    federation.check(federation.sum(task), federation.names[:3])
    check_requests_are_identical(federation)
    network.forget()
    return bool(survived)


def test_a_site_that_was_killed_at_the_upload_takes_part_in_the_next_sum(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    network = federation.network
    network.faults = lambda site, message: (
        Fault.LATE if site == "site-2" and isinstance(message, RoundTask) else None
    )
    survivors = [name for name in federation.names if name != "site-2"]
    total = federation.sum(federation.next_task())
    federation.check(total, survivors)
    assert isinstance(total, Total)
    assert total.refusals == {"site-2": "silent"}
    federation.sites["site-2"].restart()
    network.faults = silent_when(lambda site, message: False)
    federation.check(federation.sum(federation.next_task()), federation.names)
    assert not network.refused
