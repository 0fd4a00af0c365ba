"""The site of the stock deployment: adds its own number to the model, finds its loss to be 0.

Every site adds another number, because Flower carries equal bytes only once. The app imports
nothing but Flower and numpy. A hospital's app imports torch as well, in a fresh process for every
message; those seconds are not in this benchmark.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One flat array in, one out."""
    called = time.monotonic()
    (values,) = message.content["arrays"].to_numpy_ndarrays()
    content = RecordDict({"arrays": ArrayRecord([values + float(context.node_config["adds"])])})
    note_times(context, called)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The model in, a loss out."""
    called = time.monotonic()
    message.content["arrays"].to_numpy_ndarrays()
    content = RecordDict({"metrics": MetricRecord({"loss": 0.0, "num-examples": 1})})
    note_times(context, called)
    return Message(content, reply_to=message)


def note_times(context: Context, called: float) -> None:
    """Add a line to the site's own file: in the reply they would be one more object to carry."""
    times = {"process": process_start(), "called": called, "answered": time.monotonic()}
    with Path(str(context.node_config["times"])).open("a") as file:
        file.write(json.dumps(times) + "\n")


def process_start() -> float:
    """When this process began, on the monotonic clock, which all processes share."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22: ticks since the boot
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.monotonic() - (uptime - started)
