"""Dealing one data set out: each case to one site, patient by patient, by the seed alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client import partition
from client.config import CsvData, PhantomData
from client.dataset import load_site_data
from client.partition import MIN_TRAIN_PATIENTS, deal
from client.readers import Wanted, read_cases
from client.readers.case import Case, Split
from client.splits import Deal
from common.errors import ConfigError
from common.study import Study

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


def of_ward(patient: str, ward: str, split: Split = Split.TRAIN) -> Case:
    columns = {"image": f"{patient}.png", "ward": ward}
    return Case(f"{split} {patient}", patient, split, None, lambda: None, columns=columns)


def wards(**num_patients: int) -> Splits:
    """Training patients by ward, and for every second of them a patient in validation and test."""
    whole: Splits = {split: [] for split in Split}
    for ward, num in num_patients.items():
        for split, share in zip(Split, (1, 2, 2), strict=True):
            for k in range(-(-num // share)):
                whole[split] += [of_ward(f"{ward}-{split}-{k}", ward, split)] * 2
    return whole


def by_ward(whole: Splits, num_sites: int, seed: int = 1) -> list[Splits]:
    return deal(whole, rule="column:ward", num_sites=num_sites, seed=seed)


def wards_of(site: Splits) -> set[str]:
    return {member.columns["ward"] for part in site.values() for member in part}


WARDS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4), st.integers(1, 30), min_size=3, max_size=12
)


@given(WARDS, st.integers(1, 3))
def test_a_column_deals_patients_of_one_value_to_one_site_and_every_case_once(
    num_patients: dict[str, int], num_sites: int
) -> None:
    whole = wards(**num_patients)
    sites = by_ward(whole, num_sites)
    assert len(sites) == num_sites
    owned = [wards_of(site) for site in sites]
    assert sum(map(len, owned)) == len(set().union(*owned)) == len(num_patients)
    for split, cases in whole.items():
        dealt = [member.name for site in sites for member in site[split]]
        assert sorted(dealt) == sorted(member.name for member in cases)
    sizes = [len(train_patients(site)) for site in sites]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= max(num_patients.values())


def test_values_of_a_column_are_put_together_so_that_sites_are_alike_in_size() -> None:
    sites = by_ward(wards(a=5, b=30, c=10, d=20, e=10, f=5), 3)
    assert sorted(len(train_patients(site)) for site in sites) == [25, 25, 30]


def test_as_many_values_as_sites_give_each_site_one() -> None:
    sites = by_ward(wards(east=3, west=40, north=7), 3)
    assert [wards_of(site) for site in sites] == [{"west"}, {"north"}, {"east"}]


def test_neither_seed_nor_order_of_the_table_moves_a_value_to_another_site() -> None:
    whole = wards(a=5, b=5, c=10, d=10, e=2)
    one = [wards_of(site) for site in by_ward(whole, 3)]
    assert one == [wards_of(site) for site in by_ward(whole, 3, seed=2)]
    turned = {split: cases[::-1] for split, cases in whole.items()}
    assert one == [wards_of(site) for site in by_ward(turned, 3)]


def test_a_value_without_training_patients_goes_to_one_site_too() -> None:
    whole = wards(a=4, b=4, c=4)
    whole[Split.TEST] += [of_ward(f"new-{k}", "new", Split.TEST) for k in range(5)]
    sites = by_ward(whole, 3)
    assert sum("new" in wards_of(site) for site in sites) == 1
    assert sum(len(site[Split.TEST]) for site in sites) == len(whole[Split.TEST])


def test_a_patient_with_two_values_goes_with_the_first() -> None:
    whole = wards(a=4, b=3)
    whole[Split.TRAIN] += [of_ward("moved", "a"), of_ward("moved", "b"), of_ward("moved", "b")]
    sites = by_ward(whole, 2)
    (site,) = [site for site in sites if "moved" in train_patients(site)]
    assert "a-train-0" in train_patients(site)
    assert sum(member.patient == "moved" for member in site[Split.TRAIN]) == 3


WRONG_COLUMNS = {
    "fewer values than sites": (
        wards(a=4, b=3), "column:ward", "2 values with training patients cannot make 3 sites"
    ),
    "values that only test patients have": (
        {**wards(a=4, b=3), Split.TEST: [of_ward("x", "c", Split.TEST)]}, "column:ward",
        "2 values with training patients cannot make 3 sites",
    ),
    "no such column": (
        wards(a=4, b=3, c=3), "column:clinic", "has no value there (columns: image, ward)"
    ),
    "an empty cell": (
        {**wards(a=4, b=3, c=3), Split.TEST: [of_ward("x", "", Split.TEST)]}, "column:ward",
        "test x has no value there",
    ),
    "a format without columns": (
        data_set(60), "column:ward", "none: only csv tables have columns"
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", WRONG_COLUMNS)
def test_a_column_that_cannot_be_dealt_by_is_refused(title: str) -> None:
    whole, rule, sentence = WRONG_COLUMNS[title]
    with pytest.raises(ConfigError, match=f"^partition {rule}: ") as refused:
        deal(whole, rule=rule, num_sites=3, seed=1)
    assert sentence in str(refused.value)


def test_masks_have_no_class_to_deal_by_but_are_dealt_at_random() -> None:
    whole = wards(a=80, b=40, c=30)
    with pytest.raises(ConfigError, match="boxes have no class to deal by; use iid or column:"):
        deal(whole, rule="dirichlet:1", num_sites=3, seed=1)
    sites = deal(whole, rule="iid", num_sites=3, seed=1)
    assert [len(train_patients(site)) for site in sites] == [50, 50, 50]


def test_phantoms_have_the_columns_of_their_record_alone() -> None:
    wanted = Wanted("binary", ("no lesion", "lesion"), channels=1, size=(32, 32))
    cases = read_cases(PhantomData(name="phantoms", format="phantom", num_patients=4), wanted)
    with pytest.raises(ConfigError, match="columns: age, sex, smoking, crp, admitted"):
        deal({Split.TRAIN: cases}, rule="column:ward", num_sites=3, seed=1)


def test_every_test_image_of_a_table_lies_at_exactly_one_site(
    tmp_path: Path, make_study: Callable[..., Study]
) -> None:
    lines = ["image,label,who,ward"]
    for k in range(60):
        Image.new("L", (8, 8), k + 1).save(tmp_path / f"{k}.png")
        lines.append(f"{k}.png,{('mass', 'air')[k % 2]},p{k // 2},{'abcd'[k // 2 % 4]}")
    (tmp_path / "scans.csv").write_text("\n".join(lines))
    data = CsvData(name="scans", format="csv", root=tmp_path, table="scans.csv", target="label",
                   patient="who", splits={"validation": 0.2, "test": 0.3})  # fmt: skip
    changes = {"input.size": [8, 8], "input.intensity": "dtype", "task.classes": ["mass", "air"]}
    study = make_study(changes)
    whole = load_site_data(data, study)
    sites = [load_site_data(data, study, Deal("column:ward", 3, k, study.seed)) for k in range(3)]

    def grey(part: Any) -> list[int]:
        return (255 * part.pixels[:, 0, 0, 0]).round().int().tolist()

    for split in ("train", "validation", "test"):
        dealt = [value for site in sites for value in grey(getattr(site, split))]
        assert sorted(dealt) == sorted(grey(getattr(whole, split)))
        assert dealt
    found = [
        {"abcd"[(value - 1) // 2 % 4] for part in (site.train, site.test) for value in grey(part)}
        for site in sites
    ]
    assert sum(map(len, found)) == len(set().union(*found)) == 4
