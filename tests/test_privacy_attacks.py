"""Attacks that must fail, on trainings that are small and real; and that the attacks can see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import tiny_study
from scipy.stats import binom

from client.attacks.audit import Audit, audit, has_leaked
from client.attacks.inversion import Recovered
from client.attacks.membership import Membership, lower_bound, make_canaries, p_value
from client.images import Images
from common.errors import ConfigError
from common.study import Study

FEW = {"num_inverted": 2, "seed": 1}
ROOT = Path(__file__).resolve().parent.parent


def private_study(**changes: object) -> Study:
    return tiny_study(
        num_rounds=10,
        model={"name": "cnn", "width": 12, "activation": "gelu"},
        input={"size": [28, 28], "mean": 0.5, "std": 0.25},
        training={"learning_rate": 1.0, "batch_size": 80, "local_steps": 8},
        privacy={
            "unit": "image",
            "epsilon": 3.0,
            "delta": 1e-4,
            "example_clip_norm": 1.0,
            "randomness": "seeded",
            **changes,
        },
    )


def smooth_images(num: int) -> Images:
    """Blobs, each of its own: as unlike as radiographs are, and as smooth."""
    rng = np.random.default_rng(5)
    down, across = np.mgrid[0:28, 0:28]
    pixels = np.zeros((num, 1, 28, 28), np.float32)
    for number in range(num):
        for _ in range(5):
            (y, x), size, height = rng.uniform(3, 25, 2), rng.uniform(2, 6), rng.uniform(-2, 2)
            pixels[number, 0] += height * np.exp(
                -((down - y) ** 2 + (across - x) ** 2) / (2 * size**2)
            )
    return Images(
        torch.from_numpy(pixels.clip(-2, 2)), torch.arange(num) % 2, tuple(map(str, range(num)))
    )


@pytest.fixture(scope="module")
def attacked() -> Audit:
    torch.set_num_threads(1)
    return audit(
        private_study(),
        smooth_images(40),
        [1.0, 8.0],
        num_canaries=160,
        num_background=30,
        **FEW,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_who_was_trained_on_shows_without_privacy_and_stays_below_epsilon_with_it(
    attacked: Audit,
) -> None:
    plain, *private = attacked.membership
    assert plain.epsilon is None
    assert plain.bound > 2
    assert [round(one.epsilon or 0) for one in private] == [1, 8]
    for one in private:
        assert one.epsilon is not None
        assert one.bound < one.epsilon


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plain_update_shows_its_image_and_a_noised_or_masked_one_does_not(
    attacked: Audit,
) -> None:
    for results in attacked.inversion:
        by_kind = {one.kind: one for one in results}
        assert by_kind["plain"].to_own > 0.5
        assert has_leaked(by_kind["plain"])
        for kind in ("noised", "masked"):
            assert not has_leaked(by_kind[kind])
            assert by_kind[kind].to_own < 0.3
    assert list(attacked.failures()) == []


def test_a_bound_that_is_too_high_and_an_attack_that_is_blind_are_failures() -> None:
    image = np.zeros((1, 8, 8), np.float32)
    found = Audit(
        membership=(
            Membership(None, 1e-5, 100, 50, 30, 0.4),
            Membership(1.0, 1e-5, 100, 50, 49, 2.2),
        ),
        inversion=(
            (
                Recovered("plain", image, 0.2, (0.1,)),
                Recovered("noised", image, 0.6, (0.1,)),
                Recovered("masked", image, 0.02, (0.01,)),
            ),
        ),
        originals=image[None],
    )
    said = list(found.failures())
    assert len(said) == 4
    assert "the attack is blind" in said[0]
    assert "the guarantee does not hold" in said[1]
    assert said[2:] == [
        "inversion: image 0 was not recovered from a plain update",
        "inversion: image 0 was recovered from a noised update",
    ]


def test_the_bound_exceeds_epsilon_in_at_most_5_percent_of_all_runs() -> None:
    """Randomised response with epsilon is the mechanism that gives guessers most."""
    rng = np.random.default_rng(3)
    epsilon, num = 1.5, 100
    right = rng.binomial(num, np.exp(epsilon) / (1 + np.exp(epsilon)), size=400)
    bounds = {n: lower_bound(num, num, int(n), 0.0) for n in set(right)}
    share = np.mean([bounds[n] > epsilon for n in right])
    assert share <= 0.08  # 5 %, and three standard deviations of 400 draws
    assert np.mean([bounds[n] for n in right]) > 0.8  # a bound of 0 would pass, and tell nothing


def test_guesses_that_are_all_right_give_what_the_binomial_gives() -> None:
    bound = lower_bound(100, 50, 50, 0.0)
    chance = 1 / (1 + np.exp(-bound))
    assert chance**50 == pytest.approx(0.05, rel=1e-3)
    assert lower_bound(100, 50, 25, 0.0) == 0.0
    assert lower_bound(100, 50, 50, 1e-3) < bound
    assert p_value(100, 50, 50, 1.0, 0.0) == pytest.approx(
        binom.sf(49, 50, 1 / (1 + np.exp(-1.0))), rel=1e-9
    )


def test_canaries_are_in_or_out_by_a_fair_coin_and_labels_are_balanced() -> None:
    images, is_in = make_canaries(private_study(), 400, seed=2)
    assert 160 < is_in.sum() < 240
    assert abs(int(images.targets.sum()) - 200) <= 1
    assert abs(np.corrcoef(images.targets.numpy(), is_in)[0, 1]) < 0.2


def test_a_study_without_privacy_has_nothing_to_withstand() -> None:
    with pytest.raises(ConfigError, match=r"\[privacy\] is needed"):
        audit(tiny_study(), smooth_images(4), [1.0], num_canaries=40, num_background=2, **FEW)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_writes_figures_and_pictures_and_its_exit_code_is_the_verdict(
    tmp_path: Path,
) -> None:
    command = [
        *(
            sys.executable,
            ROOT / "scripts/audit-privacy",
            "--study",
            ROOT / "studies/demo-seeded.toml",
        ),
        *("--run-dir", tmp_path, "--epsilon", "3", "--canaries", "40", "--background", "8"),
        *("--images", "2", "--steps", "40"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    table = json.loads((tmp_path / "attacks.json").read_text())
    assert done.returncode == (1 if table["failures"] else 0)
    assert [row["epsilon"] is None for row in table["membership"]] == [True, False]
    with np.load(tmp_path / "attacks.npz") as arrays:
        assert {arrays[kind].shape for kind in arrays} == {(2, 1, 32, 32)}
