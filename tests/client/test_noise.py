"""Noise of the stated scale is accepted, two thirds of it is rejected; also in what is sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from federation import tiny_study
from numpy.typing import NDArray
from scipy import stats

from client.images import Images
from client.noise import Keystream
from client.train import draw_units, train_privately
from common.accounting import Event
from common.models.build import build_network
from common.plan import PrivacyPlan
from common.study import Augmentation, DifferentialPrivacy
from common.tasks import task_of


def _p_value(sample: NDArray[np.float64], scale: float) -> float:
    """Of a chi-square test that the variance is ``scale`` squared, two-sided."""
    statistic = float((sample**2).sum() / scale**2)
    below = stats.chi2.cdf(statistic, len(sample))
    return float(2 * min(below, 1 - below))


def test_the_stated_scale_is_accepted_and_two_thirds_of_it_rejected() -> None:
    sample = Keystream.from_seed("scale").gaussians(100_000)
    assert _p_value(sample, 1.0) > 1e-4
    assert _p_value(sample * 2 / 3, 1.0) < 1e-12
    assert stats.kstest(sample, "norm").pvalue > 1e-4


def test_streams_of_the_operating_system_never_repeat_and_seeded_ones_do() -> None:
    assert not np.array_equal(Keystream.from_os().integers(4), Keystream.from_os().integers(4))
    one, other = Keystream.from_seed(1, 2, 3), Keystream.from_seed(1, 2, 3)
    assert np.array_equal(one.gaussians(1000), other.gaussians(1000))
    assert not np.array_equal(Keystream.from_seed(1, 23).integers(4), one.integers(4))


def test_the_four_numbers_of_one_mix_are_independent() -> None:
    quarters = Keystream.from_seed("mix").gaussians(4 * 50_000).reshape(4, -1)
    assert np.abs(np.corrcoef(quarters) - np.eye(4)).max() < 5 / np.sqrt(50_000)
    assert np.abs(np.corrcoef(quarters**2) - np.eye(4)).max() < 5 / np.sqrt(50_000)
    assert len(np.unique(quarters)) == quarters.size


@pytest.mark.parametrize("num", [0, 1, 2, 3, 5, 70_001])
def test_any_number_of_values_is_noised(num: int) -> None:
    values = torch.full((num,), 3.0)
    noised = Keystream.from_seed("num").add_noise(values, 2.0)
    assert noised is values
    assert values.dtype == torch.float32
    assert not num or float((values == 3.0).float().mean()) == 0


def test_noise_hides_the_low_bits_of_what_it_is_added_to() -> None:
    """Where noise and value nearly cancel, coarse noise would leave the value's own last bits."""
    value = torch.full((2_000_000,), 1.0 + 2.0**-23)
    sums = Keystream.from_seed("bits").add_noise(value, 1.0).double()
    small = sums[sums.abs() < 2.0**-10]
    assert len(small) > 500
    # Multiples of the value's own last bit, which float32 noise of that size would give.
    assert float((small * 2.0**24 % 1 == 0).double().mean()) < 0.01


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    sample = Keystream.from_seed("uniform").uniforms(100_000)
    assert sample.min() >= 0
    assert sample.max() < 1
    assert stats.kstest(sample, "uniform").pvalue > 1e-4


def _private(probability: float, steps: int, noise: float, **terms: object) -> PrivacyPlan:
    privacy = DifferentialPrivacy(
        noise_multiplier=noise, delta=1e-5, example_clip_norm=0.5, **terms
    )
    return PrivacyPlan(Event(noise, probability, steps), 40, 1, privacy)


def _images(num_patients: int, each: int) -> Images:
    num = num_patients * each
    pixels = torch.randn((num, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    patients = tuple(str(k // each) for k in range(num))
    return Images(pixels, torch.arange(num) % 2, patients)


def test_the_noise_really_is_in_what_leaves_the_training() -> None:
    study = tiny_study(model={"name": "cnn", "width": 24})
    network, task = build_network(study), task_of(study)
    start = network.vector()

    def update(noise: float, probability: float) -> NDArray[np.float64]:
        return train_privately(
            start,
            _images(40, 1),
            study.training,
            _private(probability, 1, noise),
            network=network,
            task=task,
            rate=1.0,
            secrets=Keystream.from_seed("seam"),
        ).values.astype(np.float64)

    # Nobody is drawn: what is left is noise of noise multiplier * clip norm / expected batch.
    probability = 1e-12
    scale = 2.0 * 0.5 / (probability * 40)
    sample = update(2.0, probability)
    assert _p_value(sample, scale) > 1e-4
    assert _p_value(sample * 2 / 3, scale) < 1e-12


def test_each_patient_is_drawn_with_the_sampling_probability() -> None:
    images, plan = _images(200, 2), _private(0.3, 1, 1.0, max_images_per_patient=1)
    members = [np.array([2 * k, 2 * k + 1]) for k in range(200)]
    secrets = Keystream.from_seed("draw")
    drawn = [
        len(draw_units(images, members, Augmentation(), plan, secrets).sizes) for _ in range(100)
    ]
    assert stats.binomtest(sum(drawn), 200 * 100, 0.3).pvalue > 1e-4
    assert np.std(drawn) == pytest.approx(np.sqrt(200 * 0.3 * 0.7), rel=0.3)


def test_at_most_k_images_of_a_patient_are_in_one_step() -> None:
    images, plan = _images(30, 5), _private(1.0, 1, 1.0, max_images_per_patient=2)
    members = [np.arange(5 * k, 5 * k + 5) for k in range(30)]
    units = draw_units(images, members, Augmentation(), plan, Keystream.from_seed("k"))
    assert units.sizes == (2,) * 30
    assert len(units.pixels) == 60


def test_how_many_threads_make_the_noise_cannot_be_seen() -> None:
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(Keystream.from_seed(1).add_noise(torch.ones(700_001), 0.5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_a_noised_sum_is_divided_after_it_was_rounded() -> None:
    whole, part = (Keystream.from_seed(1).add_noise(torch.ones(9), 0.5, by) for by in (1.0, 3.0))
    assert torch.equal(part, whole / 3)


def test_no_two_blocks_and_no_two_steps_share_their_noise() -> None:
    stream, size = Keystream.from_seed(1), 1 << 17
    one, other = (stream.add_noise(torch.zeros(3 * size), 1.0) for _ in range(2))
    parts = [*one.split(size), *other.split(size)]
    correlations = torch.corrcoef(torch.stack(parts)) - torch.eye(len(parts))
    assert float(correlations.abs().max()) < 0.02  # seven standard deviations
