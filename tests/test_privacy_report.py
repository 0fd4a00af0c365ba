"""What a data-protection officer files: right, whole, and noticed when it is changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation import federate, tiny_study
from looked import Looked, look_at
from site_books import HEX, RUN
from typer.testing import CliRunner

from client.approvals import Approvals
from client.ledger import Ledger, charge_key
from common.accounting import Event, epsilon_of
from common.charges import WITHOUT_PRIVACY
from common.errors import ConfigError, DataError, FederationError
from common.identity import Identity
from common.privacy_report import HTML, JSON, site_folder
from common.privacy_report.texts import LANGUAGES, Texts
from common.seal import seal
from server.report import verify, write_report
from server.report_cli import app as report_app
from server.run_dir import RunDir

PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "example_clip_norm": 0.5, "randomness": "seeded"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    federate(tiny_study(num_rounds=3, privacy=PRIVACY), folder)
    write_report(folder)
    return folder


def text_of(page: str) -> str:
    body = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


# The consortium's


def test_every_number_of_the_consortiums_report_is_in_the_files_it_names(finished: Path) -> None:
    facts = json.loads((finished / JSON).read_text())
    text = text_of((finished / HTML).read_text())
    assert len(facts["costs"]) == 4
    for row in facts["costs"]:
        statements = json.loads((finished / row["about"]).read_text())
        last = statements[-1]
        for key in ("epsilon", "delta", "noise_multiplier", "sampling_probability", "steps"):
            assert row[key] == last[key]
        event = Event(last["noise_multiplier"], last["sampling_probability"], last["steps"])
        assert row["second"] == epsilon_of([event], last["delta"], "pld")
        assert f"{row['epsilon']:.3f}" in text
        by_sum = {one["sum_number"]: one["epsilon"] for one in statements}
        assert facts["curves"]["rounds"][row["name"]] == [[k + 1, by_sum[k]] for k in range(3)]
    sent = {row["kind"]: row for row in facts["sent"]["kinds"]}
    lines = [json.loads(line) for line in (finished / "transcript.jsonl").read_text().splitlines()]
    uploads = [one for one in lines if (one["direction"], one["kind"]) == ("received", "Upload")]
    assert sent["Upload"]["number"] == len(uploads)
    assert sent["Upload"]["bytes"] == sum(sum(one["bytes"].values()) for one in uploads)


def test_what_protects_nobody_is_said_first(finished: Path) -> None:
    facts = json.loads((finished / JSON).read_text())
    assert facts["promise"][0].startswith("SIMULATED")
    assert facts["promise"][1].startswith("SEEDED RANDOMNESS")
    assert "e to the power of epsilon = 7.9" in facts["promise"][2]
    assert facts["assumptions"][0].endswith("none of this protects anybody.")


def test_a_study_without_privacy_says_so_first(tmp_path: Path) -> None:
    federate(tiny_study(num_rounds=1), tmp_path / "run")
    write_report(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / JSON).read_text())
    assert facts["promise"][1].startswith("There is NO differential privacy")
    assert facts["costs"] == facts["assumptions"] == []
    assert "What it cost" not in text_of((tmp_path / "run" / HTML).read_text())


def test_equal_runs_give_equal_pages(finished: Path, tmp_path: Path) -> None:
    before = (finished / HTML).read_bytes()
    write_report(finished)
    assert (finished / HTML).read_bytes() == before


def test_attacks_on_another_study_are_marked_as_such(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    found = {
        "study": {"name": "other", "digest": "ab" * 32},
        "membership": [
            {"epsilon": None, "delta": 1e-5, "num_canaries": 8, "num_guesses": 4, "num_right": 4,
             "bound": 2.5},
        ],
        "inversion": [
            {"image": 0, "kind": "plain", "likeness_to_own": 0.9, "likeness_to_others": [0.3],
             "leaked": True},
        ],
        "limits": {"sharp": 2.0, "recognised": 0.5, "margin": 0.1},
        "failures": [],
    }  # fmt: skip
    (folder / "attacks.json").write_text(json.dumps(found))
    write_report(folder)
    text = text_of((folder / HTML).read_text())
    assert "That is NOT the study of this report." in text
    assert "none: trained without privacy 4 / 4 2.50" in text
    verify(folder)  # what was tried later is no part of the run


def flips(content: bytes, step: int) -> Iterator[bytes]:
    for place in range(0, len(content), step):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "name",
    ["privacy/site-2.json", "summary.json", "SHA256SUMS", "SHA256SUMS.sig", "rounds.jsonl"],
)
@pytest.mark.parametrize(
    "step", [pytest.param(97), pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_a_byte_of_a_run_that_is_changed_is_noticed(
    step: int, name: str, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    content = (folder / name).read_bytes()
    for changed in flips(content, step):
        (folder / name).write_bytes(changed)
        with pytest.raises(FederationError):
            verify(folder)
    (folder / name).write_bytes(content)
    assert verify(folder).num_statements == 20


def test_a_run_that_nobody_signed_or_another_did_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "SHA256SUMS.sig").unlink()
    with pytest.raises(FederationError, match=r"SHA256SUMS\.sig is missing"):
        verify(folder)
    own = folder / "sites" / "site-2"
    RunDir(folder).seal(Identity.load(own / "certificate.pem", own / "key.pem"))
    with pytest.raises(FederationError, match=r"the coordinator of epoch 1 has"):
        verify(folder)


# A hospital's own


@pytest.fixture
def site(tmp_path: Path) -> Looked:
    found = look_at(tmp_path)
    found.books.invited()
    for number in range(3):
        found.books.contribute(number)
    return found


def reported(site: Looked) -> tuple[Path, dict[str, Any], str]:
    """The folder, the facts and the text of its report."""
    page = Path(site.run("report")[-1])
    facts = json.loads((page.parent / JSON).read_text())
    return page.parent, facts, text_of(page.read_text())


def test_a_hospitals_report_has_its_ledger_its_approvals_and_what_left(site: Looked) -> None:
    folder, facts, text = reported(site)
    charges = Ledger(site.books.ledger_file, "xrays", None).charges()
    spent = epsilon_of([one.event for one in charges], 1e-3)
    assert facts["ledgers"][0]["epsilon"] == spent
    assert f"epsilon {spent:.3f} of 8 is spent" in text
    assert f"{8 - spent:.3f} is left" in text
    assert facts["curves"]["life"][0] == [0.0, 0.0]
    assert facts["curves"]["life"][-1] == [3, spent]
    assert [row["kind"] for row in facts["sent"]["kinds"]] == ["Upload"]
    assert facts["sent"]["messages"][0]["digest"] == HEX
    assert facts["approved"] == Approvals(site.home).lines()
    assert facts["planned"][0].startswith("planned: study chests, 1 of 4 rounds left")
    assert (folder / "ledgers/xrays.jsonl").read_bytes() == site.books.ledger_file.read_bytes()


def test_a_hospitals_report_is_verified_by_whoever_has_its_folder(
    site: Looked, tmp_path: Path
) -> None:
    folder, facts, _ = reported(site)
    elsewhere = shutil.copytree(folder, tmp_path / "mailed")
    done = CliRunner().invoke(report_app, ["verify", str(elsewhere)])
    assert done.exit_code == 0
    assert "3 charges, 1 signed statements" in done.stdout
    assert facts["signer"] in done.stdout


EXPORTED = ("ledgers/xrays.jsonl", "statements.json", "SHA256SUMS", "SHA256SUMS.sig")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *((name, 97) for name in (*EXPORTED, JSON, HTML)),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in EXPORTED),
    ],
)
def test_a_byte_of_a_hospitals_report_that_is_changed_is_noticed(
    name: str, step: int, site: Looked
) -> None:
    folder, _, _ = reported(site)
    content = (folder / name).read_bytes()
    for changed in flips(content, step):
        (folder / name).write_bytes(changed)
        with pytest.raises(FederationError):
            site_folder.verify(folder)
    (folder / name).write_bytes(content)
    assert site_folder.verify(folder).num_charges == 3


def test_a_hospital_that_understates_what_it_spent_is_found_out(site: Looked) -> None:
    folder, facts, _ = reported(site)
    facts["ledgers"][0]["epsilon"] *= 0.9
    (folder / JSON).write_text(json.dumps(facts))
    own = site.file.parent
    identity = Identity.load(own / "certificate.pem", own / "key.pem")
    names = [path for path in folder.rglob("*") if path.is_file() and "SUMS" not in path.name]
    seal(folder, names, identity)
    with pytest.raises(FederationError, match=r"epsilon in all is .* its ledger gives"):
        site_folder.verify(folder)


def test_a_folder_with_anything_else_in_it_is_left_alone(site: Looked, tmp_path: Path) -> None:
    before = site.books.ledger_file.read_bytes()
    for folder in (site.home, site.file.parent):
        with pytest.raises(ConfigError, match="is not empty and holds no privacy report"):
            site.run("report", "--out", str(folder))
    assert site.books.ledger_file.read_bytes() == before
    site.run("report")
    site.run("report")  # an older report is replaced


def test_a_report_is_not_written_from_a_ledger_that_was_cut(site: Looked) -> None:
    lines = site.books.ledger_file.read_bytes().splitlines(keepends=True)
    site.books.ledger_file.write_bytes(b"".join(lines[:1]))
    for command in ("report", "ledger"):
        with pytest.raises(DataError, match="the ledger does not hold the head"):
            site.run(command)


def test_a_promise_to_images_is_none_to_patients(site: Looked) -> None:
    ledger = Ledger(site.books.ledger_file, "xrays", None)
    ledger.debit("of images/" + "ef" * 32, 0, Event(2.0, 0.1, 5), num_rounds=1, unit="image")
    _, facts, text = reported(site)
    assert facts["ledgers"][0]["epsilon"] is None  # the budget is one for patients
    assert "no bound" in text


def test_seeded_noise_is_said_first_for_as_long_as_the_ledger_lives(site: Looked) -> None:
    ledger = Ledger(site.books.ledger_file, "xrays", None)
    ledger.debit("seeded/" + "ef" * 32, 0, Event(2.0, 0.1, 5), num_rounds=1, randomness="seeded")
    _, facts, _ = reported(site)
    assert facts["promise"][0].startswith("SEEDED RANDOMNESS")
    assert facts["assumptions"][0].endswith("none of this protects anybody.")


@pytest.mark.parametrize("name", [JSON, HTML])
def test_a_consortiums_report_that_was_edited_is_noticed(
    name: str, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    verify(folder)
    content = (folder / name).read_text()
    (folder / name).write_text(content.replace("7.9", "1.9"))
    with pytest.raises(FederationError, match=rf"{re.escape(name)} is not what"):
        verify(folder)


def test_a_ledger_that_was_put_into_a_report_is_noticed(site: Looked) -> None:
    folder, _, _ = reported(site)
    shutil.copy(folder / "ledgers/xrays.jsonl", folder / "ledgers/other.jsonl")
    with pytest.raises(FederationError, match=r"ledgers/other\.jsonl is not listed"):
        site_folder.verify(folder)


def test_a_data_set_without_bound_is_said_to_have_none(site: Looked) -> None:
    ledger = Ledger(site.books.ledger_file, "xrays", None)
    ledger.debit(charge_key(RUN[::-1], "ef" * 32), 0, WITHOUT_PRIVACY, num_rounds=1)
    folder, facts, text = reported(site)
    assert facts["ledgers"][0]["epsilon"] is None
    assert facts["promise"][0].startswith("This data set was used in a study without")
    assert "without differential privacy" in text
    assert site_folder.verify(folder).num_charges == 4


def test_a_hospital_that_was_never_charged_says_that(tmp_path: Path) -> None:
    site = look_at(tmp_path)
    site.books.audit.append("started", site="north")
    folder, facts, _ = reported(site)
    assert len(facts["promise"]) == 1
    assert facts["promise"][0].startswith("Nothing was ever charged to the data set xrays")
    assert site_folder.verify(folder).num_charges == 0


def test_no_word_of_the_report_is_kept_for_nothing() -> None:
    root = Path(__file__).parent.parent
    used = "".join(
        path.read_text()
        for folder in ("client", "common/privacy_report", "server/reporting")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".jinja")
    )
    for section, words in Texts("en")._table.items():
        for word in words if isinstance(words, dict) else ():
            # By its name, or as one of a section whose names come from the facts.
            assert f"{section}.{word}" in used or re.search(rf'"{section}\.("|{{)', used), word


def test_every_language_has_every_sentence() -> None:
    english = Texts("en")._table
    for language in LANGUAGES:
        other = Texts(language)._table
        assert {name: set(part) for name, part in other.items() if name != "language"} == {
            name: set(part) for name, part in english.items() if name != "language"
        }
