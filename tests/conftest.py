"""What many tests share: a study that trains in milliseconds, a site of it, and real data."""

import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

from common.config import validate
from common.study import Study

if TYPE_CHECKING:
    from client.site import Site

DATA = "FL_TEST_DATA"

TINY_STUDY = """
name = "tiny"
seed = 3
num_rounds = 2

[task]
kind = "classification"
classes = ["no lesion", "lesion"]

[model]
name = "cnn"
width = 4

[input]
size = [32, 32]
intensity = "image"

[training]
learning_rate = 0.05
batch_size = 8
local_epochs = 1

[privacy]
mode = "none"

[[members]]
name = "site-1"
[[members]]
name = "site-2"
[[members]]
name = "site-3"
"""

KNOWN_WARNINGS = (
    # typer imports click's old names one by one; gone with the typer that follows Click 9.
    "ignore:'click.utils:DeprecationWarning",
)

# Torch's threads wait for each other on a busy machine; tiny networks gain nothing from them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples everywhere, and no limit on how long one may take: a busy machine is no defect.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

StudyFactory = Callable[..., Study]
SiteFactory = Callable[..., "Site"]


MEMORY = Path("/dev/shm")  # noqa: S108 - journals flush to disk at every step; here that is free
ENOUGH_BYTES = 2 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except known lines of a dependency; temporary folders lie in memory."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    for line in KNOWN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the last file to begin decides when the last worker ends."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data sets; without it a test skips at home and fails in CI."""
    folder = os.environ.get(DATA)
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = f"{DATA} does not name a folder with the public data sets"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def seed() -> int:
    """One seed for every test that needs just any."""
    return 20_240_607


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A generator that starts alike in every test."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def tiny_study_table() -> Callable[[], dict[str, Any]]:
    """A fresh copy of the tiny study as a plain table, to be changed at will."""
    return lambda: tomllib.loads(TINY_STUDY)


@pytest.fixture(scope="session")
def make_study() -> StudyFactory:
    """Three sites, phantoms of 32x32, a network of width 4; overrides by dotted key.

    ``make_study({"training.optimizer": "adamw"}, num_rounds=3)``
    """

    def make(overrides: dict[str, Any] | None = None, **top_level: Any) -> Study:
        table = tomllib.loads(TINY_STUDY)
        for key, value in {**(overrides or {}), **top_level}.items():
            *sections, last = key.split(".")
            here = table
            for section in sections:
                here = here.setdefault(section, {})
            here[last] = value
        return validate(table, Study, source=Path("tiny.toml"))

    return make


@pytest.fixture
def make_site(make_study: StudyFactory, tmp_path: Path) -> SiteFactory:
    """A member of the tiny study with a handful of phantoms; its journal lies in ``tmp_path``."""
    from common.simulation import Simulation

    def make(study: Study | None = None, index: int = 0, *, num_patients: int = 24) -> "Site":
        from client.simulated import simulated_site

        planned = study or make_study()
        data = {
            "name": "tiny-phantoms",
            "format": "phantom",
            "num_patients": num_patients,
            "images_per_patient": 1,
        }
        simulation = Simulation(num_sites=len(planned.members), data=data)
        return simulated_site(planned, simulation, index, run_dir=tmp_path, device="cpu")

    return make
