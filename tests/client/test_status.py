"""How a site stands: read beside a running client, and every damaged book named."""

from __future__ import annotations

import fcntl
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from deployment import found, running
from looked import DATA, NAMES, SITE, STUDY, Looked, look_at
from site_books import RUN, Books

from client.approvals import Approvals
from client.hospital import LOCK
from common.accounting import Event, epsilon_of
from common.audit import AuditLog
from common.config import load
from common.errors import DataError
from common.identity import Identity
from common.study import Study


@pytest.fixture
def site(tmp_path: Path) -> Looked:
    return look_at(tmp_path)


def files_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def test_a_site_before_its_first_run_says_what_it_waits_for(site: Looked) -> None:
    lines = site.run("status")
    digest = site.books.study.digest()
    assert lines[0] == (
        f"site north: fl-client does not run; coordinator 127.0.0.1:{site.consortium.port}"
    )
    assert lines[1].startswith("warning: certificate of north: this key's, of this CA, valid until")
    assert lines[2].startswith(f"approved: chests, digest {digest}, by Test, 20")
    assert lines[3:] == [
        "proposed: no study that waits for approval",
        "current study: none; no coordinator has invited this site yet",
        "ledger: nothing was ever charged",
        f"audit log: head {'0' * 64}",
    ]


def test_a_run_under_way_is_shown_with_its_epoch_sum_budget_and_head(site: Looked) -> None:
    site.books.invited()
    site.books.contribute(0)
    site.books.invited(epoch=2)
    stated = site.books.contribute(1, unmasked=False)
    lines = site.run("status")
    spent = epsilon_of(
        [Event(stated.noise_multiplier, stated.sampling_probability, 2 * stated.steps)], 1e-3
    )
    digest = site.books.study.digest()
    assert lines[4:] == [
        f"current study: chests, digest {digest[:12]}..., run {RUN[:12]}, epoch 2, ready",
        "last sum answered: 1 (train), not unmasked with this site's help yet",
        f"ledger: data set xrays: epsilon {spent:.3g} of 8 at delta 0.001; {8 - spent:.3g} left",
        f"audit log: head {site.books.audit.head()}",
    ]
    site.books.contribute(2)
    assert "last sum answered: 2 (train), unmasked" in site.run("status")


def test_a_proposed_study_is_shown_with_the_command_that_approves_it(site: Looked) -> None:
    study = load(site.consortium.study, Study, {"name": "newer"})
    _, path = Approvals(site.home).propose(json.dumps(study.as_table()))
    line = site.run("status")[3]
    command = f"fl-client --site-config {site.file} approve {path}"
    assert line == f"proposed: newer, digest {study.digest()}; read it, then: {command}"
    site.run("approve", str(path), "--by", "Test", "--yes")
    assert "proposed: no study that waits for approval" in site.run("status")


def test_an_approved_study_that_was_changed_or_removed_is_named(site: Looked) -> None:
    (path,) = (site.home / "approved").glob("*.toml")
    text = path.read_text()
    path.write_text(text.replace("num_rounds = 4", "num_rounds = 40"))
    assert any(x.startswith("DAMAGED: ") and "was changed since" in x for x in site.run("status"))
    path.unlink()
    assert site.run("status")[2].endswith("; withdrawn: its file was removed")


