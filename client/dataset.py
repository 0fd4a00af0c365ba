"""The door where patient data enters: files to prepared images, by split."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.clinical import features_of
from client.config import Data
from client.contents import Contents, Intake
from client.images import Images, Scans
from client.prepare import (
    load_boxes,
    load_mask,
    load_pixels,
    prepare,
    prepare_boxes,
    prepare_masks,
    resample,
)
from client.readers.case import Case, Split
from client.splits import Deal, dealt_cases
from client.store import Store
from common.errors import DataError
from common.study import Detection, Input, Study

log = logging.getLogger("consilium.site")

NONE = np.empty(0, np.float32)  # no table
STACK, STACK_BYTES = 256, 1 << 26  # images prepared in one pass, and what they take at most

Samples = Images | Scans


class Sample(NamedTuple):
    """Private. One image, or one row of a table, or both."""

    pixels: NDArray[Any]  # as the file has them; empty where there is no image
    target: NDArray[Any]
    case: Case
    table: NDArray[np.float32]  # (num_features,), empty where there is no table


# Pixels, targets, cases and tables of several samples.
Stack = tuple[NDArray[Any], NDArray[Any], list[Case], NDArray[np.float32]]


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


def load_site_data(
    data: Data, study: Study, dealt: Deal | None = None, *, folder: Path | None = None
) -> SiteData:
    """Read, split and prepare one site's images.

    Args:
      data: The ``[data]`` table of the site.
      study: What the images must become, and the classes.
      dealt: In a simulation, this site's part of a data set that several share.
      folder: Where prepared images may lie that are too many for memory; None for nowhere.

    Raises:
      DataError: An image or label cannot be used; or there is nothing to train on.
    """
    splits = dealt_cases(data, study, dealt)
    skipped: list[str] = []
    intake = Intake(data.names_patients)
    parts = {
        split: _prepare_all(
            read_samples(cases, study, intake, skipped if data.on_broken == "skip" else None),
            study,
            folder,
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


def _prepare_all(read: Iterator[Sample], study: Study, folder: Path | None) -> Samples:
    """What was read, as the network takes it."""
    if study.input.patches:
        return _scans(read, study.input, folder)
    used: list[Case] = []
    pixels, targets = Store(folder), Store(folder)
    rows: list[NDArray[np.float32]] = []
    for stack, known, members, table in _stacks(read):
        pixels.add(prepare(stack, study.input) if study.input.size else torch.from_numpy(stack))
        targets.add(_prepared_targets(known, study))
        used += members
        rows.append(table)
    if not used:
        return _nothing(study)
    (all_pixels, one), (all_targets, other) = pixels.joined(), targets.joined()
    reading = tuple(filter(None, (one, other)))
    beside = torch.from_numpy(np.concatenate(rows)) if study.table else None
    patients = tuple(case.patient for case in used)
    return Images(all_pixels, all_targets, patients, reading, table=beside)


def _nothing(study: Study) -> Images:
    shape = (study.input.channels, *study.input.size) if study.input.size else (0,)
    beside = torch.empty((0, study.table.num_features)) if study.table else None
    return Images(torch.empty((0, *shape)), torch.empty(0), (), table=beside)


def _prepared_targets(known: NDArray[Any], study: Study) -> Tensor:
    if study.task.kind == "segmentation":
        return prepare_masks(known, study.input)
    if study.task.kind == "detection":
        return prepare_boxes(known, study.input)
    return torch.from_numpy(known)


def _scans(read: Iterable[Sample], config: Input, folder: Path | None) -> Scans:
    """Each image for itself, in its own size."""
    patients: list[str] = []
    pixels, masks = Store(folder), Store(folder)
    for values, mask, case, _ in read:
        pixels.add(prepare(values[None], config)[0])
        masks.add(prepare_masks(mask[None], config)[0])
        patients.append(case.patient)
    (all_pixels, one), (all_masks, other) = pixels.tensors(), masks.tensors()
    reading = tuple(filter(None, (one, other)))
    return Scans(tuple(all_pixels), tuple(all_masks), tuple(patients), config.size, reading)


def read_samples(
    cases: Iterable[Case], study: Study, intake: Intake, skipped: list[str] | None
) -> Iterator[Sample]:
    """Every image, noted; broken ones stop the site or go on the ``skipped`` list."""
    for case in cases:
        try:
            sample = load_sample(case, study)
        except DataError:
            if skipped is None:
                raise
            skipped.append(case.name)
            continue
        # The cells themselves: what a study makes of them is another thing in another study.
        row = json.dumps(sorted(case.columns.items())) if study.table is not None else ""
        intake.note(sample.pixels, sample.target, case.patient, row)
        yield sample


def load_sample(case: Case, study: Study) -> Sample:
    """Pixels, target and table of one case, as the files have them.

    Raises:
      DataError: One of them cannot be used; the message names the file.
    """
    table = NONE
    if study.table is not None:
        table = features_of(case.columns, study.table, case.forms, case.name)
    if not study.input.size:
        return Sample(np.empty(0, np.float32), _label(case), case, table)
    pixels = load_pixels(case, study.input)
    if study.task.kind == "segmentation":
        mask = load_mask(case, pixels, len(study.task.classes))
        pixels, resampled = resample(case, pixels, mask, study.input)
        assert resampled is not None  # noqa: S101 - one was given
        return Sample(pixels, resampled, case, table)
    if isinstance(study.task, Detection):
        boxes = load_boxes(case, pixels, study.task)  # shares of the sides stay what they are
        return Sample(resample(case, pixels, None, study.input)[0], boxes, case, table)
    label = _label(case)
    return Sample(resample(case, pixels, None, study.input)[0], label, case, table)


def _label(case: Case) -> NDArray[np.int64]:
    if case.target is None:
        raise DataError(f"{case.name}: no label; a classification study needs one for every image")
    return case.target


def _stacks(read: Iterable[Sample]) -> Iterator[Stack]:
    """Runs of images of equal shape and type, so that each run is prepared in one pass."""
    run: list[Sample] = []
    for sample in read:
        first = (run[0] if run else sample).pixels
        same = (first.shape, first.dtype) == (sample.pixels.shape, sample.pixels.dtype)
        is_full = len(run) == min(STACK, max(1, STACK_BYTES // max(1, sample.pixels.nbytes)))
        if not same or is_full:
            yield _stacked(run)
            run = []
        run.append(sample)
    if run:
        yield _stacked(run)


def _stacked(run: Sequence[Sample]) -> Stack:
    pixels, targets, members, tables = zip(*run, strict=True)
    return np.stack(pixels), np.stack(targets), list(members), np.stack(tables)
