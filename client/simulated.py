"""One site of a simulation, from a run folder and the site's index."""

from __future__ import annotations

import functools
from pathlib import Path

from client.config import simulated_table
from client.dataset import Deal, count_training_units, load_site_data
from client.site import Site, open_site, pick_device
from common.simulation import Simulation
from common.study import Study


def simulated_site(
    study: Study, simulation: Simulation, index: int, *, run_dir: Path, device: str = "cpu"
) -> Site:
    """Open site ``index`` of a simulation.

    Its declared number of patients is what the partition gave it; its journal is kept in
    ``<run_dir>/sites/<name>``.

    Raises:
      ConfigError: The ``[data]`` table is wrong.
      DataError: The images cannot be used.
    """
    table = dict(simulation.data)
    if simulation.generates_data:
        table["site_index"] = index
    config = simulated_table(Path(study.name), table, simulation.budget)
    data, dealt = config.data, None
    if not simulation.generates_data:
        dealt = Deal(simulation.partition, simulation.num_sites, index, study.seed)
    declared = data.declared_patients if dealt is None else None
    if declared is None:  # the harness declares for the site what the partition gave it
        declared = count_training_units(data, study, dealt)
    name = study.site_names[index]
    return open_site(
        name,
        study,
        functools.partial(load_site_data, data, study, dealt),
        data_name=data.name,
        weight=declared,
        budget=config.budget,
        state_dir=run_dir / "sites" / name,
        device=pick_device(device),
    )
