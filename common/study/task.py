"""What a study asks of an image: a label, a class for every pixel, or boxes around findings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config import Frozen, PrintableText

NUM_SIDES = 4  # of a box: left, upper, right, lower
ClassName = Annotated[PrintableText, Field(max_length=64)]
Classes = Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=64)]


class Classification(Frozen):
    """One or several labels for a whole image."""

    kind: Literal["classification"]
    labels: Literal["binary", "multiclass", "multilabel"] = "binary"
    classes: Classes

    @model_validator(mode="after")
    def _check_classes(self) -> Classification:
        _check_names(self.classes)
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
        return ("loss", "auroc", "accuracy", "precision", "recall", "f1", "calibration_error")


class Segmentation(Frozen):
    """One class for every pixel or voxel of an image."""

    kind: Literal["segmentation"]
    classes: Classes  # the background first; a mask holds their numbers, from 0

    @model_validator(mode="after")
    def _check_classes(self) -> Segmentation:
        _check_names(self.classes)
        if len(self.classes) < 2:  # noqa: PLR2004
            raise ValueError("segmentation needs the background and at least one class")
        return self

    @property
    def num_outputs(self) -> int:
        """Numbers the network returns for one pixel."""
        return 1 if len(self.classes) == 2 else len(self.classes)  # noqa: PLR2004

    @property
    def figures(self) -> tuple[str, ...]:
        """Scalar figures of this task, and so what early stopping may watch."""
        return ("loss", "dice", "iou", "sensitivity", "precision", "hd95")


class Detection(Frozen):
    """Where in an image something is: boxes, each of one class."""

    kind: Literal["detection"]
    classes: Classes
    max_boxes: Annotated[int, Field(ge=1, le=512)] = 64
    """Boxes that one image may have; an image with more is refused, not cut."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Score from which a finding is shown, and counted by precision and recall."""

    @model_validator(mode="after")
    def _check_classes(self) -> Detection:
        _check_names(self.classes)
        return self

    @property
    def num_outputs(self) -> int:
        """Numbers the network returns for one place: a score per class, and four sides."""
        return len(self.classes) + NUM_SIDES

    @property
    def figures(self) -> tuple[str, ...]:
        """Scalar figures of this task, and so what early stopping may watch."""
        return ("loss", "map50", "froc", "recall", "precision")


Task = Annotated[Classification | Segmentation | Detection, Field(discriminator="kind")]


def _check_names(classes: tuple[str, ...]) -> None:
    if len(set(classes)) != len(classes):
        raise ValueError("classes repeats a name")
