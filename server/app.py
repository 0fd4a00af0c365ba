"""The Flower ServerApp and ``FlowerNetwork``, the real ``Network``: the door for bytes to enter."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid, ServerApp

from common import wire
from common.errors import ConfigError, FederationError, RemoteProtocolError, RoundAborted
from common.messages import Greeting, Introduction, Message
from common.simulation import from_run_config, run_folder
from server.coordinator import run
from server.network import Network
from server.progress import ConsoleObserver, print_summary
from server.run_dir import RunDir

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

app = ServerApp()


class FlowerNetwork:
    """Sites behind Flower's grid."""

    def __init__(self, grid: Grid, nodes: Mapping[str, int], deadline_s: float) -> None:
        self._grid = grid
        self._nodes = dict(nodes)
        self._deadline_s = deadline_s

    def sites(self) -> Sequence[str]:
        """Every site that introduced itself."""
        return list(self._nodes)

    def ask(self, sites: Sequence[str], message: Message) -> Iterator[tuple[str, Message]]:
        """Ask sites; replies are yielded as they arrive, until the study's deadline."""
        names = {self._nodes[site]: site for site in sites}
        for node, reply in exchange(self._grid, list(names), message, self._deadline_s):
            yield names[node], reply


def exchange(
    grid: Grid, nodes: Sequence[int], message: Message, deadline_s: float
) -> Iterator[tuple[int, Message]]:
    """One message to several nodes; (node id, reply) as replies arrive.

    A node that is silent or answers with an error is left out.

    Raises:
      RoundAborted: A worker of the simulation engine died.
      RemoteProtocolError: A reply is malformed.
    """
    content = wire.pack(message)
    sent = [
        FlowerMessage(content, dst_node_id=node, message_type="query", ttl=deadline_s)
        for node in nodes
    ]
    waiting = dict(zip(grid.push_messages(sent), nodes, strict=True))
    end, pause = time.monotonic() + deadline_s, FIRST_PAUSE_S
    while waiting and time.monotonic() < end:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            node = waiting.pop(reply.metadata.reply_to_message_id)
            if not reply.has_error():
                yield node, _unpack(reply.content)
            elif reply.error.code == ACTOR_DIED:
                raise RoundAborted(f"a simulation worker died: {reply.error.reason}")
        pause = FIRST_PAUSE_S if replies else min(LONGEST_PAUSE_S, pause * 1.5)
        if not replies:
            time.sleep(pause)


def _unpack(records: RecordDict) -> Message:
    return wire.unpack(records)


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
    network = _introduce(grid, nodes, study.site_names, study.deadlines.answer_s)
    with ConsoleObserver() as observer:
        summary = run(study, network, record, observer)
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


def _introduce(
    grid: Grid, nodes: Sequence[int], names: Sequence[str], deadline_s: float
) -> Network:
    """Learn which node is which site."""
    sites: dict[str, int] = {}
    for node, reply in exchange(grid, nodes, Greeting(), START_S):
        if not isinstance(reply, Introduction) or not 0 <= reply.index < len(names):
            raise RemoteProtocolError("a node did not introduce itself as a site of this study")
        sites[names[reply.index]] = node
    if missing := sorted(set(names) - set(sites)):
        raise RoundAborted(f"{', '.join(missing)} did not introduce themselves; see the log above")
    return FlowerNetwork(grid, sites, deadline_s)


class _OneLine(logging.Filter):
    """Flower logs a traceback for what is one sentence to the person who started the run."""

    def filter(self, record: logging.LogRecord) -> bool:
        error: Any = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FederationError):
            record.msg, record.args = f"{type(error).__name__}: {error}", ()
            record.exc_info = record.exc_text = None
        return "Exit Code" not in record.getMessage()