def test_everything_is_read_beside_a_running_client_and_nothing_is_written(site: Looked) -> None:
    site.books.invited()
    site.books.contribute(0)
    with (
        (site.home / LOCK).open("wb") as lock,
        closing(sqlite3.connect(site.books.folder / "journal.sqlite")) as journal,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        journal.execute("BEGIN IMMEDIATE")  # as in the middle of a sum
        before = files_of(site.home)
        assert site.run("status")[0].startswith("site north: fl-client runs; ")
        site.run("ledger")
        site.run("audit", "verify")
        assert files_of(site.home) == before
    assert site.run("status")[0].startswith("site north: fl-client does not run; ")


def test_one_damaged_book_does_not_hide_the_others(site: Looked) -> None:
    site.books.invited()
    site.books.contribute(0)
    site.books.ledger_file.write_bytes(site.books.ledger_file.read_bytes()[:-9])
    (site.books.folder / "journal.sqlite").write_bytes(b"no database" * 99)
    lines = site.run("status")
    assert lines[-3].startswith("DAMAGED: journal ")
    assert lines[-2].startswith("DAMAGED: ledger xrays.jsonl is damaged")
    assert lines[-1] == f"audit log: head {site.books.audit.head()}"


def test_no_secret_of_the_journal_is_printed(site: Looked) -> None:
    site.books.invited()
    site.books.contribute(0, unmasked=False)
    said = "\n".join(site.run("status") + site.run("ledger") + site.run("audit", "verify"))
    for secret in ("YSBzZWNyZXQ", "YSBzaGFyZQ", "a secret", "a share"):  # base64 and plain
        assert secret not in said


def test_the_ledger_says_what_every_run_cost_the_total_and_what_is_left(site: Looked) -> None:
    site.books.invited()
    stated = [site.books.contribute(number) for number in range(3)][-1]
    site.books.invited(run="34" * 16)
    site.books.contribute(0, run="34" * 16)
    each = Event(stated.noise_multiplier, stated.sampling_probability, stated.steps)
    after = [epsilon_of([each] * num, 1e-3) for num in (3, 4)]
    in_the_end = epsilon_of([each] * 7, 1e-3)
    mechanism = "of 4 steps (noise multiplier 1.5, sampling probability 0.4)"
    after_them = f"at delta 0.001 after them; {8 - in_the_end:.3g} of 8 left"
    assert site.run("ledger") == [
        f"data set xrays: run {RUN[:12]}, 3 sums {mechanism}; epsilon {after[0]:.3g} after it",
        f"data set xrays: run {'34' * 6}, 1 sum {mechanism}; epsilon {after[1]:.3g} after it",
        f"data set xrays: epsilon {after[1]:.3g} of 8 at delta 0.001; {8 - after[1]:.3g} left",
        f"planned: study chests, 3 of 4 rounds left: epsilon {in_the_end:.3g} {after_them}",
    ]


def test_the_ledger_says_that_a_planned_study_does_not_fit(site: Looked) -> None:
    site.books.invited()
    site.books.contribute(0)
    planned = site.books.study.model_copy(update={"name": "longer", "num_rounds": 40})
    file = site.home.parent / "longer.toml"
    file.write_text(tomli_w.dumps(planned.as_table()))
    last = site.run("ledger", "--study", str(file))[-1]
    assert last.startswith("planned: study longer, 40 of 40 rounds left: epsilon ")
    assert last.endswith("; DOES NOT FIT the budget of 8")


def test_a_ledger_of_a_data_set_that_the_site_file_no_longer_names_is_shown_too(
    site: Looked,
) -> None:
    site.books.invited()
    site.books.contribute(0)
    site.books.ledger_file.rename(site.books.ledger_file.with_name("older.jsonl"))
    *_, last, _ = site.run("ledger")
    assert last.startswith("data set older: epsilon ")
    assert last.endswith("at delta 1e-05; no [budget] in the site file bounds it")


def test_without_a_charge_the_ledger_says_so(site: Looked) -> None:
    said = site.run("ledger")
    assert said[0] == f"no ledger in {site.home / 'ledgers'}: nothing was ever charged"
    assert said[1].startswith("planned: study chests, 4 of 4 rounds left")


def test_intact_books_are_verified_with_lines_head_and_times(site: Looked) -> None:
    site.books.invited()
    site.books.contribute(0)
    path = site.home / "audit.jsonl"
    times = [json.loads(line)["time"] for line in path.read_text().splitlines()]
    assert site.run("audit", "verify") == [
        f"audit log {path}: 2 lines, none changed, removed or put in between",
        f"head {site.books.audit.head()}",
        f"times {times[0]} to {times[-1]}",
        f"statement on sum 0 of run {RUN[:12]}: audit log and ledger hold its heads",
    ]


def test_without_a_statement_it_says_what_is_not_covered(site: Looked) -> None:
    AuditLog(site.home / "audit.jsonl", lambda: datetime.now(UTC)).append("started")
    assert site.run("audit", "verify")[-1] == (
        "no signed statement is kept here: lines cut off the end would not be noticed"
    )


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"received"', b'"reformed"', 1))


def line_removed(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a changed line": ("audit.jsonl", changed, r"line 1: its hash does not fit"),
    "a removed line": ("audit.jsonl", line_removed, r"line 2: it carries number 3"),
    "no log": ("audit.jsonl", Path.unlink, "there is no audit log"),
    "a log cut off its end": ("audit.jsonl", cut_off, r"the audit log does not hold the head"),
    "a ledger cut off its end": ("ledgers/xrays.jsonl", cut_off, r"the ledger does not hold the"),
    "no ledger": ("ledgers/xrays.jsonl", Path.unlink, r"the ledger does not hold the head"),
}


@pytest.mark.parametrize("title", DAMAGES)
def test_damage_to_a_book_is_found_and_exits_3(title: str, site: Looked) -> None:
    file, damage, says = DAMAGES[title]
    site.books.invited()
    site.books.contribute(0)
    site.books.contribute(1)
    site.run("audit", "verify")
    damage(site.home / file)
    with pytest.raises(DataError, match=says) as caught:
        site.run("audit", "verify")
    assert caught.value.exit_code == 3


def test_a_statement_that_this_site_did_not_sign_is_no_witness(site: Looked) -> None:
    site.books.invited()
    site.books.contribute(0)
    with closing(sqlite3.connect(site.books.folder / "journal.sqlite")) as journal:
        (content,) = journal.execute("SELECT content FROM memory WHERE name = 'sum'").fetchone()
        kept = json.loads(content)
        kept["statement"] = json.dumps(json.loads(kept["statement"]) | {"audit": "0" * 64})
        journal.execute("UPDATE memory SET content = ? WHERE name = 'sum'", (json.dumps(kept),))
        journal.commit()
    with pytest.raises(DataError, match="is not signed with this site's key"):
        site.run("audit", "verify")


@pytest.mark.slow
def test_a_deployed_run_can_be_looked_at_while_it_runs_and_verified_after(tmp_path: Path) -> None:
    planned = tmp_path / "planned.toml"
    planned.write_text(tomli_w.dumps(STUDY))
    consortium = found(tmp_path, planned, NAMES, data=DATA)
    identity_of = consortium.site(SITE).parent
    books = Books(
        identity_of / "state",
        load(consortium.study, Study),
        Identity.load(identity_of / "certificate.pem", identity_of / "key.pem"),
        "xrays",
        20,
    )
    site = Looked(consortium, books)
    with running(consortium):
        consortium.start_coordinator()
        for name in NAMES:
            consortium.start_site(name)
        assert consortium.wait("coordinator", 120) == 0
        lines = site.run("status")
        assert lines[0].startswith("site north: fl-client runs; ")
        assert any(line.startswith("current study: chests, digest ") for line in lines)
        assert any(line.startswith("last sum answered: ") for line in lines)
    assert site.run("audit", "verify")[-1].endswith(": audit log and ledger hold its heads")
    cut_off(site.home / "audit.jsonl")
    with pytest.raises(DataError, match="the audit log does not hold the head"):
        site.run("audit", "verify")
