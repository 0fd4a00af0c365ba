"""What a run returns when parts of the model stay at home, or an average is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from federation import federate, tiny_study
from safetensors.numpy import load_file

from common.errors import FederationError
from common.models.build import build_network
from server.report import verify, write_report

FROZEN = {"name": "cnn", "width": 4, "frozen": ["features.0", "features.1"]}


def test_a_frozen_layer_never_travels_and_stands_in_the_returned_model(tmp_path: Path) -> None:
    study = tiny_study(model=FROZEN)
    summary = federate(study, tmp_path)
    network = build_network(study)
    whole = build_network(tiny_study())
    final = load_file(tmp_path / "final.safetensors")
    assert set(final) == set(whole.schema.names)
    for name, tensor in network.kept().items():
        assert np.array_equal(final[name], tensor)
    assert summary["num_params"] == network.schema.num_params < whole.schema.num_params
    sent = load_file(tmp_path / "models/round-0003.safetensors")
    assert set(sent) == set(network.schema.names)
    for name in network.schema.names:
        assert not np.array_equal(
            final[name], load_file(tmp_path / "models/round-0000.safetensors")[name]
        )
    verify(tmp_path)
    assert "frozen" in write_report(tmp_path).read_text().lower()


def test_the_average_of_models_is_returned_and_verified(tmp_path: Path) -> None:
    study = tiny_study(server_optimizer={"name": "fedavg", "ema": 0.6})
    federate(study, tmp_path / "average")
    plain = federate(tiny_study(), tmp_path / "plain")
    models = [load_file(tmp_path / f"average/models/round-{k:04d}.safetensors") for k in (1, 2, 3)]
    final = load_file(tmp_path / "average/final.safetensors")
    weights = np.array([0.36, 0.6, 1.0]) / 1.96
    for name, tensor in final.items():
        expected = sum(w * model[name] for w, model in zip(weights, models, strict=True))
        assert np.allclose(tensor, expected, atol=1e-6)
        # Averaging is a look back: the rounds themselves are those of the study without it.
        last = load_file(tmp_path / "plain/models/round-0003.safetensors")
        assert np.array_equal(models[-1][name], last[name])
    assert plain["final_model_sha256"]
    verify(tmp_path / "average")


def test_a_returned_model_that_is_not_the_average_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(server_optimizer={"name": "fedavg", "ema": 0.6})
    monkeypatch.setattr("server.state.averaged_model", lambda state, config, num: state["ema"])
    federate(study, tmp_path)
    with pytest.raises(FederationError, match=r"final\.safetensors: .* is not what models/ gives"):
        verify(tmp_path)
