"""``SiteConfig``: what a hospital tells its own program.

The file names the site, where its images are, which device may be used and where the program keeps
its state. Nothing in it leaves the hospital but the name and the declared number of patients.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from common.config import Frozen, RelativePath, validate
from common.errors import ConfigError
from common.identity import Identity
from common.study import Count, Name, Positive

ISO = "%Y-%m-%d"
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of a public key


def _check_pattern(pattern: str) -> str:
    try:
        if re.compile(pattern).groups != 1:
            raise ValueError("the pattern needs exactly one group: the patient")
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]


def _check_date_form(form: str) -> str:
    day = datetime(2001, 12, 31)  # noqa: DTZ001 - a day has no zone
    try:
        is_whole = datetime.strptime(day.strftime(form), form) == day  # noqa: DTZ007
    except (ValueError, re.error):
        is_whole = False
    if not is_whole:
        raise ValueError("a date needs day, month and year, for example %d.%m.%Y")
    return form


DateForm = Annotated[str, AfterValidator(_check_date_form)]


class SplitFractions(Frozen):
    """Shares of the patients where the data has no splits of its own; training gets the rest."""

    validation: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(ge=0, lt=0.5)] = 0.1


class _Data(Frozen):
    name: Name
    declared_patients: Count | None = None  # public; weight of the site in the mean
    on_broken: Literal["stop", "skip"] = "stop"
    split_seed: Annotated[int, Field(ge=0)] = 0
    splits: SplitFractions = SplitFractions()

    @property
    def names_patients(self) -> bool:
        """Whether it is known which images are of one patient."""
        return True


class NpzData(_Data):
    """One npz file in the MedMNIST layout: ``{train,val,test}_{images,labels}``."""

    format: Literal["npz"]
    root: RelativePath  # the file, or a folder with exactly one
    patients: bool = False  # the file also has {train,val,test}_patients

    @property
    def names_patients(self) -> bool:
        """See ``_Data``."""
        return self.patients


class _Folders(_Data):
    """Files below folders: one folder per class, or images beside masks of the same name."""

    root: RelativePath
    layout: Literal["classes", "pairs"] = "classes"
    images: str = "images"  # folders of the layout "pairs"
    masks: str = "masks"
    valid: str | None = None  # where loss and figures count; without it, everywhere
    patient: Pattern | None = None  # its first group, in the file's name, is the patient

    @property
    def names_patients(self) -> bool:
        """See ``_Data``."""
        return self.patient is not None

    @model_validator(mode="after")
    def _check_layout(self) -> _Folders:
        if self.valid is not None and self.layout != "pairs":
            raise ValueError('valid belongs to layout = "pairs"')
        return self


class FolderData(_Folders):
    """PNG, JPEG or TIFF files."""

    format: Literal["folder"]


class NiftiData(_Folders):
    """NIfTI files; axes and spacing are those that they say."""

    format: Literal["nifti"]


class DicomData(_Folders):
    """DICOM files: whole series where a study takes volumes, else single images and frames.

    Without ``patient`` the id in each header says whose image it is.
    """

    format: Literal["dicom"]

    @property
    def names_patients(self) -> bool:
        """See ``_Data``."""
        return True


class MsdData(_Data):
    """A task of the Medical Segmentation Decathlon: volumes and masks that dataset.json lists."""

    format: Literal["msd"]
    root: RelativePath  # the folder with dataset.json


class VocData(_Data):
    """Images with boxes in the Pascal VOC layout."""

    format: Literal["voc"]
    root: RelativePath
    annotations: str = "Annotations"  # folders in root
    images: str = "JPEGImages"
    lists: str = "ImageSets/Main"  # of stems: train.txt, val.txt and test.txt
    patient: Pattern | None = None  # its first group, in the file's name, is the patient

    @property
    def names_patients(self) -> bool:
        """See ``_Data``."""
        return self.patient is not None


class CsvData(_Data):
    """A table with one row per image."""

    format: Literal["csv"]
    root: RelativePath  # the folder that the table's paths are relative to
    table: str  # the file, in root
    image: str = "image"  # columns; a study without images needs none
    target: str | None = None  # class, or mask; several labels may have a column each
    valid: str | None = None
    patient: str | None = None
    split: str | None = None
    decimal: Literal[".", ","] = "."  # in numbers of clinical columns
    date_format: DateForm = ISO  # as Python's strptime takes it

    @property
    def names_patients(self) -> bool:
        """See ``_Data``."""
        return self.patient is not None


class PhantomData(_Data):
    """Generated chest-like images; each site has its own scanner and its own patients."""

    format: Literal["phantom"]
    num_patients: Annotated[int, Field(ge=4, le=100_000)] = 120
    images_per_patient: Annotated[int, Field(ge=1, le=16)] = 2
    seed: Annotated[int, Field(ge=0)] = 0
    site_index: Annotated[int, Field(ge=0, le=254)] = 0
    label_skew: Positive | None = None
    """Concentration of the Dirichlet distribution that each site's class shares are drawn from."""


