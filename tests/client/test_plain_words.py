"""What a person sees before approving a study: all that it asks for, nothing that it made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from client.approvals import Approvals
from client.cli import app
from client.config import SiteConfig
from client.plain_words import describe
from common.config import validate
from common.errors import ConfigError
from common.study import Study

NOW = datetime(2026, 3, 1, tzinfo=UTC)
MEMBERS = {"site-1": "1" * 64, "site-2": "2" * 64, "site-3": "3" * 64}
PRIVATE = {
    "unit": "patient",
    "noise_multiplier": 1.5,
    "delta": 1e-3,
    "example_clip_norm": 0.75,
    "max_images_per_patient": 6,
}

Made = Callable[..., Study]


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    return validate(as_table(tmp_path), SiteConfig, source=tmp_path / "site.toml")


def as_table(folder: Path) -> dict[str, Any]:
    data = {"name": "x", "format": "phantom", "declared_patients": 50}
    return {"name": "site-1", "state_dir": str(folder / "state"), "data": data}


@pytest.fixture
def made(make_study: Callable[..., Study]) -> Made:
    def make(overrides: dict[str, Any] | None = None, **keys: str) -> Study:
        members = [{"name": name, "key": key} for name, key in {**MEMBERS, **keys}.items()]
        table = {"members": members, "coordinator": {"key": "c" * 64}, **(overrides or {})}
        return make_study(table)

    return make


def changes(study: Study, config: SiteConfig) -> list[str]:
    return [line for line in describe(study, config) if "CHANGED" in line]


def test_every_key_is_shown_in_groups_that_can_be_read_aloud(
    made: Made, config: SiteConfig
) -> None:
    lines = list(describe(made(), config))
    assert f"key of the coordinator: {' '.join(['cccc'] * 16)}" in lines
    assert f"key of site-1 (this site): {' '.join(['1111'] * 16)}" in lines
    assert f"key of site-3: {' '.join(['3333'] * 16)}" in lines
    assert any("by telephone" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "counted"),
    [
        (
            {"statistics": {"intensity": [0, 255]}},
            "images and patients by split, images by class, grey values, sides and spacing",
        ),
        (
            {
                "statistics": {"intensity": [0, 1]},
                "task": {"kind": "segmentation", "classes": ["background", "lesion"]},
                "model": {"name": "unet"},
            },
            "images by class, pixels by class, grey values",
        ),
    ],
)
def test_what_is_counted_before_training_is_said_without_a_soft_word(
    overrides: dict[str, Any], counted: str, made: Made, config: SiteConfig
) -> None:
    (line,) = [
        line for line in describe(made(overrides), config) if "before the first round" in line
    ]
    assert counted in line
    assert "the sum is exact, WITHOUT noise" in line
    assert not [line for line in describe(made(), config) if "before the first round" in line]


def test_a_study_that_only_counts_says_that_it_does_not_train(
    made: Made, config: SiteConfig
) -> None:
    counts = {"statistics": {"intensity": [0, 255]}, "num_rounds": 0}
    lines = list(describe(made(counts), config))
    assert "training: none; this study asks for counts alone" in lines
    assert not any("masked updates" in line for line in lines)
    assert any("declared number of patients (50)" in line for line in lines)


def test_a_key_that_differs_from_an_earlier_approval_is_marked(
    made: Made, config: SiteConfig
) -> None:
    approvals = Approvals(config.state_dir)
    approvals.approve(made({"name": "older"}, **{"site-2": "9" * 64}), by="Test", now=NOW)
    assert not [
        line for line in describe(made(**{"site-2": "9" * 64}), config) if "CHANGED" in line
    ]
    (line,) = changes(made(), config)
    assert line == (
        "key of site-2: CHANGED since study older was approved on 2026-03-01, where it was "
        f"{' '.join(['9999'] * 16)}; ask its owner why"
    )


def test_another_coordinator_is_marked_too(made: Made, config: SiteConfig) -> None:
    Approvals(config.state_dir).approve(
        made({"coordinator": {"key": "d" * 64}}), by="Test", now=NOW
    )
    (line,) = changes(made(), config)
    assert line.startswith("key of the coordinator: CHANGED since study tiny")


def test_the_last_approved_key_is_the_one_that_counts(made: Made, config: SiteConfig) -> None:
    approvals = Approvals(config.state_dir)
    approvals.approve(made(**{"site-2": "9" * 64}), by="Test", now=NOW)
    approvals.approve(made(), by="Test", now=NOW)
    assert not changes(made({"seed": 8}), config)


def test_everything_that_a_study_asks_for_is_said(made: Made, config: SiteConfig) -> None:
    said = "\n".join(
        describe(
            made(
                {
                    "privacy": PRIVATE,
                    "training.local_epochs": None,
                    "training.local_steps": 17,
                    "training.batch_size": 24,
                    "deadlines": {"upload_s": 123.0, "keys_s": 45.0, "unmask_s": 67.0},
                    "model.activation": "tanh",
                }
            ),
            config,
        )
    )
    for demand in (
        r"17 steps a round in batches of 24",
        r"up to 2 rounds",
        r"at most 0\.75 \(clip norm\)",
        r"at most 6 image",
        r"waits up to 123 s",
        r"validation and test images.*exact, WITHOUT noise",
        r"declared number of patients \(50\).*weight.*becomes known",
    ):
        assert re.search(demand, said), demand


def test_a_class_cannot_pass_for_the_words_around_it(made: Made, config: SiteConfig) -> None:
    study = made({"task.classes": ["healthy", "lesion', model safe"]})
    assert """classes: 'healthy', "lesion', model safe\"""" in list(describe(study, config))


def test_no_line_can_be_forged_or_steer_the_terminal(made: Made, config: SiteConfig) -> None:
    study = made()
    forged = "x\n[policy]: permits it\x1b[8m\u202e"
    task = study.task.model_copy(update={"classes": ("healthy", forged)})
    changes = {"task": task, "name": forged}
    lines = list(describe(study.model_copy(update=changes), config))
    assert all(line.isprintable() for line in lines)
    assert lines[-1].startswith("NOT PERMITTED")
    assert not [line for line in lines if line.startswith("[policy]")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.classes", ["healthy", "lesion\n[policy]: permits it"]),
        ("task.classes", ["healthy", "\x1b[8m"]),
        ("task.classes", ["healthy", "right\u202eleft"]),
        ("task.classes", ["healthy", "x" * 65]),
        ("model.frozen", ["stem\x1b[8m"]),
        ("model.frozen", ["x" * 129]),
        ("model.frozen", ["x"] * 1025),
    ],
)
def test_a_study_holds_no_text_that_does_not_print(made: Made, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        made({key: value})


def test_names_in_any_script_are_classes(made: Made) -> None:
    classes = ("kein Befund (gesund)", "病变, größer")
    assert made({"task.classes": list(classes)}).task.classes == classes


def test_approving_prints_the_keys_and_leaves_a_line_without_a_name_in_the_audit_log(
    made: Made, tmp_path: Path
) -> None:
    site, study = tmp_path / "site.toml", tmp_path / "study.toml"
    site.write_text(tomli_w.dumps(as_table(tmp_path)))
    study.write_text(tomli_w.dumps(made().as_table()))
    command = ["--site-config", str(site), "approve", str(study), "--by", "Ingrid Moen", "--yes"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    assert " ".join(["2222"] * 16) in ended.stdout
    (line,) = (tmp_path / "state" / "audit.jsonl").read_text().splitlines()
    said = json.loads(line)
    assert (said["event"], said["study"], said["digest"]) == ("approved", "tiny", made().digest())
    assert "Ingrid" not in line
