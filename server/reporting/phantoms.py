"""Examples of a classification run over phantoms: films that no site has, and what the model says.

A phantom is made by a program, so that a report may show it; no patient stands behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from common.models.build import build_network
from common.models.flat import FlatNetwork, is_parameter
from common.phantom import Phantom, draw_patient, scanner_of_site
from common.study import Classification, Input, Study
from server.reporting.record import Facts, Record
from server.run_dir import RunDir

FIRST_EXAMPLE: Final = 1_000_000  # sites have at most 100,000 patients, counted from 0
MOST_SCANNERS: Final = 4
PHANTOM_SEED: Final = 0  # default of client.config.PhantomData, which the server may not import


@dataclass(frozen=True)
class Example:
    """One phantom that no site has, and what the final model says of it."""

    phantom: Phantom
    facts: Facts  # site, patient, class, probability


def draw_phantoms(record: Record) -> list[Example]:
    """For up to four scanners the first phantom with and the first without a lesion.

    The rule is fixed before the model is asked. Empty where the data are no phantoms, where they
    are volumes, and where the study asks for masks: ``server.reporting.overlays`` has those.
    """
    study, simulation = record.study, record.simulation
    if simulation is None or not simulation.generates_data:
        return []
    if not isinstance(study.task, Classification) or len(study.input.size) != 2:  # noqa: PLR2004
        return []
    if study.table is not None or study.training.local_normalisation:
        return []  # the network sees more than a film; or each site's is another one
    seed = simulation.data.get("seed", PHANTOM_SEED)
    drawn = [
        (site, *_first_phantom(seed, site, study.input.size[0], label))
        for site in range(min(simulation.num_sites, MOST_SCANNERS))
        for label in (1, 0)
    ]
    phantoms = [phantom for _, _, phantom in drawn]
    return [
        Example(
            phantom,
            {
                "site": study.site_names[site],
                "patient": patient,
                "class": study.task.classes[phantom.label],
                "probability": probability,
            },
        )
        for (site, patient, phantom), probability in zip(
            drawn, _probabilities(study, record.run_dir, phantoms), strict=True
        )
    ]


def _first_phantom(seed: int, site: int, size: int, label: int) -> tuple[int, Phantom]:
    scanner = scanner_of_site(seed, site)
    for patient in itertools.count(FIRST_EXAMPLE):
        (phantom,) = draw_patient(seed, site, patient, scanner=scanner, size=size, num_images=1)
        if phantom.label == label:
            return patient, phantom
    raise AssertionError  # count never ends, and a scanner's share of lesions is 0.25 to 0.65


def _probabilities(study: Study, run_dir: RunDir, phantoms: Sequence[Phantom]) -> list[float]:
    """What the returned model says of each phantom: the probability of a lesion."""
    network: FlatNetwork = build_network(study)
    tensors = run_dir.final_model()
    names = filter(is_parameter, network.schema.names)
    network.load(np.concatenate([tensors[name].reshape(-1) for name in names]))
    network.module.eval()
    with torch.no_grad():
        outputs = network(prepare_phantoms(phantoms, study.input))  # (num_phantoms, 1)
    return [float(p) for p in outputs[:, 0].double().sigmoid()]


def prepare_phantoms(phantoms: Sequence[Phantom], config: Input) -> Tensor:
    """The network's input, shape (num_phantoms, 1, size, size).

    A site's own preparation is ``client.prepare.prepare``, which the server must not import; a test
    holds the two against each other.
    """
    films = np.stack([np.rint(phantom.image * 255) for phantom in phantoms])[:, None]  # 8 bits
    images = torch.from_numpy(films).float()
    if config.intensity == "dtype":
        images = images / 255
    else:
        mean = images.mean(dim=(2, 3), keepdim=True)
        images = (images - mean) / images.std(dim=(2, 3), correction=0, keepdim=True)
    return (images - config.mean) / config.std
