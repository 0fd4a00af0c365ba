"""A job for NVFlare's simulator; it runs in the environment that NVFlare is installed in.

``job.py FOLDER NUM_PARAMS NUM_ROUNDS NUM_SITES`` writes ``FOLDER/rounds.json``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nvflare.job_config.api import FedJob
from parts import AddsNumber, TimedFedAvg

RESULT = "rounds.json"

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    num_params, num_rounds, num_sites = map(int, sys.argv[2:])
    job = FedJob("bench", min_clients=num_sites)
    job.to_server(TimedFedAvg(str(folder / RESULT), num_params, num_rounds, num_sites))
    for number in range(1, num_sites + 1):
        job.to(AddsNumber(number), f"site-{number}", tasks=["train"])
    job.simulator_run(str(folder / "workspace"), threads=num_sites)
