"""NVFlare's simulator: a server and its sites on one machine, without TLS and without a database.

It needs an environment of its own, ``.venv-peers`` (``make bench-peers``): NVFlare pins versions of
packages that we use. ``python -m nvflare_simulator.simulator NUM_PARAMS NUM_ROUNDS`` in ``bench/``
measures it alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from stock_flower.deployment import processes

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parent.parent / ".venv-peers" / "bin" / "python"
START_S, ROUND_S = 120.0, 60.0  # how long we wait


def installed_version() -> str | None:
    """NVFlare's version; None where it is not installed."""
    if not PYTHON.exists():
        return None
    ask = "from importlib.metadata import version; print(version('nvflare'))"
    done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or None


def simulator_rounds(num_params: int, num_rounds: int, num_sites: int) -> list[float]:
    """Seconds of every round.

    Raises:
      RuntimeError: The simulator failed, was too slow or computed something else.
    """
    with tempfile.TemporaryDirectory(prefix="consilium-nvflare-") as name, processes() as start:
        result = Path(name) / "rounds.json"
        command = [PYTHON, HERE / "job.py", name, num_params, num_rounds, num_sites]
        program = start(command, os.environ, lambda *_: None)
        end = time.monotonic() + START_S + ROUND_S * num_rounds
        while program.is_running and time.monotonic() < end:
            time.sleep(0.2)
        if not result.exists():
            said = "".join(program.said[-40:])
            raise RuntimeError(f"NVFlare's simulator did not end:\n{said}")
        noted = json.loads(result.read_text())
    learned = noted["means"][-1] - noted["means"][0]
    if not math.isclose(learned, num_rounds * (num_sites + 1) / 2, rel_tol=1e-3):
        raise RuntimeError(f"NVFlare's model is not the average of what the sites sent: {learned}")
    return [after - before for before, after in pairwise(noted["times"])]


if __name__ == "__main__":
    print(installed_version(), simulator_rounds(*map(int, sys.argv[1:]), num_sites=3))
