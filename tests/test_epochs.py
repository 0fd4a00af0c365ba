"""Who takes part changes between sums: new keys, the same study, the same numbering."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from faulty_network import Fault, FaultyNetwork, Killed
from federation import Watcher, answers_of, federate, open_sites, tiny_study
from vectors_federation import VectorFederation, fast_folder, silent_when

import server.exchange
from common.authority import REVOKED, Authority
from common.errors import BudgetExhausted, ConfigError, PolicyError, RoundAborted
from common.identity import read_certificate
from common.manifest import default_threshold, smallest_epoch
from common.messages import (
    Invitation,
    Message,
    Purpose,
    Roster,
    RoundTask,
    Shares,
    Survivors,
    Unmask,
)
from common.throwaway import CA
from server.cohort import RETRY_SUMS
from server.coordinator import Summary
from server.network import Answer, Enough
from server.run_dir import RunDir
from server.secure_sum import Void

ALL = ["site-1", "site-2", "site-3", "site-4"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as path:
        yield path


class Story:
    """One run of the tiny study, in which something happens at a sum."""

    def __init__(self, folder: Path, num_sites: int = 4, **changes: Any) -> None:
        self.study = tiny_study(num_sites, **changes)
        self.sites_in, self.path = folder / "sites", folder / "run"
        self.sites = open_sites(self.study, self.sites_in)
        self.network = FaultyNetwork(answers_of(self.sites))
        self.watcher = Watcher()
        self.run_dir = RunDir(self.path)

    def run(self, *, resume: bool = False) -> Summary:
        return federate(
            self.study,
            self.path,
            network=self.network,
            watcher=self.watcher,
            sites_in=self.sites_in,
            resume=resume,
        )

    def replace(self, site: str, change: Callable[[Answer], Answer]) -> None:
        self.network.answers[site] = change(self.network.answers[site])

    def before_sum(self, number: int, happen: Callable[[], None]) -> None:
        """Let something happen once, when the first site gets the task of a sum."""
        waiting = [happen]

        def fault(_site: str, message: Message) -> None:
            if isinstance(message, RoundTask) and message.sum_number == number and waiting:
                waiting.pop()()

        self.network.faults = fault

    def revoke(self, *names: str) -> None:
        folder = self.sites_in / CA
        certificates = [
            read_certificate(self.sites_in / "sites" / name / "certificate.pem") for name in names
        ]
        serial_numbers = [certificate.serial_number for certificate in certificates]
        authority, now = Authority.load(folder), datetime.now(UTC)
        content = authority.revocation_list(serial_numbers, now, days=1)
        (folder / REVOKED).write_bytes(content)

    @property
    def tasks(self) -> list[tuple[int, str]]:
        """Sums and purposes that sites were asked for, once each."""
        tasks = [message for _, message in self.network.of(RoundTask)]
        return list(dict.fromkeys((task.sum_number, task.purpose.value) for task in tasks))

    def members(self) -> list[list[str]]:
        """Of each epoch, as the run folder has them."""
        return [list(manifest.names) for manifest in self.run_dir.manifests()]


def spent_from(number: int) -> Callable[[Answer], Answer]:
    """A site whose budget is spent when this sum comes."""

    def change(answer: Answer) -> Answer:
        def changed(message: Message) -> Message:
            if isinstance(message, RoundTask) and message.sum_number >= number:
                raise BudgetExhausted("nothing is left")
            return answer(message)

        return changed

    return change


# Leaving for good


def test_a_site_whose_budget_is_spent_is_left_out_by_a_new_epoch(folder: Path) -> None:
    story = Story(folder)
    story.replace("site-2", spent_from(1))
    summary = story.run()
    assert story.watcher.epochs == [["site-1", "site-3", "site-4"]]
    assert story.members() == [ALL, ["site-1", "site-3", "site-4"]]
    excluded = json.loads((story.path / "excluded.json").read_text())
    assert excluded == {"site-2": "its privacy budget is spent"}
    assert summary["survivors"] == [ALL, *[["site-1", "site-3", "site-4"]] * 2]
    assert summary["sites"] == ALL
    assert story.watcher.lines[1]["refusals"] == {"site-2": "budget"}
    assert all(line["refusals"] == {} for line in story.watcher.lines[2:])


def test_the_numbering_of_sums_goes_on_over_epochs(folder: Path) -> None:
    story = Story(folder)
    story.replace("site-2", spent_from(1))
    story.run()
    assert story.tasks == [
        (0, "train"),
        (1, "train"),
        (2, "train"),
        (3, "validate"),
        (4, "test"),
    ]
    first, second = story.run_dir.manifests()
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.run == second.run
    assert first.nonce != second.nonce
    keys = [json.loads((story.path / f"keys-{k}.json").read_text())[0] for k in (1, 2)]
    assert not set(keys[0]["public_keys"]) & set(keys[1]["public_keys"])
    runs = {message.sum_number: message.run for _, message in story.network.of(RoundTask)}
    assert runs[0] == runs[1] != runs[2] == runs[3] == runs[4]


def test_who_left_is_not_asked_for_anything_again(folder: Path) -> None:
    story = Story(folder)
    story.replace("site-2", spent_from(1))
    story.run()
    sums = {
        getattr(message, "sum_number", None)
        for site, message in story.network.sent
        if site == "site-2"
    }
    assert sums == {None, 0, 1}
    assert not [m for site, m in story.network.of(Unmask) if site == "site-2" and m.sum_number]


def test_a_site_that_refuses_for_another_reason_stays_a_member(folder: Path) -> None:
    story = Story(folder)
    refusing = {1, 2}

    def change(answer: Answer) -> Answer:
        def changed(message: Message) -> Message:
            if isinstance(message, RoundTask) and message.sum_number in refusing:
                raise ConfigError("the disk is full")
            return answer(message)

        return changed

    story.replace("site-2", change)
    story.run()
    assert story.watcher.epochs == []
    assert [len(line["survivors"]) for line in story.watcher.lines] == [4, 3, 3]
    assert len(story.run_dir.evaluations()[-1]["survivors"]) == 4


def test_who_left_stays_out_after_a_restart(folder: Path) -> None:
    class Stop(BaseException):
        pass

    class Stopping(Watcher):
        def finished_round(self, line: dict[str, Any]) -> None:
            super().finished_round(line)
            if line["round"] == 3:
                raise Stop

    story = Story(folder)
    story.replace("site-2", spent_from(1))
    story.watcher = Stopping()
    with pytest.raises(Stop):
        story.run()
    gc.collect()  # the run that was stopped still holds its folder
    story.watcher = Watcher()
    story.network.forget()
    summary = story.run(resume=True)
    assert story.watcher.epochs == []
    assert story.members() == [ALL, ["site-1", "site-3", "site-4"]]
    assert not story.network.of(Invitation)
    assert [line["survivors"] for line in story.run_dir.evaluations()] == [
        ["site-1", "site-3", "site-4"]
    ] * 2
    assert summary["num_rounds"] == 3


# Coming late


def test_a_site_that_is_absent_at_first_joins_by_a_new_epoch(folder: Path) -> None:
    story = Story(folder)
    story.network.absent = {"site-4"}
    story.before_sum(1, story.network.absent.clear)
    summary = story.run()
    assert story.watcher.epochs == [ALL]
    assert story.members() == [ALL[:3], ALL]
    assert summary["survivors"] == [ALL[:3], ALL[:3], ALL]
    assert summary["sites"] == ALL
    assert not (story.path / "excluded.json").exists()
    assert not story.network.refused


@pytest.mark.parametrize("asked", [Invitation, Roster])
def test_a_site_that_is_silent_while_keys_are_exchanged_is_invited_again_later(
    asked: type[Message], folder: Path
) -> None:
    story = Story(folder, num_rounds=RETRY_SUMS + 2)

    def fault(site: str, message: Message) -> Fault | None:
        keys = isinstance(message, asked) and not story.watcher.lines
        return Fault.SILENT if site == "site-1" and keys else None

    story.network.faults = fault
    summary = story.run()
    assert story.members() == [ALL[1:], ALL]
    survivors = [len(names) for names in summary["survivors"]]
    assert survivors == [3] * RETRY_SUMS + [4] * 2
    assert not story.network.refused


def test_a_site_that_stays_silent_while_keys_are_exchanged_does_not_stop_the_others(
    folder: Path,
) -> None:
    story = Story(folder, num_rounds=RETRY_SUMS + 2)
    story.network.faults = silent_when(
        lambda site, message: site == "site-1" and isinstance(message, Invitation)
    )
    summary = story.run()
    assert summary["survivors"] == [ALL[1:]] * (RETRY_SUMS + 2)
    assert [names for names in story.members() if names != ALL[1:]] == []


def test_a_site_that_does_not_approve_the_study_is_asked_once(folder: Path) -> None:
    story = Story(folder, num_rounds=RETRY_SUMS + 2)

    def declined(message: Message) -> Message:
        raise PolicyError("not here")

    story.network.answers["site-3"] = declined
    story.run()
    assert [type(m).__name__ for site, m in story.network.sent if site == "site-3"] == [
        "Invitation"
    ]
    assert story.members() == [["site-1", "site-2", "site-4"]]


def test_one_leaves_and_another_comes_at_once(folder: Path) -> None:
    story = Story(folder, num_sites=5)
    story.network.absent = {"site-5"}
    story.replace("site-2", spent_from(1))
    story.before_sum(1, story.network.absent.clear)
    summary = story.run()
    later = ["site-1", "site-3", "site-4", "site-5"]
    assert story.members() == [ALL, later]
    assert summary["survivors"] == [ALL, ["site-1", "site-3", "site-4"], later]


# Revoked certificates


def test_a_site_whose_certificate_was_revoked_is_left_out_after_the_sum(folder: Path) -> None:
    story = Story(folder)
    story.before_sum(1, lambda: story.revoke("site-3"))
    summary = story.run()
    left = ["site-1", "site-2", "site-4"]
    assert story.members() == [ALL, left]
    assert summary["survivors"] == [ALL, ALL, left]
    excluded = json.loads((story.path / "excluded.json").read_text())
    assert excluded == {"site-3": "its certificate was revoked"}
    assert not story.watcher.voids


def test_no_site_takes_part_in_a_sum_with_a_member_that_was_revoked(folder: Path) -> None:
    story = Story(folder)
    members_of, asked = story.network.sites, []

    def sites() -> Sequence[str]:
        """The last thing before the tasks of a sum are written."""
        asked.append(len(story.watcher.lines))
        if asked[-1] == 1:
            story.revoke("site-3")
        return members_of()

    story.network.sites = sites
    summary = story.run()
    left = ["site-1", "site-2", "site-4"]
    assert [void.task.sum_number for void in story.watcher.voids] == [1]
    assert [(site, error.rule) for site, error in story.network.refused] == [
        (site, "R3") for site in ALL
    ]
    assert story.members() == [ALL, left]
    assert summary["survivors"] == [ALL, left, left]
    models = {m.sum_number: m.model_digest for _, m in story.network.of(RoundTask)}
    assert models[1] == models[2]  # the void sum taught nothing


def test_nobody_waits_for_a_member_that_was_revoked_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.exchange, "LOOK_S", 0.0)
    story, told = Story(folder), []
    ask = story.network.ask

    def asked(messages: dict[str, Message], deadline_s: float, enough: Enough) -> Iterator[Any]:
        yield from ask(messages, deadline_s, enough)
        if any(isinstance(each, RoundTask) and each.sum_number == 1 for each in messages.values()):
            told.append(enough())
            story.revoke("site-2")
            told.append(enough())
            story.revoke("site-2", "site-3")
            told.append(enough())

    story.network.ask = asked
    story.network.faults = lambda site, message: (
        Fault.SILENT
        if site == "site-3" and isinstance(message, RoundTask) and message.sum_number == 1
        else None
    )
    with pytest.raises(RoundAborted, match="2 sites take part"):
        story.run()
    assert told == [False, False, True]


# Too few


def test_when_fewer_than_three_are_left_the_run_ends_and_says_who_is_missing(
    folder: Path,
) -> None:
    story = Story(folder)
    story.replace("site-2", spent_from(1))
    story.before_sum(1, lambda: story.revoke("site-4"))
    with pytest.raises(RoundAborted, match="2 sites take part, 3 are needed") as ended:
        story.run()
    assert "site-2 (its privacy budget is spent)" in str(ended.value)
    assert "site-4 (its certificate was revoked)" in str(ended.value)
    assert "site-1" not in str(ended.value)
    assert (story.path / "models" / "round-0002.safetensors").exists()
    assert not (story.path / "summary.json").exists()
    assert not (story.path / "final.safetensors").exists()


def test_no_two_epochs_have_room_for_two_sums_of_one_round() -> None:
    """Two sets of sites that can each finish a sum always share one, and it answers once."""
    for num_approved in range(3, 256):
        sizes = range(smallest_epoch(num_approved), num_approved + 1)
        thresholds = [default_threshold(size) for size in sizes]
        assert min(thresholds) + min(thresholds) > num_approved


def test_of_six_sites_one_may_leave_for_good_and_not_two(folder: Path) -> None:
    story = Story(folder, num_sites=6)
    story.replace("site-2", spent_from(1))
    story.replace("site-5", spent_from(2))
    with pytest.raises(RoundAborted, match="4 sites take part, 5 are needed") as ended:
        story.run()
    assert [len(names) for names in story.members()] == [6, 5]
    assert "site-2 (its privacy budget is spent)" in str(ended.value)
    assert "site-5 (its privacy budget is spent)" in str(ended.value)


@pytest.mark.parametrize("present", [ALL[:2], ALL[:1], []], ids=["two", "one", "none"])
def test_a_run_of_fewer_than_three_never_begins_and_says_who_is_missing(
    present: list[str], folder: Path
) -> None:
    story = Story(folder)
    story.network.absent = set(ALL) - set(present)
    with pytest.raises(RoundAborted, match=f"{len(present)} sites take part, 3 are") as ended:
        story.run()
    assert not story.network.sent
    for name in story.network.absent:
        assert name in str(ended.value)


def test_when_too_few_agree_on_keys_the_run_never_begins(folder: Path) -> None:
    story = Story(folder)
    story.network.faults = silent_when(
        lambda site, message: site in ALL[:2] and isinstance(message, Roster)
    )
    with pytest.raises(RoundAborted, match=r"site-1 \(silent\), site-2 \(silent\)"):
        story.run()
    assert not story.network.of(RoundTask)


def test_a_run_that_never_began_is_simply_started_again(folder: Path) -> None:
    story = Story(folder)
    story.network.faults = silent_when(lambda site, message: site in ALL[:2])
    with pytest.raises(RoundAborted):
        story.run()
    gc.collect()
    story.network.faults = silent_when(lambda site, message: False)
    assert story.run()["num_rounds"] == 3


def test_a_run_killed_before_the_first_keys_are_agreed_on_is_simply_started_again(
    folder: Path,
) -> None:
    for moment in (0, 7, 8, 15):
        story = Story(folder / str(moment), num_rounds=1)
        story.network.die_at = moment
        with pytest.raises(Killed):
            story.run()
        gc.collect()
        story.network.die_at = None
        assert story.run()["num_rounds"] == 1


def test_a_study_of_three_sites_works(folder: Path) -> None:
    story = Story(folder, num_sites=3)
    summary = story.run()
    assert summary["survivors"] == [ALL[:3]] * 3
    assert story.run_dir.manifests()[0].threshold == 3
    assert not story.network.of(Survivors)


@pytest.mark.parametrize("asked", [RoundTask, Unmask], ids=["upload", "unmasking"])
def test_a_study_of_three_sites_tolerates_no_dropout(asked: type[Message], folder: Path) -> None:
    story = Story(folder, num_sites=3)
    story.network.faults = silent_when(
        lambda site, message: (
            site == "site-3" and isinstance(message, asked) and message.sum_number == 1
        )
    )
    if asked is Unmask:
        with pytest.raises(RoundAborted, match="2 good shares of a secret came, 3 are needed"):
            story.run()
        return
    summary = story.run()
    assert [void.survivors for void in story.watcher.voids] == [("site-1", "site-2")]
    assert [line["sum"] for line in story.watcher.lines] == [0, 2, 3]
    assert summary["num_rounds"] == 3


# A coordinator that is killed between two epochs


def test_a_run_killed_just_after_a_site_has_joined_ends_with_the_same_model(folder: Path) -> None:
    digests, steps = [], []
    for name in ("undisturbed", "killed"):
        story = Story(folder / name)
        story.network.absent = {"site-4"}
        story.before_sum(1, story.network.absent.clear)
        if name == "killed":
            kill_before(story, lambda message: isinstance(message, RoundTask), sum_number=2)
        digests.append(story.run(resume=name == "killed")["final_model_sha256"])
        assert story.members() == [ALL[:3], ALL]
        steps.append({m.sum_number: m.exponents for _, m in story.network.of(RoundTask)})
    assert steps[0] == steps[1]
    assert digests[0] == digests[1]


def kill_before(story: Story, wanted: Callable[[Message], bool], *, sum_number: int) -> None:
    """Run until a message about a sum is to be delivered, and end there."""
    others = story.network.faults

    def fault(site: str, message: Message) -> Fault | None:
        if wanted(message) and getattr(message, "sum_number", sum_number) == sum_number:
            raise Killed
        return others(site, message)

    story.network.faults = fault
    with pytest.raises(Killed):
        story.run()
    story.network.faults = others
    gc.collect()  # the run that was stopped still holds its folder


@pytest.mark.parametrize(
    ("is_back", "moments"),
    [
        pytest.param(True, range(12), id="a site was away for a moment", marks=pytest.mark.slow),
        pytest.param(True, (0, 3, 6, 11), id="the same, some moments"),
        pytest.param(False, (1, 7), id="a site is away for good"),
    ],
)
def test_a_run_killed_while_a_new_epoch_begins_goes_on_to_its_end(
    is_back: bool, moments: Sequence[int], folder: Path
) -> None:
    """Three sites exchange keys: two exchanges, twelve moments."""
    for moment in moments:
        story = Story(folder / str(moment), num_rounds=2)
        network = story.network
        story.before_sum(0, lambda network=network: network.absent.add("site-4"))
        die_in_second_epoch(story, moment)
        with pytest.raises(Killed):
            story.run()
        gc.collect()
        story.watcher, network.die_at = Watcher(), None
        network.absent = set() if is_back else {"site-4"}
        summary = story.run(resume=True)
        assert summary["num_rounds"] == 2, moment


def die_in_second_epoch(story: Story, moment: int) -> None:
    """Kill the coordinator at one of the moments that follow the first sum."""
    finished = story.watcher.finished_round

    def then_count(line: dict[str, Any]) -> None:
        finished(line)
        story.network.num_moments, story.network.die_at = 0, moment

    story.watcher.finished_round = then_count


def test_a_run_that_ended_while_keys_were_exchanged_goes_on_when_the_sites_are_back(
    folder: Path,
) -> None:
    story = Story(folder)
    story.before_sum(0, lambda: story.network.absent.add("site-4"))
    joined, network = story.network.faults, story.network
    network.faults = lambda site, message: (
        Fault.SILENT
        if site == "site-3" and isinstance(message, Invitation) and story.watcher.lines
        else joined(site, message)
    )
    with pytest.raises(RoundAborted, match=r"2 sites take part, 3 are needed.*site-3 \(silent\)"):
        story.run()
    gc.collect()
    network.absent, network.faults = set(), lambda site, message: None
    summary = story.run(resume=True)
    assert summary["num_rounds"] == 3


# What sites remember over epochs


def test_a_model_that_was_summed_is_not_trained_again_in_another_epoch(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    federation.check(federation.sum(federation.next_task(model=7)), ALL)
    federation.open_epoch(2, ALL[:3])
    assert isinstance(federation.sum(federation.next_task(model=7)), Void)
    assert [error.rule for _, error in federation.network.refused] == ["R4"] * 3
    federation.check(federation.sum(federation.next_task(model=8)), ALL[:3])


def test_a_model_whose_sum_was_void_may_be_trained_again_in_another_epoch(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    federation.network.faults = silent_when(lambda site, message: site in ALL[:2])
    assert isinstance(federation.sum(federation.next_task(model=7)), Void)
    federation.network.faults = silent_when(lambda site, message: False)
    federation.open_epoch(2, ALL[:3])
    federation.check(federation.sum(federation.next_task(model=7)), ALL[:3])
    assert not federation.network.refused


def test_the_same_model_may_be_summed_once_for_each_purpose(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    for number, purpose in enumerate((Purpose.VALIDATE, Purpose.TEST)):
        federation.open_epoch(2 + number, ALL[number % 2 :])
        task = federation.next_task(purpose, model=7)
        federation.check(federation.sum(task), ALL[number % 2 :])
    assert not federation.network.refused


def test_training_scores_a_model_too_so_it_is_not_validated_again_over_other_sites(
    folder: Path,
) -> None:
    federation = VectorFederation(folder, 5)
    federation.check(federation.sum(federation.next_task(Purpose.TRAIN, model=7)), federation.names)
    federation.open_epoch(2, federation.names[1:])
    total = federation.sum(federation.next_task(Purpose.VALIDATE, model=7))
    assert isinstance(total, Void)
    assert set(total.refusals.values()) == {"protocol"}


def test_a_sum_number_does_not_come_back_in_another_epoch(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    for _ in range(3):
        federation.check(federation.sum(federation.next_task()), ALL)
    federation.open_epoch(2, ALL[:3])
    federation.run_dir.drop_pending()
    for number in (0, 1, 2):
        federation.sum_number = number - 1
        assert isinstance(federation.sum(federation.next_task(model=10 + number)), Void)
    rules = [error.rule for _, error in federation.network.refused]
    assert rules == ["R4"] * 3 + ["R4"] * 3 + ["R5"] * 3
    federation.check(federation.sum(federation.next_task(model=20)), ALL[:3])


def test_a_sum_of_an_epoch_that_has_ended_is_not_unmasked_any_more(folder: Path) -> None:
    federation = VectorFederation(folder, 4)
    task, before = federation.next_task(), federation.epoch
    federation.network.faults = silent_when(lambda site, message: isinstance(message, Unmask))
    with pytest.raises(RoundAborted):
        federation.sum(task)
    federation.network.faults = silent_when(lambda site, message: False)
    federation.open_epoch(2, ALL)
    federation.epoch = before
    with pytest.raises(RoundAborted):
        federation.sum(task)
    assert {error.rule for _, error in federation.network.refused} <= {"R7", "R14"}
    assert federation.network.refused
    assert not [reply for _, reply in federation.network.received if isinstance(reply, Shares)]
