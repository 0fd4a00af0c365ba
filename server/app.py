"""The Flower ServerApp and ``FlowerNetwork``, the real ``Network``: the door for bytes to enter."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid, ServerApp

from common import wire
from common.errors import ConfigError, FederationError, RemoteProtocolError, RoundAborted
from common.messages import Greeting, Introduction, Message, Reason, Refusal
from common.simulation import from_run_config, run_folder
from common.throwaway import coordinator_credentials, issue_identities
from server.coordinator import run
from server.network import Enough, Network, never
from server.progress import ConsoleObserver, print_summary
from server.run_dir import RunDir

PULLED_TOGETHER = 4
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.1
NODES_APPEAR_S = 10.0  # the engine registers its nodes within a fraction of a second
NODES_SETTLE_S = 0.5
START_S = 120.0  # the first answer waits for the engine to start its workers
ACTOR_DIED = 0  # error code of the simulation engine; it never recovers within a run

CALL = """\
PATH=$PWD/.venv/bin:$PATH FLWR_HOME=$PWD/runs/.flwr FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=39291 \\
FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0 \\
FLWR_DISABLE_UPDATE_CHECK=1 flwr run . --stream \\
--federation-config 'num-supernodes=4 client-resources-num-cpus=1' \\
--run-config 'study="studies/phantoms.toml" num-rounds=3'"""

log = logging.getLogger("consilium.coordinator")
app = ServerApp()


class FlowerNetwork:
    """Sites behind Flower's grid."""

    def __init__(self, grid: Grid, nodes: Mapping[str, int]) -> None:
        self._grid = grid
        self._nodes = dict(nodes)

    def sites(self) -> Sequence[str]:
        """Every site that introduced itself."""
        return list(self._nodes)

    def ask(
        self, messages: Mapping[str, Message], deadline_s: float, enough: Enough = never
    ) -> Iterator[tuple[str, Message]]:
        """Ask sites; replies are yielded as they arrive, until the deadline."""
        names = {self._nodes[site]: site for site in messages if site in self._nodes}
        by_node = {node: messages[site] for node, site in names.items()}
        for node, reply in exchange(self._grid, by_node, deadline_s, enough):
            yield names[node], reply


def exchange(
    grid: Grid,
    messages: Mapping[int, Message],
    deadline_s: float,
    enough: Enough = never,
) -> Iterator[tuple[int, Message]]:
    """One message to each of several simulated nodes; (node id, reply) as replies arrive.

    A node that is silent or gone is left out.

    Raises:
      RoundAborted: A worker of the simulation engine died.
    """
    end, pause = time.monotonic() + deadline_s, FIRST_PAUSE_S
    waiting = _push(grid, messages, end)
    while waiting and time.monotonic() < end:
        arrived = 0
        for reply in _pulled(grid, list(waiting)):
            arrived += 1
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            message = None if node is None else _read(node, reply)
            if node is not None and message is not None:
                yield node, message
        if not arrived and enough():
            return
        pause = FIRST_PAUSE_S if arrived else min(LONGEST_PAUSE_S, pause * 1.5)
        if not arrived:
            time.sleep(pause)


def _push(grid: Grid, messages: Mapping[int, Message], end: float) -> dict[str, int]:
    """Send messages that expire at ``end``; node by message id."""
    packed = wire.pack_all(messages.values())
    ttl = max(1.0, end - time.monotonic())
    sent = [
        FlowerMessage(content, dst_node_id=node, message_type="query", ttl=ttl)
        for node, content in zip(messages, packed, strict=True)
    ]
    return dict(zip(grid.push_messages(sent), messages, strict=True))


def _pulled(grid: Grid, ids: Sequence[str]) -> Iterator[FlowerMessage]:
    """A few at a time: bodies that came together must not all be in memory together."""
    for few in (ids[k : k + PULLED_TOGETHER] for k in range(0, len(ids), PULLED_TOGETHER)):
        yield from grid.pull_messages(few)


def _read(node: int, reply: FlowerMessage) -> Message | None:
    """A node's reply; one that cannot be read counts as a refusal, and the others go on."""
    try:
        if not reply.has_error():
            return wire.unpack(reply.content)
    except RemoteProtocolError as error:
        log.error("node %d: %s", node, error)  # noqa: TRY400 - a sentence, not a traceback
        return Refusal(run="", reason=Reason.PROTOCOL)
    if reply.error.code == ACTOR_DIED:
        raise RoundAborted(f"a simulation worker died: {reply.error.reason}")
    return None  # the engine says that the node is gone


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that ``--run-config`` names over the nodes of this federation."""
    logging.getLogger("flwr").addFilter(_OneLine())
    nodes = _settled_nodes(grid)
    try:
        study, simulation = from_run_config(context.run_config, num_sites=len(nodes))
    except ConfigError as error:
        text = f"{error}\nThis federation has {len(nodes)} nodes. The call:\n{CALL}"
        raise ConfigError(text) from None
    folder = run_folder(context.run_config)
    resume = bool(context.run_config["resume"])
    record = RunDir.open(folder, study, simulation, resume=resume)
    issue_identities(folder, study.site_names)
    credentials = coordinator_credentials(folder, study.site_names)
    network = _introduce(grid, nodes, study.site_names)
    with ConsoleObserver() as observer:
        summary = run(study, network, record, observer, credentials)
    print_summary(summary, folder)


def _settled_nodes(grid: Grid) -> list[int]:
    """Node ids once their number no longer changes; at first some may be missing."""
    nodes: list[int] = []
    changed = time.monotonic()
    end = changed + NODES_APPEAR_S
    while time.monotonic() < (changed + NODES_SETTLE_S if nodes else end):
        found = sorted(grid.get_node_ids())
        if found != nodes:
            nodes, changed = found, time.monotonic()
        time.sleep(0.02)
    return nodes


def _introduce(grid: Grid, nodes: Sequence[int], names: Sequence[str]) -> Network:
    """Learn which node is which site."""
    sites: dict[str, int] = {}
    for node, reply in exchange(grid, dict.fromkeys(nodes, Greeting()), START_S):
        if not isinstance(reply, Introduction) or not 0 <= reply.index < len(names):
            raise RemoteProtocolError("a node did not introduce itself as a site of this study")
        sites[names[reply.index]] = node
    if missing := sorted(set(names) - set(sites)):
        raise RoundAborted(f"{', '.join(missing)} did not introduce themselves; see the log above")
    return FlowerNetwork(grid, sites)


class _OneLine(logging.Filter):
    """Flower logs a traceback for what is one sentence to the person who started the run."""

    def filter(self, record: logging.LogRecord) -> bool:
        error: Any = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FederationError):
            record.msg, record.args = f"{type(error).__name__}: {error}", ()
            record.exc_info = record.exc_text = None
        return "Exit Code" not in record.getMessage()
