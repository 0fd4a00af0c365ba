"""The doors that a message can come in by, and what may pass each of them.

A door delivers a message to the product's own code in a known state, and puts the state back. What
passed is held against the honest message of that door: every place where the two differ must stand
in the list of permitted.py. All else is malformed.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from permitted import FREE, Change, differences, is_signed, table_of
from recorded import COORDINATOR, HERO, NUM_SITES, Recording, copied
from resign import Hostile

from client.contents import Contents
from client.journal import Journal
from client.ledger import Ledger
from client.round import answer
from common.audit import AuditLog
from common.charges import LEDGERS
from common.errors import RemoteProtocolError
from common.evidence import Evidence
from common.messages import (
    Agreement,
    Invitation,
    Message,
    Refusal,
    Roster,
    RoundTask,
    Shares,
    SiteKeys,
    Survivors,
    Unmask,
    Upload,
    Vote,
)
from common.secagg.header import Header
from common.secagg.phases import Phase
from common.secagg.task import digest_of_task
from common.secagg.view import digest_of_view
from server.collected import Collected
from server.epoch import _agreed, exchange_keys
from server.exchange import Exchange, Keep
from server.network import Enough, never
from server.unmasking import Answers, _ask_for_votes, _dropouts, _take_shares

TABLES = ("manifest", "answered", "memory", "counter")  # of a journal


class Door(ABC):
    """One place where messages arrive."""

    title: str
    due: Message  # the honest message that may come in here
    before: Message  # the one before it
    hostile: Hostile
    recording: Recording

    @abstractmethod
    def deliver(self, message: Message) -> None:
        """Hand a message to the product.

        Raises:
          RemoteProtocolError: It was refused.
        """

    def unforeseen(self, message: Message) -> list[str]:
        """What is wrong with a message that was accepted."""
        honest = self.honest(message)
        if honest is None:
            return [f"{type(message).__name__} is not due"]
        changes = differences(honest, message)
        wrong = [str(change) for change in changes if not self._is_free(change, message)]
        if changes and hasattr(message, "signature") and not is_signed(self, message):
            wrong.append(f"{type(message).__name__}.signature")
        return wrong

    def _is_free(self, change: Change, message: Message) -> bool:
        try:
            return change.path in FREE and FREE[change.path](self, message, change)
        except (RemoteProtocolError, LookupError, ValueError, TypeError, OverflowError):
            return False  # what cannot even be read is nobody's to choose

    def honest(self, message: Message) -> Message | None:
        """What an accepted message is held against; None where nothing of its kind may pass."""
        return self.due if type(message) is type(self.due) else None

    def state(self) -> Any:
        """What a refusal must leave as it is."""
        return None

    @abstractmethod
    def restore(self) -> None:
        """Back to the state in which the honest message is due."""


# A site


class SiteDoor(Door):
    """The attacked site, just before it received a certain message."""

    def __init__(self, recording: Recording, number: int, folder: Path) -> None:
        self.recording = recording
        self.due, self._pristine = recording.network.before[number]
        self.before = recording.network.before[max(number - 1, 0)][0]
        self._folder = folder
        site = recording.sites[recording.manifest.names[HERO]]
        self.hostile = Hostile(
            recording.identities[COORDINATOR],
            COORDINATOR,
            HERO,
            {k: one for k, one in recording.identities.items() if k not in (HERO, COORDINATOR)},
        )
        shutil.copytree(self._pristine, folder)
        self.site = replace(
            site,
            journal=Journal(folder / "journal.sqlite"),
            ledger=Ledger(folder / LEDGERS / "phantoms.jsonl", "phantoms", None),
            state_dir=folder,
            load=_no_images,
        )
        epoch, last = self.site.journal.epoch(), self.site.journal.sum()
        self.phase = epoch.phase if epoch else Phase.NEW
        self.last = last.sum_number if last else -1
        self.has_answered = bool(last and last.shares)
        self.has_voted = bool(last and last.vote)
        self.answered_pairs = {
            (recording.tasks[k].model_digest, recording.tasks[k].purpose)
            for k in range(self.last + self.has_answered)
        }
        self.title = f"site, {self.phase}, after sum {self.last}, {type(self.due).__name__} is due"
        self._at_first = self.state()

    def deliver(self, message: Message) -> None:
        answer(message, self.site)

    def honest(self, message: Message) -> Message | None:
        said = self._said_to_it(type(message))
        return self._due_now(message, said) if said else None

    def _due_now(self, message: Message, said: Sequence[Any]) -> Message | None:
        has_upload = self.phase in (Phase.MASKED, Phase.VOTED)
        found: Message | None = None
        match message:
            case Invitation():
                is_new = table_of(message.manifest) != table_of(said[0].manifest)
                found = said[0] if is_new or self.phase in (Phase.NEW, Phase.KEYS) else None
            case Roster() if self.phase == Phase.KEYS or self.has_just_agreed:
                found = said[0]
            case RoundTask() if has_upload or self.phase == Phase.READY:
                found = self._honest_task(message, said)
            case Survivors() if has_upload or self.has_voted:
                found = replace(said[0], sum_number=self.last)
            case Unmask() if has_upload or self.has_answered:
                found = next((one for one in said if one.sum_number == self.last), None)
        return found

    def _honest_task(self, task: RoundTask, said: Sequence[Any]) -> Message | None:
        if self.repeats(task):
            return said[self.last]
        is_new = task.sum_number > self.last
        if not is_new or (task.model_digest, task.purpose) in self.answered_pairs:
            return None
        return replace(said[0], sum_number=task.sum_number)

    def repeats(self, task: RoundTask) -> bool:
        """Whether it is the task that was answered last."""
        said = self.recording.tasks[self.last] if self.last >= 0 else None
        try:
            return said is not None and digest_of_task(said) == digest_of_task(task)
        except OverflowError:
            return False

    @property
    def has_just_agreed(self) -> bool:
        """Whether the roster may be repeated."""
        return self.phase == Phase.READY and self.last < 0

    def _said_to_it(self, kind: type[Message]) -> list[Any]:
        return [one for one, _ in self.recording.network.before if type(one) is kind]

    def state(self) -> Any:
        database = self.site.journal._database
        rows = [database.execute(f"SELECT * FROM {name}").fetchall() for name in TABLES]  # noqa: S608
        mark = self._folder / "journal.mark"
        files = sorted(path.name for path in self._folder.glob("answer-*"))
        return rows, mark.read_text() if mark.exists() else "", files

    def restore(self) -> None:
        if self.state() == self._at_first:
            return
        self.site.journal.close()
        shutil.rmtree(self._folder)
        shutil.copytree(self._pristine, self._folder)
        self.site = replace(self.site, journal=Journal(self._folder / "journal.sqlite"))


def _no_images() -> Any:
    """What a stand-in for training and scoring never looks at."""
    none = Contents("0" * 64, 0, frozenset())
    return SimpleNamespace(
        train=(), validation=(), test=(), contents=none, to=lambda _: _no_images()
    )


# The coordinator


class CoordinatorDoor(Door):
    """The coordinator, waiting for the hostile site's answer to one message."""

    def __init__(self, recording: Recording, title: str, due: Message, keep: Keep) -> None:
        self.recording, self.due, self.before = recording, due, due
        self.title = f"coordinator, {title}"
        self._name = recording.manifest.names[HERO]
        self._keep = keep
        self._network = _OneAnswer(self._name)
        self._exchange = Exchange(
            self._network,
            recording.credentials,
            Evidence(recording.folder / "coordinator"),
            AuditLog(recording.folder / "coordinator" / "audit.jsonl", lambda: recording.now),
            now=lambda: recording.now,
        )
        own = recording.identities[HERO]
        friends = {k: one for k, one in recording.identities.items() if k != COORDINATOR}
        self.hostile = Hostile(own, HERO, COORDINATOR, friends)

    def deliver(self, message: Message) -> None:
        self._network.reply = message
        error = RemoteProtocolError("a word")

        def keep(site: int, reply: Message) -> None:
            nonlocal error
            try:
                self._keep(site, reply)
            except RemoteProtocolError as raised:
                error = raised
                raise

        asked = {self._name: self.due}
        missing = self._exchange.ask_all(self.recording.manifest.names, asked, keep, 60)
        if missing and not isinstance(message, Refusal):
            raise error

    def unforeseen(self, message: Message) -> list[str]:
        return [] if isinstance(message, Refusal) else super().unforeseen(message)


