"""Signed privacy statements of a run, checked again from its files alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation import federate, tiny_study
from sealed import seal_again

from common.accounting import Event, epsilon_of
from common.errors import FederationError
from common.identity import Identity
from common.statement import Statement
from server.report import verify
from server.run_dir import RunDir

PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "example_clip_norm": 0.5, "randomness": "seeded"}
FILE = "privacy/site-2.json"

Change = Callable[[list[dict[str, Any]], Identity], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    federate(tiny_study(num_rounds=2, privacy=PRIVACY), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change(folder: Path, how: Change) -> None:
    statements = json.loads((folder / FILE).read_text())
    key = folder / "sites" / "site-2"
    how(statements, Identity.load(key / "certificate.pem", key / "key.pem"))
    (folder / FILE).write_text(json.dumps(statements))
    seal_again(folder)


def signed_again(number: int, **changes: Any) -> Change:
    """A lie of the site itself, well signed."""

    def how(statements: list[dict[str, Any]], identity: Identity) -> None:
        told = Statement(**{**statements[number], **changes})
        statements[number] = told.signed(identity).model_dump()

    return how


def understated(**changes: Any) -> Change:
    """Every statement tells less than was spent, with an epsilon that follows and a signature."""

    def how(statements: list[dict[str, Any]], identity: Identity) -> None:
        for number, table in enumerate(statements):
            told = Statement(**{**table, **changes})
            event = Event(told.noise_multiplier, told.sampling_probability, told.steps)
            told = told.model_copy(update={"epsilon": epsilon_of([event], told.delta)})
            statements[number] = told.signed(identity).model_dump()

    return how


def written_over(number: int, **changes: Any) -> Change:
    """A lie of whoever holds the folder."""
    return lambda statements, _: statements[number].update(changes)


def test_every_sum_has_a_statement_of_every_site(finished: Path) -> None:
    found = verify(finished)
    assert found.num_statements == 4 * (2 + 2)  # two rounds and two evaluations
    assert found.num_lines == len((finished / "audit.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (written_over(1, epsilon=0.1), "sum 1: the signature of site-2"),
        (written_over(0, steps=0), "sum 0: the signature of site-2"),
        (written_over(2, audit="0" * 64), "sum 2: the signature of site-2"),
        (signed_again(1, epsilon=0.1), "sum 1: epsilon is 0.1, its own numbers give"),
        (signed_again(1, site="site-1"), "it is about another site, run or study"),
        (signed_again(1, run="f" * 32), "it is about another site, run or study"),
        (signed_again(0, study="f" * 64), "it is about another site, run or study"),
        (understated(delta=0.01), "delta is 0.01, the study says 1e-05"),
        (understated(unit="image"), "unit is image, the study says patient"),
        (understated(randomness="os"), "randomness is os, the study says seeded"),
        (understated(noise_multiplier=1000.0), "noise_multiplier is 1000, the plan's"),
        (understated(steps=2), "2 steps, where 2 sums of 2 steps were unmasked"),
        (lambda statements, _: statements.pop(1), r"no statement about sum 1"),
        (lambda statements, _: statements.pop(), r"no statement about sum 3"),
        (lambda statements, _: statements.reverse(), "it does not follow from the statement"),
    ],
)
def test_a_changed_statement_is_named(how: Change, said: str, run: Path) -> None:
    change(run, how)
    with pytest.raises(FederationError, match=said) as refused:
        verify(run)
    assert "site-" in str(refused.value) or "privacy/" in str(refused.value)
    assert refused.value.exit_code == 1


def test_a_line_taken_out_of_the_audit_log_is_found(run: Path) -> None:
    lines = (run / "audit.jsonl").read_text().splitlines(keepends=True)
    (run / "audit.jsonl").write_text("".join(lines[:3] + lines[4:]))
    seal_again(run)
    with pytest.raises(FederationError, match=r"audit\.jsonl.*line 4") as refused:
        verify(run)
    assert refused.value.exit_code == 1


def test_a_sites_statement_is_filed_without_reading_those_of_the_others(run: Path) -> None:
    run_dir = RunDir(run)
    last = run_dir.all_statements()["site-2"][-1]
    (run / "privacy" / "site-1.json").write_text("not read")
    run_dir.save_statements([last.model_copy(update={"sum_number": last.sum_number + 1})])
    filed = json.loads((run / FILE).read_text())
    assert [one["sum_number"] for one in filed] == [0, 1, 2, 3, 4]
