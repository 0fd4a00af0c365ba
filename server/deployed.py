"""A run over real sites: start Flower's SuperLink, wait for the members, run, stop."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from common.errors import ConfigError
from common.identity import Identity, read_certificate
from common.manifest import code_digest, smallest_epoch
from common.messages import Greeting, Introduction, Message, Refusal
from common.models.build import build_network
from common.roster import CoordinatorCredentials, Trust
from common.study import Study
from common.tasks import task_of
from server.app import exchange
from server.config import CoordinatorConfig
from server.coordinator import Summary, run
from server.heads import Heads
from server.network import Enough, never
from server.progress import ConsoleObserver, Readiness
from server.run_dir import SUPERLINK, RunDir
from server.superlink.grid import Connected, CoordinatorGrid
from server.superlink.launcher import Listening, SuperLink, new_secret

ASK_S, LONGEST_S = 5.0, 60.0  # a site that is not ready yet is asked again after so long
POLL_S = 0.2
RETURN_S = 5.0  # for a site that was connected when it was looked last
WATCH_S = 2.0  # between two looks at who connected anew
AROUND_BYTES, MEMBER_BYTES = 128 << 10, 64_000  # of an upload: statement and heads; shares
ANSWER_S = 30.0  # for saying whether it takes part

log = logging.getLogger("consilium.coordinator")


class DeployedNetwork:
    """Sites behind Flower's SuperLink, by the names in their certificates."""

    def __init__(self, grid: CoordinatorGrid, deadline_s: float) -> None:
        self._grid = grid
        self._deadline_s = deadline_s
        self._there: set[str] = set()  # when it was looked last

    def sites(self) -> Sequence[str]:
        """Every site that is connected now."""
        return list(self._connected())

    def _connected(self) -> dict[str, Connected]:
        """Who is connected; a site that was here a moment ago gets a moment to come back.

        A site connects anew when its certificate is renewed, its program restarted, or a link
        flickers: that must not make it a dropout, or open a new epoch without it.
        """
        end = time.monotonic() + RETURN_S
        while True:
            now = self._grid.connected()
            if self._there <= now.keys() or time.monotonic() > end:
                self._there = set(now)
                return now
            time.sleep(POLL_S)

    def ask(
        self, messages: Mapping[str, Message], enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        """Ask sites; replies are yielded as they arrive, until the study's deadline."""
        yield from self.ask_within(messages, self._deadline_s, enough)

    def ask_within(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        """The same with another deadline; a site that is not connected is left out."""
        there = {site: one for site, one in self._connected().items() if site in messages}
        names = {one.node_id: site for site, one in there.items()}
        by_node = {node: messages[site] for node, site in names.items()}
        if by_node:
            watch = Watch(self._grid, {one.node_id: one.since for one in there.values()})
            replies = exchange(
                self._grid, by_node, deadline_s, enough, watch.returned, is_simulated=False
            )
            for node, reply in replies:
                yield names[node], reply


class Watch:
    """Notices sites that connect anew while they are asked."""

    def __init__(self, grid: CoordinatorGrid, since: Mapping[int, str]) -> None:
        self._grid = grid
        self._since = dict(since)
        self._next = time.monotonic() + WATCH_S

    def returned(self) -> set[int]:
        """Nodes whose connection is another one than when this was called last."""
        if time.monotonic() < self._next:
            return set()
        self._next = time.monotonic() + WATCH_S
        now = {one.node_id: one.since for one in self._grid.connected().values()}
        back = {node for node, since in self._since.items() if now.get(node, since) != since}
        self._since |= {node: now[node] for node in back}
        return back


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
        grid = superlink.open_grid()
        try:
            network = DeployedNetwork(grid, study.deadlines.answer_s)
            wait_for_members(study, network, config.wait_s, shown.waiting(study))
            heads = Heads(config.state_dir)
            summary = run(study, network, record, shown, credentials, heads)
        finally:
            grid.finish()
    shutil.rmtree(service)
    return summary


def largest_upload(study: Study) -> int:
    """Bytes of the longest answer that an honest site gives, with room for what goes around it."""
    schema, task = build_network(study).schema, task_of(study)
    num_tail = 1 + len(schema.names) + task.num_counts
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
            for name, reply in network.ask_within(dict.fromkeys(due, greeting), ANSWER_S):
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
