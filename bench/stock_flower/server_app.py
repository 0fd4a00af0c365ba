"""The coordinator of the stock deployment: rounds of two exchanges, train and evaluate.

What Flower does is left as it is; its pushes and pulls are timed from outside. All times are on
the monotonic clock, which the processes of one machine share.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

PATIENCE_S = 120.0  # for the sites to connect, and for the replies of one exchange

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write their times."""
    config = context.run_config
    num_rounds, num_sites = int(config["num-rounds"]), int(config["num-sites"])
    nodes = connected_nodes(grid, num_sites)
    pushes, pulls = timed(grid, "push_messages"), timed(grid, "pull_messages")
    initial = np.random.default_rng(0).standard_normal(int(config["num-params"]), np.float32)
    values = initial
    rounds = []
    for number in range(num_rounds):
        started, exchanges = time.monotonic(), []
        for kind in (MessageType.TRAIN, MessageType.EVALUATE):
            begun = time.monotonic()
            replies = exchange(grid, nodes, kind, values, number)
            ended = time.monotonic()
            exchanges.append(
                {"begun": begun, "pushed": pushes[-1][1], "pulling": pulls[-1][0], "ended": ended}
            )
            if kind == MessageType.TRAIN:
                values = average(replies)
        rounds.append({"started": started, "ended": time.monotonic(), "exchanges": exchanges})
    per_round = (num_sites + 1) / 2  # the sites add 1, 2, 3 and so on
    if not np.allclose(values, initial + num_rounds * per_round, atol=1e-4):
        raise AssertionError("the model is not the average of what the sites sent")
    write_whole(Path(str(config["result"])), json.dumps(rounds))


def connected_nodes(grid: Grid, num_sites: int) -> list[int]:
    """The ids of all sites, as soon as they are there."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        nodes = list(grid.get_node_ids())
        if len(nodes) == num_sites:
            return nodes
        time.sleep(0.2)
    raise TimeoutError(f"{len(nodes)} of {num_sites} sites after {PATIENCE_S:.0f} s")


def timed(grid: Grid, method: str) -> list[tuple[float, float]]:
    """The start and end of every call of a method from now on."""
    call: Callable[..., Any] = getattr(grid, method)
    times: list[tuple[float, float]] = []

    def watched(*args: Any) -> Any:
        started = time.monotonic()
        result = call(*args)
        times.append((started, time.monotonic()))
        return result

    setattr(grid, method, watched)
    return times


def exchange(
    grid: Grid, nodes: list[int], kind: str, values: NDArray[np.float32], number: int
) -> list[Message]:
    """The model to every site, and every site's reply."""
    content = RecordDict({"arrays": ArrayRecord([values])})
    messages = [Message(content, node, kind, group_id=str(number)) for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=PATIENCE_S))
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"round {number}: {reply.error.reason}")
    if len(replies) < len(nodes):
        raise TimeoutError(f"round {number}: {len(replies)} of {len(nodes)} replies")
    return replies


def average(replies: list[Message]) -> NDArray[np.float32]:
    """The plain mean."""
    total = np.float32(0)
    for reply in replies:
        total = total + reply.content["arrays"].to_numpy_ndarrays()[0]
    return total / np.float32(len(replies))


def write_whole(path: Path, text: str) -> None:
    """Whoever waits for the file finds all of it."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(path)
