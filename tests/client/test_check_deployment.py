"""The preflight of a deployment: every fault in one line that ends with the remedy."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import socket
import stat
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import looked
import pytest
import tomli_w
from deployment import Consortium, found, free_port
from looked import NAMES, SITE
from PIL import Image
from site_books import Books
from typer.testing import CliRunner

from client.approvals import Approvals
from client.certificate_check import check_certificate
from client.cli import app
from client.config import SiteConfig
from client.data_card import NAME as CARD
from client.ledger import Ledger
from common.authority import CERTIFICATE, REVOKED, Authority
from common.config import load
from common.identity import Identity, read_certificate
from common.manifest import code_digest
from common.plan import plan_privacy
from common.study import Study
from server.config import CoordinatorConfig
from server.superlink.launcher import Listening, SuperLink, new_secret
from server.superlink.listener import tls_context

NUM_PATIENTS = 24
CLASSES = looked.STUDY["task"]["classes"]
STUDY = {**looked.STUDY, "privacy": {**looked.STUDY["privacy"], "max_images_per_patient": 2}}
LINE_STARTS = ("ok       ", "warning  ", "FAULT    ")


class Disk(NamedTuple):
    """What ``shutil.disk_usage`` returns."""

    total: int
    used: int
    free: int


@dataclass
class World:
    """A consortium of which one site is looked at."""

    consortium: Consortium
    images: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def file(self) -> Path:
        return self.consortium.site(SITE)

    @property
    def home(self) -> Path:
        return self.file.parent / "state"

    @property
    def study(self) -> Study:
        return load(self.consortium.study, Study)

    def edit(self, **changes: Any) -> None:
        """Replace values of the site file, by keys with ``__`` between their parts."""
        table = tomllib.loads(self.file.read_text())
        for key, value in changes.items():
            *sections, last = key.split("__")
            here = table
            for section in sections:
                here = here.setdefault(section, {})
            here[last] = value
        self.file.write_text(tomli_w.dumps(table))

    def write_table(self, label: Callable[[int], str], num_patients: int = NUM_PATIENTS) -> None:
        with (self.images / "images.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "label", "pid"])
            rows.writerows([f"{n}.png", label(n), f"P{n:03}"] for n in range(num_patients))

    def check(self, *options: str) -> tuple[int, list[str]]:
        """Exit code and lines of the command, which all have the form of a finding."""
        ended = CliRunner().invoke(app, ["--site-config", str(self.file), "check", *options])
        lines = ended.stdout.splitlines()
        assert ended.exception is None or isinstance(ended.exception, SystemExit)
        assert lines, ended.output
        assert all(line.startswith(LINE_STARTS) for line in lines), lines
        assert "P0" not in ended.output  # no patient is named
        return ended.exit_code, lines


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(NUM_PATIENTS):
        Image.new("L", (32, 32), 8 * number).save(images / f"{number}.png")
    planned = tmp_path / "planned.toml"
    planned.write_text(tomli_w.dumps(STUDY))
    data = {
        "name": "xrays",
        "format": "csv",
        "root": str(images),
        "table": "images.csv",
        "target": "label",
        "patient": "pid",
        "declared_patients": 20,
    }
    consortium = found(tmp_path, planned, NAMES, data=data, policy={"min_patients": 10})
    made = World(consortium, images, monkeypatch)
    made.write_table(lambda number: CLASSES[number % 2])
    made.edit(budget={"epsilon": 40.0, "delta": 1e-3})
    return made


def faults(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("FAULT")]


@contextlib.contextmanager
def coordinator(
    world: World, *, skew_s: float = 0.0, own: Path | None = None, status: int = 200, **said: str
) -> Iterator[None]:
    """Answers /health at the site's coordinator address as it is told to.

    Args:
      world: Its files.
      skew_s: Added to the time that it says.
      own: A folder with another certificate and key than the coordinator's.
      status: Of the answer.
      **said: Replaces what a coordinator of this version and study says.
    """
    about = {"version": version("consilium"), "code": code_digest(), "study": world.study.digest()}

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said_now = json.dumps({**about, **said, "time": time.time() + skew_s}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(said_now)))
            self.end_headers()
            self.wfile.write(said_now)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    folder = own or world.consortium.folder / "coordinator"
    ca = world.consortium.folder / "ca" / CERTIFICATE
    server = HTTPServer(("127.0.0.1", world.consortium.port), Health)
    tls = tls_context(ca, folder / "certificate.pem", folder / "key.pem")
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    answering = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    answering.start()
    try:
        yield
    finally:
        server.shutdown()
        answering.join()
        server.server_close()


@contextlib.contextmanager
def superlink(world: World, members: tuple[str, ...] = NAMES) -> Iterator[SuperLink]:
    """The real listener of a coordinator."""
    study, folder = world.study, world.consortium.folder
    own = load(folder / "coordinator.toml", CoordinatorConfig)
    told = Listening(
        host=own.host,
        port=own.port,
        ca=str(own.certificates.ca),
        certificate=str(own.certificates.cert),
        key=str(own.certificates.key),
        revocation_list=str(own.certificates.revoked),
        members={one.name: str(one.key) for one in study.members if one.name in members},
        about={
            "version": version("consilium"),
            "code": code_digest(),
            "study": study.digest(),
        },
        health="",
        secret=new_secret(),
    )
    with SuperLink.start(told, folder / "superlink.log") as running:
        yield running


def test_a_site_that_can_take_part_has_no_fault(world: World) -> None:
    with superlink(world):
        exit_code, lines = world.check()
    address, digest = f"127.0.0.1:{world.consortium.port}", world.study.digest()
    assert (exit_code, faults(lines)) == (0, [])
    expected = [
        "ok       site file: every key of north is valid",
        f"ok       study chests: digest {digest}, approved by Test on ",
        f"ok       state folder {world.home}: writable",
        f"ok       disk of {world.home}: ",
        f"ok       key {world.file.parent / 'key.pem'}: mode 0600",
        "warning  certificate of north: this key's, of this CA, valid until ",
        f"ok       coordinator {address}: the port is open",
        f"ok       coordinator {address}: its certificate is of this CA, and it lets this site in",
        "ok       clock: 0.",
        f"ok       version: {version('consilium')} on both sides, code {code_digest()[:12]}...",
        f"ok       the coordinator announces study {digest[:12]}..., which is chests",
        "ok       link: ",
        "ok       policy: permits study chests",
        "ok       data set xrays: 24 readable images, 32x32 grey uint8 (24)",
        "ok       train: ",
        "ok       val: ",
        "ok       test: ",
        "warning  train: fewer than 10 images of ",
        "warning  val: fewer than 10 images of ",
        "warning  test: fewer than 10 images of ",
        "ok       patients: 24, of which ",
        f"ok       data card: {world.home / 'data-card.md'}; it stays here",
        "ok       budget: covers 4 of 4 rounds of study chests; 0 of 40 is spent",
        "ok       device: cpu",
    ]
    assert len(lines) == len(expected), lines
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start), line
    assert "29 days; ask the CA's operator to run: fl-certs renew --ca CA north" in lines[5]
    assert not list(world.home.glob(".writable"))


# Faults of measure 4. Each is planted in a site that has none, beside a coordinator that answers.


def clock_ahead(world: World) -> contextlib.AbstractContextManager[None]:
    return coordinator(world, skew_s=-60.5)


def clock_behind(world: World) -> contextlib.AbstractContextManager[None]:
    return coordinator(world, skew_s=400.5)


def unknown_host(world: World) -> contextlib.AbstractContextManager[None]:
    world.edit(coordinator="nowhere.invalid:9443")
    return contextlib.nullcontext()


@contextlib.contextmanager
def silent_host(world: World) -> Iterator[None]:
    """The queue of this listener is full: the next call gets no answer, as behind a firewall."""
    world.monkeypatch.setattr("client.health.TIMEOUT_S", 0.3)
    with socket.socket() as full, contextlib.ExitStack() as queued:
        full.bind(("127.0.0.1", world.consortium.port))
        full.listen(0)
        for _ in range(4):
            waiting = queued.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield


def coordinator_of_another_ca(world: World) -> contextlib.AbstractContextManager[None]:
    return coordinator(world, own=_foreign_kit(world))


def site_with_another_ca(world: World) -> contextlib.AbstractContextManager[None]:
    world.edit(certificates__ca=str(_foreign_kit(world) / "ca" / CERTIFICATE))
    return coordinator(world)


def _foreign_kit(world: World) -> Path:
    folder, now = world.consortium.folder / "foreign", datetime.now(UTC)
    authority = Authority.create("Test consortium", now, days=9)
    authority.save(folder / "ca")
    authority.enrol("coordinator", "coordinator", folder, now, days=9, hosts=["127.0.0.1"])
    return folder


def unreadable_image(world: World) -> contextlib.AbstractContextManager[None]:
    path = world.images / "7.png"
    path.write_bytes(path.read_bytes()[:40])
    return coordinator(world)


def no_patient_column(world: World) -> contextlib.AbstractContextManager[None]:
    world.edit(data__patient="case_number")
    return coordinator(world)


def no_image_of_a_class(world: World) -> contextlib.AbstractContextManager[None]:
    world.write_table(lambda _: "no lesion")
    return coordinator(world)


def too_few_patients(world: World) -> contextlib.AbstractContextManager[None]:
    world.write_table(lambda number: CLASSES[number % 2], num_patients=6)
    return coordinator(world)


def no_budget(world: World) -> contextlib.AbstractContextManager[None]:
    charge(world, "an earlier study", num_sums=4)
    world.edit(budget__epsilon=5.0)
    return coordinator(world)


def charge(world: World, run: str, *, num_sums: int) -> Ledger:
    plan = plan_privacy(world.study, 20)
    assert plan is not None
    ledger = Ledger(world.home / "ledgers" / "xrays.jsonl", "xrays", None)
    for number in range(num_sums):
        ledger.debit(run, number, plan.event, num_rounds=num_sums)
    return ledger


def full_disk(world: World) -> contextlib.AbstractContextManager[None]:
    world.monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 40, 1 << 40, 100 << 20))
    return coordinator(world)


def closed_port(world: World) -> contextlib.AbstractContextManager[None]:
    world.edit(coordinator=f"127.0.0.1:{free_port()}")
    return contextlib.nullcontext()


def other_version(world: World) -> contextlib.AbstractContextManager[None]:
    return coordinator(world, version="9.9.9", code="0" * 64)


def other_code(world: World) -> contextlib.AbstractContextManager[None]:
    return coordinator(world, code="0" * 64)


def open_key(world: World) -> contextlib.AbstractContextManager[None]:
    (world.file.parent / "key.pem").chmod(0o644)
    return coordinator(world)


PLANTED: dict[str, tuple[Callable[[World], Any], int, tuple[str, ...]]] = {
    "wrong clock, ahead": (
        clock_ahead,
        2,
        ("clock: 60.", "305 s behind is accepted", "set it by a time server: timedatectl"),
    ),
    "wrong clock, behind": (
        clock_behind,
        2,
        (
            "clock: 400.",
            " s behind the coordinator's; 5 s ahead to 305 s",
            "set it by a time server",
        ),
    ),
    "unreachable host, unknown name": (
        unknown_host,
        2,
        ("coordinator nowhere.invalid:9443: the name cannot be resolved", "correct coordinator"),
    ),
    "unreachable host, no answer": (
        silent_host,
        2,
        ("no answer within 0.3 s: the host is off or a firewall", "let this machine call out"),
    ),
    "wrong CA, the coordinator's": (
        coordinator_of_another_ca,
        2,
        ("its certificate is not of the CA in certificates.ca", "compare ca.pem"),
    ),
    "wrong CA, the site's": (
        site_with_another_ca,
        2,
        ("certificate.pem: not issued by the CA in ", "from the same consortium"),
    ),
    "unreadable image": (
        unreadable_image,
        3,
        ("data set xrays: 23 readable images", "1 unreadable: 7.png: not a", "repair or remove"),
    ),
    "patient column missing": (
        no_patient_column,
        3,
        ("images.csv: no column 'case_number' in its first line, which has 3 cells; correct the",),
    ),
    "class missing": (
        no_image_of_a_class,
        3,
        ("data set xrays: no image of class 'lesion'; correct the labels or data.root",),
    ),
    "too few patients": (
        too_few_patients,
        3,
        ("too few patients: 6, of which ", "declared_patients is 20", "complete the data"),
    ),
    "no budget left": (
        no_budget,
        4,
        ("budget: 4 of 4 rounds of study chests", "of 5 is spent; ask the data owner"),
    ),
    "disk full": (
        full_disk,
        2,
        ("0.10 GiB free, 1.00 GiB needed; delete what is not needed, or move state_dir",),
    ),
    "port closed": (
        closed_port,
        2,
        ("nobody listens there (port closed); start fl-server, ask the coordinator",),
    ),
    "version mismatch": (
        other_version,
        5,
        (f"the coordinator runs 9.9.9, this site {version('consilium')}; install the same",),
    ),
    "same version, other code": (
        other_code,
        5,
        ("the code differs (000000000000... there", "install it anew from the same release"),
    ),
    "wrong key mode": (
        open_key,
        2,
        ("key.pem: mode 0644, only its owner may read it: chmod 600 ",),
    ),
}


@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_fault_is_the_only_one_and_named_in_one_line(title: str, world: World) -> None:
    plant, expected_code, says = PLANTED[title]
    with plant(world):
        exit_code, lines = world.check()
    found_faults = faults(lines)
    assert len(found_faults) == 1, found_faults
    assert all(part in found_faults[0] for part in says), found_faults
    assert exit_code == expected_code
    assert lines[-1] == "ok       device: cpu"  # it went on to the end


def test_several_faults_are_all_reported_and_the_first_is_the_exit_code(world: World) -> None:
    unreadable_image(world)
    open_key(world)
    closed_port(world)
    world.edit(data__declared_patients=300, policy={"max_rounds": 3, "min_sites": 4})
    world.edit(budget__epsilon=0.01)
    exit_code, lines = world.check()
    starts = [
        "key ",
        "coordinator ",
        "policy: 4 rounds, max_rounds is 3; the site's owner decides on [policy]",
        "policy: 3 members, min_sites is 4; the site's owner decides on [policy]",
        "data set xrays: 23 readable",
        "data set xrays: too few patients",
        "budget: ",
    ]
    said = [line[9:] for line in faults(lines)]
    assert len(said) == len(starts), said
    assert all(line.startswith(start) for line, start in zip(said, starts, strict=True)), said
    assert exit_code == 2


def test_offline_leaves_the_coordinator_out(world: World) -> None:
    closed_port(world)
    exit_code, lines = world.check("--offline")
    assert exit_code == 0
    called = [line for line in lines if " coordinator 127.0.0.1:" in line]
    assert len(called) == 1
    assert called[0].startswith("warning")
    assert called[0].endswith("not called, as --offline says")


@pytest.mark.parametrize("why", ["not a member", "revoked"])
def test_a_certificate_that_the_coordinator_refuses_is_one_fault(why: str, world: World) -> None:
    if why == "revoked":
        folder, now = world.consortium.folder / "ca", datetime.now(UTC)
        number = read_certificate(world.file.parent / "certificate.pem").serial_number
        listed = Authority.load(folder).revocation_list([number], now, days=9, number=2)
        (folder / REVOKED).write_bytes(listed)
    with superlink(world, members=NAMES if why == "revoked" else NAMES[1:]):
        exit_code, lines = world.check()
    assert len(faults(lines)) == 1
    assert "refuses this site's certificate (HTTP 403)" in faults(lines)[0]
    assert exit_code == 2


def test_a_certificate_that_a_run_brought_the_revocation_of_is_a_fault_without_calling(
    world: World,
) -> None:
    number = read_certificate(world.file.parent / "certificate.pem").serial_number
    authority = Authority.load(world.consortium.folder / "ca")
    listed = authority.revocation_list([number], datetime.now(UTC), days=9, number=2)
    (world.home / "revoked.crl").write_bytes(listed)
    with coordinator(world):
        exit_code, lines = world.check()
    assert [line[-58:] for line in faults(lines)] == [
        "it was revoked; make a new key and request: fl-certs request"[-58:]
    ]
    assert any(line.endswith("not asked; first correct the certificate") for line in lines)
    assert exit_code == 2


def test_a_coordinator_that_a_known_list_revokes_is_a_fault(world: World) -> None:
    folder = world.consortium.folder
    now = datetime.now(UTC)
    shown = read_certificate(folder / "coordinator" / "certificate.pem").serial_number
    content = Authority.load(folder / "ca").revocation_list([shown], now, days=9, number=8)
    (world.home / "revoked.crl").write_bytes(content)
    with coordinator(world):
        _, lines = world.check()
    (line,) = faults(lines)
    assert "the coordinator's certificate was revoked" in line
    assert "do not go on" in line


def test_what_is_no_coordinator_is_named_as_that(world: World) -> None:
    with coordinator(world, status=404):
        _, lines = world.check()
    assert ["HTTP status 404" in line for line in faults(lines)] == [True]
    with socket.create_server(("127.0.0.1", world.consortium.port)) as listening:
        answering = threading.Thread(target=_speak_plainly, args=(listening,))
        answering.start()
        _, lines = world.check()
        answering.join()
    assert ["TLS refused" in line for line in faults(lines)] == [True]


def _speak_plainly(listening: socket.socket) -> None:
    caller, _ = listening.accept()
    with caller:
        caller.recv(1 << 16)
        caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_a_coordinator_with_another_key_than_the_studys_is_a_fault(world: World) -> None:
    authority = Authority.load(world.consortium.folder / "ca")
    folder, now = world.consortium.folder / "usurper", datetime.now(UTC)
    authority.enrol("coordinator", "coordinator", folder, now, days=9, hosts=["127.0.0.1"])
    with coordinator(world, own=folder):
        exit_code, lines = world.check()
    assert ["study chests was made for" in line for line in faults(lines)] == [True]
    assert exit_code == 6


def test_the_announced_study_is_held_against_what_was_approved(world: World) -> None:
    other = "ab" * 32
    with coordinator(world, study=other):
        exit_code, lines = world.check()
    assert [f"study {other[:12]}..., which is not approved here" in x for x in faults(lines)] == [
        True
    ]
    assert exit_code == 6
    (world.home / "approvals.jsonl").unlink()
    with coordinator(world, study=other):
        exit_code, lines = world.check()
    assert exit_code == 0
    assert any("nothing is approved here yet" in line for line in lines)


def test_without_study_the_newest_approved_one_is_checked(world: World) -> None:
    newer = load(world.consortium.study, Study, {"name": "newer"})
    Approvals(world.home).approve(newer, by="Test", now=datetime.now(UTC))
    assert f"study newer: digest {newer.digest()}" in world.check("--offline")[1][1]
    said = world.check("--offline", "--study", str(world.consortium.study))[1][1]
    assert said.startswith(f"ok       study chests: digest {world.study.digest()}")


def test_a_study_that_nobody_approved_yet_is_checked_with_a_warning(world: World) -> None:
    file = world.consortium.folder / "new.toml"
    file.write_text(tomli_w.dumps(load(world.consortium.study, Study, {"seed": 9}).as_table()))
    exit_code, lines = world.check("--offline", "--study", str(file))
    assert exit_code == 0
    assert lines[1].startswith("warning  study chests: ")
    assert lines[1].endswith("not approved here; read it, then fl-client approve FILE")


def test_a_study_file_with_problems_is_one_line_and_the_rest_is_checked(world: World) -> None:
    file = world.consortium.folder / "broken.toml"
    file.write_text(world.consortium.study.read_text().replace('kind = "classification"', ""))
    exit_code, lines = world.check("--offline", "--study", str(file))
    assert len(faults(lines)) == 1
    assert faults(lines)[0].startswith("FAULT    broken.toml has 1 problem(s): task.kind: ")
    assert any("24 readable images" in line for line in lines)
    assert exit_code == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "east"}, "certificate.pem: it is north's, this site is east"),
        ({"name": "east"}, "study chests: east is not a member"),
        ({"certificates__key": "../south/key.pem"}, "is not the key of"),
        ({"certificates__key": "nowhere.pem"}, "No such file or directory; give the private key"),
        ({"certificates__ca": "site.toml"}, "not a certificate in PEM"),
        ({"coordinator": "127.0.0.1"}, "coordinator '127.0.0.1': expected \"host:port\""),
        ({"data__root": "nowhere"}, "data set xrays: "),
        ({"device": "cuda"}, 'torch finds no GPU here; set device to "auto" or "cpu"'),
    ],
)
def test_a_wrong_value_of_the_site_file_is_named(
    changes: dict[str, Any], says: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    world.edit(**changes)
    with coordinator(world):
        exit_code, lines = world.check()
    assert sum(says in line for line in faults(lines)) == 1
    assert exit_code


def test_a_state_folder_that_is_a_file_is_one_fault(world: World) -> None:
    (world.file.parent / "in-the-way").write_text("")
    world.edit(state_dir="in-the-way/state")
    with coordinator(world):
        _, lines = world.check("--study", str(world.consortium.study))
    assert len(faults(lines)) == 1
    assert faults(lines)[0].endswith("choose a writable one")


def test_broken_images_that_may_be_skipped_are_a_warning(world: World) -> None:
    unreadable_image(world)
    world.edit(data__on_broken="skip")
    exit_code, lines = world.check("--offline")
    assert exit_code == 0
    assert any(x.startswith("warning") and x.endswith("they will be skipped") for x in lines)


def test_a_run_under_way_needs_budget_for_its_other_rounds_alone(world: World) -> None:
    """Its budget is for four rounds, three are spent: it goes on, another run cannot begin."""
    world.edit(budget__epsilon=round(charge(world, "to measure", num_sums=4).spent(1e-3) + 0.01, 2))
    (world.home / "ledgers" / "xrays.jsonl").unlink()
    identity = Identity.load(world.file.parent / "certificate.pem", world.file.parent / "key.pem")
    books = Books(world.home, world.study, identity, "xrays", 20)
    books.invited()
    for number in range(3):
        books.contribute(number)
    exit_code, lines = world.check("--offline")
    assert (exit_code, faults(lines)) == (0, [])
    assert any("budget: covers 1 of 4 rounds of study chests" in line for line in lines)
    shutil.rmtree(books.folder)
    exit_code, lines = world.check("--offline")
    assert exit_code == 4
    assert "4 of 4 rounds of study chests on data set xrays would bring" in faults(lines)[0]


@pytest.mark.parametrize(
    ("days", "level", "says"),
    [
        (60, "ok", "59 days"),
        (20, "warning", "19 days; ask the CA's operator to run: fl-certs renew --ca CA north"),
        (-1, "FAULT", "; ask the CA's operator to run: fl-certs renew --ca CA north"),
    ],
    ids=["weeks left", "days left", "ended"],
)
def test_a_certificate_says_when_it_ends_and_how_to_renew_it(
    days: int, level: str, says: str, world: World
) -> None:
    now = datetime.now(UTC)
    authority = Authority.create("Another", now - timedelta(days=90), days=400)
    authority.save(world.file.parent / "ca")
    began = now - timedelta(days=80)
    authority.enrol(SITE, "site", world.file.parent, began, days=80 + days)
    world.edit(certificates__ca="ca/ca.pem")
    config = load(world.file, SiteConfig)
    assert config.certificates is not None
    (finding,) = check_certificate(config, config.certificates, now)
    assert finding.level == level
    assert finding.text.endswith(says)


def test_what_a_peer_says_cannot_write_to_the_terminal(world: World) -> None:
    with coordinator(world, version="\x1b[2J\n9"):
        _, lines = world.check()
    assert "the coordinator runs ?[2J" in faults(lines)[0]
    assert len(faults(lines)) == 1


def test_the_check_leaves_files_as_they_were(world: World) -> None:
    def files() -> dict[Path, tuple[int, bytes]]:
        return {
            path: (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
            for path in world.file.parent.rglob("*")
            if path.is_file() and path.name != CARD
        }

    before = files()
    world.check("--offline")
    assert files() == before
