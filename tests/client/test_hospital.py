"""A hospital's side of the door: what it takes part in, what it keeps, and what it withstands."""

from __future__ import annotations

import errno
import gc
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from client.approvals import MAX_PROPOSED, MAX_STUDY_CHARS
from client.certificate_check import check_own_list
from client.cli import app
from client.config import SiteConfig
from client.hospital import FIRST_PAUSE_S, LONGEST_PAUSE_S, Hospital
from client.place import NEWEST_LIST
from common.authority import CERTIFICATE, Authority
from common.config import load
from common.errors import (
    ConfigError,
    DataError,
    FederationError,
    PolicyError,
    RemoteProtocolError,
)
from common.identity import read_revocation_list, revocation_number
from common.messages import Greeting, Introduction, Invitation
from common.study import Study

DAYS = 30
SITE = "site-1"
NAMES = (SITE, "site-2", "site-3")

Made = Callable[..., Study]


@dataclass
class World:
    """A hospital's files, and the CA that could be anywhere."""

    folder: Path
    authority: Authority
    study: Study
    keys: dict[str, str]  # fingerprints; the coordinator's under "hub"

    @property
    def file(self) -> Path:
        return self.folder / "site.toml"

    @property
    def home(self) -> Path:
        return self.folder / "state"

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

    def hospital(self, now: Callable[[], datetime] | None = None) -> Hospital:
        config = load(self.file, SiteConfig)
        return Hospital(config, now) if now else Hospital(config)

    def approve(self, study: Study | None = None) -> None:
        from client.approvals import Approvals

        now = datetime.now(UTC)
        Approvals(self.home).approve(study or self.study, by="Test", now=now)

    def audit(self) -> list[dict[str, Any]]:
        lines = (self.home / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def listed(self, number: int, revoked: list[int], days: int = DAYS) -> bytes:
        began = datetime.now(UTC) - timedelta(days=2)
        return self.authority.revocation_list(revoked, began, days=days, number=number)


@pytest.fixture
def world(tmp_path: Path, make_study: Made) -> World:
    now = datetime.now(UTC)
    authority = Authority.create("Test", now - timedelta(days=3), days=400)
    authority.save(tmp_path / "ca")
    keys = {
        name: authority.enrol(name, "site", tmp_path / name, now, days=DAYS).fingerprint
        for name in NAMES
    }
    hub = authority.enrol("hub", "coordinator", tmp_path / "hub", now, days=DAYS)
    members = [{"name": name, "key": key} for name, key in keys.items()]
    study = make_study(
        {
            "members": members,
            "coordinator": {"key": hub.fingerprint},
            "aggregation": {"weight_cap": 60},
        }
    )
    made = World(tmp_path, authority, study, {**keys, "hub": hub.fingerprint})
    files = {"cert": f"{SITE}/certificate.pem", "key": f"{SITE}/key.pem"}
    site = {
        "name": SITE,
        "state_dir": "state",
        "device": "cpu",
        "coordinator": "127.0.0.1:1",
        "certificates": {"ca": f"ca/{CERTIFICATE}", **files},
        "data": {"name": "x", "format": "phantom", "declared_patients": 50},
        "policy": {"allow_no_privacy": True},
    }
    made.file.write_text(tomli_w.dumps(site))
    return made


def greeting(study: Study, **changes: Any) -> Greeting:
    return Greeting(json.dumps({**study.as_table(), **changes}))


# Proposals


def test_an_approved_study_is_answered_however_many_others_were_proposed(world: World) -> None:
    world.approve()
    hospital = world.hospital()
    for seed in range(MAX_PROPOSED + 1):
        with pytest.raises(PolicyError):
            hospital.answer(greeting(world.study, seed=100 + seed))
    assert hospital.answer(greeting(world.study)) == Introduction(0)
    assert len(list((world.home / "proposed").iterdir())) == MAX_PROPOSED


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 30_000 + "]" * 30_000, id="nested"),
        pytest.param(json.dumps({f"seex{k:04}": 1 for k in range(4000)}), id="unknown keys"),
        pytest.param("x" * (MAX_STUDY_CHARS + 1), id="long"),
    ],
)
def test_a_greeting_that_means_harm_is_refused_with_a_line(world: World, text: str) -> None:
    hospital = world.hospital()
    with pytest.raises(RemoteProtocolError):
        hospital.answer(Greeting(text))
    assert [line["event"] for line in world.audit()] == ["received", "refused"]


