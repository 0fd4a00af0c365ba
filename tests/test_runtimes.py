"""The three runtimes, started as a person starts them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import tomli_w
from deployment import found, running

from client.config import simulated_table
from client.splits import count_training_units
from common.config import load, read_table, replace_value
from common.study import Study
from server.report import verify

ROOT = Path(__file__).parent.parent


def _run(script: str, folder: Path, *arguments: str) -> dict[str, object]:
    command = [ROOT / "scripts" / script, "--run-dir", folder, *arguments]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.mark.slow
@pytest.mark.timeout(900)  # every process of Flower's loads torch anew
def test_flower_and_one_process_give_the_same_model_on_real_images(
    tmp_path: Path, real_data: Path
) -> None:
    arguments = ["--study", str(ROOT / "studies/pneumonia.toml"), "--sites", "4", "--seed", "3"]
    arguments += ["--data", str(real_data / "pneumonia"), "--partition", "dirichlet:0.5"]
    arguments += ["--set", "num_rounds=3"]
    local = _run("simulate", tmp_path / "local", *arguments)
    flower = _run("flwr-run", tmp_path / "flower", *arguments)
    assert flower["final_model_sha256"] == local["final_model_sha256"]
    assert flower["study"] == local["study"]
    assert flower["metrics"] == local["metrics"]
    # The signature under each of five uploads is 68 to 72 bytes long, as chance has it.
    assert flower["bytes_up_per_site"] == pytest.approx(local["bytes_up_per_site"], abs=25)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_seeded_private_study_is_the_same_under_flower_in_one_process_deployed_and_resumed(
    tmp_path: Path,
) -> None:
    study = ROOT / "studies/demo-seeded.toml"
    arguments = ["--study", str(study), "--sites", "3"]
    local = _run("simulate", tmp_path / "local", *arguments)
    flower = _run("flwr-run", tmp_path / "flower", *arguments)
    killed = tmp_path / "killed"
    _kill_after_a_round(killed, *arguments)
    resumed = _run("simulate", killed, *arguments, "--resume")
    assert set(local["privacy"]) == {"site-1", "site-2", "site-3"}
    for other in (flower, resumed, _deploy(study, tmp_path / "deployed")):
        assert other["final_model_sha256"] == local["final_model_sha256"]
        assert other["privacy"] == local["privacy"]
    other_noise = _run("simulate", tmp_path / "other", *arguments, "--seed", "2")
    assert other_noise["final_model_sha256"] != local["final_model_sha256"]


ALGORITHMS: dict[str, dict[str, object]] = {
    "FedBN, SCAFFOLD and frozen layers": {
        "model.frozen": ["features.0"],
        "training.local_normalisation": True,
        "training.control_variates": True,
        "training.optimizer": "sgd",
        "training.weight_decay": 0.0,
        "training.learning_rate": 0.05,
    },
    "early stopping": {
        "num_rounds": 6,
        "training.early_stopping": {"figure": "loss", "patience": 1},
        "training.learning_rate": 0.1,  # too high: the loss rises soon
        "statistics": {"intensity": [0, 255]},
    },
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("title", ALGORITHMS)
def test_what_sites_keep_and_when_a_run_ends_is_the_same_in_all_runtimes(
    title: str, tmp_path: Path
) -> None:
    table = read_table(ROOT / "studies/phantoms.toml")
    table["num_rounds"], table["training"]["local_epochs"] = 3, 1
    for key, value in ALGORITHMS[title].items():
        replace_value(table, key, value)
    study = tmp_path / "kept.toml"
    study.write_text(tomli_w.dumps(table))
    data = {"name": "phantoms", "format": "phantom", "num_patients": 24}
    study.with_suffix(".site.toml").write_text(tomli_w.dumps({"data": data}))
    arguments = ["--study", str(study), "--sites", "3"]
    local = _run("simulate", tmp_path / "local", *arguments)
    flower = _run("flwr-run", tmp_path / "flower", *arguments)
    for other in (flower, _deploy(study, tmp_path / "deployed", num_statements=0)):
        assert other["final_model_sha256"] == local["final_model_sha256"]
        assert other["metrics"] == local["metrics"]
    if title == "early stopping":
        assert local["num_rounds"] < 6  # type: ignore[operator]
        counted = [
            tmp_path / run / "statistics.json" for run in ("local", "flower", "deployed/run")
        ]
        assert len({path.read_bytes() for path in counted}) == 1


def _deploy(study: Path, folder: Path, num_statements: int = 3 * (4 + 2)) -> dict[str, object]:
    """The same over TLS: a coordinator and three hospitals, each a process of its own."""
    folder.mkdir()
    data = read_table(study.with_suffix(".site.toml"))["data"]
    dealt = simulated_table(study, data, {}).data
    data["declared_patients"] = count_training_units(dealt, load(study, Study), None)
    consortium = found(folder, study, ["site-1", "site-2", "site-3"], data=data)
    with running(consortium):
        for name in consortium.names:
            consortium.start_site(name)
        consortium.start_coordinator()
        assert consortium.wait("coordinator") == 0, consortium.log("coordinator")
    summary: dict[str, object] = json.loads((consortium.run_dir / "summary.json").read_text())
    assert verify(consortium.run_dir).num_statements == num_statements
    return summary


def _kill_after_a_round(folder: Path, *arguments: str) -> None:
    command = [ROOT / "scripts/simulate", "--run-dir", folder, *arguments]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    try:
        while not (folder / "models/round-0002.safetensors").exists():
            assert running.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        running.kill()
        running.wait()
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_a_failed_flower_run_exits_with_an_error(tmp_path: Path) -> None:
    arguments = ["--study", str(ROOT / "studies/pneumonia.toml"), "--sites", "4"]
    command = [ROOT / "scripts/flwr-run", *arguments, "--data", str(tmp_path / "nowhere")]
    command += ["--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stdout + ended.stderr
