"""The study: everything that people at the sites approve, and nothing else.

One TOML file holds the task, the model, how images are prepared, how a site trains, the privacy
plan, the secure sum and the members. Its digest is what a site approves and what every run names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from common.config import Frozen

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

MIN_SITES = 3  # below three, a site could compute the only other site's update from the sum


class Classification(Frozen):
    """One or several labels for a whole image."""

    kind: Literal["classification"]
    labels: Literal["binary", "multiclass", "multilabel"] = "binary"
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]

    @model_validator(mode="after")
    def _check_classes(self) -> Classification:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes repeats a name")
        if self.labels == "binary" and len(self.classes) != 2:  # noqa: PLR2004
            raise ValueError("binary needs exactly two classes: the negative and the positive one")
        if self.labels == "multiclass" and len(self.classes) < 3:  # noqa: PLR2004
            raise ValueError("multiclass needs at least three classes; for two use binary")
        return self

    @property
    def num_outputs(self) -> int:
        """Numbers the network returns for one image."""
        return 1 if self.labels == "binary" else len(self.classes)

    @property
    def figures(self) -> tuple[str, ...]:
        """Scalar figures of this task, and so what early stopping may watch."""
        return ("loss", "auroc", "accuracy", "precision", "recall", "f1")


class Cnn(Frozen):
    """Small convolutional network with GroupNorm, for images of about 28 to 128 pixels."""

    name: Literal["cnn"]
    width: Annotated[int, Field(ge=4, le=512, multiple_of=4)] = 24
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    pooling: Literal["mean", "max"] = "mean"  # max finds small things, mean judges the whole
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ResNet18(Frozen):
    """MONAI's ResNet-18 with GroupNorm in place of BatchNorm; about 11 million parameters."""

    name: Literal["resnet18"]
    stem_stride: Literal[1, 2] = 2
    max_pool: bool = True


class Input(Frozen):
    """How every site turns a file into the network's input."""

    size: Annotated[
        tuple[Annotated[int, Field(ge=8, le=1024)], ...], Field(min_length=2, max_length=2)
    ]
    channels: Literal[1, 3] = 1
    intensity: Literal["dtype", "image"] = "dtype"
    """``dtype``: grey values over the range of the file's number type; ``image``: each image to
    mean 0 and standard deviation 1. No statistic of a data set enters either way."""
    mean: float = 0.0  # then every value becomes (value - mean) / std
    std: Positive = 1.0


class Augmentation(Frozen):
    """Random changes drawn anew for every image of every batch."""

    flip: Fraction = 0.0  # probability of a left-right flip
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0  # up to, both ways
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # up to this share of the side
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0  # up to this share, in or out
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0  # gain in 1 +- contrast
    brightness: Annotated[float, Field(ge=0)] = 0.0  # offset, in units of the normalised image
    noise: Annotated[float, Field(ge=0)] = 0.0  # standard deviation, same units


class EarlyStopping(Frozen):
    """Stop when a validation figure has not improved for ``patience`` rounds."""

    figure: str = "loss"
    patience: Count