def test_whatever_fails_while_answering_is_a_line_with_its_kind_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = world.hospital()

    def fail(*_: object) -> None:
        raise RecursionError("/srv/patients/Hansen")

    monkeypatch.setattr(hospital.approvals, "propose", fail)
    monkeypatch.setattr(hospital, "_site_for", fail)
    for message in (greeting(world.study), Invitation("", b"", b"")):
        with pytest.raises(RecursionError):
            hospital.answer(message)
    lines = world.audit()
    assert [line["event"] for line in lines] == ["received", "refused"] * 2
    assert "Hansen" not in json.dumps(lines)
    assert "RecursionError" in lines[1]["reason"]


@pytest.mark.parametrize("where", ["propose", "_site_for"])
def test_a_full_disk_is_no_refusal_and_the_same_message_is_answered_later(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.approve()
    hospital = world.hospital()

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = greeting(world.study) if where == "propose" else Invitation("{}", b"", b"")
    with monkeypatch.context() as patch:
        patch.setattr(hospital.approvals if where == "propose" else hospital, where, no_room)
        with pytest.raises(OSError, match="No space left"):
            hospital.answer(message)
    assert hospital.answer(greeting(world.study)) == Introduction(0)
    assert "refused" not in {line["event"] for line in world.audit()}
    assert hospital.pause_s() == 0


def test_refusals_in_a_row_slow_this_site_down_and_a_good_message_ends_that(world: World) -> None:
    world.approve()
    hospital, pauses = world.hospital(), []
    assert hospital.pause_s() == 0
    for seed in range(9):
        with pytest.raises(FederationError):
            hospital.answer(greeting(world.study, seed=100 + seed))
        pauses.append(hospital.pause_s())
    assert pauses[:4] == pytest.approx([FIRST_PAUSE_S * 2**k for k in range(4)])
    assert pauses[-1] == LONGEST_PAUSE_S
    hospital.answer(greeting(world.study))
    assert hospital.pause_s() == 0


# What began here


def test_a_site_file_that_is_corrected_is_no_lost_journal(world: World) -> None:
    world.approve()
    world.edit(data__declared_patients=61)
    hospital = world.hospital()
    with pytest.raises(ConfigError, match="weight_cap is 60"):
        hospital._opened(world.study.digest())
    del hospital
    gc.collect()  # which gives the folder's lock back
    world.edit(data__declared_patients=50)
    assert world.hospital()._opened(world.study.digest()).name == SITE


@pytest.mark.parametrize("keep_folder", [True, False])
def test_a_journal_that_is_gone_is_noticed(world: World, keep_folder: bool) -> None:
    world.approve()
    hospital = world.hospital()
    hospital._opened(world.study.digest())
    del hospital
    gc.collect()  # which gives the folder's lock back
    folder = world.home / "studies" / world.study.digest()
    for path in folder.iterdir():
        path.unlink()
    if not keep_folder:
        folder.rmdir()
    with pytest.raises(DataError, match=r"is gone.*\[R6\]"):
        world.hospital()._opened(world.study.digest())


def test_a_journal_whose_file_alone_is_gone_is_noticed_by_its_mark(world: World) -> None:
    world.approve()
    hospital = world.hospital()
    journal = hospital._opened(world.study.digest()).journal
    path = world.home / "studies" / world.study.digest() / "journal.sqlite"
    path.with_suffix(".mark").write_text("3")
    del hospital, journal
    gc.collect()
    path.unlink()
    with pytest.raises(DataError, match="R6"):
        world.hospital()._opened(world.study.digest())


# Who decides where nobody reads a study


def pinned(world: World, **changes: str) -> dict[str, Any]:
    keys = {name: key for name, key in world.keys.items() if name != "hub"} | changes
    return {"coordinator_key": world.keys["hub"], "member_keys": keys}


def test_without_approval_the_site_file_must_pin_every_key(world: World) -> None:
    world.edit(policy__require_approval=False)
    with pytest.raises(ConfigError) as caught:
        load(world.file, SiteConfig)
    assert "policy.coordinator_key: needed where require_approval is false" in str(caught.value)
    assert "policy.member_keys: needed where require_approval is false" in str(caught.value)


def test_without_approval_a_study_with_the_pinned_keys_is_taken(world: World) -> None:
    world.edit(policy__require_approval=False)
    for key, value in pinned(world, **{"site-9": "9" * 64}).items():
        world.edit(**{f"policy__{key}": value})
    assert world.hospital().answer(greeting(world.study)) == Introduction(0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"coordinator_key": "d" * 64}, "coordinator's key is .*coordinator_key is dddddddddddd"),
        ({"member_keys": {"site-2": "d" * 64}}, "key of site-2 is .*has dddddddddddd"),
        ({"member_keys": {"site-2": None}}, "site-2 is a member, member_keys does not name it"),
    ],
)
@pytest.mark.parametrize("is_approved", [True, False])
def test_a_study_with_other_keys_than_the_pinned_is_refused(
    world: World, changes: dict[str, Any], reason: str, is_approved: bool
) -> None:
    if is_approved:
        world.approve()
    table = pinned(world)
    members = {**table["member_keys"], **changes.get("member_keys", {})}
    table["member_keys"] = {name: key for name, key in members.items() if key}
    table["coordinator_key"] = changes.get("coordinator_key", table["coordinator_key"])
    for key, value in {**table, "require_approval": is_approved}.items():
        world.edit(**{f"policy__{key}": value})
    with pytest.raises(PolicyError, match=reason):
        world.hospital().answer(greeting(world.study))


