"""A stock Flower deployment on loopback, and where the seconds of its rounds go.

``flower-superlink`` with TLS, node authentication and a database file, a ``flower-supernode`` for
each site and ``flwr run``, all with the settings that they come with. Nothing of Flower is changed.
``python -m stock_flower.deployment NUM_PARAMS NUM_ROUNDS`` in ``bench/`` measures it alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from stock_flower.credentials import CA, CERTIFICATE, KEY, write_certificates, write_node_key
from stock_flower.phases import Round, SiteTimes, phases_of_rounds

APP = Path(__file__).resolve().parent
BIN = APP.parent.parent / ".venv" / "bin"
HOST = "127.0.0.1"
CONNECTION = "bench"  # what the command line calls this SuperLink
START_S, ROUND_S, END_S = 120.0, 120.0, 15.0  # how long we wait; a round takes 12 to 16 s

Environment = Mapping[str, str]


def stock_rounds(num_params: int, num_rounds: int, num_sites: int) -> list[Round]:
    """Deploy, run, and take everything down again.

    Raises:
      RuntimeError: A program of Flower failed; the message ends with what it said.
      TimeoutError: Something did not happen in time; the message ends with what was said.
    """
    with tempfile.TemporaryDirectory(prefix="consilium-stock-") as name, processes() as start:
        folder = Path(name)
        port, *site_ports = free_ports(1 + num_sites)
        environment = settle(folder, port)
        superlink = start_superlink(start, folder, port, environment)
        sites = [
            start_site(start, folder, number, (port, site_port), environment)
            for number, site_port in enumerate(site_ports, 1)
        ]
        config = {"num-params": num_params, "num-rounds": num_rounds, "num-sites": num_sites}
        patience_s = START_S + ROUND_S * num_rounds
        rounds = run_app([superlink], folder, config, environment, patience_s)
        return phases_of_rounds(rounds, sites)


def settle(folder: Path, port: int) -> Environment:
    """Certificates, Flower's own folder, and the variables that all programs get."""
    write_certificates(folder, HOST)
    home = folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{HOST}:{port}"\nroot-certificates = "{folder / CA}"\n'
    )
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


# Programs


class Program:
    """A process of Flower's whose lines we hear; it ends with everything that it started."""

    def __init__(
        self,
        command: Sequence[object],
        environment: Environment,
        hear: Callable[[str, float], None],
    ) -> None:
        self.said: list[str] = []
        self._process = subprocess.Popen(  # noqa: S603 - Flower's own programs
            list(map(str, command)),
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        Thread(target=self._listen, args=[hear], daemon=True).start()

    def _listen(self, hear: Callable[[str, float], None]) -> None:
        assert self._process.stdout is not None  # noqa: S101 - asked for at the start
        with self._process.stdout as lines:
            for line in lines:
                hear(line, time.monotonic())
                self.said.append(line)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def stop(self) -> None:
        """End it, and by their ids those of its descendants that did not end with it."""
        family = descendants(self._process.pid)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


Start = Callable[[Sequence[object], Environment, Callable[[str, float], None]], Program]


@contextlib.contextmanager
def processes() -> Iterator[Start]:
    """A function that starts a program; all are ended, the last one first, come what may."""
    with contextlib.ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        stack.callback(signal.signal, signal.SIGTERM, before)

        def start(
            command: Sequence[object],
            environment: Environment,
            hear: Callable[[str, float], None],
        ) -> Program:
            program = Program(command, environment, hear)
            stack.callback(program.stop)
            return program

        yield start


def descendants(pid: int) -> list[int]:
    """A process and everything it started that still runs."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            found += map(int, children)
    return found


def start_superlink(
    start: Start,
    folder: Path,
    port: int,
    environment: Environment,
    database: str = "superlink.db",
) -> Program:
    """The SuperLink, when it answers; without a file of its own, its database is in memory."""
    command = [BIN / "flower-superlink", "--host", HOST, "--port", port]
    command += ["--ssl-ca-certfile", folder / CA, "--ssl-certfile", folder / CERTIFICATE]
    command += ["--ssl-keyfile", folder / KEY, "--enable-supernode-auth"]
    command += ["--database", folder / database] if database else []
    superlink = start(command, environment, lambda *_: None)
    context = ssl.create_default_context(cafile=str(folder / CA))

    def is_healthy() -> bool:
        with contextlib.suppress(OSError):
            url = f"https://{HOST}:{port}/health"
            return bool(urllib.request.urlopen(url, timeout=1, context=context).status == 200)  # noqa: PLR2004
        return False

    wait_for(is_healthy, superlink, START_S)
    return superlink


def start_site(
    start: Start, folder: Path, number: int, ports: tuple[int, int], environment: Environment
) -> SiteTimes:
    """Register a site's key and start its SuperNode."""
    ca, folder = folder / CA, folder / f"site-{number}"
    folder.mkdir()
    port, own_port = ports
    key, public = folder / "key", folder / "key.pub"
    write_node_key(key, public)
    flwr(["supernode", "register", public, CONNECTION], environment)
    times = SiteTimes(folder / "times.jsonl")
    command = [BIN / "flower-supernode", "--superlink", f"{HOST}:{port}", "--port", own_port]
    command += ["--root-certificates", ca, "--auth-supernode-private-key", key]
    command += ["--node-config", f'times="{times.app}" adds={number}']
    start(command, environment, times.hear)
    return times


def run_app(
    superlinks: Sequence[Program],
    folder: Path,
    config: Mapping[str, int],
    environment: Environment,
    patience_s: float,
) -> list[dict[str, Any]]:
    """``flwr run``, and what the coordinator's app noted of every round."""
    result = folder / "result.json"
    text = " ".join(f"{key}={value}" for key, value in config.items()) + f' result="{result}"'
    command = ["run", APP, CONNECTION, "--run-config", text, "--format", "json"]
    run_id = json.loads(flwr(command, environment))["run-id"]

    def is_finished() -> bool:
        # The coordinator's app is the only task that there is; any SuperLink may take it.
        return any("Finished task" in line for each in superlinks for line in each.said)

    wait_for(is_finished, superlinks[0], patience_s)
    if not result.exists():
        said = flwr(["log", run_id, CONNECTION, "--show"], environment)
        raise RuntimeError(f"the coordinator's app of stock Flower failed:\n{said}")
    rounds: list[dict[str, Any]] = json.loads(result.read_text())
    return rounds


def flwr(arguments: Sequence[object], environment: Environment) -> str:
    """What Flower's command line prints."""
    command = list(map(str, [BIN / "flwr", *arguments]))
    done = subprocess.run(  # noqa: S603 - Flower's own program
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


# Waiting


def wait_for(happened: Callable[[], bool], superlink: Program, patience_s: float) -> None:
    """Return when it has happened; what the SuperLink said stands in the error."""
    end = time.monotonic() + patience_s
    while not happened():
        said = "".join(superlink.said[-40:])
        if not superlink.is_running:
            raise RuntimeError(f"flower-superlink ended:\n{said}")
        if time.monotonic() > end:
            raise TimeoutError(f"stock Flower is not done after {patience_s:.0f} s:\n{said}")
        time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    """As many different ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


if __name__ == "__main__":
    for one_round in stock_rounds(int(sys.argv[1]), int(sys.argv[2]), num_sites=3):
        print(json.dumps({"round": sum(one_round.values()), **one_round}, indent=1))
