"""Whole runs over a loopback network: stories with their endings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from federation import Watcher, answers_of, federate, open_sites, tiny_study

from client.evaluate import evaluate
from client.train import train
from common.errors import ConfigError, RoundAborted
from common.messages import Message, Reason, Refusal, RoundTask
from common.models.build import build_network
from common.tasks import task_of
from server.network import LoopbackNetwork, never
from server.run_dir import RunDir


def test_a_run_leaves_the_files_that_people_rely_on(tmp_path: Path) -> None:
    summary = federate(tiny_study(), tmp_path / "run")
    names = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*")}
    assert {
        "study.toml",
        "simulation.toml",
        "epoch-1.json",
        "rounds.jsonl",
        "models/round-0001.safetensors",
        "models/round-0003.safetensors",
        "final.safetensors",
        "summary.json",
        "SHA256SUMS",
    } <= names
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert summary["num_rounds"] == 3
    assert summary["survivors"] == [["site-1", "site-2", "site-3", "site-4"]] * 3
    assert len(summary["metrics"]["by_round"]) == 3
    assert summary["metrics"]["final"]["num_examples"] > 0
    assert summary["privacy"] == {}


def test_the_federation_equals_plain_averaging_within_the_rounding_bound(tmp_path: Path) -> None:
    study = tiny_study(num_rounds=1)
    federate(study, tmp_path / "run")
    network = build_network(study)
    start, task = network.vector(), task_of(study)
    sites = open_sites(study, tmp_path / "plain")
    updates = [
        train(
            start,
            site.data.train,
            study.training,
            network=site.network,
            task=task,
            rate=study.training.learning_rate,
            rng=site.rng(0),
        ).values
        for site in sites.values()
    ]
    weights = [site.weight for site in sites.values()]
    plain = start + np.average(updates, axis=0, weights=weights)
    exact = RunDir(tmp_path / "run").model(1, network.schema)
    (manifest,) = RunDir(tmp_path / "run").manifests()
    half_step = 2.0 ** max(manifest.exponents) / 2
    largest_error = study.aggregation.weight_cap / min(weights) * half_step + 1e-7
    assert np.abs(exact - plain).max() <= largest_error
    assert np.abs(exact - start).max() > 100 * largest_error


def test_validation_figures_are_those_of_the_model_after_each_round(tmp_path: Path) -> None:
    study = tiny_study(num_rounds=2)
    summary = federate(study, tmp_path / "run")
    network, task = build_network(study), task_of(study)
    model = RunDir(tmp_path / "run").model(2, network.schema)
    sites = open_sites(study, tmp_path / "other").values()
    splits = {"by_round": "validation", "final": "test"}
    for split in splits.values():
        counts = sum(
            evaluate(model, getattr(site.data, split), network=network, task=task) for site in sites
        )
        known = summary["metrics"]["by_round"][1]
        if split == "test":
            known = summary["metrics"]["final"]
        assert task.figures(np.asarray(counts)) == known


def test_the_order_of_arrival_does_not_change_a_bit(tmp_path: Path) -> None:
    study = tiny_study()
    forwards = federate(study, tmp_path / "a")
    sites = open_sites(study, tmp_path / "sites")

    class Backwards(LoopbackNetwork):
        def ask(self, messages, deadline_s, enough=never):
            return super().ask(dict(reversed(messages.items())), deadline_s, enough)

    watcher = Watcher()
    backwards = federate(
        study,
        tmp_path / "b",
        network=Backwards(answers_of(sites)),
        watcher=watcher,
        sites_in=tmp_path / "sites",
    )
    assert watcher.uploads[0] == "site-4"
    assert backwards["final_model_sha256"] == forwards["final_model_sha256"]


def test_a_silent_site_is_a_dropout_and_the_round_goes_on(tmp_path: Path) -> None:
    study = tiny_study()
    answers = answers_of(open_sites(study, tmp_path / "sites"))
    mute = _refuses_sums(answers["site-2"], {1})
    network = LoopbackNetwork({**answers, "site-2": mute})
    summary = federate(study, tmp_path / "run", network=network, sites_in=tmp_path / "sites")
    assert summary["survivors"] == [
        ["site-1", "site-2", "site-3", "site-4"],
        ["site-1", "site-3", "site-4"],
        ["site-1", "site-2", "site-3", "site-4"],
    ]


def test_too_few_survivors_teach_nothing_and_the_next_sum_is_a_new_training(
    tmp_path: Path,
) -> None:
    study = tiny_study()
    answers = answers_of(open_sites(study, tmp_path / "sites"))
    for name in ("site-1", "site-2"):
        answers[name] = _refuses_sums(answers[name], {1})
    watcher = Watcher()
    network = LoopbackNetwork(answers)
    summary = federate(
        study, tmp_path / "run", network=network, watcher=watcher, sites_in=tmp_path / "sites"
    )
    assert [void.task.sum_number for void in watcher.voids] == [1]
    assert [line["sum"] for line in watcher.lines] == [0, 2, 3]
    assert summary["num_rounds"] == 3


def test_when_no_spare_sum_is_left_the_run_ends_with_a_clear_error(tmp_path: Path) -> None:
    study = tiny_study()
    answers = answers_of(open_sites(study, tmp_path / "sites"))
    refusing = {name: _refuses_sums(answer, set(range(100))) for name, answer in answers.items()}
    with pytest.raises(RoundAborted, match="0 sites answered, 3 are needed"):
        federate(
            study,
            tmp_path / "run",
            network=LoopbackNetwork(refusing),
            sites_in=tmp_path / "sites",
        )


def test_early_stopping_returns_the_best_round_by_validation(tmp_path: Path) -> None:
    stopping = {"figure": "loss", "patience": 2}
    training = {"learning_rate": 3.0, "batch_size": 8, "local_steps": 8}
    study = tiny_study(num_rounds=12, training={**training, "early_stopping": stopping})
    summary = federate(study, tmp_path / "run")
    losses = [figures["loss"] for figures in summary["metrics"]["by_round"]]
    assert summary["num_rounds"] < 12
    assert summary["returned_round"] == 1 + int(np.argmin(losses))
    schema = build_network(study).schema
    best = RunDir(tmp_path / "run").model(summary["returned_round"], schema)
    final = RunDir(tmp_path / "run").final_model()
    assert np.array_equal(np.concatenate([final[n].ravel() for n in schema.names]), best)


def test_a_run_folder_in_use_is_never_overwritten(tmp_path: Path) -> None:
    study = tiny_study(num_rounds=1)
    federate(study, tmp_path / "run")
    with pytest.raises(ConfigError, match="--resume"):
        federate(study, tmp_path / "run")
    with pytest.raises(ConfigError, match="another study"):
        federate(tiny_study(num_rounds=1, seed=2), tmp_path / "run", resume=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    study = tiny_study(num_rounds=1)
    summary = federate(study, tmp_path / "run")
    before = (tmp_path / "run/SHA256SUMS").read_bytes()
    assert federate(study, tmp_path / "run", resume=True) == summary
    assert (tmp_path / "run/SHA256SUMS").read_bytes() == before


def _refuses_sums(answer, sums: set[int]):  # type: ignore[no-untyped-def]
    def reply(message: Message) -> Message:
        if isinstance(message, RoundTask) and message.sum_number in sums:
            return Refusal(message.run, Reason.BUSY)
        return answer(message)  # type: ignore[no-any-return]

    return reply
