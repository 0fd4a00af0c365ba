"""The door where patient data enters: files to prepared images, split by patient."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.config import Data
from client.contents import Contents, Intake
from client.images import Images, Scans
from client.partition import deal
from client.prepare import load_mask, load_pixels, prepare, prepare_masks
from client.readers import read_cases
from client.readers.case import Case, Split, Wanted
from common.errors import DataError
from common.study import DifferentialPrivacy, Input, Study

log = logging.getLogger("consilium.site")

VALIDATION_SHARE = 0.1  # of the training patients, where a data set has no validation split
STACK = 256  # images prepared in one pass

Samples = Images | Scans
Sample = tuple[NDArray[Any], NDArray[Any], Case]  # pixels and target as the files have them


@dataclass(frozen=True)
class Deal:
    """Which part of a shared data set belongs to this site of a simulation."""

    rule: str
    num_sites: int
    site_index: int
    seed: int


@dataclass(frozen=True)
class SiteData:
    """Private. Everything one site trains and scores on."""

    train: Samples
    validation: Samples
    test: Samples
    num_skipped: int  # unreadable images, where the site's configuration says to skip them
    contents: Contents  # digests of all of it

    @property
    def num_patients(self) -> int:
        """Patients over all splits; no patient is in two."""
        return sum(part.num_patients for part in (self.train, self.validation, self.test))

    def to(self, device: torch.device) -> SiteData:
        """The same images on another device."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


def load_site_data(data: Data, study: Study, dealt: Deal | None = None) -> SiteData:
    """Read, split and prepare one site's images.

    Args:
      data: The ``[data]`` table of the site.
      study: What the images must become, and the classes.
      dealt: In a simulation, this site's part of a data set that several share.

    Raises:
      DataError: An image or label cannot be used; or there is nothing to train on.
    """
    splits = _dealt_cases(data, study, dealt)
    skipped: list[str] = []
    intake = Intake(data.names_patients)
    parts = {
        split: _prepare_all(
            _read(cases, study, intake, skipped if data.on_broken == "skip" else None), study
        )
        for split, cases in splits.items()
    }
    if skipped:
        log.warning("data set %s: %d unreadable images were skipped", data.name, len(skipped))
    if not len(parts[Split.TRAIN]):
        raise DataError(f"data set {data.name} has no training image; check data.root")
    return SiteData(
        parts[Split.TRAIN],
        parts[Split.VALIDATION],
        parts[Split.TEST],
        num_skipped=len(skipped),
        contents=intake.contents(),
    )


def count_training_units(data: Data, study: Study, dealt: Deal | None) -> int:
    """Training patients of one simulated site; no pixel is prepared.

    With ``privacy.unit = "image"`` every image is a unit of its own.
    """
    cases = _dealt_cases(data, study, dealt)[Split.TRAIN]
    if isinstance(study.privacy, DifferentialPrivacy) and study.privacy.unit == "image":
        return len(cases)
    return len({case.patient for case in cases})


def _dealt_cases(data: Data, study: Study, dealt: Deal | None) -> Mapping[Split, Sequence[Case]]:
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


def _prepare_all(read: Iterator[Sample], study: Study) -> Samples:
    """What was read, as the network takes it."""
    if study.input.patches:
        return _scans(read, study.input)
    used: list[Case] = []
    pixels: list[Tensor] = []
    targets: list[Tensor] = []
    has_masks = study.task.kind == "segmentation"
    for stack, known, members in _stacks(read):
        pixels.append(prepare(stack, study.input))
        targets.append(prepare_masks(known, study.input) if has_masks else torch.from_numpy(known))
        used += members
    if not used:
        return Images(torch.empty((0, study.input.channels, *study.input.size)), torch.empty(0), ())
    return Images(torch.cat(pixels), torch.cat(targets), tuple(case.patient for case in used))


def _scans(read: Iterable[Sample], config: Input) -> Scans:
    """Each image for itself, in its own size."""
    used = [
        (prepare(pixels[None], config)[0], prepare_masks(mask[None], config)[0], case.patient)
        for pixels, mask, case in read
    ]
    pixels, masks, patients = zip(*used, strict=True) if used else ((), (), ())
    return Scans(pixels, masks, patients, config.size)


def _read(
    cases: Iterable[Case], study: Study, intake: Intake, skipped: list[str] | None
) -> Iterator[Sample]:
    """Every image, noted; broken ones stop the site or go on the ``skipped`` list."""
    for case in cases:
        try:
            pixels, target, _ = sample = load_sample(case, study)
        except DataError:
            if skipped is None:
                raise
            skipped.append(case.name)
            continue
        intake.note(pixels, target, case.patient)
        yield sample


def load_sample(case: Case, study: Study) -> Sample:
    """Pixels and target of one case, as the files have them.

    Raises:
      DataError: One of them cannot be used; the message names the file.
    """
    pixels = load_pixels(case, study.input)
    if study.task.kind == "segmentation":
        return pixels, load_mask(case, pixels, len(study.task.classes)), case
    if case.target is None:
        raise DataError(f"{case.name}: no label; a classification study needs one for every image")
    return pixels, case.target, case


def _stacks(read: Iterable[Sample]) -> Iterator[tuple[NDArray[Any], NDArray[Any], list[Case]]]:
    """Runs of images of equal shape and type, so that each run is prepared in one pass."""
    run: list[Sample] = []
    for sample in read:
        first = run[0][0] if run else sample[0]
        same = (first.shape, first.dtype) == (sample[0].shape, sample[0].dtype)
        if not same or len(run) == STACK:
            yield _stacked(run)
            run = []
        run.append(sample)
    if run:
        yield _stacked(run)


def _stacked(run: Sequence[Sample]) -> tuple[NDArray[Any], NDArray[Any], list[Case]]:
    pixels, targets, members = zip(*run, strict=True)
    return np.stack(pixels), np.stack(targets), list(members)
