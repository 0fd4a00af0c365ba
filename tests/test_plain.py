"""The secure sum changes nothing but what is seen; and there is no way around it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_network import FaultyNetwork
from federation import Watcher, answers_of, federate, open_sites, tiny_study
from plain import run_plainly
from vectors_federation import fast_folder

from common.errors import ConfigError
from common.messages import Message, Reason, Refusal, RoundTask
from common.models.build import build_network
from common.secagg.masking import mask
from common.study.study import Aggregation
from common.update import QuantizedUpdate
from server.network import Answer

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("server", "client", "common", "scripts")

STUDIES: dict[str, dict[str, Any]] = {
    "a network, averaged": {},
    "a ring of 24 bits": {"aggregation": {"ring_bits": 24}},
    "a ring of 16 bits": {"aggregation": {"ring_bits": 16}},
    "first steps so small that entries are clipped": {
        "aggregation": {"ring_bits": 16, "first_round_bound": 1e-6}
    },
    "a server optimizer and an average of models": {
        "server_optimizer": {"name": "fedyogi", "ema": 0.7}
    },
    "early stopping returns the best round": {
        "num_rounds": 6,
        "training": {
            "learning_rate": 3.0,
            "batch_size": 8,
            "local_steps": 8,
            "early_stopping": {"figure": "loss", "patience": 2},
        },
    },
    "seeded privacy": {
        "num_rounds": 1,
        "privacy": {
            "epsilon": 8.0,
            "delta": 1e-5,
            "example_clip_norm": 0.5,
            "randomness": "seeded",
        },
    },
}


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as path:
        yield path


# The same model


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=title, marks=[pytest.mark.slow] if "privacy" in changes else [])
        for title, changes in STUDIES.items()
    ],
)
def test_the_model_is_that_of_plain_sums(changes: dict[str, Any], folder: Path) -> None:
    study = tiny_study(**changes)
    summary = federate(study, folder / "run")
    plain = run_plainly(study, folder / "plain")
    assert summary["final_model_sha256"] == plain.final_model_sha256
    assert summary["metrics"]["by_round"] == plain.validation[1:]


@pytest.mark.parametrize("num_sites", [3, 5, 8])
def test_it_is_for_any_number_of_sites(num_sites: int, folder: Path) -> None:
    study = tiny_study(num_sites, num_rounds=2)
    summary = federate(study, folder / "run")
    plain = run_plainly(study, folder / "plain")
    assert summary["final_model_sha256"] == plain.final_model_sha256


def test_clipped_entries_raise_the_steps_alike(folder: Path) -> None:
    study = tiny_study(**STUDIES["first steps so small that entries are clipped"])
    num_tensors, watcher = len(build_network(study).schema.names), Watcher()
    federate(study, folder / "run", watcher=watcher)
    plain = run_plainly(study, folder / "plain")
    clipped = [
        sum(
            int(update.tail[1 : 1 + num_tensors].sum())
            for (number, _), update in plain.updates.items()
            if number == line["sum"]
        )
        for line in watcher.lines
    ]
    assert [line["clipped"] for line in watcher.lines] == clipped
    assert clipped[0] > 0


def refusing(sites: dict[str, Answer], reasons: dict[str, Callable[[int], Reason | None]]) -> Any:
    """A network in which some sites refuse some sums."""

    def answer(name: str, message: Message) -> Message:
        if isinstance(message, RoundTask) and name in reasons:
            reason = reasons[name](message.sum_number)
            if reason is not None:
                return Refusal(message.run, reason)
        return sites[name](message)

    return FaultyNetwork({name: lambda message, name=name: answer(name, message) for name in sites})


def test_the_model_is_that_of_plain_sums_without_the_site_that_dropped(folder: Path) -> None:
    study = tiny_study()
    sites = answers_of(open_sites(study, folder / "sites"))
    network = refusing(sites, {"site-2": lambda number: Reason.BUSY if number == 1 else None})
    summary = federate(study, folder / "run", network=network, sites_in=folder / "sites")
    plain = run_plainly(study, folder / "plain", dropouts={1: {"site-2"}})
    assert [len(names) for names in summary["survivors"]] == [4, 3, 4]
    assert summary["final_model_sha256"] == plain.final_model_sha256
    undisturbed = run_plainly(study, folder / "undisturbed")
    assert plain.final_model_sha256 != undisturbed.final_model_sha256


def test_the_model_is_that_of_plain_sums_after_a_void_one(folder: Path) -> None:
    study = tiny_study()
    sites = answers_of(open_sites(study, folder / "sites"))
    busy = dict.fromkeys(("site-1", "site-2"), lambda number: Reason.BUSY if number == 1 else None)
    network = refusing(sites, busy)
    summary = federate(study, folder / "run", network=network, sites_in=folder / "sites")
    plain = run_plainly(study, folder / "plain", dropouts={1: {"site-1", "site-2"}})
    assert summary["final_model_sha256"] == plain.final_model_sha256


def test_the_model_is_that_of_plain_sums_over_two_epochs(folder: Path) -> None:
    study = tiny_study(aggregation={"ring_bits": 16})
    sites = answers_of(open_sites(study, folder / "sites"))
    network = refusing(sites, {"site-3": lambda number: Reason.BUDGET if number >= 1 else None})
    watcher = Watcher()
    summary = federate(
        study, folder / "run", network=network, sites_in=folder / "sites", watcher=watcher
    )
    plain = run_plainly(study, folder / "plain", dropouts={1: {"site-3"}}, leavers={2: {"site-3"}})
    assert watcher.epochs == [["site-1", "site-2", "site-4"]]
    assert summary["final_model_sha256"] == plain.final_model_sha256


# No way around it


def product_files() -> list[Path]:
    found = [file for name in PRODUCT for file in (ROOT / name).rglob("*.py")]
    scripts = [file for file in (ROOT / "scripts").iterdir() if file.is_file()]
    scripts.remove(ROOT / "scripts" / "crash-test")  # a test that a person may run, too
    return found + [file for file in scripts if "python" in file.read_text()[:200]]


def calls_of(name: str) -> set[str]:
    """Product files that call a function or make an object of this name."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in product_files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and _name(node.func) == name
    }


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@pytest.mark.parametrize(
    ("made", "where"),
    [
        ("Upload", "client/session.py"),  # from what the journal keeps of ``protect``
        ("Protected", "common/secagg/protect.py"),
        ("MaskedUpdate", "common/secagg/masking.py"),
        ("protect", "client/session.py"),
        ("record_upload", "client/session.py"),
        ("SumMemory", "client/session.py"),
    ],
)
def test_what_leaves_a_site_is_made_in_one_place(made: str, where: str) -> None:
    assert calls_of(made) == {where}


def test_protect_alone_masks_and_it_always_does() -> None:
    # Session.mask, and an attack that looks at what is masked
    masking = {"client/round.py", "common/secagg/protect.py", "client/attacks/inversion.py"}
    assert calls_of("mask") == masking
    assert calls_of("plain_body") == calls_of("run_plainly") == set()


def test_an_update_without_masks_is_not_sent() -> None:
    update = QuantizedUpdate(np.zeros(4, np.int32), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="never sent without a mask"):
        mask(update, [], bits=32)


def test_a_study_cannot_switch_the_secure_sum_off() -> None:
    assert set(Aggregation.model_fields) == {"ring_bits", "weight_cap", "first_round_bound"}
    for switch in ("secure", "masks", "plain", "mode"):
        with pytest.raises(ConfigError, match=f"aggregation.{switch}: Extra inputs"):
            tiny_study(aggregation={switch: False})


def test_the_product_imports_nothing_that_lives_under_tests() -> None:
    of_tests = {file.stem for file in (ROOT / "tests").rglob("*.py")}
    imported = {name for file in product_files() for name in _imports(file)}
    assert "numpy" in imported
    assert not imported & (of_tests | {"tests"})


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found
