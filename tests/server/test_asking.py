"""Whom a deployed coordinator asks again, and when: sites come and go, and the SuperLink dies."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from common import wire
from common.errors import ConfigError, RoundAborted
from common.messages import (
    Greeting,
    Introduction,
    Purpose,
    Reason,
    Refusal,
    RoundTask,
    digest_of_model,
)
from common.messages import Message as Said
from server import deployed
from server.deployed import DeployedNetwork
from server.superlink import asking
from server.superlink.grid import CAME_TO_NOTHING, Connected, SuperLinkDied

A, B = "a", "b"
NODES = {A: 11, B: 22}
QUESTIONS = {A: Greeting("to a"), B: Greeting("to b")}
SITE_WENT = ErrorCode.NODE_UNAVAILABLE
Event = Callable[["FakeGrid"], None]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_task_id", "_node_id"):  # what Flower's messages are sent as
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(asking, "LOOK_S", 0.0)
    monkeypatch.setattr(asking, "AGAIN_S", 0.0)
    monkeypatch.setattr(asking, "AWAY_S", 0.0)
    monkeypatch.setattr(deployed, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(deployed, "LONGEST_PAUSE_S", 0.001)
    monkeypatch.setattr(deployed, "FIRST_REVIVAL_S", 0.001)


@dataclass
class FakeGrid:
    """A SuperLink to which one thing after the other happens, between two looks for answers."""

    events: Iterator[Event]
    since: dict[str, str]  # when each site connected that is there
    asked: list[str] = field(default_factory=list)  # sites, in order
    open: dict[str, Message] = field(default_factory=dict)  # questions by id
    replies: list[Message] = field(default_factory=list)
    coming: dict[str, float] = field(default_factory=dict)  # idle seconds of answers by question
    forgotten: list[str] = field(default_factory=list)
    finished: bool = False
    is_full: bool = False  # the SuperLink's disk
    ids: Iterator[int] = field(default_factory=itertools.count)

    def connected(self) -> dict[str, Connected]:
        return {site: Connected(NODES[site], since) for site, since in self.since.items()}

    def check_room(self) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "no room", "objects")

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = []
        for message in messages:
            number = f"q{next(self.ids)}"
            message.metadata.__dict__["_message_id"] = number
            self.open[number] = message
            self.asked += [site for site, n in NODES.items() if n == message.metadata.dst_node_id]
            sent.append(number)
        return sent

    def pull_messages(self, questions: Iterable[str]) -> Iterator[Message]:
        assert set(questions) <= self.open.keys()
        next(self.events, lambda _: None)(self)
        came, self.replies = self.replies, []
        yield from came

    def idle_s(self, question: str) -> float | None:
        return self.coming.get(question)

    def num_bytes(self) -> dict[str, int]:
        return {question: 1000 * (1 + number) for number, question in enumerate(self.coming)}

    def forget(self, questions: Iterable[str]) -> None:
        self.forgotten += questions

    def abandon(self) -> None:
        self.finished = True

    def question(self, site: str, which: int = -1) -> Message:
        return [m for m in self.open.values() if m.metadata.dst_node_id == NODES[site]][which]


def says(site: str, which: int = -1, what: Said | None = None) -> Event:
    def happens(grid: FakeGrid) -> None:
        content = wire.pack(what or Introduction(NODES[site]))
        grid.replies.append(Message(content, reply_to=grid.question(site, which)))

    return happens


def fails(site: str, code: int, *, by_flower: bool) -> Event:
    def happens(grid: FakeGrid) -> None:
        reply = Message(Error(code), reply_to=grid.question(site))
        if by_flower:
            reply.metadata.__dict__["_src_node_id"] = 1
        grid.replies.append(make_message(reply.metadata, error=Error(code)))

    return happens


def connects(site: str, since: str) -> Event:
    return lambda grid: grid.since.update({site: since})


def goes(site: str) -> Event:
    return lambda grid: grid.since.pop(site) and None


def nothing(_: FakeGrid) -> None:
    pass


def dies(_: FakeGrid) -> None:
    raise SuperLinkDied("killed")


def network_of(*grids: FakeGrid) -> DeployedNetwork:
    waiting = list(grids[1:])
    return DeployedNetwork(grids[0], lambda: waiting.pop(0))  # type: ignore[arg-type, return-value]


def grid_of(*events: Event, **since: str) -> FakeGrid:
    return FakeGrid(iter(events), since or dict.fromkeys(NODES, "monday"))


def answers(network: DeployedNetwork, deadline_s: float = 10) -> dict[str, Said]:
    return dict(network.ask(QUESTIONS, deadline_s))


BOTH = {A: Introduction(11), B: Introduction(22)}


def test_everybody_is_asked_once_and_answers() -> None:
    grid = grid_of(says(A), says(B))
    assert answers(network_of(grid)) == BOTH
    assert grid.asked == [A, B]


def test_a_site_that_works_is_left_alone() -> None:
    grid = grid_of(says(A), *[nothing] * 50, says(B))
    assert answers(network_of(grid)) == BOTH
    assert grid.asked == [A, B]


def test_a_site_that_is_away_is_asked_when_it_is_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    grid = grid_of(says(A), nothing, nothing, connects(B, "tuesday"), nothing, says(B), a="monday")
    assert answers(network_of(grid)) == BOTH
    assert grid.asked == [A, B]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "b is not connected: waiting for it, for 10 s at most",
        "b is back: asked again",
    ]


def test_a_site_that_connected_anew_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    grid = grid_of(says(A), connects(B, "tuesday"), nothing, nothing, says(B))
    assert answers(network_of(grid)) == BOTH
    assert grid.asked == [A, B, B]
    assert [record.getMessage() for record in caplog.records] == ["b is back: asked again"]


def test_the_answer_that_a_site_had_ready_counts_and_the_second_question_is_taken_back() -> None:
    grid = grid_of(says(A), connects(B, "tuesday"), nothing, nothing, says(B, which=0))
    assert answers(network_of(grid)) == BOTH
    assert grid.asked == [A, B, B]
    assert grid.forgotten == ["q2"]


def test_a_site_that_connected_anew_and_sends_is_not_disturbed() -> None:
    def sends(grid: FakeGrid) -> None:
        grid.coming["q1"] = 0.0

    grid = grid_of(says(A), sends, connects(B, "tuesday"), *[nothing] * 5, says(B))
    assert answers(network_of(grid)) == BOTH
    assert grid.asked == [A, B]


def test_when_an_answer_is_on_its_way_the_other_question_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sends(grid: FakeGrid) -> None:
        monkeypatch.setattr(asking, "LOOK_S", 1.0)
        grid.coming["q2"] = 0.0

    grid = grid_of(says(A), connects(B, "tuesday"), nothing, sends, nothing, says(B))
    assert answers(network_of(grid)) == BOTH
    assert grid.forgotten == ["q1"]


def test_the_pieces_of_a_new_answer_bring_no_dead_one_to_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sends_what_both_have(grid: FakeGrid) -> None:
        monkeypatch.setattr(asking, "LOOK_S", 1.0)
        grid.coming |= {"q1": 0.0, "q2": 0.0}

    events = says(A), connects(B, "tuesday"), nothing, sends_what_both_have, nothing, says(B)
    grid = grid_of(*events)
    assert answers(network_of(grid)) == BOTH
    assert grid.forgotten == ["q1"]


@pytest.mark.parametrize(
    ("code", "by_flower"), [(SITE_WENT, True), (CAME_TO_NOTHING, True), (CAME_TO_NOTHING, False)]
)
def test_a_question_that_came_to_nothing_is_asked_again(code: int, by_flower: bool) -> None:
    grid = grid_of(says(A), fails(B, code, by_flower=by_flower), nothing, says(B))
    assert answers(network_of(grid)) == BOTH
    assert grid.asked == [A, B, B]


def test_a_site_with_nothing_to_train_is_asked_again_when_it_is_silent_for_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever took the question or the answer: without that, all wait for the deadline."""
    caplog.set_level("INFO")
    monkeypatch.setattr(asking, "PATIENCE_S", 0.01)
    silent = [lambda _: time.sleep(0.005)] * 4
    grid = grid_of(says(A), *silent, says(B, which=0))
    assert answers(network_of(grid)) == BOTH
    assert grid.asked == [A, B, B]
    assert [record.getMessage() for record in caplog.records] == ["b did not answer: asked again"]


