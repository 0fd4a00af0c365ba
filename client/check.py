"""Preflight: can this site's data be used? It counts and names rules, never a patient's value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from client.config import CsvData, Data, FolderData, NpzData, SiteConfig
from client.dataset import load_sample, split_cases
from client.policy import check_policy, check_unit
from client.readers import Case, Wanted, read_cases
from client.readers.case import Labels, Split
from client.readers.csv import read_rows
from client.readers.image import AS_STORED, SUFFIXES
from common.errors import ConfigError, DataError
from common.study import Study

MAX_NAMED = 5  # unreadable files that are listed one by one
PHANTOM_CLASSES = ("no lesion", "lesion")
MASKS = Wanted("masks", ("background", "foreground"), channels=AS_STORED, size=())


def check(config: SiteConfig, study: Study | None = None) -> Iterator[str]:
    """Read every image of the site once and say what was found, line by line.

    Without a study, classes and channels are taken from the files themselves.

    Raises:
      ConfigError: The state folder cannot be written; or the site is not a member of the study.
      DataError: The data set cannot be used; the message names the file or folder.
    """
    yield f"site {config.name}: configuration is valid"
    if config.coordinator or config.certificates:
        yield "coordinator, certificates: kept for the deployment; this version only simulates"
    _check_state_dir(config.state_dir)
    yield f"state folder {config.state_dir}: writable"
    if study is not None:
        if study.members and config.name not in study.site_names:
            raise ConfigError(f"{config.name} is not a member of study {study.name}")
        yield f"study {study.name}: digest {study.digest()}"
        check_policy(config.policy, study, config.data.declared_patients)
        check_unit(config.data, study)
        yield "policy: permits this study"
    wanted = Wanted.by(study) if study else _seen(config.data)
    cases = read_cases(config.data, wanted)
    yield from _describe_pixels(config.data, cases, study)
    for split, members in split_cases(cases, config.data).items():
        patients = len({case.patient for case in members})
        yield f"{split}: {len(members)} images of {patients} patients; {_support(members, wanted)}"
    if config.data.declared_patients is None:
        yield "data.declared_patients is not set: a deployed study needs it (a public constant)"


def _check_state_dir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"state_dir {folder}: {error.strerror}; choose a writable one") from None


def _describe_pixels(data: Data, cases: list[Case], study: Study | None) -> Iterator[str]:
    shapes: Counter[str] = Counter()
    broken = []
    for case in cases:
        try:
            pixels = load_sample(case, study)[0] if study else case.load()
            if study is None and case.load_mask is not None:
                case.load_mask()
        except DataError as error:
            broken.append(str(error))
            continue
        size = "x".join(map(str, pixels.shape[1:]))
        colour = "colour" if pixels.shape[0] == 3 else "grey"  # noqa: PLR2004
        shapes[f"{size} {colour} {pixels.dtype}"] += 1
    most = ", ".join(f"{shape} ({num})" for shape, num in shapes.most_common(MAX_NAMED))
    more = f" and {len(shapes) - MAX_NAMED} other kinds" if len(shapes) > MAX_NAMED else ""
    yield f"data set {data.name}: {len(cases) - len(broken)} readable images, {most}{more}"
    if broken and data.on_broken == "stop":
        named = "; ".join(broken[:MAX_NAMED])
        raise DataError(
            f"{len(broken)} unreadable: {named}; repair or remove them, or set "
            'data.on_broken = "skip"'
        )
    if broken:
        yield f"{len(broken)} unreadable images will be skipped"


def _support(cases: list[Case], wanted: Wanted) -> str:
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


def _seen(data: Data) -> Wanted:
    """What the files themselves hold, where no study says what to expect."""
    if isinstance(data, FolderData) and data.layout == "pairs":
        return MASKS
    if isinstance(data, CsvData):
        return _seen_csv(data)
    if isinstance(data, FolderData):
        return Wanted("multiclass", _class_folders(data.root), channels=AS_STORED, size=())
    if isinstance(data, NpzData):
        return _seen_npz(data)
    return Wanted("binary", PHANTOM_CLASSES, channels=1, size=(64, 64))


def _class_folders(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; set data.root")
    splits = [root / split for split in Split if (root / split).is_dir()]
    found = {p.name for folder in splits or [root] for p in folder.iterdir() if p.is_dir()}
    return tuple(sorted(found))


def _seen_csv(data: CsvData) -> Wanted:
    rows = read_rows(data)
    if data.target is None:
        raise DataError(f"{data.table}: a column per label; the study names them, so give --study")
    found = {row[data.target] for _, row in rows}
    if all(Path(value).suffix.lower() in SUFFIXES for value in found):
        return MASKS
    classes = sorted({name.strip() for value in found for name in value.split("|")} - {""})
    labels: Labels = "multilabel" if any("|" in value for value in found) else "multiclass"
    return Wanted(labels, tuple(classes), channels=AS_STORED, size=())


def _seen_npz(data: NpzData) -> Wanted:
    from client.readers.npz import open_npz

    with open_npz(data.root) as (_, arrays):
        labels = arrays.get("train_labels", np.zeros((0, 1)))
    if labels.ndim == 2 and labels.shape[1] > 1:  # noqa: PLR2004
        names = tuple(f"label {k}" for k in range(labels.shape[1]))
        return Wanted("multilabel", names, channels=3, size=())
    num_classes = int(labels.max(initial=0)) + 1
    return Wanted(
        "multiclass", tuple(f"class {k}" for k in range(num_classes)), channels=3, size=()
    )