class FreshDoor(CoordinatorDoor):
    """An exchange whose other answers have arrived; it begins anew after each that is taken."""

    def __init__(
        self,
        recording: Recording,
        title: str,
        due: Message,
        start: Callable[[Exchange], Any],
        others: Mapping[int, Message],
    ) -> None:
        self._start, self._others = start, others
        super().__init__(recording, title, due, self._begun(recording))
        self._has_taken = False

    def deliver(self, message: Message) -> None:
        super().deliver(message)
        self._has_taken = True

    def restore(self) -> None:
        if self._has_taken:
            self._keep, self._has_taken = self._begun(self.recording), False

    def _begun(self, recording: Recording) -> Keep:
        keep = keep_of(self._start, recording)
        for site, reply in self._others.items():
            keep(site, reply)
        return keep


class UploadDoor(CoordinatorDoor):
    """The others' uploads are in the sum."""

    def __init__(self, recording: Recording, number: int) -> None:
        task, epoch = recording.tasks[number], recording.epoch
        said = [one for one in recording.messages() if isinstance(one, Upload)]
        uploads = {Header.decode(one.header).site: one for one in said if one.sum_number == number}
        self._others = Collected.nothing(task, recording.manifest)
        for site in sorted(set(range(NUM_SITES)) - {HERO}):
            self._others.take(site, uploads[site], epoch, is_private=True)
        self.collected = copied(self._others)

        def keep(site: int, reply: Message) -> None:
            self.collected.take(site, reply, epoch, is_private=True)

        super().__init__(recording, f"sum {number}, upload", uploads[HERO], keep)
        self._file = recording.folder / f"pending-{number}.safetensors"

    def deliver(self, message: Message) -> None:
        super().deliver(message)
        self.collected.save(self._file)
        self.collected.statements()
        list(self.collected.disagreements())

    def state(self) -> Any:
        return (
            self.collected.values.tobytes(),
            self.collected.tail.tobytes(),
            dict(self.collected.uploads),
        )

    def restore(self) -> None:
        self.collected = copied(self._others)


