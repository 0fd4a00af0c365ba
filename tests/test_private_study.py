"""A private study from end to end: the same model twice, and no data opened over budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import PHANTOMS, answers_of, federate, open_sites, tiny_simulation, tiny_study

from client.simulated import simulated_site, source_of
from common.accounting import Event, epsilon_of
from common.errors import BudgetExhausted, ConfigError, DataError
from common.messages import RoundTask, Upload
from common.signing import sign
from common.throwaway import coordinator_credentials
from server.network import LoopbackNetwork, never

PRIVACY: dict[str, Any] = {
    "epsilon": 8.0,
    "delta": 1e-5,
    "example_clip_norm": 0.5,
    "randomness": "seeded",
}


def test_a_seeded_private_study_gives_the_same_model_and_the_stated_epsilon(
    tmp_path: Path,
) -> None:
    study = tiny_study(privacy=PRIVACY)
    one, other = (federate(study, tmp_path / name) for name in ("a", "b"))
    assert one["final_model_sha256"] == other["final_model_sha256"]
    assert set(one["privacy"]) == {"site-1", "site-2", "site-3", "site-4"}
    for site in one["privacy"].values():
        assert site["steps"] == 3 * 2
        assert site["unit"] == "patient"
        event = Event(site["noise_multiplier"], site["sampling_probability"], site["steps"])
        assert site["epsilon"] == epsilon_of([event], 1e-5)
        assert 7.9 <= site["epsilon"] <= 8.0


def test_randomness_of_the_operating_system_gives_other_weights_and_the_same_epsilon(
    tmp_path: Path,
) -> None:
    study = tiny_study(num_rounds=1, privacy={**PRIVACY, "randomness": "os"})
    one, other = (federate(study, tmp_path / name) for name in ("a", "b"))
    assert one["final_model_sha256"] != other["final_model_sha256"]
    assert one["privacy"] == other["privacy"]


def test_an_answered_sum_is_never_trained_or_charged_again(tmp_path: Path) -> None:
    study = tiny_study(num_rounds=1, privacy={**PRIVACY, "randomness": "os"})
    sites = open_sites(study, tmp_path / "sites")
    answers = answers_of(sites)
    same = []

    class Stuttering(LoopbackNetwork):
        def ask(self, messages, deadline_s, enough=never):
            for site, reply in super().ask(messages, deadline_s, enough):
                if isinstance(reply, Upload):
                    again = answers[site](messages[site])
                    same.append(np.array_equal(again.body, reply.body))
                    assert again.header == reply.header
                yield site, reply

    federate(study, tmp_path / "run", network=Stuttering(answers), sites_in=tmp_path / "sites")
    assert same == [True] * 12  # four sites; a training and two evaluations each
    for name in sites:
        ledger = tmp_path / "sites" / "sites" / name / "ledgers" / "phantoms.jsonl"
        assert len(ledger.read_text().splitlines()) == 1


def test_a_study_over_budget_is_refused_before_any_data_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(privacy=PRIVACY)
    data = {**PHANTOMS, "declared_patients": 16}
    budget = {"epsilon": 2.0, "delta": 1e-5}
    simulation = tiny_simulation(study).model_copy(update={"data": data, "budget": budget})

    def opened(*_: object) -> None:
        raise AssertionError("data was opened")

    monkeypatch.setattr("client.dataset.read_cases", opened)
    with pytest.raises(BudgetExhausted, match="study tiny on data set phantoms"):
        simulated_site(study, simulation, 0, run_dir=tmp_path, device="cpu")


def test_a_budget_for_patients_does_not_pay_for_a_promise_about_images(tmp_path: Path) -> None:
    study = tiny_study(privacy={**PRIVACY, "unit": "image"})
    budget = {"unit": "patient", "epsilon": 20.0, "delta": 1e-5}
    simulation = tiny_simulation(study).model_copy(update={"budget": budget})
    with pytest.raises(ConfigError, match=r"budget\.unit"):
        simulated_site(study, simulation, 0, run_dir=tmp_path, device="cpu")


def test_a_promise_to_patients_needs_data_that_name_them(tmp_path: Path) -> None:
    study = tiny_study(privacy=PRIVACY)
    data = {"name": "scans", "format": "folder", "root": str(tmp_path)}
    simulation = tiny_simulation(study).model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"names no patients .* set data\.patient, or"):
        source_of(study, simulation, 0)
    by_image = tiny_study(privacy={**PRIVACY, "unit": "image"})
    with pytest.raises(DataError, match="no PNG"):  # the next step: the folder is empty
        source_of(by_image, simulation, 0)


def test_a_void_sum_is_paid_for_so_the_run_ends_a_round_earlier(tmp_path: Path) -> None:
    study = tiny_study(privacy=PRIVACY)
    sites = open_sites(study, tmp_path / "sites")

    class Silent(LoopbackNetwork):
        def ask(self, messages, deadline_s, enough=never):
            first = messages["site-1"]
            is_silent = isinstance(first, RoundTask) and first.sum_number == 1
            yield from super().ask({"site-1": first} if is_silent else messages, deadline_s, enough)

    network = Silent(answers_of(sites))
    summary = federate(study, tmp_path / "run", network=network, sites_in=tmp_path / "sites")
    assert summary["num_rounds"] == 2
    # site-1 answered the void sum too and was charged for it; nobody exceeds the study's epsilon.
    assert summary["privacy"]["site-1"]["steps"] == 3 * 2
    assert summary["privacy"]["site-2"]["steps"] == 2 * 2
    assert max(site["epsilon"] for site in summary["privacy"].values()) <= 8.0


def test_a_site_refuses_more_sums_than_the_studys_epsilon_pays_for(tmp_path: Path) -> None:
    study = tiny_study(privacy=PRIVACY)
    sites = open_sites(study, tmp_path / "sites")
    coordinator = coordinator_credentials(tmp_path / "sites", study.site_names).identity
    answers = answers_of(sites)
    greedy = []

    class Greedy(LoopbackNetwork):
        """Asks for training again and again under new sum numbers."""

        def ask(self, messages, deadline_s, enough=never):
            yield from super().ask(messages, deadline_s, enough)
            task = messages["site-1"]
            if isinstance(task, RoundTask) and task.sum_number == 2:
                for number in (3, 4):
                    again = sign(replace(task, sum_number=number), coordinator)
                    with pytest.raises(BudgetExhausted, match="as many as its epsilon pays for"):
                        answers["site-1"](again)
                    greedy.append(number)

    summary = federate(
        study, tmp_path / "run", network=Greedy(answers), sites_in=tmp_path / "sites"
    )
    assert greedy == [3, 4]
    assert summary["num_rounds"] == 3  # what was refused cost the sum in progress nothing