# The hospital's own files


def test_a_newer_list_of_its_own_counts_at_once(world: World) -> None:
    world.edit(certificates__revoked="own.crl")
    (world.folder / "own.crl").write_bytes(world.listed(3, []))
    hospital = world.hospital()
    remembered = world.home / NEWEST_LIST
    assert remembered.read_bytes() == (world.folder / "own.crl").read_bytes()
    (world.folder / "own.crl").write_bytes(world.listed(7, [12345]))
    trust = hospital._credentials(world.study).trust
    now = datetime.now(UTC)
    listed = read_revocation_list(remembered.read_bytes(), world.authority.certificate, now)
    assert revocation_number(listed) == 7
    with pytest.raises(RemoteProtocolError, match="number 7"):
        trust.revoked_by(world.listed(6, []), now)


@pytest.mark.parametrize("content", ["older", "stale", "garbage", "another CA's", "none"])
def test_a_list_of_its_own_that_is_not_the_newest_changes_nothing(
    world: World, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    remembered = world.home / NEWEST_LIST
    world.home.mkdir()
    remembered.write_bytes(world.listed(5, []))
    before, own = remembered.read_bytes(), world.folder / "own.crl"
    world.edit(certificates__revoked="own.crl")
    other = Authority.create("Other", datetime.now(UTC), days=DAYS)
    lists = {
        "older": world.listed(4, []),
        "stale": world.listed(9, [], days=1),
        "garbage": b"half a list",
        "another CA's": other.revocation_list([], datetime.now(UTC), days=DAYS, number=9),
    }
    if content in lists:
        own.write_bytes(lists[content])
    hospital = world.hospital()
    for _ in range(3):
        hospital._credentials(world.study)
    assert remembered.read_bytes() == before
    assert caplog.text.count("was not taken") == 1


def test_a_list_that_the_disk_had_no_room_for_is_taken_as_soon_as_it_has(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.edit(certificates__revoked="own.crl")
    hospital = world.hospital()
    (world.folder / "own.crl").write_bytes(world.listed(3, []))

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("common.roster.replace_file", no_room)
        with pytest.raises(OSError, match="No space left"):
            hospital._credentials(world.study)
    hospital._credentials(world.study)
    assert (world.home / NEWEST_LIST).read_bytes() == (world.folder / "own.crl").read_bytes()


def test_check_says_whether_its_own_list_counts(world: World) -> None:
    files = load(world.file, SiteConfig).certificates
    assert files is not None
    now, own = datetime.now(UTC), world.folder / "own.crl"
    assert list(check_own_list(files, now)) == []
    files = files.model_copy(update={"revoked": own})
    levels = []
    for content in (world.listed(3, []), world.listed(3, [], days=1), b"garbage"):
        own.write_bytes(content)
        (found,) = check_own_list(files, now)
        levels.append(found.level)
    assert levels == ["ok", "warning", "FAULT"]


def test_a_certificate_that_is_being_copied_is_not_there_yet(world: World) -> None:
    hospital = world.hospital()
    path = world.folder / SITE / "certificate.pem"
    before = hospital._credentials(world.study).identity
    path.write_bytes(path.read_bytes()[:100])
    assert hospital._credentials(world.study).identity == before
    key = before.key.public_key()
    renewed = world.authority.issue(SITE, "site", key, datetime.now(UTC), days=DAYS)
    from cryptography.hazmat.primitives.serialization import Encoding

    path.write_bytes(renewed.public_bytes(Encoding.PEM))
    now = hospital._credentials(world.study).identity
    assert now.certificate == renewed.public_bytes(Encoding.DER)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_stops_the_start(world: World, mode: int) -> None:
    key = world.folder / SITE / "key.pem"
    key.chmod(mode)
    ended = CliRunner().invoke(app, ["--site-config", str(world.file)])
    assert isinstance(ended.exception, ConfigError)
    assert f"chmod 600 {key}" in str(ended.exception)
    assert not world.home.exists()


def test_the_state_folder_is_this_users_alone(world: World) -> None:
    world.hospital()
    assert world.home.stat().st_mode & 0o777 == 0o700
