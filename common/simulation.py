"""What a simulated run is: a study, how many sites, and which data is dealt out to them how.

It is written into the run folder, so that a run can be resumed, and repeated in another runtime,
from its folder alone.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from common.config import (
    Frozen,
    load,
    parse_assignment,
    read_table,
    replace_value,
    validate,
)
from common.errors import ConfigError
from common.study import MIN_SITES, Study

STUDY = "study.toml"  # in a run folder
SIMULATION = "simulation.toml"
WORTH = "worth.json"  # of scripts/worth: each site's own figures, by how the model was trained
EXAMPLE = "example.npz"  # in a site's own folder; client.examples says what it holds
DATA = "data."  # beginning of a key that changes the sites' table, not the study
PARTITION = re.compile(r"iid|column:.+|dirichlet:(\d+(\.\d*)?|\.\d+)")


class Simulation(Frozen):
    """How the sites of a simulation come by their data."""

    num_sites: Annotated[int, Field(ge=MIN_SITES, le=255)]
    partition: str = "iid"
    data: dict[str, Any]  # the [data] table of every site; client.config checks it
    budget: dict[str, Any] = Field(default_factory=dict)  # its [budget] table, where there is one

    @field_validator("partition")
    @classmethod
    def _check_partition(cls, rule: str) -> str:
        if not _is_partition(rule):
            raise ValueError("Input should be iid, dirichlet:A with A above 0 or column:NAME")
        return rule

    @property
    def generates_data(self) -> bool:
        """Whether each site draws its own phantoms, so that there is nothing to deal out."""
        return bool(self.data.get("format") == "phantom")


def plan_simulation(
    study_path: Path,
    *,
    num_sites: int,
    data_root: str = "",
    partition: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Study, Simulation]:
    """Read a study and the ``<name>.site.toml`` beside it, and fill in the members.

    Args:
      study_path: Of the study.
      num_sites: Sites to simulate.
      data_root: Replaces ``data.root``; empty for none.
      partition: How the data set is dealt out; empty for ``iid``.
      overrides: Values by dotted key: of the study, or of its sites' table after ``data.``.

    Raises:
      ConfigError: A file or argument does not fit; or the study's members are not ``num_sites``.
    """
    given = dict(overrides or {})
    of_data = {key[len(DATA) :]: given.pop(key) for key in list(given) if key.startswith(DATA)}
    study = load(study_path, Study, given)
    if study.members and len(study.members) != num_sites:
        asked = f"{num_sites} sites asked for"
        raise ConfigError(f"the study has {len(study.members)} members, {asked}")
    if num_sites < study.cohort.min_sites:
        raise ConfigError(f"{num_sites} sites, the study needs {study.cohort.min_sites} or more")
    if not study.members:
        study = study.with_members(tuple(f"site-{k + 1}" for k in range(num_sites)))
    data_root = data_root or str(of_data.pop("root", ""))
    table, budget = _site_tables(study_path, data_root)
    for key, value in of_data.items():
        replace_value(table, key, value)
    if table.get("format") == "phantom" and partition:
        raise ConfigError("--partition: phantoms are not dealt out, each site generates its own")
    simulation = _check(num_sites, partition or "iid", table, budget)
    return study, simulation


def from_run_config(config: Mapping[str, Any], *, num_sites: int) -> tuple[Study, Simulation]:
    """The same from the run-config of ``flwr run``; empty text and 0 mean as the study says.

    Raises:
      ConfigError: As ``plan_simulation``.
    """
    overrides = dict(map(parse_assignment, filter(None, str(config["set"]).split(";"))))
    if config["seed"]:
        overrides["seed"] = config["seed"]
    if config["num-rounds"]:
        overrides["num_rounds"] = config["num-rounds"]
    data = str(config["data"])
    return plan_simulation(
        _from_root(str(config["study"])),
        num_sites=num_sites,
        data_root=str(_from_root(data)) if data else "",
        partition=str(config["partition"]),
        overrides=overrides,
    )


def run_folder(config: Mapping[str, Any]) -> Path:
    """Where ``flwr run`` keeps its run: as asked for, else ``runs/<study name>``."""
    if config["run-dir"]:
        return _from_root(str(config["run-dir"]))
    name = read_table(_from_root(str(config["study"]))).get("name", "unnamed")
    return _from_root(f"runs/{name}")


def _from_root(path: str) -> Path:
    """Relative paths are relative to the repository's root, where ``.venv`` lies.

    Flower runs an unpacked copy of the code elsewhere, from whatever folder its SuperLink was
    started in; only the environment's own place is the same for all.
    """
    return Path(sys.prefix).parent / Path(path).expanduser()


def _site_tables(study_path: Path, data_root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    path = study_path.with_suffix(".site.toml")
    content = read_table(path)
    if unknown := sorted(set(content) - {"data", "budget"}):
        raise ConfigError(f"{path.name}: {unknown[0]}: only [data] and [budget] belong here")
    table = content.get("data")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: no [data] table; it says where a site's images are")
    if data_root:
        if table.get("format") == "phantom":
            raise ConfigError("--data: phantoms are generated; leave it out")
        table["root"] = str(Path(data_root).expanduser().resolve())
    elif "root" in table:
        table["root"] = str((path.parent / Path(str(table["root"])).expanduser()).resolve())
    return table, content.get("budget", {})


def _check(
    num_sites: int, partition: str, table: dict[str, Any], budget: dict[str, Any]
) -> Simulation:
    if not MIN_SITES <= num_sites <= 255:  # noqa: PLR2004
        raise ConfigError(f"--sites {num_sites}: a secure sum takes {MIN_SITES} to 255 sites")
    if not _is_partition(partition):
        rules = "iid, dirichlet:A with A > 0 or column:NAME"
        raise ConfigError(f"--partition {partition}: expected {rules}")
    given = {"num_sites": num_sites, "partition": partition, "data": table, "budget": budget}
    return validate(given, Simulation, source=Path("site.toml"))


def _is_partition(rule: str) -> bool:
    found = PARTITION.fullmatch(rule)
    if found is None:
        return False
    return not found.group(1) or 0 < float(found.group(1)) < math.inf
