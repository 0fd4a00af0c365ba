"""Which part of a data set each case belongs to, by patient; no pixel is read."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client.config import Data
from client.partition import deal
from client.readers import read_cases
from client.readers.case import Case, Split, Wanted
from common.errors import DataError
from common.study import DifferentialPrivacy, Study

VALIDATION_SHARE = 0.1  # of the training patients, where a data set has no validation split


@dataclass(frozen=True)
class Deal:
    """Which part of a shared data set belongs to this site of a simulation."""

    rule: str
    num_sites: int
    site_index: int
    seed: int


def count_training_units(data: Data, study: Study, dealt: Deal | None) -> int:
    """Training patients of one simulated site; no pixel is prepared.

    With ``privacy.unit = "image"`` every image is a unit of its own.
    """
    cases = dealt_cases(data, study, dealt)[Split.TRAIN]
    if isinstance(study.privacy, DifferentialPrivacy) and study.privacy.unit == "image":
        return len(cases)
    return len({case.patient for case in cases})


def dealt_cases(data: Data, study: Study, dealt: Deal | None) -> Mapping[Split, Sequence[Case]]:
    """A site's cases by split; in a simulation, of what several sites share.

    Raises:
      DataError: The data set cannot be listed; or a patient is in two splits.
    """
    wanted = Wanted.by(study)
    if dealt is None:
        return split_cases(read_cases(data, wanted), data)
    return _all_dealt(data, wanted, dealt.rule, dealt.num_sites, dealt.seed)[dealt.site_index]


@functools.lru_cache(maxsize=1)  # the sites of one simulation share the files
def _all_dealt(
    data: Data, wanted: Wanted, rule: str, num_sites: int, seed: int
) -> list[dict[Split, list[Case]]]:
    splits = split_cases(read_cases(data, wanted), data)
    return deal(splits, rule=rule, num_sites=num_sites, seed=seed)


def split_cases(cases: Sequence[Case], data: Data) -> dict[Split, list[Case]]:
    """Cases by split: the data set's own where it has one, else by a hash of the patient.

    A patient's split depends on its id and the split seed alone, so adding a patient moves nobody.
    """
    official = any(case.split is not None for case in cases)
    splits: dict[Split, list[Case]] = {split: [] for split in Split}
    test, validation = data.splits.test, data.splits.validation
    for case in cases:
        place = _place(case.patient, data.split_seed)
        drawn = Split.TEST if place < test else Split.TRAIN
        if test <= place < test + validation:
            drawn = Split.VALIDATION
        splits[case.split or (Split.TRAIN if official else drawn)].append(case)
    _check_disjoint(splits)
    if not splits[Split.VALIDATION]:
        _take_validation(splits, data.split_seed)
    return splits


def _take_validation(splits: dict[Split, list[Case]], seed: int) -> None:
    """Move a tenth of the training patients, at least one and never all, to validation."""
    places = {case.patient: _place(case.patient, seed) for case in splits[Split.TRAIN]}
    if len(places) < 2:  # noqa: PLR2004 - one patient cannot be shared out
        return
    ordered = sorted(places, key=places.__getitem__)
    wanted = sum(place < VALIDATION_SHARE for place in places.values())
    moved = set(ordered[: min(max(wanted, 1), len(ordered) - 1)])
    splits[Split.VALIDATION] = [c for c in splits[Split.TRAIN] if c.patient in moved]
    splits[Split.TRAIN] = [c for c in splits[Split.TRAIN] if c.patient not in moved]


def _check_disjoint(splits: Mapping[Split, Sequence[Case]]) -> None:
    """A patient in two splits would be trained on and tested on."""
    patients = [{case.patient for case in cases} for cases in splits.values()]
    shared = sum(map(len, patients)) - len(set().union(*patients))
    if shared:
        raise DataError(f"{shared} patient(s) are in two of the data set's own splits; mend them")


def _place(patient: str, seed: int) -> float:
    """A number in [0, 1) that only this patient and the seed decide."""
    digest = hashlib.sha256(f"{seed}/{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
