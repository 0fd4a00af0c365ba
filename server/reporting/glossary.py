"""What each figure of a report says, in a sentence that needs no statistics."""

from __future__ import annotations

from typing import Final, NamedTuple

from common.study import Classification, Study
from server.reporting.record import Facts

TITLES: Final = {"auroc": "AUROC", "f1": "F1", "iou": "IoU", "dice": "Dice"}


class Explained(NamedTuple):
    """One row of the table of figures."""

    figure: str
    value: float | None  # on the test images
    says: str


def title_of(figure: str) -> str:
    """A figure's name in the middle of a sentence."""
    return TITLES.get(figure, figure)


def explained(study: Study, test: Facts) -> list[Explained]:
    """Every scalar figure of the study's task, with its value and what it says.

    Args:
      study: Of the run.
      test: The figures on the test images, those by class too.
    """
    if not isinstance(study.task, Classification):
        rows = _of_pixels(study, test)
    elif study.task.labels == "binary":
        rows = _of_two_classes(study.task, test)
    else:
        rows = _of_many_classes(study.task, test)
    return [*rows, Explained("Loss", test["loss"], _loss(study))]


def loss_of(study: Study) -> str:
    """The name of the loss that the study trains with."""
    loss = study.training.loss
    weighted = "class-weighted " if loss.class_weights else ""
    names = {
        "cross-entropy": f"{weighted}cross-entropy",
        "focal": f"{weighted}focal loss (gamma {loss.focal_gamma:g})",
        "dice": "soft Dice loss",
        "dice-cross-entropy": f"soft Dice loss plus {weighted}cross-entropy",
    }
    return names[loss.kind]


def _loss(study: Study) -> str:
    lowered = "the quantity that training lowers"
    if study.training.logit_adjustment:
        lowered += " (there with an allowance for how common each class is at a site)"
    if study.training.proximal:
        lowered += " (there together with the pull towards the common model)"
    return f"Mean {loss_of(study)}, {lowered}. It compares rounds of one study, not studies."


def _of_pixels(study: Study, test: Facts) -> list[Explained]:
    first, *others = study.task.classes
    pixels = "pixels" if len(study.input.size) == 2 else "voxels"  # noqa: PLR2004
    if len(others) == 1:
        the_class, mean = f"“{others[0]}”", ""
    else:
        the_class, mean = "a class", f" Mean over the {len(others)} classes but “{first}”."
    return [
        Explained(
            "Dice",
            test["dice"],
            f"How well the {pixels} that the model gave {the_class} overlap the true ones: twice "
            "those in both, divided by the sum of the two. 0 is no overlap, 1 is the same outline."
            + mean,
        ),
        Explained(
            "IoU (intersection over union)",
            test["iou"],
            f"Another measure of the same overlap: the {pixels} in both, divided by those in at "
            "least one. It is never above Dice; compare it with other values of IoU only." + mean,
        ),
        Explained(
            "Sensitivity (recall)",
            test["sensitivity"],
            f"Of the {pixels} that truly are of {the_class}, the share the model found." + mean,
        ),
        Explained(
            "Precision (positive predictive value)",
            test["precision"],
            f"Of the {pixels} that the model gave {the_class}, the share that truly are of it."
            + mean,
        ),
    ]


def _of_two_classes(task: Classification, test: Facts) -> list[Explained]:
    negative, positive = task.classes
    return [
        Explained(
            "AUROC",
            test["auroc"],
            f"The chance that a random “{positive}” image scores above a random “{negative}” one: "
            "0.5 is no better than chance, 1 is perfect. No threshold is involved.",
        ),
        Explained(
            "Accuracy",
            test["accuracy"],
            "Share of all test images that were put in the right class. Depends on how common each "
            "class is.",
        ),
        Explained(
            "Recall (sensitivity)",
            test["recall"],
            f"Of the “{positive}” images, the share the model found.",
        ),
        Explained(
            "Specificity",
            test["by_class"][0]["specificity"],
            f"Of the “{negative}” images, the share the model recognised as such.",
        ),
        Explained(
            "Precision (positive predictive value)",
            test["precision"],
            f"Of the images the model called “{positive}”, the share that truly were. It is lower "
            f"wherever “{positive}” is rarer than among these test images.",
        ),
        Explained(
            "F1", test["f1"], "Harmonic mean of precision and recall: high only if both are."
        ),
    ]


def _of_many_classes(task: Classification, test: Facts) -> list[Explained]:
    if task.labels == "multilabel":
        each, every, right = "label", "labels", "Share of the test images with every label right."
    else:
        each, every = "class", "classes"
        right = (
            "Share of all test images that were put in the right class. Common classes weigh more."
        )
    return [
        Explained(
            "AUROC",
            test["auroc"],
            f"The chance that a random image of a {each} scores above a random one without it, "
            f"mean over the {every}: 0.5 is no better than chance, 1 is perfect. No threshold is "
            "involved.",
        ),
        Explained("Accuracy", test["accuracy"], right),
        Explained(
            "Recall (sensitivity)",
            test["recall"],
            f"Of the images of a {each}, the share the model found; every {each} weighs the same.",
        ),
        Explained(
            "Precision (positive predictive value)",
            test["precision"],
            f"Of the images the model gave a {each}, the share that truly have it; every {each} "
            f"weighs the same. It is lower wherever a {each} is rarer than among these test "
            "images.",
        ),
        Explained(
            "F1",
            test["f1"],
            f"Harmonic mean of precision and recall, mean over the {every}: high only if both are.",
        ),
    ]
