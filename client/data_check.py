"""Can this site's data be used? Every image is read once; lines count and name files and rules."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.clinical import count_empty
from client.config import Data, SiteConfig
from client.dataset import load_sample
from client.finding import Finding, fault, ok, warning
from client.header_check import Headers, check_headers
from client.prepare import has_area
from client.readers import Case, Wanted, read_cases
from client.readers.case import Split
from client.readers.seen import seen
from client.splits import split_cases
from common.errors import ConfigError, DataError
from common.study import DifferentialPrivacy, Study, Table
from common.tasks.losses import OUTSIDE

LEAST_SUPPORT = 10  # images of a class in a split, below which its figures mean little
MAX_NAMED = 5  # unreadable files that are named one by one
UNCOUNTED: Mapping[str, str] = {"masks": "each with a mask", "boxes": "each with its boxes"}
FAR_OFF = 2  # times more or fewer patients than declared

Splits = Mapping[Split, Sequence[Case]]


@dataclass
class _Read:
    """Private. What reading every image of a data set showed."""

    shapes: Counter[str] = field(default_factory=Counter)
    per_class: Counter[int] = field(default_factory=Counter)  # images with a pixel or label of it
    broken: list[str] = field(default_factory=list)
    without_area: int = 0  # boxes
    headers: Headers = field(default_factory=Headers)
    digests: dict[bytes, list[Case]] = field(default_factory=dict)  # of pixels; images alike


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
    what = "images" if wanted.images else "records"
    yield from _describe_images(data, read, what)
    yield from check_headers(read.headers, study)
    for split, members in splits.items():
        patients = len({case.patient for case in members})
        yield ok(
            f"{split}: {len(members)} {what} of {patients} patients; {_per_class(members, wanted)}"
        )
    yield from _check_boxes(read)
    if study is not None and study.table is not None:
        yield from _check_columns(cases, study.table)
    yield from _check_classes(data, read, wanted, splits)
    yield from _check_support(splits, wanted)
    yield from _check_copies(read, splits)
    yield _check_numbers(config, study, splits)


def _read_all(cases: Sequence[Case], study: Study | None) -> _Read:
    """Read pixels and masks of every case, one at a time."""
    read = _Read()
    for case in cases:
        try:
            shape, classes, digest = _look_at(case, study)
            if case.load_boxes:
                read.without_area += int((~has_area(case.load_boxes())).sum())
            if case.look is not None:
                read.headers.note(case.look())
        except DataError as error:
            read.broken.append(str(error))
            continue
        read.shapes[shape] += 1
        read.digests.setdefault(digest, []).append(case)
        read.per_class.update(classes)
    return read


def _look_at(case: Case, study: Study | None) -> tuple[str, set[int], bytes]:
    """Size and number type of one image, its classes, and a digest of its pixels."""
    target: NDArray[Any] | None
    if study is not None:
        pixels, target, _, table = load_sample(case, study)
        if not study.input.size:  # two patients may well be alike in a few columns
            return f"{table.size} numbers", _classes_of(case, target), case.name.encode()
    else:
        pixels, target = case.load(), _target_as_stored(case)
    if not pixels.size:
        return f"{len(case.columns)} cells", _classes_of(case, target), case.name.encode()
    size = "x".join(map(str, pixels.shape[1:]))
    colour = "colour" if pixels.shape[0] == 3 else "grey"  # noqa: PLR2004
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data).digest()
    return f"{size} {colour} {pixels.dtype}", _classes_of(case, target), digest


def _target_as_stored(case: Case) -> NDArray[Any] | None:
    if case.load_mask:
        return case.load_mask()
    return case.load_boxes() if case.load_boxes else case.target


def _classes_of(case: Case, target: object) -> set[int]:
    values = np.asarray(target)
    if case.load_boxes:
        return {int(kind) for kind in np.unique(values[:, 4]) if kind >= 0}
    if case.target is None:  # a mask
        return {int(value) for value in np.unique(values) if value != OUTSIDE}
    return {int(values)} if values.ndim == 0 else set(np.flatnonzero(values).tolist())


def _describe_images(data: Data, read: _Read, what: str) -> Iterator[Finding]:
    most = ", ".join(f"{shape} ({num})" for shape, num in read.shapes.most_common(MAX_NAMED))
    others = len(read.shapes) - MAX_NAMED
    more = f" and {others} other kinds" if others > 0 else ""
    readable = f"{read.shapes.total()} readable {what}, {most}{more}"
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


def _check_boxes(read: _Read) -> Iterator[Finding]:
    if read.without_area:
        yield warning(
            f"boxes at most one pixel wide or high: {read.without_area}; they are left out: "
            "correct the annotations"
        )


def _check_columns(cases: Sequence[Case], table: Table) -> Iterator[Finding]:
    """How many cells of each column are empty; where the study refuses them, that is a fault."""
    if table.missing == "refuse":
        return
    empty = Counter(name for case in cases for name in count_empty(case.columns, table))
    for name, num in sorted(empty.items()):
        text = f"column {name!r}: {num} of {len(cases)} cells are empty"
        mostly = 2 * num > len(cases)
        yield warning(f"{text}; is it the right column?") if mostly else ok(text)


def _check_classes(data: Data, read: _Read, wanted: Wanted, splits: Splits) -> Iterator[Finding]:
    missing = [name for index, name in enumerate(wanted.classes) if not read.per_class[index]]
    if missing and read.shapes:  # of broken images alone nothing is known
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


def _check_support(splits: Splits, wanted: Wanted) -> Iterator[Finding]:
    """Labels of whole images; how many voxels of a class there are is no number of examples."""
    if wanted.labels in UNCOUNTED:
        return
    for split, cases in splits.items():
        counts = _counts(cases, wanted)
        few = {name: num for name, num in counts.items() if num < LEAST_SUPPORT}
        if cases and few:
            named = ", ".join(f"{name} {num}" for name, num in few.items())
            yield warning(
                f"{split}: fewer than {LEAST_SUPPORT} images of {named}; figures of so few mean "
                "little"
            )


def _check_copies(read: _Read, splits: Splits) -> Iterator[Finding]:
    """Images with the same pixels: in two splits, figures would be too good."""
    split_of = {id(case): split for split, cases in splits.items() for case in cases}
    alike = [cases for cases in read.digests.values() if len(cases) > 1]
    across = [cases for cases in alike if len({split_of[id(case)] for case in cases}) > 1]
    if across:
        named = "; ".join(f"{cases[0].name} = {cases[1].name}" for cases in across[:MAX_NAMED])
        yield warning(
            f"{len(across)} images are in two splits under two names: {named}; figures would be "
            "too good: take one of each out"
        )
    if within := len(alike) - len(across):
        yield warning(f"{within} images are there more than once, under other names")


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
    if wanted.labels in UNCOUNTED:
        return UNCOUNTED[wanted.labels]
    return ", ".join(f"{name} {num}" for name, num in _counts(cases, wanted).items())


def _counts(cases: Sequence[Case], wanted: Wanted) -> dict[str, int]:
    """Images by name of the class."""
    targets = np.array([case.target for case in cases], np.int64)
    if targets.ndim == 1:
        counts = np.bincount(targets, minlength=len(wanted.classes))
    else:
        counts = targets.sum(axis=0)
    return dict(zip(wanted.classes, counts.tolist(), strict=True))


def _in_data_set(data: Data, text: str) -> DataError:
    return DataError(f"data set {data.name}: {text}")
