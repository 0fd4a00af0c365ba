"""Was it worth it? The table of three ways to train, and of one without, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from federation import federate, tiny_study
from finished import Run

from common.errors import FederationError
from common.simulation import WORTH
from server.report import verify, write_report

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    federate(tiny_study(3), path)
    return Run(path)


@pytest.fixture
def run(finished, tmp_path) -> Run:
    return finished.copied_to(tmp_path / "run")


def compare(run: Run, **values: tuple[float | None, float | None, float | None]) -> None:
    def figures(value: float | None) -> dict[str, Any]:
        return {"auroc": value, "num_examples": 40, "intervals": {"auroc": [0.1, 0.9]}}

    found = {
        site.replace("_", "-"): dict(
            zip(("blind", "alone", "federated", "pooled"), map(figures, (0.5, *three)), strict=True)
        )
        for site, three in values.items()
    }
    (run.path / WORTH).write_text(json.dumps(found))


def test_without_a_comparison_the_page_says_nothing_of_it(finished):
    assert "Was it worth it?" not in finished.text
    assert finished.facts["worth"] is None


def test_the_page_counts_the_sites_that_gained_and_shows_the_means(run):
    compare(run, site_1=(0.7, 0.8, 0.9), site_2=(0.9, 0.8, 0.85), site_3=(0.5, 0.9, 0.95))
    assert "At 2 of 3 sites the common model does better" in run.text
    assert "Mean AUROC: 0.7000 alone, 0.8333 together, 0.9000 if all images" in run.text
    assert "0.5000 by saying the same of every image without a look" in run.text
    assert "0.1000 to 0.9000" in run.text
    verify(run.path)


def test_a_site_without_a_figure_is_left_out_of_the_means(run):
    compare(run, site_1=(0.7, 0.8, 0.9), site_2=(None, 0.8, 0.85), site_3=(0.5, 0.9, 0.95))
    assert "At 2 of 2 sites" in run.text
    assert run.facts["worth"]["means"]["blind"] == 0.5
    compare(run, **{f"site_{k}": (None, None, None) for k in (1, 2, 3)})
    assert "Nothing can be said" in run.text


def test_a_site_where_only_the_blind_answer_has_no_figure_is_compared(run):
    compare(run, site_1=(0.7, 0.8, 0.9), site_2=(0.7, 0.8, 0.9), site_3=(0.7, 0.8, 0.9))
    found = json.loads((run.path / WORTH).read_text())
    for number, site in enumerate(found, start=1):
        found[site]["blind"]["auroc"] = None
        (run.path / WORTH).write_text(json.dumps(found))
        assert "At 3 of 3 sites" in run.text
        assert ("without a look." in run.text) == (number < 3)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"site-1": {"alone": 3}}'])
def test_a_file_of_something_else_is_named(text, run):
    (run.path / WORTH).write_text(text)
    with pytest.raises(FederationError, match=r"worth\.json is not of this run and version"):
        write_report(run.path)


@pytest.mark.slow
def test_the_script_trains_what_a_run_is_compared_with(tmp_path):
    arguments = ["--study", ROOT / "studies/records.toml", "--sites", "3"]
    arguments += ["--set", "num_rounds=3", "--run-dir", tmp_path / "run"]
    for command in (["simulate", *arguments], ["worth", tmp_path / "run"]):
        words = [ROOT / "scripts" / command[0], *command[1:]]
        ended = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    worth = Run(tmp_path / "run").facts["worth"]
    assert [row["site"] for row in worth["sites"]] == ["site-1", "site-2", "site-3"]
    for row in worth["sites"]:
        for way in ("alone", "federated", "pooled"):
            low, high = row[way]["interval"]
            assert low < row[way]["value"] < high
    assert worth["means"]["blind"] == 0.5
    assert worth["means"]["federated"] > 0.7