class SharesDoor(CoordinatorDoor):
    """The survivors were asked to unmask."""

    def __init__(self, recording: Recording, number: int) -> None:
        self._collected, self._number = recording.collected[number], number
        epoch = recording.epoch
        headers = self._collected.headers()
        self._view = digest_of_view(epoch.run, number, self._collected.task, headers)
        slots = _dropouts(epoch, self._collected)
        self._secrets = [
            (owner, slot) for owner in self._collected.survivors for slot in (owner, *slots)
        ]
        self.restore()

        def keep(site: int, reply: Message) -> None:
            _take_shares(site, reply, epoch, self._collected, self.answers)

        (due,) = (one for one in recording.replies(Shares) if one.sum_number == number)
        super().__init__(recording, f"sum {number}, shares", due, keep)
        super().deliver(due)
        self._good = self.answers.good
        self.restore()

    def state(self) -> Any:
        """Shares of a wrong answer that match their commitments are kept: they are right."""
        return [
            secret for secret, by in self.answers.good.items() if by not in ({}, self._good[secret])
        ]

    def restore(self) -> None:
        self.answers = Answers(self._view, {secret: {} for secret in self._secrets})


class _OneAnswer:
    """A network with one site, which says what it is told to."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.reply: Message | None = None

    def sites(self) -> Sequence[str]:
        return [self._name]

    def ask(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        assert self.reply is not None
        yield self._name, self.reply


class _CaughtError(Exception):
    def __init__(self, keep: Keep) -> None:
        super().__init__()
        self.keep = keep


class _Catching(Exchange):
    """Shows what the coordinator does with answers, without asking anybody."""

    def ask_all(
        self,
        names: Sequence[str],
        messages: Mapping[str, Message],
        keep: Keep,
        deadline_s: float,
        enough: Enough = never,
    ) -> dict[str, str]:
        raise _CaughtError(keep)


def keep_of(start: Callable[[Exchange], Any], recording: Recording) -> Keep:
    """The function that takes answers where an exchange of the coordinator begins."""
    catching = _Catching(
        recording.network,
        recording.credentials,
        Evidence(recording.folder / "coordinator"),
        AuditLog(recording.folder / "coordinator" / "audit.jsonl", lambda: recording.now),
        now=lambda: recording.now,
    )
    try:
        start(catching)
    except _CaughtError as caught:
        return caught.keep
    raise AssertionError("nobody was asked")


def doors_of_site(recording: Recording) -> list[Door]:
    """Every state that a site is in, in the order of a run."""
    return [
        SiteDoor(recording, number, recording.folder / f"door-{number}")
        for number in range(len(recording.network.before))
    ]


def doors_of_coordinator(recording: Recording) -> list[Door]:
    """Every kind of answer that the coordinator waits for; the others have answered."""
    epoch, collected = recording.epoch, recording.collected[1]
    view = digest_of_view(epoch.run, 1, collected.task, collected.headers())
    votes = partial(_ask_for_votes, epoch=epoch, collected=collected, view=view)
    keys, agreement, vote = (recording.replies(kind)[0] for kind in (SiteKeys, Agreement, Vote))
    invite = partial(exchange_keys, manifest=recording.manifest)
    relay = partial(_agreed, epoch=replace(epoch, agreements=()))
    others = [site for site in range(NUM_SITES) if site != HERO]
    all_keys = {site: epoch.roster.keys_of(site) for site in others}
    agreements = {site: epoch.agreements[site] for site in others}
    return [
        FreshDoor(recording, "keys", keys, invite, all_keys),
        FreshDoor(recording, "agreement", agreement, relay, agreements),
        UploadDoor(recording, 0),
        UploadDoor(recording, 2),
        FreshDoor(recording, "vote", vote, votes, {}),
        SharesDoor(recording, 0),
        SharesDoor(recording, 1),
    ]
