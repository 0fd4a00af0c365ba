"""Can this site's data be used? Every image is read once; lines count and name files and rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.config import Data, SiteConfig
from client.dataset import load_sample, split_cases
from client.finding import Finding, fault, ok, warning
from client.readers import Case, Wanted, read_cases
from client.readers.case import Split
from client.readers.seen import seen
from common.errors import ConfigError, DataError
from common.study import DifferentialPrivacy, Study
from common.tasks.losses import OUTSIDE

MAX_NAMED = 5  # unreadable files that are named one by one
FAR_OFF = 2  # times more or fewer patients than declared

Splits = Mapping[Split, Sequence[Case]]


@dataclass
class _Read:
    """Private. What reading every image of a data set showed."""

    shapes: Counter[str] = field(default_factory=Counter)
    per_class: Counter[int] = field(default_factory=Counter)  # images with a pixel or label of it
    broken: list[str] = field(default_factory=list)


def check_data(config: SiteConfig, study: Study | None) -> Iterator[Finding]:
    """Read every image once and say what was found; without a study, as the files have it."""
    data = config.data
    try:
        wanted = Wanted.by(study) if study else seen(data)
        cases = read_cases(data, wanted)
        splits = split_cases(cases, data)
    except DataError as error:
        yield fault(_in_data_set(data, f"{error}; correct the files or [data] in site.toml"))
        return
    except OSError as error:
        yield fault(_in_data_set(data, f"{error.filename}: {error.strerror}; let this user read"))
        return
    read = _read_all(cases, study)
    yield from _describe_images(data, read)
    for split, members in splits.items():
        patients = len({case.patient for case in members})
        yield ok(
            f"{split}: {len(members)} images of {patients} patients; {_per_class(members, wanted)}"
        )
    yield from _check_classes(data, read, wanted, splits)
    yield _check_numbers(config, study, splits)


def _read_all(cases: Sequence[Case], study: Study | None) -> _Read:
    """Read pixels and masks of every case, one at a time."""
    read = _Read()
    for case in cases:
        try:
            shape, classes = _look_at(case, study)
        except DataError as error:
            read.broken.append(str(error))
            continue
        read.shapes[shape] += 1
        read.per_class.update(classes)
    return read


def _look_at(case: Case, study: Study | None) -> tuple[str, set[int]]:
    """Size and number type of one image, and its classes."""
    target: NDArray[Any] | None
    if study is not None:
        pixels, target, _ = load_sample(case, study)
    else:
        pixels, target = case.load(), case.load_mask() if case.load_mask else case.target
    size = "x".join(map(str, pixels.shape[1:]))
    colour = "colour" if pixels.shape[0] == 3 else "grey"  # noqa: PLR2004
    return f"{size} {colour} {pixels.dtype}", _classes_of(case, target)


def _classes_of(case: Case, target: object) -> set[int]:
    values = np.asarray(target)
    if case.target is None:  # a mask
        return {int(value) for value in np.unique(values) if value != OUTSIDE}
    return {int(values)} if values.ndim == 0 else set(np.flatnonzero(values).tolist())


def _describe_images(data: Data, read: _Read) -> Iterator[Finding]:
    most = ", ".join(f"{shape} ({num})" for shape, num in read.shapes.most_common(MAX_NAMED))
    others = len(read.shapes) - MAX_NAMED
    more = f" and {others} other kinds" if others > 0 else ""
    readable = f"{read.shapes.total()} readable images, {most}{more}"
    if not read.broken:
        yield ok(f"data set {data.name}: {readable}")
        return
    named = "; ".join(read.broken[:MAX_NAMED])
    hidden = len(read.broken) - MAX_NAMED
    named += f"; and {hidden} more" if hidden > 0 else ""
    broken = f"{readable}; {len(read.broken)} unreadable: {named}"
    if data.on_broken == "skip":
        yield warning(f"data set {data.name}: {broken}; they will be skipped")
        return
    remedy = 'repair or remove them, or set data.on_broken = "skip"'
    yield fault(_in_data_set(data, f"{broken}; {remedy}"))


def _check_classes(data: Data, read: _Read, wanted: Wanted, splits: Splits) -> Iterator[Finding]:
    missing = [name for index, name in enumerate(wanted.classes) if not read.per_class[index]]
    if missing and (wanted.labels != "multilabel" or read.shapes):
        names = ", ".join(map(repr, missing))
        yield fault(
            _in_data_set(
                data,
                f"no image of class {names}; correct the labels or data.root, or ask the "
                "coordinator whether this site may take part without",
            )
        )
    if not splits[Split.TRAIN]:
        yield fault(_in_data_set(data, "no training image; correct data.root or its splits"))


def _check_numbers(config: SiteConfig, study: Study | None, splits: Splits) -> Finding:
    """Patients, or images where they are the privacy unit, against what the site declares."""
    data, least, unit = config.data, config.policy.min_patients, _unit(study)
    total = sum(_num_units(cases, unit) for cases in splits.values())
    training = _num_units(splits[Split.TRAIN], unit)
    found = f"{unit}s: {total}, of which {training} to train on"
    if data.declared_patients is None:
        text = f"{found}; data.declared_patients is not set: a deployed study needs this constant"
        return fault(ConfigError(text)) if config.coordinator else warning(text)
    said = f"{found}; data.declared_patients is {data.declared_patients}, min_patients {least}"
    if total < least or FAR_OFF * training < data.declared_patients:
        return fault(
            _in_data_set(
                data,
                f"too few {said}; complete the data, or correct declared_patients; the site's "
                "owner decides on [policy]",
            )
        )
    if training > FAR_OFF * data.declared_patients:
        return warning(f"{said}: far fewer than there are; correct it before the study is approved")
    return ok(said)


def _unit(study: Study | None) -> str:
    is_private = study is not None and isinstance(study.privacy, DifferentialPrivacy)
    return study.privacy.unit if is_private else "patient"  # type: ignore[union-attr]


def _num_units(cases: Sequence[Case], unit: str) -> int:
    return len(cases) if unit == "image" else len({case.patient for case in cases})


def _per_class(cases: Sequence[Case], wanted: Wanted) -> str:
    """Images per class, in the order of the classes."""
    if not cases:
        return "no images"
    if wanted.labels == "masks":
        return "each with a mask"
    targets = np.array([case.target for case in cases])
    if targets.ndim == 1:
        counts = np.bincount(targets, minlength=len(wanted.classes))
    else:
        counts = targets.sum(axis=0)
    return ", ".join(f"{name} {num}" for name, num in zip(wanted.classes, counts, strict=True))


def _in_data_set(data: Data, text: str) -> DataError:
    return DataError(f"data set {data.name}: {text}")
