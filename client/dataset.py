"""The door where patient data enters: files to prepared images, split by patient.

Preparation uses the study's constants and each image's own values, never a statistic of the data
set: such a statistic would be a release of its own.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.data import set_track_meta
from monai.transforms import Compose, NormalizeIntensity, Resize, ScaleIntensityRange
from numpy.typing import NDArray
from torch import Tensor

from client.config import Data
from client.partition import deal
from client.readers import read_cases
from client.readers.case import Case, Split, Wanted
from common.errors import DataError
from common.study import DifferentialPrivacy, Input, Study

log = logging.getLogger("consilium.site")

VALIDATION_SHARE = 0.1  # of the training patients, where a data set has no validation split
STACK = 256  # images prepared in one pass

set_track_meta(False)  # arrays here have no spatial header


@dataclass(frozen=True)
class Images:
    """Private. One split of one site's data, prepared for the network."""

    pixels: Tensor  # (num_images, channels, height, width) float32
    targets: Tensor  # (num_images,) or (num_images, num_labels) int64
    patients: tuple[str, ...]  # (num_images,)

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def num_patients(self) -> int:
        """Number of different patients."""
        return len(set(self.patients))

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        return replace(self, pixels=self.pixels.to(device), targets=self.targets.to(device))


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

    train: Images
    validation: Images
    test: Images
    num_skipped: int  # unreadable images, where the site's configuration says to skip them

    @property
    def num_patients(self) -> int:
        """Patients over all splits; no patient is in two."""
        return sum(part.num_patients for part in (self.train, self.validation, self.test))

    def to(self, device: torch.device) -> SiteData:
        """The same images on another device."""
        return SiteData(
            self.train.to(device),
            self.validation.to(device),
            self.test.to(device),
            self.num_skipped,
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
    parts = {
        split: _prepare_all(cases, study, skipped if data.on_broken == "skip" else None)
        for split, cases in splits.items()
    }
    if skipped:
        log.warning("data set %s: %d unreadable images were skipped", data.name, len(skipped))
    if not len(parts[Split.TRAIN]):
        raise DataError(f"data set {data.name} has no training image; check data.root")
    return SiteData(
        parts[Split.TRAIN], parts[Split.VALIDATION], parts[Split.TEST], num_skipped=len(skipped)
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


def _prepare_all(cases: Sequence[Case], study: Study, skipped: list[str] | None) -> Images:
    """Prepared images of these cases; broken ones stop the site or go on the ``skipped`` list."""
    used: list[Case] = []
    stacks: list[Tensor] = []
    for stack, members in _stacks(_loaded(cases, study.input, skipped)):
        stacks.append(prepare(stack, study.input))
        used += members
    shape = (0, study.input.channels, *study.input.size)
    targets = np.array([case.target for case in used], np.int64)
    return Images(
        pixels=torch.cat(stacks) if stacks else torch.empty(shape),
        targets=torch.from_numpy(targets),
        patients=tuple(case.patient for case in used),
    )


def _loaded(
    cases: Iterable[Case], config: Input, skipped: list[str] | None
) -> Iterator[tuple[NDArray[Any], Case]]:
    for case in cases:
        try:
            yield load_pixels(case, config), case
        except DataError:
            if skipped is None:
                raise
            skipped.append(case.name)


def load_pixels(case: Case, config: Input) -> NDArray[Any]:
    """Raw grey values of a case that the study can use, shape (config.channels, height, width).

    Raises:
      DataError: The file cannot be read, or its values cannot be prepared; the message names it.
    """
    pixels = case.load()
    if not np.isfinite(pixels).all():
        raise DataError(f"{case.name}: some grey values are not finite")
    if pixels.shape[0] == 1 < config.channels:
        pixels = np.repeat(pixels, config.channels, axis=0)
    if pixels.shape[0] != config.channels:
        raise DataError(f"{case.name}: {pixels.shape[0]} channels, {config.channels} expected")
    if config.intensity == "dtype" and pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{case.name}: grey values of type {pixels.dtype} have no usual range; set "
            'input.intensity = "image" in the study'
        )
    return pixels


def _stacks(
    loaded: Iterable[tuple[NDArray[Any], Case]],
) -> Iterator[tuple[NDArray[Any], list[Case]]]:
    """Runs of images of equal shape and type, so that each run is prepared in one pass."""
    pixels: list[NDArray[Any]] = []
    members: list[Case] = []
    for image, case in loaded:
        same = not pixels or (pixels[0].shape, pixels[0].dtype) == (image.shape, image.dtype)
        if not same or len(pixels) == STACK:
            yield np.stack(pixels), members
            pixels, members = [], []
        pixels.append(image)
        members.append(case)
    if pixels:
        yield np.stack(pixels), members


def prepare(images: NDArray[Any], config: Input) -> Tensor:
    """Raw grey values to the network's input.

    Args:
      images: Any number type, shape (num_images, channels, height, width).
      config: The study's ``[input]``.

    Returns:
      Float32, shape (num_images, channels, *config.size).

    """
    num_images, channels, height, width = images.shape
    # Images and channels share one axis: MONAI's array transforms then treat a whole stack at once.
    stack = images.reshape(num_images * channels, height, width)
    transformed = _preparation(config, images.dtype, (height, width))(stack)
    prepared: Tensor = torch.as_tensor(transformed, dtype=torch.float32)
    return prepared.reshape(num_images, channels, *config.size)


def _preparation(config: Input, dtype: np.dtype[Any], size: tuple[int, int]) -> Compose:
    steps: list[Any] = []
    if config.intensity == "dtype":
        steps.append(ScaleIntensityRange(0, np.iinfo(dtype).max, 0.0, 1.0))
    if size != config.size:
        # Averaging keeps thin structures when shrinking; between pixels it interpolates.
        shrinking = size[0] >= config.size[0] and size[1] >= config.size[1]
        steps.append(Resize(config.size, mode="area" if shrinking else "bilinear"))
    if config.intensity == "image":
        steps.append(NormalizeIntensity(channel_wise=True))
    steps.append(NormalizeIntensity(subtrahend=config.mean, divisor=config.std))
    return Compose(steps)
