"""How far the mean that comes out of the secure sum is from the mean of what went in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from client.simulated import simulated_site
from client.train import learning_rate, train
from common.config import load
from common.identity import Identity
from common.models.build import build_network
from common.quantize import (
    Ring,
    dequantize,
    first_exponents,
    next_exponents,
    quantize,
)
from common.secagg.encoding import derive
from common.secagg.masking import Mask, add_masks, add_packed, add_tail_masks, signed, split_body
from common.secagg.protect import Place, protect
from common.simulation import Simulation
from common.study import Study
from common.update import LocalUpdate

STUDY = Path(__file__).parent.parent.parent / "studies/pneumonia-resnet18.toml"
NUM_SITES, THRESHOLD = 8, 6
MOST_ENTRIES = 4096  # per tensor of a synthetic update
BOUNDS = {32: 1e-7, 24: 2e-5, 16: 5e-3}  # relative L2 error of the mean, once the steps fit

Update = NDArray[np.float32]


class Sum(NamedTuple):
    """What the coordinator has after one sum."""

    values: NDArray[np.int32]
    weight: int
    clipped: NDArray[np.int64]


class Federation:
    """Sites with declared weights, and the ring and steps of one epoch."""

    def __init__(
        self,
        study: Study,
        sizes: Sequence[int],
        weights: Sequence[int],
        bits: int,
        signer: Identity,
    ) -> None:
        self.ring = Ring(bits, len(weights))
        self.sizes, self.weights, self.signer = sizes, weights, signer
        aggregation = study.aggregation.model_copy(update={"ring_bits": bits})
        self.weight_cap = aggregation.weight_cap
        self.exponents = first_exponents(len(sizes), aggregation.first_round_bound, self.ring)

    def error_of_mean(self, updates: Sequence[Update]) -> float:
        """Relative L2 error of one round's mean; the next round's steps follow from its sum."""
        found = self.summed(updates)
        assert found.weight == sum(self.weights)
        mean = dequantize(
            found.values, sizes=self.sizes, exponents=self.exponents, weight=found.weight,
            weight_cap=self.weight_cap,
        )  # fmt: skip
        self.exponents = next_exponents(
            found.values, found.clipped, sizes=self.sizes, exponents=self.exponents,
            num_summands=len(updates), ring=self.ring,
        )  # fmt: skip
        wanted = np.average(np.stack(updates).astype(np.float64), axis=0, weights=self.weights)
        return float(np.linalg.norm(mean - wanted) / np.linalg.norm(wanted))

    def summed(self, updates: Sequence[Update]) -> Sum:
        """From updates to their sum by every step of the product; nobody drops."""
        num_params = sum(self.sizes)
        total, tails = np.zeros(num_params, np.uint32), np.zeros(1 + len(self.sizes), np.uint64)
        self_masks = []
        for site, update in enumerate(updates):
            key, body = self.protected(site, update)
            packed, tail = split_body(body, num_params, bits=self.ring.bits)
            add_packed(total, packed, bits=self.ring.bits)
            tails += tail
            self_masks.append(Mask(key, is_added=False))
        add_masks(total, self_masks, threads=2)
        add_tail_masks(tails, self_masks, num_params)
        tail = tails.view(np.int64)
        return Sum(signed(total, bits=self.ring.bits), int(tail[0]), tail[1:])

    def protected(self, site: int, update: Update) -> tuple[bytes, NDArray[np.uint8]]:
        """The key of one site's self mask, and its masked body."""
        quantized = quantize(
            LocalUpdate(update), np.zeros(0, np.int64), sizes=self.sizes, exponents=self.exponents,
            weight=self.weights[site], weight_cap=self.weight_cap, ring=self.ring,
        )  # fmt: skip
        chains = [
            b"" if other == site else derive(b"", "pair", min(site, other), max(site, other))
            for other in range(len(self.weights))
        ]
        drawn: list[bytes] = []

        def random(num_bytes: int) -> bytes:
            drawn.append(os.urandom(num_bytes))
            return drawn[-1]

        place = Place(b"r" * 32, 0, b"t" * 32, site, THRESHOLD)
        protected = protect(
            quantized, place, chains, self.signer,
            statement="", bits=self.ring.bits, threads=2, random=random,
        )  # fmt: skip
        return drawn[0], protected.body


