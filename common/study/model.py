"""The networks a study can name. Every one is normalised by groups, never by the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from common.config import Frozen, PrintableText

Width = Annotated[int, Field(ge=4, le=1024, multiple_of=4)]
STRIDE = 4  # pixels of the input between two places where a detector looks
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


Classifier = Cnn | ResNet18 | DenseNet121 | EfficientNetB0


class _Pyramid(_Network):
    """Every level has half the side of the one before."""

    first_stride: ClassVar[int] = 1  # of the first level, in pixels of the input
    dropout: Dropout = 0.0
    channels: Annotated[tuple[Width, ...], Field(min_length=2, max_length=7)] = (16, 32, 64, 128)
    """Feature maps at each level."""

    @property
    def maps(self) -> tuple[int, ...]:
        """Feature maps at each level."""
        return self.channels

    @property
    def shrinks(self) -> int:
        """By how much the deepest level is smaller than the input, along each side."""
        return int(self.first_stride * 2 ** (len(self.channels) - 1))


class Unet(_Pyramid):
    """MONAI's U-Net with residual units, for images or volumes; as given, 405,000 parameters."""

    name: Literal["unet"]
    residual_units: Annotated[int, Field(ge=0, le=4)] = 2  # convolutions per level


class AttentionUnet(_Pyramid):
    """MONAI's U-Net with attention gates, for images or volumes."""

    name: Literal["attention-unet"]


class SegResNet(_Network):
    """MONAI's SegResNet, for images or volumes; as given, 1.2 million parameters in volumes."""

    name: Literal["segresnet"]
    dropout: Dropout = 0.0
    filters: Width = 8  # feature maps of the first level; each level has twice those before
    blocks: Annotated[
        tuple[Annotated[int, Field(ge=1, le=8)], ...], Field(min_length=2, max_length=6)
    ] = (1, 2, 2, 4)
    """Residual blocks at each level on the way down; one on the way up."""

    @property
    def maps(self) -> tuple[int, ...]:
        """See ``_Pyramid``."""
        return tuple(self.filters * 2**level for level in range(len(self.blocks)))

    @property
    def shrinks(self) -> int:
        """See ``_Pyramid``."""
        return int(2 ** (len(self.blocks) - 1))


class CenterUnet(_Pyramid):
    """Finds boxes, by their centres and sides, as given with 517,000 parameters.

    Two convolutions halve the image twice; a U-Net with attention gates works on what they give.
    """

    name: Literal["center-unet"]
    first_stride: ClassVar[int] = STRIDE
    channels: Annotated[tuple[Width, ...], Field(min_length=2, max_length=6)] = (32, 64, 128)


class Logistic(_Network):
    """Logistic regression on a table."""

    name: Literal["logistic"]


class Mlp(_Network):
    """Layers of hidden units on a table."""

    name: Literal["mlp"]
    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1, max_length=8)
    ] = (32, 16)
    dropout: Dropout = 0.0


class Multimodal(_Network):
    """A network for the image and a layer for the table; what both found decides together."""

    name: Literal["multimodal"]
    image: Annotated[Classifier, Field(discriminator="name")]
    image_features: Annotated[int, Field(ge=1, le=4096)] = 32
    table_features: Annotated[int, Field(ge=1, le=4096)] = 16


Model = Annotated[
    Classifier | Unet | AttentionUnet | SegResNet | CenterUnet | Logistic | Mlp | Multimodal,
    Field(discriminator="name"),
]

# Smallest side at which the last feature map still has a pixel.
SMALLEST = {"cnn": 8, "resnet18": 16, "densenet121": 32, "efficientnet-b0": 32}


def model_misfits(
    model: Model, *, task: str, size: tuple[int, ...], has_table: bool
) -> Iterator[tuple[str, str]]:
    """Where a model does not fit the task or the input: the key and what is wrong."""
    if isinstance(model, Logistic | Mlp | Multimodal):
        yield from _table_misfits(model, task, size, has_table=has_table)
        return
    if has_table:
        yield "table", f"{model.name} sees images alone; use multimodal, mlp or logistic"
    if not size:
        yield "input", f"{model.name} looks at images: give [input] with their size"
        return
    if isinstance(model, CenterUnet):
        yield from _detector_misfits(model, task, size)
    elif isinstance(model, Unet | AttentionUnet | SegResNet):
        yield from _segmenter_misfits(model, task, size)
    else:
        yield from _classifier_misfits(model, task, size)


def _segmenter_misfits(
    model: Unet | AttentionUnet | SegResNet, task: str, size: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    name = model.name
    if task != "segmentation":
        yield "model.name", f"{name} answers for every pixel; this task is {task}"
    if any(side % model.shrinks for side in size):
        yield "input.size", f"{name} needs sides that are multiples of {model.shrinks}"
    elif max(size) == model.shrinks and model.maps[-1] < 8:  # noqa: PLR2004 - 2 per group
        # A group of one map of one pixel has no spread: normalised, it is 0 for every image.
        yield "model.channels", "the deepest level has one pixel; give it 8 channels or more"


def _classifier_misfits(
    model: Classifier, task: str, size: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    if task != "classification":
        yield "model.name", f"{model.name} answers for a whole image; this task is {task}"
    if min(size) < SMALLEST[model.name]:
        yield "input.size", f"{model.name} needs at least {SMALLEST[model.name]} pixels a side"
    if len(size) != 2 and model.name == "cnn":  # noqa: PLR2004
        yield "input.size", "cnn takes images of two dimensions"


def _table_misfits(
    model: Logistic | Mlp | Multimodal, task: str, size: tuple[int, ...], *, has_table: bool
) -> Iterator[tuple[str, str]]:
    if task != "classification" and not isinstance(model, Multimodal):
        yield "model.name", f"{model.name} answers for a whole patient; this task is {task}"
    if not has_table:
        yield "table", f"{model.name} reads clinical columns: give [[table.columns]]"
    if isinstance(model, Multimodal):
        if not size:
            yield "input", "multimodal looks at images too: give [input] with their size"
            return
        if model.image.frozen:
            text = 'name them in model.frozen, each beginning with "image."'
            yield "model.image.frozen", text
        yield from _classifier_misfits(model.image, task, size)
    elif size:
        yield "input", f"{model.name} sees no images; leave [input] out, or use multimodal"


def _detector_misfits(
    model: CenterUnet, task: str, size: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    if task != "detection":
        yield "model.name", f"{model.name} finds boxes; this task is {task}"
    if len(size) != 2:  # noqa: PLR2004
        yield "input.size", f"{model.name} takes images of two dimensions"
    if any(side % model.shrinks for side in size):
        yield "input.size", f"{model.name} needs sides that are multiples of {model.shrinks}"
