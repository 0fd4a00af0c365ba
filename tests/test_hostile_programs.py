"""Real programs: a coordinator that sends code, a member that is revoked during a run."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from callers import PHANTOMS, STUDY, authority_of, serial_number, site_of, told_of
from deployment import Consortium, found, running
from flwr.app import ConfigRecord, Message, RecordDict

from common import wire
from common.authority import REVOKED
from common.config import load
from common.disk import replace_file
from common.messages import Greeting, Introduction, Reason, Refusal
from common.study import Study
from server.deployed import DeployedNetwork
from server.superlink import launcher as flower
from server.superlink.grid import CoordinatorGrid
from server.superlink.launcher import SuperLink

NAMES = ("site-1", "site-2", "site-3", "site-4", "site-5")
ANSWER_S = 60.0
BUDGET = '\n[budget]\nunit = "patient"\nepsilon = 100.0\ndelta = 1e-3\n'


def foreign_bundle(canary: Path) -> bytes:
    """An app of Flower's that leaves a file wherever a part of it is imported."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as bundle:
        bundle.writestr("pyproject.toml", flower.FAB.replace("nothing:app", "evil:app"))
        bundle.writestr(
            "evil.py",
            "from pathlib import Path\n"
            "from flwr.clientapp import ClientApp\n"
            f"Path({str(canary)!r}).write_text('executed')\n"
            "app = ClientApp()\n",
        )
    return content.getvalue()


@pytest.mark.timeout(300)
def test_code_that_a_coordinator_sends_is_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary, bundle = tmp_path / "canary", tmp_path / "evil.zip"
    bundle.write_bytes(foreign_bundle(canary))
    load_app = f"import sys; sys.path.insert(0, {str(bundle)!r}); import evil"
    subprocess.run([sys.executable, "-c", load_app], check=True)
    assert canary.exists()  # it would
    canary.unlink()
    monkeypatch.setattr(flower, "_fab", bundle.read_bytes)
    made = found(tmp_path, STUDY, NAMES[:3], data=PHANTOMS)
    with (
        running(made),
        SuperLink.start(told_of(made), tmp_path / "superlink.log") as superlink,
    ):
        site = made.start_site("site-1")
        grid = superlink.open_grid()
        node = wait_for_node(grid, made, "site-1")
        for kind in ("train", "evaluate", "query", "train.evil"):
            content = RecordDict({"config": ConfigRecord({"code": "import evil", "lr": 0.1})})
            told = Message(content, dst_node_id=node, message_type=kind, ttl=ANSWER_S)
            reply = answer_to(grid, told)
            assert not reply.has_error()
            assert wire.unpack(reply.content) == Refusal(run="", reason=Reason.PROTOCOL)
        greeting = Greeting(json.dumps(load(made.study, Study).as_table()))
        ((_, answered),) = DeployedNetwork(grid, superlink.revived).ask(
            {"site-1": greeting}, ANSWER_S
        )
        assert answered == Introduction(0)  # the installed code goes on answering
        assert site.poll() is None
        grid.finish()
    assert not canary.exists()
    assert not [path for path in tmp_path.rglob("*evil*") if path != bundle]
    assert made.log("site-1").count("refused: RemoteProtocolError") == 4


def wait_for_node(grid: CoordinatorGrid, made: Consortium, name: str) -> int:
    end = time.monotonic() + ANSWER_S
    while name not in (nodes := grid.connected()):
        assert time.monotonic() < end, made.log(name)
        time.sleep(0.1)
    return nodes[name].node_id


def answer_to(grid: CoordinatorGrid, message: Message) -> Message:
    (sent,) = grid.push_messages([message])
    end = time.monotonic() + ANSWER_S
    while not (replies := list(grid.pull_messages([sent]))):
        assert time.monotonic() < end
        time.sleep(0.05)
    return replies[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_without_a_member_that_is_revoked_after_its_first_round(
    tmp_path: Path,
) -> None:
    made = found(tmp_path, STUDY, NAMES, data=PHANTOMS)
    for name in NAMES:
        with made.site(name).open("a") as file:
            file.write(BUDGET)
    with running(made):
        for name in NAMES:
            made.start_site(name)
        made.start_coordinator()
        made.wait_for("coordinator", "round   1/", 200)
        revoke(made, "site-3")
        assert made.wait("coordinator", 300) == 0, made.log("coordinator")
    summary = json.loads((made.run_dir / "summary.json").read_text())
    assert summary["num_rounds"] >= 3  # of 4: the sum that was void has spent its privacy, too
    assert "site-3" in summary["survivors"][0]
    assert summary["survivors"][-1] == [name for name in NAMES if name != "site-3"]
    said = made.log("coordinator")
    assert re.search(r"epoch \d+: new keys among site-1, site-2, site-4, site-5", said), said
    excluded = [path.read_text() for path in made.run_dir.glob("*excluded*")]
    assert any("certificate was revoked" in text and "site-3" in text for text in excluded)
    assert "refuses this site's certificate" in made.log("site-3")


def revoke(made: Consortium, name: str) -> None:
    """What fl-certs revoke does, and the coordinator's copy of the list is replaced."""
    serials = [serial_number(site_of(made, name))]
    content = authority_of(made).revocation_list(serials, datetime.now(UTC), days=30, number=2)
    replace_file(made.folder / "ca" / REVOKED, content)
