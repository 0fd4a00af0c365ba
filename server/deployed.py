"""A run over real sites: start Flower's SuperLink, wait for the members, run, stop."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from common.errors import ConfigError, RoundAborted
from common.identity import Identity, read_certificate
from common.manifest import code_digest, smallest_epoch
from common.messages import Greeting, Introduction, Message, Refusal
from common.models.build import build_network
from common.roster import CoordinatorCredentials, Trust
from common.study import Study
from common.tasks import task_of
from common.tasks.statistics import StatisticsTask
from server.config import CoordinatorConfig
from server.coordinator import Summary, run
from server.heads import Heads
from server.network import Enough, never
from server.progress import ConsoleObserver, Readiness
from server.run_dir import SUPERLINK, RunDir
from server.superlink.asking import Asking
from server.superlink.grid import CoordinatorGrid, SuperLinkDied
from server.superlink.launcher import Listening, SuperLink, new_secret

ASK_S, LONGEST_S = 5.0, 60.0  # a site that is not ready yet is asked again after so long
POLL_S = 0.2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.1  # between two questions for answers
FIRST_REVIVAL_S, LONGEST_REVIVAL_S = 1.0, 30.0  # between two attempts to start the SuperLink
REVIVE_S = 600.0  # for such attempts, where no deadline runs
AROUND_BYTES, MEMBER_BYTES = 128 << 10, 64_000  # of an upload: statement and heads; shares
ANSWER_S = 30.0  # for saying whether it takes part

Receiving = Callable[[Mapping[str, int]], None]
log = logging.getLogger("consilium.coordinator")


class DeployedNetwork:
    """Sites behind Flower's SuperLink, by the names in their certificates.

    Args:
      grid: Reaches them.
      revive: Starts a SuperLink that died again, and reaches the sites through it.
      receiving: Told now and then how much came of answers that are on their way, by site.
    """

    def __init__(
        self,
        grid: CoordinatorGrid,
        revive: Callable[[], CoordinatorGrid],
        receiving: Receiving = lambda _: None,
    ) -> None:
        self._grid = grid
        self._revive = revive
        self._receiving = receiving

    def sites(self) -> Sequence[str]:
        """Every site that is connected now."""
        while True:
            try:
                return list(self._grid.connected())
            except SuperLinkDied as died:
                self._start_again(died, REVIVE_S)

    def ask(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        """Ask sites until the deadline; replies are yielded as they arrive.

        A site that is away is asked when it is back, and all are asked again when the SuperLink
        died: the deadline alone decides who is left out.

        Raises:
          RoundAborted: The SuperLink cannot be started again.
        """
        asking = Asking(messages, deadline_s)
        pause = FIRST_PAUSE_S
        while not asking.is_over():
            num_arrived = 0
            try:
                asking.look(self._grid)
                for answered in asking.answers(self._grid):
                    num_arrived += 1
                    yield answered
                    del answered
                self._receiving(asking.arriving(self._grid))
            except SuperLinkDied as died:
                self._start_again(died, asking.left_s())
                asking.lost()
            if not num_arrived and enough():
                return
            pause = FIRST_PAUSE_S if num_arrived else min(LONGEST_PAUSE_S, pause * 1.5)
            if not num_arrived:
                time.sleep(pause)
        with contextlib.suppress(SuperLinkDied):  # the next question finds that out
            asking.give_up(self._grid)

    def finish(self) -> None:
        """End Flower's run, so that sites stop waiting for it."""
        self._grid.finish()

    def _start_again(self, died: SuperLinkDied, patience_s: float) -> None:
        """A new SuperLink in the place of one that died; the sites connect to it by themselves."""
        log.warning("Flower's SuperLink died; it is started again, and the sites asked again")
        self._grid.abandon()
        end, pause = time.monotonic() + patience_s, FIRST_REVIVAL_S
        while True:
            try:
                self._grid = self._revive()
            except (ConfigError, SuperLinkDied) as error:
                if time.monotonic() + pause > end:
                    raise RoundAborted(f"{died}; it could not be started again: {error}") from None
                log.error("%s; trying again in %.0f s", error, pause)  # noqa: TRY400
            else:
                return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_REVIVAL_S)


