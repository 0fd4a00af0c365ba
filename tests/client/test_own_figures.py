"""A site's own figures: kept where it scored, shown by its report, sent to nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from federation import answers_of, federate, open_sites, tiny_study

from client.evaluate import evaluate
from client.own_figures import NAME, PAGE, own_lines, write_own_figures
from common.errors import DataError
from server.network import LoopbackNetwork
from server.run_dir import RunDir


def test_after_a_run_each_site_has_the_figures_of_its_own_images(tmp_path: Path) -> None:
    study = tiny_study(4)
    sites = open_sites(study, tmp_path)
    federate(study, tmp_path, network=LoopbackNetwork(answers_of(sites)), sites_in=tmp_path)
    run_dir = RunDir(tmp_path)
    last = run_dir.model(3, sites["site-1"].network.schema)
    num = 0
    for site in sites.values():
        known = json.loads((site.state_dir / NAME).read_text())
        assert (known["study"], known["run"]) == ("tiny", run_dir.manifests()[0].run)
        assert known["test"]["round"] == known["validation"]["round"] == 3
        counts = evaluate(last, site.data.test, network=site.network, task=site.task)
        assert known["test"]["figures"] == json.loads(json.dumps(site.task.figures(counts)))
        num += known["test"]["figures"]["num_examples"]
    summary = run_dir.summary()
    assert summary is not None
    assert summary["metrics"]["final"]["num_examples"] == num


def test_the_page_says_them_with_intervals_and_warns_of_few(tmp_path: Path) -> None:
    study = tiny_study(3)
    sites = open_sites(study, tmp_path)
    federate(study, tmp_path, network=LoopbackNetwork(answers_of(sites)), sites_in=tmp_path)
    home = sites["site-2"].state_dir
    path = write_own_figures(home)
    assert path == home / PAGE
    text = path.read_text()
    assert "## Study tiny, run " in text
    assert "Model of round 3 on " in text
    assert " (95 %: 0." in text
    assert "Fewer than 30 images" in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_where_nothing_was_scored_there_is_no_page(tmp_path: Path) -> None:
    assert write_own_figures(tmp_path) is None
    assert list(own_lines(tmp_path)) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{")
    with pytest.raises(DataError, match=r"own-figures\.json: damaged .* the next round writes it"):
        write_own_figures(tmp_path)
