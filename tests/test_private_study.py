"""A private study from end to end: the same model twice, and no data opened over budget."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import PHANTOMS, answers_of, federate, open_sites, tiny_simulation, tiny_study
from safetensors.numpy import load_file

from client.app import reason_of
from client.config import Budget, NpzData
from client.dataset import load_site_data
from client.ledger import Ledger
from client.simulated import simulated_site, source_of
from client.site import Site
from common.accounting import Event, epsilon_of
from common.errors import BudgetExhausted, ConfigError, DataError, RoundAborted
from common.messages import Refusal, RoundTask, Upload
from common.signing import sign
from common.study import Study
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


def test_both_engines_give_a_model_of_the_same_promise(tmp_path: Path) -> None:
    models = {}
    for engine in ("book-keeping", "opacus"):
        study = tiny_study(num_rounds=1, privacy={**PRIVACY, "engine": engine})
        summary = federate(study, tmp_path / engine)
        models[engine] = load_file(tmp_path / engine / "final.safetensors"), summary["privacy"]
    ours, theirs = (models[name][0] for name in ("book-keeping", "opacus"))
    assert all(np.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)
    assert models["book-keeping"][1] == models["opacus"][1]


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
        assert len(Ledger(ledger, "phantoms", None).charges()) == 1


def test_a_study_over_budget_is_refused_before_any_data_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(privacy=PRIVACY)
    data = {**PHANTOMS, "declared_patients": 16}
    budget = {"epsilon": 2.0, "delta": 1e-5}
    simulation = tiny_simulation(study).model_copy(update={"data": data, "budget": budget})

    def opened(*_: object) -> None:
        raise AssertionError("data was opened")

    monkeypatch.setattr("client.splits.read_cases", opened)
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


class Opened:
    """Names of files that this process opens; a hook can never be taken off again."""

    def __init__(self) -> None:
        self.names: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.names is not None:
            self.names.append(str(arguments[0]))


def refusing(sites: dict[str, Site]) -> dict[str, Any]:
    """Answers as they leave a site: of a refusal, one word."""

    def said(message: Any, answered: Any) -> Any:
        try:
            return answered(message)
        except BudgetExhausted as error:
            return Refusal(message.run, reason_of(error))

    return {name: partial(said, answered=one) for name, one in answers_of(sites).items()}


def sites_of_which_the_first_reads_a_file(
    num_sites: int, folder: Path, budget: Budget
) -> tuple[Study, dict[str, Site], Path]:
    study = tiny_study(num_sites, privacy=PRIVACY)
    sites = open_sites(study, folder)
    file = folder / "images.npz"
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, num in (("train", 14), ("val", 2), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (num, 32, 32), np.uint8)
        arrays[f"{split}_labels"] = np.arange(num) % 2
        arrays[f"{split}_patients"] = np.array([f"{split}{k}" for k in range(num)])
    np.savez(file, **arrays)
    data = NpzData(name="phantoms", format="npz", root=file, patients=True)
    first = sites["site-1"]
    ledger = Ledger(first.home / "ledgers" / "phantoms.jsonl", "phantoms", budget)
    load = partial(load_site_data, data, study)
    sites["site-1"] = replace(first, ledger=ledger, load=load)
    return study, sites, file


def test_a_round_over_budget_opens_no_file_and_the_others_go_on(tmp_path: Path) -> None:
    opened = Opened()
    outcome = {}
    for spent in (False, True):
        folder = tmp_path / str(spent)
        budget = Budget(epsilon=9.0, delta=1e-5)
        study, sites, file = sites_of_which_the_first_reads_a_file(4, folder, budget)
        if spent:  # another study used the data meanwhile
            sites["site-1"].ledger.debit("other/study", 0, Event(1.0, 0.5, 7), num_rounds=1)
        opened.names = []
        summary = federate(
            study, folder / "run", network=LoopbackNetwork(refusing(sites)), sites_in=folder
        )
        outcome[spent] = summary, str(file) in opened.names
        opened.names = None
    assert outcome[False][1]  # else the hook sees nothing
    assert outcome[False][0]["survivors"] == [[f"site-{k}" for k in (1, 2, 3, 4)]] * 3
    assert not outcome[True][1]
    # The sum that it refused went on without it; the others paid for every round.
    assert outcome[True][0]["survivors"] == [[f"site-{k}" for k in (2, 3, 4)]] * 3
    assert "site-1" not in outcome[True][0]["privacy"]
    line = json.loads((tmp_path / "True/run/rounds.jsonl").read_text().splitlines()[0])
    assert line["refusals"] == {"site-1": "budget"}


def test_three_sites_of_which_one_has_no_budget_left_end_cleanly(tmp_path: Path) -> None:
    budget = Budget(epsilon=9.0, delta=1e-5)
    study, sites, _ = sites_of_which_the_first_reads_a_file(3, tmp_path, budget)
    sites["site-1"].ledger.debit("other/study", 0, Event(1.0, 0.5, 7), num_rounds=1)
    network = LoopbackNetwork(refusing(sites))
    expected = r"2 sites take part, 3 are needed; not there: site-1 \(its privacy budget is spent"
    with pytest.raises(RoundAborted, match=expected):
        federate(study, tmp_path / "run", network=network, sites_in=tmp_path)
    assert not list((tmp_path / "run").glob("final*"))


def test_a_study_without_privacy_is_refused_where_there_is_a_budget(tmp_path: Path) -> None:
    study = tiny_study()
    budget = {"epsilon": 2.0, "delta": 1e-5}
    simulation = tiny_simulation(study).model_copy(update={"budget": budget})
    with pytest.raises(
        BudgetExhausted,
        match="without differential privacy, on data set phantoms would bring epsilon to inf",
    ):
        simulated_site(study, simulation, 0, run_dir=tmp_path, device="cpu")


def test_a_study_without_privacy_is_a_charge_without_bound(tmp_path: Path) -> None:
    study = tiny_study(num_rounds=1)
    sites = open_sites(study, tmp_path)
    federate(study, tmp_path / "run", network=LoopbackNetwork(answers_of(sites)), sites_in=tmp_path)
    for site in sites.values():
        assert site.ledger.spent(1e-5) == np.inf
        assert len(site.ledger.charges()) == 1


@pytest.mark.parametrize("book", ["ledgers/phantoms.jsonl", "audit.jsonl"])
def test_a_site_whose_books_lack_what_it_stated_last_opens_no_study(
    book: str, tmp_path: Path
) -> None:
    """Whatever the coordinator remembers of them: a new one remembers nothing."""
    study = tiny_study(privacy=PRIVACY)
    federate(study, tmp_path)
    simulation = tiny_simulation(study)
    simulated_site(study, simulation, 0, run_dir=tmp_path, device="cpu")
    path = tmp_path / "sites" / "site-1" / book
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(DataError, match=r"does not hold the head .* of its own statement on sum"):
        simulated_site(study, simulation, 0, run_dir=tmp_path, device="cpu")
