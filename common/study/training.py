"""How a site trains in one round, and how the coordinator makes the next model of the mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from common.config import Frozen

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
FOCAL_GAMMA = 2.0  # of Lin et al. (2017)
Decay = Annotated[float, Field(ge=0, lt=1)]


def _check_sides(size: tuple[int, ...]) -> tuple[int, ...]:
    if len(size) == 1:
        raise ValueError("an image has two sides, a volume three")
    return size


class Input(Frozen):
    """How every site turns a file into the network's input."""

    size: Annotated[
        tuple[Annotated[int, Field(ge=8, le=1024)], ...],
        Field(max_length=3),
        AfterValidator(_check_sides),
    ]
    """Height and width, or depth, height and width; of a patch where ``patches`` is set. Empty in a
    study without images."""
    patches: bool = False
    """Images keep their own size: training draws patches, scoring slides a window over all."""
    channels: Literal[1, 3] = 1
    colour: Literal["luminance", "red", "green", "blue"] = "luminance"
    """Which grey value a colour file gives where ``channels`` is 1."""
    intensity: Literal["dtype", "image", "window", "file-window"] = "dtype"
    """``dtype``: grey values over the range of the file's number type; ``image``: each image to
    mean 0 and standard deviation 1; ``window``: those from ``window`` to 0 and 1; ``file-window``:
    those from the window that a DICOM file names. No statistic of a data set enters."""
    window: tuple[float, float] | None = None  # lowest and highest value; in CT, Hounsfield units
    spacing: Annotated[tuple[Positive, ...], Field(min_length=2, max_length=3)] | None = None
    """Millimetres between pixels that every image is resampled to, in the order of ``size``; the
    files must say theirs, as DICOM and NIfTI do."""
    mean: float = 0.0  # then every value becomes (value - mean) / std
    std: Positive = 1.0

    @model_validator(mode="after")
    def _check_values(self) -> Input:
        if (self.intensity == "window") != (self.window is not None):
            raise ValueError('window = [low, high] belongs to intensity = "window"')
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError("the lowest value that is kept must be below the highest")
        if self.spacing is not None and len(self.spacing) != len(self.size):
            raise ValueError("spacing and size must have as many values")
        return self


class Augmentation(Frozen):
    """Random changes drawn anew for every image of every batch."""

    flip: Fraction = 0.0  # probability of a left-right flip
    flip_vertical: Fraction = 0.0  # of a top-bottom flip
    quarter_turns: bool = False  # by 0, 90, 180 or 270 degrees, each as likely
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0  # up to, both ways
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # up to this share of the side
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0  # up to this share, in or out
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0  # gain in 1 +- contrast
    brightness: Annotated[float, Field(ge=0)] = 0.0  # offset, in units of the normalised image
    noise: Annotated[float, Field(ge=0)] = 0.0  # standard deviation, same units

    @property
    def moves_pixels(self) -> bool:
        """Whether any change resamples the image."""
        return self.quarter_turns or any(
            (self.flip, self.flip_vertical, self.rotate_degrees, self.shift, self.zoom)
        )


class EarlyStopping(Frozen):
    """Stop when a validation figure has not improved for ``patience`` rounds."""

    figure: str = "loss"
    patience: Count


class TrainingLoss(Frozen):
    """What training lowers. Weights are the study's constants, never a site's own shares."""

    kind: Literal["cross-entropy", "focal", "dice", "dice-cross-entropy"] = "cross-entropy"
    class_weights: tuple[Positive, ...] = ()  # one per class, in the order of task.classes
    focal_gamma: Annotated[float, Field(ge=1)] = FOCAL_GAMMA  # how much less an easy example counts
    dice_over: Literal["image", "batch"] = "image"

    @property
    def has_dice(self) -> bool:
        """Whether overlap is part of the loss."""
        return "dice" in self.kind

    def misfits(self, *, task: str, num_classes: int) -> Iterator[tuple[str, str]]:
        """Where the loss does not fit the task: the key and what is wrong."""
        if self.has_dice and task != "segmentation":
            yield "training.loss.kind", f"{self.kind} compares masks; this task is {task}"
        if task == "detection" and self.kind != "focal":
            yield "training.loss.kind", f"{self.kind} does not find centres; detection takes focal"
        if self.class_weights and len(self.class_weights) != num_classes:
            given = len(self.class_weights)
            yield "training.loss.class_weights", f"{given} given, the task has {num_classes}"
        if self.dice_over == "batch" and not self.has_dice:
            yield "training.loss.dice_over", f"{self.kind} has no overlap; leave it out"
        if self.focal_gamma != FOCAL_GAMMA and self.kind != "focal":
            yield "training.loss.focal_gamma", f"{self.kind} takes none; leave it out"
        if self.class_weights and self.kind == "dice":
            yield "training.loss.class_weights", "dice takes none; every class counts the same"


class Training(Frozen):
    """What a site does with one round's model."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive
    momentum: Decay = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # over the rounds, towards 0
    warmup_rounds: Annotated[int, Field(ge=0)] = 0  # in which the rate grows to its full value
    batch_size: Annotated[int, Field(ge=1, le=65536)]
    local_epochs: Count | None = None
    local_steps: Count | None = None
    loss: TrainingLoss = TrainingLoss()
    logit_adjustment: bool = False
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx: pull towards the round's model, as a multiple of the distance from it."""
    control_variates: bool = False
    """SCAFFOLD: every step is corrected by how the site's gradients differ from all sites'."""
    local_normalisation: bool = False
    """FedBN: layers that normalise are trained at each site for itself and never sent."""
    mixed_precision: bool = False  # bfloat16 where it is safe; faster on a GPU
    augmentation: Augmentation = Augmentation()
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _check_length(self) -> Training:
        if (self.local_epochs is None) == (self.local_steps is None):
            raise ValueError("give exactly one of local_epochs and local_steps")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum belongs to sgd; adam and adamw have their own")
        return self

    @property
    def keeps_state(self) -> bool:
        """Whether a site keeps something from round to round."""
        return self.control_variates or self.local_normalisation


class _ServerOptimizer(Frozen):
    ema: Decay = 0.0
    """Return the exponential moving average of the models after each round, with this decay."""


class FedAvg(_ServerOptimizer):
    """The mean update is added to the model."""

    name: Literal["fedavg"] = "fedavg"
    learning_rate: Positive = 1.0


class FedAvgM(_ServerOptimizer):
    """The mean update is added to a decaying sum of the earlier ones."""

    name: Literal["fedavgm"]
    learning_rate: Positive = 1.0
    momentum: Decay = 0.9


class FedAdaptive(_ServerOptimizer):
    """Adam's or Yogi's rule, with the mean update in the place of a gradient."""

    name: Literal["fedadam", "fedyogi"]
    learning_rate: Positive = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    tau: Positive = 0.001  # how adaptive: added to the root of the second moment


class FedAdagrad(_ServerOptimizer):
    """Adagrad's rule: squares of all mean updates add up, and no step grows again."""

    name: Literal["fedadagrad"]
    learning_rate: Positive = 0.01
    beta1: Decay = 0.0
    tau: Positive = 0.001  # how adaptive: added to the root of the sum


ServerOptimizer = Annotated[
    FedAvg | FedAvgM | FedAdaptive | FedAdagrad, Field(discriminator="name")
]
