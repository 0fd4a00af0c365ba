"""Dealing one data set out: each case to one site, patient by patient, by the seed alone."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import partition
from client.partition import MIN_TRAIN_PATIENTS, deal
from client.readers.case import Case, Split
from common.errors import ConfigError

Splits = dict[Split, list[Case]]


def case(patient: str, target: int | list[int], split: Split) -> Case:
    return Case(f"{split} {patient}", patient, split, np.array(target, np.int64), lambda: None)


def data_set(
    num_train: int = 300,
    num_val: int = 40,
    num_test: int = 50,
    *,
    images: int = 1,
    classes: int = 2,
) -> Splits:
    """Patients with ``images`` images each; class 0 is the most common one."""
    rng = np.random.default_rng(num_train)
    sizes = dict(zip(Split, (num_train, num_val, num_test), strict=True))
    odds = np.arange(classes, 0, -1) / np.arange(1, classes + 1).sum()
    return {
        split: [
            case(f"{split}-{k}", int(rng.choice(classes, p=odds)), split)
            for k in range(num)
            for _ in range(images)
        ]
        for split, num in sizes.items()
    }


def train_patients(site: Splits) -> set[str]:
    return {member.patient for member in site[Split.TRAIN]}


def class_counts(sites: list[Splits], classes: int = 2) -> list[list[int]]:
    counts = [Counter(int(member.target) for member in site[Split.TRAIN]) for site in sites]
    return [[count[k] for k in range(classes)] for count in counts]


def names(sites: list[Splits]) -> list[dict[str, list[str]]]:
    return [{split: [c.name for c in part] for split, part in site.items()} for site in sites]


RULES = st.one_of(st.just("iid"), st.sampled_from(["dirichlet:0.5", "dirichlet:1", "dirichlet:9."]))


@settings(max_examples=40)
@given(RULES, st.integers(3, 6), st.integers(0, 2**63 - 1), st.integers(1, 3), st.integers(2, 5))
def test_every_case_of_every_split_is_dealt_to_exactly_one_site(
    rule: str, num_sites: int, seed: int, images: int, classes: int
) -> None:
    whole = data_set(images=images, classes=classes)
    sites = deal(whole, rule=rule, num_sites=num_sites, seed=seed)
    assert len(sites) == num_sites
    for split, cases in whole.items():
        dealt = [id(member) for site in sites for member in site[split]]
        assert sorted(dealt) == sorted(map(id, cases))
        owners = [{member.patient for member in site[split]} for site in sites]
        assert sum(map(len, owners)) == len(set().union(*owners))  # a patient stays together


@settings(max_examples=15)
@given(st.integers(0, 2**63 - 1))
def test_dirichlet_leaves_every_site_enough_training_patients(seed: int) -> None:
    sites = deal(data_set(400, images=2), rule="dirichlet:0.3", num_sites=5, seed=seed)
    assert min(len(train_patients(site)) for site in sites) >= MIN_TRAIN_PATIENTS == 20


def test_iid_gives_equal_shares_of_every_class_to_every_site() -> None:
    sites = deal(data_set(600, classes=4), rule="iid", num_sites=5, seed=1)
    for counts in zip(*class_counts(sites, classes=4), strict=True):
        assert max(counts) - min(counts) <= 1
    assert {len(site[Split.VALIDATION]) for site in sites} <= set(range(6, 11))


def test_iid_takes_few_patients_too() -> None:
    sites = deal(data_set(9, 3, 3), rule="iid", num_sites=3, seed=1)
    assert sum(len(train_patients(site)) for site in sites) == 9


def test_a_small_concentration_makes_sites_differ_and_a_large_one_does_not() -> None:
    def spread(rule: str) -> float:
        shares = [
            positive / (negative + positive)
            for seed in range(8)
            for negative, positive in class_counts(
                deal(data_set(600), rule=rule, num_sites=4, seed=seed)
            )
        ]
        return float(np.std(shares))

    assert spread("dirichlet:0.5") > 4 * spread("dirichlet:500") > 0
    assert spread("iid") < 0.01


def test_the_shares_of_a_class_are_the_same_in_every_split() -> None:
    whole = data_set(2000, 1000, 1000)
    sites = deal(whole, rule="dirichlet:0.5", num_sites=4, seed=3)
    for site in sites:
        share = {
            split: [
                sum(int(c.target) == k for c in site[split])
                / sum(int(c.target) == k for c in whole[split])
                for k in range(2)
            ]
            for split in Split
        }
        assert np.allclose(share[Split.TRAIN], share[Split.TEST], atol=0.005)
        assert np.allclose(share[Split.TRAIN], share[Split.VALIDATION], atol=0.005)


@pytest.mark.parametrize("rule", ["iid", "dirichlet:0.5"])
def test_the_seed_alone_decides(rule: str) -> None:
    whole = data_set()
    one = names(deal(whole, rule=rule, num_sites=4, seed=7))
    np.random.seed(0)  # noqa: NPY002 - the global generator must not matter
    assert one == names(deal(whole, rule=rule, num_sites=4, seed=7))
    assert one != names(deal(whole, rule=rule, num_sites=4, seed=8))


def test_the_order_of_cases_at_a_site_is_that_of_the_data_set() -> None:
    whole = data_set()
    place = {id(member): number for number, member in enumerate(whole[Split.TRAIN])}
    for site in deal(whole, rule="iid", num_sites=4, seed=7):
        order = [place[id(member)] for member in site[Split.TRAIN]]
        assert order == sorted(order)


def test_a_patient_with_images_of_two_classes_goes_with_the_first() -> None:
    whole = data_set(0, 0, 0)
    for k in range(300):
        images = [(0, 0), (0, 1), (1, 0)][k % 3]
        whole[Split.TRAIN] += [case(f"p{k}", label, Split.TRAIN) for label in images]
    sites = deal(whole, rule="iid", num_sites=4, seed=2)
    firsts = [Counter(int(c.target) for c in site[Split.TRAIN][::2]) for site in sites]
    assert [(first[0], first[1]) for first in firsts] == [(50, 25)] * 4


def test_multi_label_cases_are_dealt_by_their_first_label() -> None:
    rng = np.random.default_rng(5)
    whole = data_set(0, 0, 0)
    for k in range(600):
        labels = [[0, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1]][rng.integers(4)]
        whole[Split.TRAIN].append(case(f"p{k}", labels, Split.TRAIN))
    sites = deal(whole, rule="iid", num_sites=4, seed=1)
    counts = [Counter(tuple(c.target.tolist()) for c in site[Split.TRAIN]) for site in sites]
    for labels in counts[0]:
        assert max(c[labels] for c in counts) - min(c[labels] for c in counts) <= 1


@pytest.mark.parametrize(
    ("num_patients", "rule", "num_sites"),
    [(59, "dirichlet:100", 3), (200, "dirichlet:1", 11), (300, "dirichlet:0.0001", 5)],
)
def test_an_impossible_deal_is_refused_with_the_next_move(
    num_patients: int, rule: str, num_sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "MAX_DRAWS", 50)
    settings_: dict[str, Any] = {"rule": rule, "num_sites": num_sites, "seed": 1}
    with pytest.raises(ConfigError, match="use fewer sites or") as refused:
        deal(data_set(num_patients), **settings_)
    assert f"partition {rule}" in str(refused.value)
    assert f"{num_sites} sites" in str(refused.value)