class Training(Frozen):
    """What a site does with one round's model."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    batch_size: Annotated[int, Field(ge=1, le=65536)]
    local_epochs: Count | None = None
    local_steps: Count | None = None
    logit_adjustment: bool = False
    augmentation: Augmentation = Augmentation()
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _check_length(self) -> Training:
        if (self.local_epochs is None) == (self.local_steps is None):
            raise ValueError("give exactly one of local_epochs and local_steps")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum belongs to sgd; adam and adamw have their own")
        return self


class FedAvg(Frozen):
    """The mean update is added to the model."""

    name: Literal["fedavg"] = "fedavg"
    learning_rate: Positive = 1.0


class FedAvgM(Frozen):
    """The mean update is added to a decaying sum of the earlier ones."""

    name: Literal["fedavgm"]
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class FedAdaptive(Frozen):
    """Adam's or Yogi's rule, with the mean update in the place of a gradient."""

    name: Literal["fedadam", "fedyogi"]
    learning_rate: Positive = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 0.001  # how adaptive: added to the root of the second moment


ServerOptimizer = Annotated[FedAvg | FedAvgM | FedAdaptive, Field(discriminator="name")]


class NoPrivacy(Frozen):
    """A study without differential privacy; its report says so on the first line."""

    mode: Literal["none"]


class DifferentialPrivacy(Frozen):
    """DP-SGD at every site: what one patient's (or image's) whole record may change."""

    unit: Literal["patient", "image"] = "patient"
    epsilon: Positive | None = None  # of the whole study, at each site; or the noise multiplier
    noise_multiplier: Positive | None = None  # noise standard deviation / example_clip_norm
    delta: Annotated[float, Field(gt=0, le=0.01)]
    example_clip_norm: Positive  # L2 norm of one unit's gradient
    max_images_per_patient: Count = 1  # images of one patient in one step
    randomness: Literal["os", "seeded"] = "os"

    @model_validator(mode="after")
    def _check_privacy(self) -> DifferentialPrivacy:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of epsilon and noise_multiplier")
        if self.unit == "image" and self.max_images_per_patient != 1:
            raise ValueError(
                "with unit = image every image is its own unit: leave out max_images_per_patient"
            )
        return self


def _privacy_kind(value: Any) -> str:
    mode = value.get("mode") if isinstance(value, dict) else getattr(value, "mode", None)
    return "private" if mode is None else "none"


Privacy = Annotated[
    Annotated[NoPrivacy, Tag("none")] | Annotated[DifferentialPrivacy, Tag("private")],
    Discriminator(_privacy_kind),
]


class Aggregation(Frozen):
    """The secure sum's number format."""

    ring_bits: Literal[16, 24, 32] = 32
    weight_cap: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000  # patients; n_max
    first_round_bound: Positive = 4.0  # largest |entry of an update| expected in round 1


class Cohort(Frozen):
    """Who must take part."""

    min_sites: Annotated[int, Field(ge=MIN_SITES, le=255)] = MIN_SITES


class Deadlines(Frozen):
    """How long the coordinator waits, in seconds."""

    answer_s: Positive = 3600.0


class Member(Frozen):
    """One site that takes part."""

    name: Name


class Study(Frozen):
    """A whole study; ``common.config.load(path, Study)`` reads one."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    num_rounds: Annotated[int, Field(ge=1, le=100_000)]
    torch_threads: Annotated[int, Field(ge=1, le=256)] = 1
    task: Classification
    model: Annotated[Cnn | ResNet18, Field(discriminator="name")]
    input: Input
    training: Training
    server_optimizer: ServerOptimizer = FedAvg()
    privacy: Privacy
    aggregation: Aggregation = Aggregation()
    cohort: Cohort = Cohort()
    deadlines: Deadlines = Deadlines()
    members: Annotated[tuple[Member, ...], Field(max_length=255)] = ()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Values that are right alone and wrong together."""
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            yield "members", "two members have the same name"
        if names and len(names) < self.cohort.min_sites:
            yield "members", f"{len(names)} given, cohort.min_sites is {self.cohort.min_sites}"
        stopping = self.training.early_stopping
        if stopping and stopping.figure not in self.task.figures:
            choices = ", ".join(self.task.figures)
            yield "training.early_stopping.figure", f"this task has {choices}"
        if isinstance(self.privacy, DifferentialPrivacy):
            yield from self._privacy_conflicts()
        if self.model.name == "resnet18" and min(self.input.size) < 16:  # noqa: PLR2004
            yield "input.size", "resnet18 needs at least 16 pixels on each side"

    def _privacy_conflicts(self) -> Iterator[tuple[str, str]]:
        """What would release more about a patient than the noise covers."""
        if self.training.logit_adjustment:
            text = "uses the site's own class shares, which are private; leave it out"
            yield "training.logit_adjustment", text
        if self.training.early_stopping:
            text = "would choose by figures of patients that are not noised; leave it out"
            yield "training.early_stopping", text

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the members in the study's order; a site's index is its place here."""
        return tuple(member.name for member in self.members)

    def with_members(self, names: tuple[str, ...]) -> Study:
        """The same study with these members: a simulation fills them in."""
        return self.model_copy(update={"members": tuple(Member(name=name) for name in names)})

    def as_table(self) -> dict[str, Any]:
        """The study as a plain table, ready for TOML; unset optional keys are left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of every value, defaults included; 64 hex digits."""
        canonical = json.dumps(self.as_table(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
