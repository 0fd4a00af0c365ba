"""What a site keeps from round to round: FedBN's layers, SCAFFOLD's variates; when they count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import answers_of, federate, open_sites, tiny_study
from torch import nn

from client.keeping import LOCAL, NAME, VARIATE, Keeping
from client.scaffold import Variates
from client.train import train
from common.errors import ConfigError, DataError
from common.messages import Purpose
from common.models.build import build_network
from common.models.flat import CONTROL, SUMMED, WEIGHT, Schema, is_parameter
from common.study import Study
from server.network import LoopbackNetwork
from server.run_dir import FINAL, RunDir
from server.scaffold import Last, blocks_after

ONE, TWO = ({LOCAL: np.full(3, value, np.float32)} for value in (1, 2))
SGD = {"learning_rate": 0.05, "batch_size": 8, "local_steps": 2}
FEDBN = {"training": {**SGD, "local_normalisation": True}}
SCAFFOLD = {"training": {**SGD, "control_variates": True}}
BOTH = {"training": {**SGD, "control_variates": True, "local_normalisation": True}}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


# The file


def test_before_the_first_round_nothing_is_kept(tmp_path: Path) -> None:
    assert Keeping(tmp_path, "run").recall(0) == {}


def test_a_trained_round_counts_when_its_sum_holds_it(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path, "run")
    keeping.remember(0, {}, ONE)
    assert same(keeping.recall(1), ONE)
    keeping.remember(1, ONE, TWO)
    assert same(keeping.recall(2), TWO)


def test_a_void_sum_a_lost_upload_and_an_absence_leave_a_site_where_it_was(
    tmp_path: Path,
) -> None:
    keeping = Keeping(tmp_path, "run")
    keeping.remember(4, ONE, TWO)
    assert same(keeping.recall(4), ONE)  # the sum was void, or only others were summed
    assert same(keeping.recall(2), ONE)  # and so before
    assert same(keeping.recall(5), TWO)  # summed, whenever the site is asked again


def test_another_run_of_the_study_begins_anew(tmp_path: Path) -> None:
    Keeping(tmp_path, "run").remember(0, {}, ONE)
    assert Keeping(tmp_path, "another").recall(1) == {}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"nothing that was written here")
    with pytest.raises(DataError, match=r"kept\.safetensors: damaged .* remove it"):
        Keeping(tmp_path, "run").recall(1)


def test_only_the_site_can_read_it(tmp_path: Path) -> None:
    Keeping(tmp_path, "run").remember(0, {}, ONE)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


# What travels


def test_with_fedbn_layers_that_normalise_do_not_travel() -> None:
    study = tiny_study(**FEDBN)
    network, plain = build_network(study), build_network(tiny_study())
    norms = {
        f"{place}.{name}"
        for place, layer in network.module.named_modules()
        if isinstance(layer, nn.GroupNorm)
        for name, _ in layer.named_parameters(recurse=False)
    }
    assert norms
    assert set(plain.schema.names) - set(network.schema.names) == norms
    assert set(network.kept()) == norms
    assert network.local().size == sum(array.size for array in network.kept().values())
    assert network.schema.num_own + network.local().size == plain.schema.num_params


def test_local_parameters_are_set_and_read_apart_from_the_others() -> None:
    network = build_network(tiny_study(**FEDBN))
    vector, local = network.vector(), network.local()
    network.load(vector + 1)
    assert np.array_equal(network.local(), local)
    network.load_local(local + 2)
    num_own = network.schema.num_own
    assert np.array_equal(network.vector()[:num_own], (vector + 1)[:num_own])
    assert np.array_equal(network.local(), local + 2)
    assert np.allclose(network.minus(vector)[:num_own], 1)
    spread = network.spread(np.ones(network.schema.num_own, np.float32))
    assert spread.sum() == network.schema.num_own


def test_a_network_that_normalises_nothing_is_refused(make_study: Callable[..., Study]) -> None:
    study = make_study(
        {
            "model": {"name": "logistic"},
            "table": {"columns": [{"name": "age", "kind": "number"}]},
            "input": {"size": []},
            "training.local_normalisation": True,
        }
    )
    with pytest.raises(ConfigError, match="trains no layer that normalises"):
        build_network(study)


# SCAFFOLD


def test_a_corrected_step_adds_the_correction_to_the_gradient(tmp_path: Path) -> None:
    study = tiny_study(**SCAFFOLD)
    site = open_sites(study, tmp_path)["site-1"]
    network, num_own = site.network, site.network.schema.num_own
    correction = np.linspace(-1, 1, num_own, dtype=np.float32)
    one_step = study.training.model_copy(update={"local_steps": 1})

    def trained(corrected: Any) -> Any:
        return train(
            network.vector(),
            site.data.train,
            one_step,
            network=network,
            task=site.task,
            rate=0.5,
            rng=torch.Generator().manual_seed(1),
            correction=corrected,
        ).values[:num_own]

    start = network.vector()
    plain = trained(None)
    network.load(start)
    assert np.allclose(trained(correction), plain - 0.5 * correction, atol=1e-6)


def test_a_variate_is_the_mean_gradient_of_the_last_round() -> None:
    rng = np.random.default_rng(1)
    own, common, gradients = (rng.normal(size=shape).astype(np.float32) for shape in (5, 5, (3, 5)))
    update = -0.1 * (gradients + (common - own)).sum(axis=0)  # three corrected steps
    change = Variates(own, common).change(update.astype(np.float32), 3, 0.1)
    assert np.allclose(own + change, gradients.mean(axis=0), atol=1e-5)


def test_the_common_variate_stays_the_weighted_mean_of_the_sites() -> None:
    study = tiny_study(4, **SCAFFOLD)
    schema = Schema(("w", CONTROL + "w", SUMMED, WEIGHT), ((2,), (2,), (4,), (1,)))
    rng, weights = np.random.default_rng(2), np.array([10.0, 1000.0, 10.0, 30.0])
    model, own = np.zeros(9, np.float32), np.zeros((4, 2))
    for number, took_part in enumerate([(0, 1, 2, 3), (0, 2), (1, 3), (0, 1, 2, 3), (2,)], start=1):
        rows = list(took_part)
        changes = rng.normal(size=(len(rows), 2))
        own[rows] += changes
        weight = weights[rows].sum()
        mean = np.average(changes, axis=0, weights=weights[rows])
        update = np.concatenate([[1, 1], mean, np.zeros(5)]).astype(np.float32)
        last = Last(number, {f"site-{row + 1}" for row in rows}, weight)
        model[2:] = blocks_after(model, update, schema, last, study)
        assert model[2:4] == pytest.approx(np.average(own, axis=0, weights=weights), rel=1e-4)
    assert model[4:].tolist() == [4, 4, 5, 4, 1050]


def test_the_common_variate_is_the_mean_of_the_sites(tmp_path: Path) -> None:
    study = tiny_study(4, **SCAFFOLD)
    sites = open_sites(study, tmp_path)
    federate(study, tmp_path, network=LoopbackNetwork(answers_of(sites)), sites_in=tmp_path)
    run_dir = RunDir(tmp_path)
    tensors = run_dir.tensors(3)
    common = np.concatenate([t.ravel() for n, t in tensors.items() if n.startswith(CONTROL)])
    assert tensors[SUMMED].tolist() == [3, 3, 3, 3]
    weights = np.array([site.weight for site in sites.values()])
    run = run_dir.manifests()[0].run
    kept = [Keeping(site.state_dir, run).recall(3) for site in sites.values()]
    schema = build_network(study).schema
    own = [
        np.concatenate([p.ravel() for _, p in sorted(_by_name(schema, each[VARIATE]).items())])
        for each in kept
    ]
    mean = np.average(own, axis=0, weights=weights)
    assert np.abs(mean).max() > 1e-3
    assert np.allclose(common, mean, atol=1e-4 * np.abs(mean).max())


def _by_name(schema: Schema, own: Any) -> dict[str, Any]:
    names = [name for name in schema.names if is_parameter(name)]
    shapes = schema.shapes[: len(names)]
    return Schema(tuple(names), shapes).split(own)


# Whole runs


@pytest.mark.parametrize("given", [FEDBN, SCAFFOLD, BOTH], ids=["FedBN", "SCAFFOLD", "both"])
def test_the_returned_file_holds_the_whole_network_and_nothing_else(
    given: dict[str, Any], tmp_path: Path
) -> None:
    study = tiny_study(**given)
    federate(study, tmp_path)
    final = RunDir(tmp_path).final_model()
    assert set(final) == {name for name, _ in build_network(study).module.named_parameters()}
    assert (tmp_path / FINAL).exists()


@pytest.mark.parametrize("given", [FEDBN, SCAFFOLD], ids=["FedBN", "SCAFFOLD"])
def test_a_site_that_is_opened_anew_for_every_message_gives_the_same_model(
    given: dict[str, Any], tmp_path: Path
) -> None:
    study = tiny_study(**given)
    once = federate(study, tmp_path / "once")
    anew = tmp_path / "anew"

    def reopened(name: str) -> Callable[[Any], Any]:
        return lambda message: answers_of(open_sites(study, anew))[name](message)  # noqa: PLW0108 - opened when it comes

    network = LoopbackNetwork({name: reopened(name) for name in study.site_names})
    open_sites(study, anew)
    again = federate(study, anew, network=network, sites_in=anew)
    assert again["final_model_sha256"] == once["final_model_sha256"]
    assert again["metrics"] == once["metrics"]


def test_sites_of_fedbn_keep_layers_of_their_own(tmp_path: Path) -> None:
    study = tiny_study(4, **FEDBN)
    sites = open_sites(study, tmp_path)
    federate(study, tmp_path, network=LoopbackNetwork(answers_of(sites)), sites_in=tmp_path)
    locals_ = [site.network.local() for site in sites.values()]
    first = build_network(study).local()
    assert all(not np.array_equal(each, first) for each in locals_)
    assert not np.array_equal(locals_[0], locals_[1])


class Losing(LoopbackNetwork):
    """One site's second training is lost: on the way back, or the task never arrives."""

    def __init__(self, sites: Any, *, arrives: bool) -> None:
        super().__init__(answers_of(sites))
        self._answer, self._arrives = answers_of(sites), arrives

    def ask(self, messages: Any, *arguments: Any, **more: Any) -> Any:
        lost = {
            name
            for name, message in messages.items()
            if name == "site-2" and getattr(message, "round_number", 0) == 2
            and getattr(message, "purpose", None) == Purpose.TRAIN
        }  # fmt: skip
        if self._arrives:
            for name in lost:
                self._answer[name](messages[name])
        others = {name: message for name, message in messages.items() if name not in lost}
        yield from super().ask(others, *arguments, **more)


@pytest.mark.parametrize("given", [FEDBN, SCAFFOLD], ids=["FedBN", "SCAFFOLD"])
def test_a_lost_upload_and_one_that_was_never_made_give_the_same_model(
    given: dict[str, Any], tmp_path: Path
) -> None:
    study, digests = tiny_study(4, num_rounds=3, **given), []
    for arrives in (False, True):
        folder = tmp_path / str(arrives)
        sites = open_sites(study, folder)
        network = Losing(sites, arrives=arrives)
        summary = federate(study, folder, network=network, sites_in=folder)
        assert [len(line) for line in summary["survivors"]] == [4, 3, 4]
        digests.append(summary["final_model_sha256"])
    assert digests[0] == digests[1]