Files = FolderData | NiftiData | DicomData
FileFormat = Literal["folder", "nifti", "dicom"]
Data = Annotated[
    NpzData | FolderData | NiftiData | DicomData | MsdData | VocData | CsvData | PhantomData,
    Field(discriminator="format"),
]


class Budget(Frozen):
    """How much privacy this data set may ever cost, over all studies."""

    unit: Literal["patient", "image"] = "patient"
    epsilon: Positive
    delta: Annotated[float, Field(gt=0, le=0.01)]


def simulated_table(
    study_path: Path, data: Mapping[str, Any], budget: Mapping[str, Any]
) -> DataTable:
    """The tables of ``<study>.site.toml`` as a simulated site reads them.

    Raises:
      ConfigError: A key is wrong; the message names it and the file.
    """
    table = {"data": dict(data), **({"budget": dict(budget)} if budget else {})}
    return validate(table, DataTable, source=study_path.with_suffix(".site.toml"))


class Certificates(Frozen):
    """The site's certificate and key, and the consortium's CA."""

    ca: RelativePath
    cert: RelativePath
    key: RelativePath
    revoked: RelativePath | None = None
    """This hospital's own copy of the CA's list: the newest one counts, whoever brought it."""


class Policy(Frozen):
    """What this site permits; client.policy holds every study against it."""

    allowed_tasks: tuple[str, ...] = ("classification", "segmentation", "detection")
    max_epsilon: Positive | None = None  # of one study
    max_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_rounds: Count | None = None
    max_runs: Count = 10  # of one study: each may ask for sums over other members
    min_sites: Annotated[int, Field(ge=3)] = 3  # in every sum
    min_threshold: Annotated[int, Field(ge=3)] = 3  # sites that must help to unmask a sum
    min_patients: Count = 1  # declared by this site
    allow_seeded_randomness: bool = False
    allow_no_privacy: bool = False
    allow_statistics: bool = False  # exact counts of what the images are like, before training
    require_approval: bool = True
    """Whether a person here must have approved a study; without it, this table alone decides."""
    coordinator_key: Fingerprint | None = None  # a study of another coordinator is refused
    member_keys: dict[Name, Fingerprint] = Field(default_factory=dict)  # nor one of other members

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Where nobody reads a study, its keys stand here: people compared them by telephone."""
        if self.require_approval:
            return
        if self.coordinator_key is None:
            text = "needed where require_approval is false; fl-certs show prints the fingerprint"
            yield "coordinator_key", text
        if not self.member_keys:
            text = 'needed where require_approval is false: {name = "fingerprint", ...}'
            yield "member_keys", text


class SiteConfig(Frozen):
    """A whole ``site.toml``; ``common.config.load(path, SiteConfig)`` reads one."""

    name: Name
    state_dir: RelativePath
    device: Literal["auto", "cpu", "cuda"] = "auto"
    coordinator: str | None = None  # host:port
    certificates: Certificates | None = None
    data: Data
    budget: Budget | None = None
    policy: Policy = Policy()


class DataTable(Frozen):
    """What the sites of a simulation have in common: a file with ``[data]`` and no names."""

    data: Data
    budget: Budget | None = None


def deployed(config: SiteConfig) -> Certificates:
    """The certificates of a site file that says all a deployment needs.

    Raises:
      ConfigError: A key is missing, or the certificate is another site's; the message says which.
    """
    if config.coordinator is None or config.certificates is None:
        raise ConfigError(
            'site.toml needs coordinator = "host:port" and [certificates] ca, cert, key to take '
            "part; see certs/README.md"
        )
    name = Identity.load(config.certificates.cert, config.certificates.key).name
    if name != config.name:
        raise ConfigError(
            f"certificates.cert is {name}'s, this site is {config.name}; give this site's own"
        )
    return config.certificates


def check_key_mode(key: Path) -> None:
    """Refuse a private key that others on this machine can read; none is the loader's to find.

    Raises:
      ConfigError: With the command that corrects it.
    """
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
    except OSError:
        return
    if mode & ~0o600:
        raise ConfigError(
            f"key {key}: mode {mode:04o}, only its owner may read it: chmod 600 {key}; if others "
            "could log in here, let the CA revoke it"
        )