def test_a_site_that_trains_is_left_alone_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "PATIENCE_S", 0.0)
    model = np.zeros(1, np.float32)
    digest = digest_of_model(model)
    task = RoundTask("ab" * 16, 0, 1, Purpose.TRAIN, (0,), digest, (), (), b"", model)
    grid = grid_of(says(A), *[nothing] * 20, says(B))
    assert dict(network_of(grid).ask({A: task, B: task}, 10)) == BOTH
    assert grid.asked == [A, B]


def test_an_error_of_a_site_is_a_refusal() -> None:
    grid = grid_of(says(A), fails(B, SITE_WENT, by_flower=False))
    assert answers(network_of(grid)) == BOTH | {B: Refusal(run="", reason=Reason.PROTOCOL)}
    assert grid.asked == [A, B]


def test_a_site_answers_once() -> None:
    grid = grid_of(says(A), says(A, what=Introduction(99)), says(B))
    network = network_of(grid)
    assert list(network.ask(QUESTIONS, 10)) == list(BOTH.items())


def test_at_the_deadline_questions_are_taken_back() -> None:
    grid = grid_of(says(A), goes(B))
    assert answers(network_of(grid), deadline_s=0.2) == {A: Introduction(11)}
    assert grid.forgotten == ["q1"]


def test_it_is_told_what_is_on_its_way() -> None:
    told = []

    def sends(grid: FakeGrid) -> None:
        grid.coming |= {"q0": 0.0, "q1": 0.0, "another": 0.0}

    grid = grid_of(sends, says(A), says(B))
    network = DeployedNetwork(grid, lambda: grid, told.append)  # type: ignore[arg-type, return-value]
    assert answers(network) == BOTH
    assert told == [{A: 1000, B: 2000}, {B: 2000}, {}]


