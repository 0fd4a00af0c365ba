"""Deal one data set out over the sites of a simulation.

Train, validation and test are dealt out by the same rule, patient by patient, so every test image
lies at exactly one site and the summed figure is that of the whole test split.

Source: Hsu, Qi and Brown (2019), Measuring the Effects of Non-Identical Data Distribution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from client.readers.case import Case, Split
from common.errors import ConfigError

MIN_TRAIN_PATIENTS = 20
MAX_DRAWS = 10_000

Splits = Mapping[Split, Sequence[Case]]


def deal(splits: Splits, *, rule: str, num_sites: int, seed: int) -> list[dict[Split, list[Case]]]:
    """One dictionary of cases per site.

    Args:
      splits: The whole data set by split.
      rule: ``iid`` (equal shares at random), ``dirichlet:A`` (per class, shares over the sites
        drawn from a symmetric Dirichlet distribution with concentration A), or ``column:NAME`` (by
        a column of the data's table: patients with one value share a site).
      num_sites: Number of sites.
      seed: Equal seeds give equal deals.

    Raises:
      ConfigError: No deal leaves each site at least 20 training patients; or the rule does not fit
        the data.
    """
    num_patients = len({case.patient for case in splits[Split.TRAIN]})
    if num_patients < num_sites:
        raise ConfigError(f"{num_patients} training patients cannot make {num_sites} sites")
    if rule.startswith("column:"):
        return _deal_by_column(splits, rule.removeprefix("column:"), num_sites)
    if rule != "iid" and any(case.target is None for cases in splits.values() for case in cases):
        raise ConfigError(
            f"partition {rule}: masks and boxes have no class to deal by; use iid or column:NAME"
        )
    if rule != "iid" and num_patients < MIN_TRAIN_PATIENTS * num_sites:
        raise ConfigError(
            f"partition {rule}: {num_patients} training patients cannot give {num_sites} sites "
            f"{MIN_TRAIN_PATIENTS} each; use fewer sites or iid"
        )
    rng = np.random.default_rng([seed, 0x6465616C])  # "deal": a stream of its own
    num_groups = 1 + max((_group(c) for cases in splits.values() for c in cases), default=0)
    for _ in range(MAX_DRAWS):
        shares = _draw_shares(rule, num_groups, num_sites, rng)
        dealt = {split: _deal_split(cases, shares, rng) for split, cases in splits.items()}
        sites = [{split: parts[k] for split, parts in dealt.items()} for k in range(num_sites)]
        if rule == "iid" or min(map(_num_train_patients, sites)) >= MIN_TRAIN_PATIENTS:
            return sites
    raise ConfigError(
        f"partition {rule} over {num_sites} sites: no draw of {MAX_DRAWS} gave each site "
        f"{MIN_TRAIN_PATIENTS} training patients; use fewer sites or a larger concentration"
    )


def _deal_by_column(splits: Splits, column: str, num_sites: int) -> list[dict[Split, list[Case]]]:
    """Values with the most training patients first, each to the site with the fewest so far."""
    every = [case for cases in splits.values() for case in cases]
    if missing := [case for case in every if not case.columns.get(column)]:
        known = ", ".join(every[0].columns) or "none: only csv tables have columns"
        raise ConfigError(
            f"partition column:{column}: {missing[0].name} has no value there (columns: {known})"
        )
    value_of = {case.patient: case.columns[column] for case in reversed(every)}
    patients = {case.patient for case in splits[Split.TRAIN]}
    num_patients = Counter(value_of[patient] for patient in patients)
    values = sorted(set(value_of.values()), key=lambda value: (-num_patients[value], value))
    if len([value for value in values if num_patients[value]]) < num_sites:
        raise ConfigError(
            f"partition column:{column}: {len(num_patients)} values with training patients cannot "
            f"make {num_sites} sites"
        )
    size_of, site_of = [0] * num_sites, {}
    for value in values:
        site_of[value] = min(range(num_sites), key=size_of.__getitem__)
        size_of[site_of[value]] += num_patients[value]
    return [
        {
            split: [case for case in cases if site_of[value_of[case.patient]] == site]
            for split, cases in splits.items()
        }
        for site in range(num_sites)
    ]


def _draw_shares(
    rule: str, num_groups: int, num_sites: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Shares of each class over the sites, shape (num_groups, num_sites); rows add up to 1."""
    if rule == "iid":
        return np.full((num_groups, num_sites), 1 / num_sites)
    concentration = float(rule.removeprefix("dirichlet:"))
    return rng.dirichlet([concentration] * num_sites, size=num_groups)


def _deal_split(
    cases: Sequence[Case], shares: NDArray[np.float64], rng: np.random.Generator
) -> list[list[Case]]:
    site_of = _deal_patients(cases, shares, rng)
    parts: list[list[Case]] = [[] for _ in range(shares.shape[1])]
    for case in cases:
        parts[site_of[case.patient]].append(case)
    return parts


def _deal_patients(
    cases: Sequence[Case], shares: NDArray[np.float64], rng: np.random.Generator
) -> dict[str, int]:
    """The site of each patient; a patient goes with the class of the first of its images."""
    groups: dict[int, list[str]] = {group: [] for group in range(len(shares))}
    for patient, group in {case.patient: _group(case) for case in reversed(cases)}.items():
        groups[group].append(patient)
    site_of = {}
    for group, patients in groups.items():
        order = rng.permutation(len(patients))
        ends = np.floor(np.cumsum(shares[group]) * len(patients) + 1e-9).astype(np.int64)
        ends[-1] = len(patients)
        sites = np.searchsorted(ends, np.arange(len(patients)), side="right")
        for position, site in zip(order, sites, strict=True):
            site_of[patients[position]] = int(site)
    return site_of


def _group(case: Case) -> int:
    """The class that a patient is dealt out by; of several labels, the first that is present."""
    if case.target is None:
        return 0
    if case.target.ndim == 0:
        return int(case.target)
    present = np.flatnonzero(case.target)
    return int(present[0]) + 1 if present.size else 0


def _num_train_patients(site: Mapping[Split, Sequence[Case]]) -> int:
    return len({case.patient for case in site[Split.TRAIN]})
