"""A model of a hospital's own: trained further there, kept only where it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import PHANTOMS, answers_of, federate, open_sites, tiny_study
from safetensors.numpy import load_file
from typer.testing import CliRunner

from client import cli
from client.config import SiteConfig
from client.finetune import OWN, Tuned, finetune
from client.hospital import STUDIES
from client.returned import RETURNED
from common.config import validate
from common.errors import DataError
from common.models.build import build_network
from common.study import Study
from server.network import LoopbackNetwork
from server.run_dir import RunDir

FEDBN = {
    "training": {
        "learning_rate": 0.1,
        "batch_size": 8,
        "local_steps": 4,
        "local_normalisation": True,
    }
}


def hospital(folder: Path, index: int = 0) -> SiteConfig:
    data = {**PHANTOMS, "num_patients": 60, "site_index": index, "declared_patients": 40}
    table = {"name": "site-1", "state_dir": str(folder), "data": data}
    return validate(table, SiteConfig, source=folder / "site.toml")


def ran(folder: Path, **changes: Any) -> Study:
    study = tiny_study(3, **changes)
    sites = open_sites(study, folder)
    federate(study, folder, network=LoopbackNetwork(answers_of(sites)), sites_in=folder)
    return study


def test_after_a_run_each_site_has_the_returned_model(tmp_path: Path) -> None:
    ran(tmp_path)
    final = RunDir(tmp_path).final_model()
    for name in ("site-1", "site-2", "site-3"):
        kept = load_file(tmp_path / "sites" / name / RETURNED)
        assert kept.keys() == final.keys()
        assert all(np.array_equal(kept[key], final[key]) for key in final)


def test_with_fedbn_a_sites_own_layers_are_in_it(tmp_path: Path) -> None:
    study = ran(tmp_path, **FEDBN)
    final = RunDir(tmp_path).final_model()
    local = build_network(study).kept()
    kept = load_file(tmp_path / "sites" / "site-1" / RETURNED)
    for key, tensor in final.items():
        assert np.array_equal(kept[key], tensor) == (key not in local)


def test_the_epoch_with_the_least_validation_loss_is_kept(tmp_path: Path) -> None:
    study = ran(tmp_path, training={"learning_rate": 0.01, "batch_size": 16, "local_epochs": 1})
    folder = tmp_path / "sites" / "site-1"
    steps = list(finetune(hospital(tmp_path), study, folder, epochs=4, rate=0.05))
    *epochs, end = steps
    assert isinstance(end, Tuned)
    losses = [figures["loss"] for _, figures in epochs]  # type: ignore[misc]
    assert [number for number, _ in epochs] == [0, 1, 2, 3, 4]  # type: ignore[misc]
    assert end.epochs == int(np.argmin(losses)) > 0
    assert end.after != end.before
    own, returned = (load_file(folder / name) for name in (OWN, RETURNED))
    assert any(not np.array_equal(own[key], returned[key]) for key in own)
    assert (folder / OWN).stat().st_mode & 0o777 == 0o600


def test_where_no_epoch_helps_the_common_model_is_kept(tmp_path: Path) -> None:
    study = ran(tmp_path)
    folder = tmp_path / "sites" / "site-1"
    *_, end = finetune(hospital(tmp_path), study, folder, epochs=2, rate=1e-9)
    assert isinstance(end, Tuned)
    assert (end.epochs, end.after) == (0, end.before)
    own, returned = (load_file(folder / name) for name in (OWN, RETURNED))
    assert all(np.array_equal(own[key], returned[key]) for key in own)


def test_without_a_returned_model_it_says_what_to_do(tmp_path: Path) -> None:
    study = tiny_study(3)
    with pytest.raises(DataError, match="no run of this study has returned a model here"):
        next(finetune(hospital(tmp_path), study, tmp_path, epochs=1, rate=0.1))
    (tmp_path / RETURNED).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"returned\.safetensors: damaged"):
        next(finetune(hospital(tmp_path), study, tmp_path, epochs=1, rate=0.1))


def test_the_command_tells_both_figures_and_that_it_must_stay(tmp_path: Path) -> None:
    import tomli_w

    study = ran(tmp_path / "run")
    folder = tmp_path / "state" / STUDIES / study.digest()
    folder.mkdir(parents=True)
    (folder / RETURNED).write_bytes((tmp_path / "run/sites/site-1" / RETURNED).read_bytes())
    config = hospital(tmp_path / "state")
    (tmp_path / "site.toml").write_text(
        tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
    )
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(study.as_table()))
    arguments = [
        "--site-config",
        str(tmp_path / "site.toml"),
        "finetune",
        str(tmp_path / "tiny.toml"),
    ]
    ended = CliRunner().invoke(cli.app, [*arguments, "--epochs", "2"])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.count("epoch ") >= 3
    assert "common model, own test images: loss " in ended.stdout
    assert "trained without differential privacy; keep it in the hospital" in ended.stdout