def test_who_has_not_answered_is_asked_by_a_new_superlink(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    old, new = grid_of(says(A), dies), grid_of(nothing, connects(B, "tuesday"), says(B), a="x")
    assert answers(network_of(old, new)) == BOTH
    assert old.finished
    assert (old.asked, new.asked) == ([A, B], [B])
    assert "SuperLink died; it is started again" in caplog.text


def test_a_superlink_may_die_while_it_is_looked_who_is_there() -> None:
    class Dead(FakeGrid):
        def connected(self) -> dict[str, Connected]:
            raise SuperLinkDied("killed")

    old = Dead(iter(()), {})
    assert network_of(old, grid_of()).sites() == [A, B]
    assert old.finished


def test_a_superlink_that_does_not_start_is_tried_until_the_deadline() -> None:
    tries = []

    def revive() -> FakeGrid:
        tries.append(1)
        if len(tries) < 4:
            raise ConfigError("the port is taken")
        return grid_of(says(A), says(B))

    network = DeployedNetwork(grid_of(dies), revive)  # type: ignore[arg-type]
    assert answers(network) == BOTH
    assert len(tries) == 4


def test_one_that_never_starts_ends_the_run() -> None:
    def revive() -> FakeGrid:
        raise ConfigError("the port is taken")

    network = DeployedNetwork(grid_of(dies), revive)  # type: ignore[arg-type]
    with pytest.raises(RoundAborted, match="could not be started again: the port is taken"):
        answers(network, deadline_s=0.1)


def test_where_no_answer_could_be_kept_nobody_waits_for_the_deadline() -> None:
    def fills_up(grid: FakeGrid) -> None:
        grid.is_full = True

    grid = FakeGrid(iter([fills_up]), {A: "1", B: "1"})
    with pytest.raises(OSError, match="objects"):
        list(DeployedNetwork(grid, lambda: grid).ask(QUESTIONS, 3600.0))
