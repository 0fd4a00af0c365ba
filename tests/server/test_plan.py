"""What a study costs, before anything runs: ``fl-server plan``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli_w
from federation import tiny_study
from typer.testing import CliRunner, Result

from common.errors import ConfigError
from common.plan import plan_privacy
from common.study import Study
from server.cli import app

PRIVACY = {"epsilon": 4.0, "delta": 1e-5, "example_clip_norm": 0.5}


def planned(study: Study, folder: Path, *arguments: str) -> Result:
    file = folder / "study.toml"
    file.write_text(tomli_w.dumps(study.as_table()))
    return CliRunner().invoke(app, ["plan", "--study", str(file), *arguments])


def test_epsilon_after_every_round_has_a_column_for_each_size(tmp_path: Path) -> None:
    study = tiny_study(num_rounds=5, privacy=PRIVACY)
    result = planned(study, tmp_path, "--declared", "50", "--declared", "103")
    assert result.exit_code == 0
    plans = [plan_privacy(study, declared) for declared in (50, 103)]
    rows = re.findall(r"^ +([1-5]) +([0-9.]+) +([0-9.]+) *$", result.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5]
    for number, *shown in rows:
        spent = [f"{plan.epsilon_after(int(number)):.3f}" for plan in plans if plan]
        assert list(shown) == spent
    assert "100 patients" in result.stdout  # the public number, not the declared one


def test_a_budget_is_solved_for_rounds_and_for_noise(tmp_path: Path) -> None:
    study = tiny_study(num_rounds=5, privacy=PRIVACY)
    result = planned(study, tmp_path, "--declared", "100", "--budget", "3")
    found = re.search(r"epsilon 3 pays for (\d+) rounds", result.stdout)
    assert found
    plan = plan_privacy(study, 100)
    assert plan is not None
    assert plan.epsilon_after(int(found[1])) <= 3 < plan.epsilon_after(int(found[1]) + 1)
    noise = re.search(r"for all 5 rounds with noise multiplier ([0-9.]+)", result.stdout)
    assert noise
    terms = {"noise_multiplier": float(noise[1]), "delta": 1e-5, "example_clip_norm": 0.5}
    solved = plan_privacy(tiny_study(num_rounds=5, privacy=terms), 100)
    assert solved is not None
    assert 2.99 < solved.epsilon_after(5) <= 3.001


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "--study"), (["plan"], "--study"), (["plan", "--budget", "99"], "")],
)
def test_a_missing_study_or_a_budget_beyond_reason_is_a_usage_error(
    arguments: list[str], says: str
) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_a_study_without_privacy_has_nothing_to_plan(tmp_path: Path) -> None:
    result = planned(tiny_study(), tmp_path)
    assert isinstance(result.exception, ConfigError)
    assert "set epsilon or noise_multiplier" in str(result.exception)
