"""A consortium on one machine: a CA, kits, approvals, and the programs over TLS on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from client.approvals import Approvals
from common.authority import CERTIFICATE, REVOKED, Authority
from common.config import load
from common.study import Study

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
}
DAYS = 30


@dataclass
class Consortium:
    """Files of a consortium and the processes that run on them."""

    folder: Path
    names: tuple[str, ...]
    study: Path  # with every key pinned
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as output:
            self.running[name] = subprocess.Popen(
                [str(BIN / arguments[0]), *arguments[1:]],
                stdout=output,
                stderr=output,
                env={**os.environ, **ENVIRONMENT},
            )
        return self.running[name]

    def start_site(self, name: str) -> subprocess.Popen[bytes]:
        return self.start(name, "fl-client", "--site-config", str(self.site(name)))

    def start_coordinator(self, *more: str) -> subprocess.Popen[bytes]:
        return self.start(
            "coordinator",
            "fl-server",
            *("--study", str(self.study)),
            *("--config", str(self.folder / "coordinator.toml")),
            *("--run-dir", str(self.run_dir)),
            *more,
        )

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name / "site.toml"

    def state(self, name: str) -> Path:
        """The folder that a site keeps its books in."""
        return self.site(name).parent / "state"

    def superlink(self) -> int | None:
        """The coordinator's SuperLink by its pid; None while there is none."""
        coordinator = self.running.get("coordinator")
        pids = children(coordinator.pid) if coordinator else []
        return next((p for p in pids if is_superlink_of(self.run_dir, command_line(p))), None)

    def kill(self, name: str) -> bool:
        """As a power cut does: a program, or ``superlink`` alone; False where it had ended."""
        if name == "superlink":
            pid = self.superlink()
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
            return pid is not None
        self.running[name].kill()
        return self.running[name].wait() == -signal.SIGKILL

    def left_over(self) -> list[int]:
        """SuperLinks of this consortium whose coordinator is gone."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        ours = [pid for pid in pids if is_superlink_of(self.run_dir, command_line(pid))]
        return [pid for pid in ours if pid != self.superlink()]

    def wait(self, name: str, timeout_s: float = 120) -> int:
        try:
            return self.running[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} still runs:\n{self.log(name)[-3000:]}") from None

    def wait_for(self, name: str, text: str, timeout_s: float = 60) -> None:
        """Until a program's log has a text."""
        end = time.monotonic() + timeout_s
        while text not in self.log(name):
            if time.monotonic() > end:
                raise AssertionError(f"{name} never said {text!r}:\n{self.log(name)[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.left_over():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def found(
    folder: Path,
    study_file: Path,
    names: Sequence[str],
    *,
    data: dict[str, Any],
    policy: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    approve: Sequence[str] | None = None,
) -> Consortium:
    """Make all files of a consortium; every site approves unless ``approve`` names who does."""
    now = datetime.now(UTC)
    authority = Authority.create("Test consortium", now, days=DAYS)
    authority.save(folder / "ca")
    (folder / "ca" / REVOKED).write_bytes(authority.revocation_list([], now, days=DAYS))
    hosts = ["127.0.0.1", "localhost"]
    owner = authority.enrol(
        "coordinator", "coordinator", folder / "coordinator", now, days=DAYS, hosts=hosts
    )
    keys = {
        name: authority.enrol(name, "site", folder / "sites" / name, now, days=DAYS).fingerprint
        for name in names
    }
    table = load(study_file, Study, overrides or {}).as_table()
    table["coordinator"] = {"key": owner.fingerprint}
    table["members"] = [{"name": name, "key": key} for name, key in keys.items()]
    study = folder / "study.toml"
    study.write_text(tomli_w.dumps(table))
    port = free_port()
    ca = folder / "ca"
    own = folder / "coordinator"
    certificates = {"ca": str(ca / CERTIFICATE), "cert": str(own / "certificate.pem")}
    (folder / "coordinator.toml").write_text(
        tomli_w.dumps(
            {
                "listen": f"127.0.0.1:{port}",
                "state_dir": "coordinator/state",
                "certificates": {
                    **certificates,
                    "key": str(own / "key.pem"),
                    "revoked": str(ca / REVOKED),
                },
            }
        )
    )
    for index, name in enumerate(names):
        home = folder / "sites" / name
        site = {
            "name": name,
            "coordinator": f"127.0.0.1:{port}",
            "state_dir": "state",
            "device": "cpu",
            "certificates": {
                "ca": str(ca / CERTIFICATE),
                "cert": "certificate.pem",
                "key": "key.pem",
            },
            "data": {**data, "site_index": index} if data["format"] == "phantom" else data,
            "policy": policy
            or {
                "allow_seeded_randomness": True,
                "allow_no_privacy": True,
                "allow_statistics": True,
            },
        }
        (home / "site.toml").write_text(tomli_w.dumps(site))
        if name in (approve if approve is not None else names):
            loaded = load(study, Study)
            (home / "state").mkdir()
            Approvals(home / "state").approve(loaded, by="Test", now=now)
    return Consortium(folder, tuple(names), study, port)


def children(pid: int) -> list[int]:
    """What a process started and has not waited for."""
    try:
        tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        return [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:  # it ended meanwhile
        return []


def command_line(pid: int) -> bytes:
    """As it was typed, with zeros between the words; empty once the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_superlink_of(run_dir: Path, words: bytes) -> bool:
    """Whether this is the command line of a SuperLink that logs into a run folder."""
    return b"server.superlink.service" in words and bytes(run_dir) + b"/" in words


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def running(consortium: Consortium) -> Iterator[Consortium]:
    try:
        yield consortium
    finally:
        consortium.stop()