def coordinate(study: Study, config: CoordinatorConfig, folder: Path, *, resume: bool) -> Summary:
    """Run a study over the sites that call.

    Raises:
      ConfigError: A file is missing or does not fit the study; nothing was started.
      RoundAborted: Too few sites take part.
    """
    credentials = credentials_of(study, config)
    record = RunDir.open(folder, study, resume=resume)
    config.state_dir.mkdir(parents=True, exist_ok=True)
    service = folder / SUPERLINK
    service.mkdir(mode=0o700, exist_ok=True)
    told = Listening(
        host=config.host,
        port=config.port,
        ca=str(config.certificates.ca),
        certificate=str(config.certificates.cert),
        key=str(config.certificates.key),
        revocation_list=str(config.certificates.revoked),
        members=dict(credentials.trust.members),
        about={"version": version("consilium"), "code": code_digest(), "study": study.digest()},
        health=config.health,
        secret=new_secret(),
        max_upload_bytes=largest_upload(study),
    )
    with SuperLink.start(told, service / "superlink.log") as superlink, ConsoleObserver() as shown:
        log.info("listening on %s port %d", config.host, superlink.public_port)
        network = DeployedNetwork(superlink.open_grid(), superlink.revived, shown.receiving)
        try:
            wait_for_members(study, network, config.wait_s, shown.waiting(study))
            heads = Heads(config.state_dir)
            summary = run(study, network, record, shown, credentials, heads)
        finally:
            network.finish()
    shutil.rmtree(service)
    return summary


def largest_upload(study: Study) -> int:
    """Bytes of the longest answer that an honest site gives, with room for what goes around it."""
    schema = build_network(study).schema
    num_counts = task_of(study).num_counts
    if study.statistics is not None:
        num_counts = max(num_counts, StatisticsTask(study).num_counts)
    num_tail = 1 + len(schema.names) + num_counts
    return 4 * schema.num_params + 8 * num_tail + AROUND_BYTES + MEMBER_BYTES * len(study.members)


def credentials_of(study: Study, config: CoordinatorConfig) -> CoordinatorCredentials:
    """The coordinator's key, held against the key that the study names.

    Raises:
      ConfigError: The study pins no keys, or another coordinator's.
    """
    study.check_pinned()
    assert study.coordinator is not None  # noqa: S101 - unpinned() has looked
    files = config.certificates
    identity = Identity.load(files.cert, files.key)
    if identity.fingerprint != study.coordinator.key:
        raise ConfigError(
            f"{files.cert} has the key {identity.fingerprint[:12]}..., the study names "
            f"{study.coordinator.key[:12]}... as its coordinator.key; sites would refuse"
        )
    trust = Trust(
        ca=read_certificate(files.ca),
        members={member.name: member.key or "" for member in study.members},
        coordinator=identity.fingerprint,
    )
    credentials = CoordinatorCredentials(identity, trust, files.revoked)
    credentials.revoked()  # a missing list is found before anything is started
    return credentials


def wait_for_members(
    study: Study, network: DeployedNetwork, wait_s: float, shown: Readiness
) -> None:
    """Until every member is ready; after ``wait_s``, until enough of them are.

    A site is ready when it has answered that its people approved the study and its policy permits
    it. Whoever is not is asked again: an approval may come any minute.
    """
    needed = max(study.cohort.min_sites, smallest_epoch(len(study.members)))
    greeting = Greeting(json.dumps(study.as_table()))
    started, asked, pauses = time.monotonic(), dict[str, float](), dict[str, float]()
    states = dict.fromkeys(study.site_names, "not connected")
    while True:
        connected = set(network.sites())
        for name in states:
            if name not in connected:
                states[name] = "not connected"
                asked.pop(name, None)
                pauses.pop(name, None)
        now = time.monotonic()
        due = [n for n in connected if states[n] != "ready" and now >= asked.get(n, 0.0)]
        if due:
            for name in due:  # every question is a line in the site's audit log: not too many
                pauses[name] = min(LONGEST_S, 2 * pauses.get(name, ASK_S / 2))
                asked[name] = now + pauses[name]
            for name, reply in network.ask(dict.fromkeys(due, greeting), ANSWER_S):
                states[name] = _state(reply)
        shown.show(states)
        num_ready = list(states.values()).count("ready")
        waited = time.monotonic() - started
        if num_ready == len(states) or (waited > wait_s and num_ready >= needed):
            shown.done(states)
            return
        time.sleep(POLL_S)


def _state(reply: Message) -> str:
    if isinstance(reply, Introduction):
        return "ready"
    return f"refused: {reply.reason.value}" if isinstance(reply, Refusal) else "refused: protocol"
