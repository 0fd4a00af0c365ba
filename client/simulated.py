"""One site of a simulation, from a run folder and the site's index."""

from __future__ import annotations

from pathlib import Path

from client.config import DataTable
from client.dataset import Deal, load_site_data
from client.site import Site, open_site, pick_device
from common.config import validate
from common.simulation import Simulation
from common.study import Study


def simulated_site(
    study: Study, simulation: Simulation, index: int, *, run_dir: Path, device: str = "auto"
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
    data = validate({"data": table}, DataTable, source=Path(f"{study.name}.site.toml")).data
    dealt = None
    if not simulation.generates_data:
        dealt = Deal(simulation.partition, simulation.num_sites, index, study.seed)
    images = load_site_data(data, study, dealt)
    name = study.site_names[index]
    return open_site(
        name,
        study,
        images,
        weight=images.train.num_patients,
        state_dir=run_dir / "sites" / name,
        device=pick_device(device),
    )
