"""The networks a study can name. Every one is normalised by groups, never by the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from common.config import Frozen, PrintableText

Width = Annotated[int, Field(ge=4, le=1024, multiple_of=4)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class _Network(Frozen):
    frozen: Annotated[
        tuple[Annotated[PrintableText, Field(max_length=128)], ...], Field(max_length=1024)
    ] = ()
    """Beginnings of names of parameters that keep their initial values and are never sent."""


class Cnn(_Network):
    """Small convolutional network with GroupNorm, for images of about 28 to 128 pixels."""

    name: Literal["cnn"]
    width: Annotated[int, Field(ge=4, le=512, multiple_of=4)] = 24
    activation: Literal["relu", "gelu", "tanh"] = "relu"
    pooling: Literal["mean", "max"] = "mean"  # max finds small things, mean judges the whole
    dropout: Dropout = 0.0


class ResNet18(_Network):
    """MONAI's ResNet-18; about 11 million parameters."""

    name: Literal["resnet18"]
    stem_stride: Literal[1, 2] = 2
    max_pool: bool = True


class DenseNet121(_Network):
    """MONAI's DenseNet-121; about 7 million parameters."""

    name: Literal["densenet121"]
    dropout: Dropout = 0.0


class EfficientNetB0(_Network):
    """MONAI's EfficientNet-B0; about 4 million parameters."""

    name: Literal["efficientnet-b0"]


class _Pyramid(_Network):
    channels: Annotated[tuple[Width, ...], Field(min_length=2, max_length=7)] = (16, 32, 64, 128)
    """Feature maps at each level; every level has half the side of the one before."""
    dropout: Dropout = 0.0

    @property
    def shrinks(self) -> int:
        """By how much the deepest level is smaller than the input, along each side."""
        return int(2 ** (len(self.channels) - 1))


class Unet(_Pyramid):
    """MONAI's U-Net with residual units, for images or volumes; as given, 405,000 parameters."""

    name: Literal["unet"]
    residual_units: Annotated[int, Field(ge=0, le=4)] = 2  # convolutions per level


class AttentionUnet(_Pyramid):
    """MONAI's U-Net with attention gates, for images or volumes."""

    name: Literal["attention-unet"]


Model = Annotated[
    Cnn | ResNet18 | DenseNet121 | EfficientNetB0 | Unet | AttentionUnet,
    Field(discriminator="name"),
]

# Smallest side at which the last feature map still has a pixel.
SMALLEST = {"cnn": 8, "resnet18": 16, "densenet121": 32, "efficientnet-b0": 32}


def model_misfits(model: Model, *, task: str, size: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Where a model does not fit the task or the input: the key and what is wrong."""
    if isinstance(model, _Pyramid):
        if task != "segmentation":
            yield "model.name", f"{model.name} answers for every pixel; this task is {task}"
        if any(side % model.shrinks for side in size):
            yield "input.size", f"{model.name} needs sides that are multiples of {model.shrinks}"
        elif max(size) == model.shrinks and model.channels[-1] < 8:  # noqa: PLR2004 - 2 per group
            # A group of one map of one pixel has no spread: normalised, it is 0 for every image.
            yield "model.channels", "the deepest level has one pixel; give it 8 channels or more"
        return
    if task != "classification":
        yield "model.name", f"{model.name} answers for a whole image; this task is {task}"
    if min(size) < SMALLEST[model.name]:
        yield "input.size", f"{model.name} needs at least {SMALLEST[model.name]} pixels a side"
    if len(size) != 2 and model.name == "cnn":  # noqa: PLR2004
        yield "input.size", "cnn takes images of two dimensions"