def synthetic(scales: NDArray[np.float64], rng: np.random.Generator) -> list[Update]:
    """One round's updates: sites agree in part."""
    common = rng.laplace(size=scales.size)
    return [
        (scales * (common + rng.laplace(size=scales.size))).astype(np.float32)
        for _ in range(NUM_SITES)
    ]


@pytest.mark.parametrize("bits", BOUNDS)
def test_the_mean_of_synthetic_updates_is_as_exact_as_the_ring_allows(
    bits: int, members: Sequence[Identity], rng: np.random.Generator
) -> None:
    study = load(STUDY, Study)
    sizes = [min(size, MOST_ENTRIES) for size in build_network(study).schema.sizes]
    weights = rng.integers(200, 600, NUM_SITES).tolist()
    federation = Federation(study, sizes, weights, bits, members[0])
    # Tensors differ in scale by a thousand, and keep their scales.
    scales = np.repeat(10.0 ** rng.uniform(-5, -2, len(sizes)), sizes)
    errors = [federation.error_of_mean(synthetic(scales, rng)) for _ in range(4)]
    assert errors[-1] <= BOUNDS[bits]
    assert errors[-1] >= BOUNDS[bits] / 50  # rounding is there: the bound can be missed


@pytest.mark.parametrize("bits", BOUNDS)
def test_a_bias_on_which_the_sites_disagree_is_not_lost_in_the_next_round(
    bits: int, members: Sequence[Identity], rng: np.random.Generator
) -> None:
    """What sites say of a single entry may cancel in one sum and not in the next."""
    sizes = [MOST_ENTRIES, 1]
    federation = Federation(load(STUDY, Study), sizes, [590] * NUM_SITES, bits, members[0])
    signs = np.array([1, -1] * (NUM_SITES // 2))
    for disagree in (signs, signs, signs, abs(signs)):
        updates = synthetic(np.full(sum(sizes), 1e-3), rng)
        for update, sign in zip(updates, disagree, strict=True):
            update[-1] = 1e-3 * (sign + 0.01)
        error = federation.error_of_mean(updates)
    assert error <= BOUNDS[bits]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_mean_of_real_updates_is_as_exact_as_the_ring_allows(
    real_data: Path,
    tmp_path: Path,
    members: Sequence[Identity],
    record_property: Callable[[str, object], None],
) -> None:
    names = tuple(f"site-{k + 1}" for k in range(NUM_SITES))
    study = load(STUDY, Study).with_members(names)
    data = {"name": "pneumonia", "format": "npz", "root": str(real_data / "pneumonia")}
    simulation = Simulation(num_sites=NUM_SITES, data=data)
    sites = [simulated_site(study, simulation, k, run_dir=tmp_path) for k in range(NUM_SITES)]
    network, weights = sites[0].network, [site.weight for site in sites]

    def trained(model: Update, round_number: int) -> list[Update]:
        rate = learning_rate(study.training, round_number, study.num_rounds)
        return [
            train(
                model, site.data.train, study.training,
                network=network, task=site.task, rate=rate, rng=site.rng(round_number),
            ).values
            for site in sites
        ]  # fmt: skip

    start = network.vector()
    first = trained(start, 1)
    mean = np.average(first, axis=0, weights=weights).astype(np.float32)
    second = trained(start + mean, 2)
    found = {}
    for bits in BOUNDS:
        federation = Federation(study, network.schema.sizes, weights, bits, members[0])
        # The first round stands for three: the steps of some tensors need them to fit.
        errors = [federation.error_of_mean(first) for _ in range(3)]
        found[bits] = federation.error_of_mean(second)
        record_property(f"errors at {bits} bits", [*errors, found[bits]])
    assert {bits: error for bits, error in found.items() if error > BOUNDS[bits]} == {}
