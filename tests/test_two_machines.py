"""The walkthrough of docs/operators/two-machines.md, typed in two network namespaces."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALKTHROUGH = ROOT / "docs" / "operators" / "two-machines.md"
BLOCK = re.compile(
    r"^### (\d+)\. (Coordinator|Hospitals): .*?^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
HOSPITALS = ["st-olav", "lindenhof", "riverside"]
ADDRESSES = {"Coordinator": "192.0.2.10", "Hospitals": "192.0.2.20"}
ENDED = "the block has ended"


@dataclass
class Machine:
    """A network namespace with a terminal in it."""

    namespace: str
    folder: Path
    terminal: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.terminal = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.namespace),
                *("bash", "--noprofile", "--norc", "-e", "-u", "-o", "pipefail"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            text=True,
            env={
                **os.environ,
                "CONSILIUM": str(ROOT),
                "MAIL": str(self.folder.parent / "mail"),
                "OMP_NUM_THREADS": "1",
            },
        )

    def type(self, block: str, answers: list[str]) -> str:
        """Type one block, and what it asks for; what the terminal shows."""
        script, typed = self.folder / ".block.sh", self.folder / ".answers"
        script.write_text(block)
        typed.write_text("".join(f"{answer}\n" for answer in answers))
        assert self.terminal.stdin is not None
        assert self.terminal.stdout is not None
        self.terminal.stdin.write(f". {script} < {typed}\necho {ENDED!r}\n")
        self.terminal.stdin.flush()
        shown = list(itertools.takewhile(lambda line: ENDED not in line, self.terminal.stdout))
        text = "".join(shown)
        if self.terminal.poll() is not None or not self._is_alive():
            logs = [log.read_text()[-2000:] for log in self.folder.glob("*/*.log")]
            raise AssertionError("\n".join([f"this block failed:\n{block}\n{text}", *logs]))
        return text

    def _is_alive(self) -> bool:
        time.sleep(0.05)  # a shell that fails ends at once
        return self.terminal.poll() is None

    def listening(self) -> set[str]:
        """Addresses that answer from outside this machine."""
        told = ip("netns", "exec", self.namespace, "ss", "-Hltn").splitlines()
        return {line.split()[3] for line in told if not line.split()[3].startswith("127.")}

    def remove(self) -> None:
        """End everything that runs in the namespace, by pid, and the namespace."""
        for pid in map(int, ip("netns", "pids", self.namespace).split()):
            os.kill(pid, signal.SIGKILL)
        self.terminal.wait(10)
        for pipe in (self.terminal.stdin, self.terminal.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        ip("netns", "delete", self.namespace)


def ip(*arguments: str) -> str:
    return subprocess.run(
        ["ip", *arguments],  # noqa: S607 - wherever it is
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def connect(names: dict[str, str]) -> None:
    """A cable between two namespaces: one end each, named by who it belongs to."""
    ends = {who: f"veth-{name[-8:]}" for who, name in names.items()}
    one, other = ends.values()
    ip("link", "add", one, "type", "veth", "peer", "name", other)
    for who, name in names.items():
        ip("link", "set", ends[who], "netns", name)
        ip("-n", name, "address", "add", f"{ADDRESSES[who]}/24", "dev", ends[who])
        ip("-n", name, "link", "set", ends[who], "up")
        ip("-n", name, "link", "set", "lo", "up")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[dict[str, Machine]]:
    """Two namespaces, a cable, and nothing else: whatever is not on it cannot be reached."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and iproute2")
    if os.geteuid() != 0:
        pytest.skip("making a network namespace needs root")
    names = {who: f"cs{os.getpid()}{who[0].lower()}" for who in ADDRESSES}
    made: list[str] = []
    running: dict[str, Machine] = {}
    try:
        try:
            for name in names.values():
                ip("netns", "add", name)
                made.append(name)
            connect(names)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine permits no network namespace: {error.stderr.strip()}")
        (tmp_path / "mail").mkdir()
        for who, name in names.items():
            running[who] = Machine(name, tmp_path / who.lower())
        yield running
    finally:
        for machine in running.values():
            machine.remove()
        for name in made[len(running) :]:
            ip("netns", "delete", name)


def fingerprints(shown: str) -> dict[str, str]:
    """What people read aloud, by the folder that `fl-certs request` named above it."""
    return dict(re.findall(r"^(\S+)/request\.pem: .*\nfingerprint +(\w{64})$", shown, re.MULTILINE))


def test_the_walkthrough_is_numbered_without_a_gap() -> None:
    text = WALKTHROUGH.read_text()
    numbers = [int(number) for number, _, _ in BLOCK.findall(text)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == text.count("```sh\n") == text.count("\n### ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_machines_come_from_a_certificate_request_to_a_report_as_documented(
    machines: dict[str, Machine],
) -> None:
    heard: dict[str, str] = {}
    told = ""
    for _, who, block in BLOCK.findall(WALKTHROUGH.read_text()):
        answers = [heard[name] for name in (*HOSPITALS, "hub")] if "read -r" in block else []
        told = machines[who].type(block, answers)
        heard |= fingerprints(told)
        if "audit verify" not in block:
            assert machines["Hospitals"].listening() == set()
        if "server=$!" in block:
            wait_until_open(machines["Coordinator"])
    run_dir = machines["Coordinator"].folder / "run"
    report = json.loads((run_dir / "report.json").read_text())
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert summary["survivors"] == [sorted(HOSPITALS)] * summary["num_rounds"]
    assert summary["metrics"]["final"]["auroc"] > 0.65
    assert all(1 < site["epsilon"] <= 8 for site in summary["privacy"].values())
    assert report["study"]["digest"] == summary["study"]["digest"]
    assert told.count("audit log") >= len(HOSPITALS)


def wait_until_open(coordinator: Machine) -> None:
    """One port is open to the outside, and no other ever."""
    end = time.monotonic() + 60
    while not (ports := coordinator.listening()) and time.monotonic() < end:
        time.sleep(0.2)
    assert ports == {"0.0.0.0:9443"}
