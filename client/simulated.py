"""The sites of a simulation, from a run folder and a site's index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from client.config import simulated_table
from client.contents import Contents
from client.dataset import Samples, SiteData, load_site_data
from client.images import Images, Scans
from client.policy import check_unit
from client.site import Site, Source, open_site, pick_device
from client.splits import Deal, count_training_units
from client.statistics import count_images
from common.errors import ConfigError
from common.roster import Credentials
from common.simulation import Simulation
from common.study import Study
from common.throwaway import issue_identities, site_credentials


def source_of(study: Study, simulation: Simulation, index: int) -> Source:
    """The images of site ``index``: its part of a shared data set, or its own phantoms.

    Raises:
      ConfigError: The ``[data]`` table is wrong.
      DataError: The files cannot be used.
    """
    table = dict(simulation.data)
    if simulation.generates_data:
        table["site_index"] = index
    config = simulated_table(Path(study.name), table, simulation.budget)
    data, dealt = config.data, None
    check_unit(data, study)
    if not simulation.generates_data and data.declared_patients is not None:
        raise ConfigError(
            "data.declared_patients: in a simulation a site declares what it is dealt; leave it out"
        )
    if not simulation.generates_data:
        dealt = Deal(simulation.partition, simulation.num_sites, index, study.seed)
    declared = data.declared_patients if dealt is None else None
    if declared is None:  # the harness declares for the site what the partition gave it
        declared = count_training_units(data, study, dealt)
    load = partial(load_site_data, data, study, dealt)
    count = partial(count_images, data, study, dealt)
    return Source(data.name, declared, config.budget, load, count)


def simulated_site(
    study: Study, simulation: Simulation, index: int, *, run_dir: Path, device: str = "cpu"
) -> Site:
    """Open site ``index`` of a simulation; its journal is kept in ``<run_dir>/sites/<name>``.

    Raises:
      ConfigError: The ``[data]`` table is wrong.
      DataError: The images cannot be used.
    """
    names = study.site_names
    issue_identities(run_dir, names)
    return site_over(
        source_of(study, simulation, index),
        names[index],
        study,
        run_dir=run_dir,
        device=device,
        credentials=partial(site_credentials, run_dir, names[index], names),
    )


def site_over(
    source: Source,
    name: str,
    study: Study,
    *,
    run_dir: Path,
    device: str,
    credentials: Callable[[], Credentials] | None = None,
) -> Site:
    """A simulated site over these images; without credentials it can only train alone."""
    return open_site(
        name,
        study,
        source,
        state_dir=run_dir / "sites" / name,
        device=pick_device(device),
        credentials=credentials,
    )


def pooled(sources: Sequence[Source], trained_on: int | None) -> Source:
    """One source that trains on all sites' images, or on one site's, and is tested on all.

    Patients of different sites are different people, even where their ids are equal.
    """

    def load() -> SiteData:
        parts = [source.load() for source in sources]
        chosen = [k for k in range(len(parts)) if trained_on in (None, k)]
        return SiteData(
            _joined({k: parts[k].train for k in chosen}),
            _joined({k: parts[k].validation for k in chosen}),
            _joined({k: part.test for k, part in enumerate(parts)}),
            num_skipped=sum(part.num_skipped for part in parts),
            contents=Contents.together(part.contents for part in parts),
        )

    first = sources[0]
    counted = sources if trained_on is None else [sources[trained_on]]
    return replace(first, num_units=sum(source.num_units for source in counted), load=load)


def alone(study: Study, name: str, source: Source) -> Study:
    """The same study with one member; the cap on a site's weight belongs to the secure sum."""
    cap = max(study.aggregation.weight_cap, source.num_units)
    aggregation = study.aggregation.model_copy(update={"weight_cap": cap})
    return study.model_copy(update={"aggregation": aggregation}).with_members((name,))


def _joined(by_site: Mapping[int, Samples]) -> Samples:
    parts = list(by_site.values())
    patients = tuple(
        f"{site}/{patient}" for site, part in by_site.items() for patient in part.patients
    )
    if all(isinstance(part, Scans) for part in parts):
        pixels = tuple(each for part in parts for each in part.pixels)
        targets = tuple(each for part in parts for each in part.targets)
        return Scans(pixels, targets, patients, parts[0].patch)  # type: ignore[union-attr]
    filled = [part for part in parts if len(part)] or parts[:1]
    return Images(
        torch.cat([part.pixels for part in filled]),  # type: ignore[misc]
        torch.cat([part.targets for part in filled]),  # type: ignore[misc]
        patients,
        table=torch.cat([part.table for part in filled]) if filled[0].table is not None else None,  # type: ignore[misc,union-attr]
    )
