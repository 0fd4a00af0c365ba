"""What each figure of a report says, in a sentence that needs no statistics."""

from __future__ import annotations

from typing import Final, NamedTuple

from common.study import Classification, Detection, Segmentation, Study
from server.reporting.record import Facts

TITLES: Final = {
    "calibration_error": "calibration error",
    "auroc": "AUROC",
    "f1": "F1",
    "iou": "IoU",
    "dice": "Dice",
    "hd95": "HD95",
    "map50": "mAP",
    "froc": "FROC",
}


class Explained(NamedTuple):
    """One row of the table of figures."""

    figure: str
    value: float | None  # on the test images
    says: str
    interval: list[float] | None = None  # 95 %, where one is known


INTERVALS: Final = {  # key of a figure's interval by its name in the table
    "AUROC": "auroc",
    "Accuracy": "accuracy",
    "Dice": "dice",
    "Recall (sensitivity)": "recall",
    "Specificity": "specificity",
    "Precision (positive predictive value)": "precision",
}


def title_of(figure: str) -> str:
    """A figure's name in the middle of a sentence."""
    return TITLES.get(figure, figure)


def explained(study: Study, test: Facts) -> list[Explained]:
    """Every scalar figure of the study's task, with its value and what it says.

    Args:
      study: Of the run.
      test: The figures on the test images, those by class too.
    """
    what = "image" if study.input.size else "record"
    if isinstance(study.task, Segmentation):
        rows = _of_pixels(study, test)
    elif isinstance(study.task, Detection):
        rows = _of_boxes(study.task, test)
    elif study.task.labels == "binary":
        rows = _of_two_classes(study.task, test, what)
    else:
        rows = _of_many_classes(study.task, test, what)
    known = test.get("intervals", {})
    rows = [row._replace(interval=known.get(INTERVALS.get(row.figure, ""))) for row in rows]
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
    unit = "millimetres" if study.input.spacing else pixels
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
        Explained(
            "HD95 (95 % Hausdorff distance)",
            test["hd95"],
            f"How far the outline of {the_class} is from the true one, in {unit}: of 100 places on "
            "either, 95 are no further from the other. Smaller is better. Mean over the images in "
            "which both are; an image without one of them is left out." + mean,
        ),
    ]


def _of_boxes(task: Detection, test: Facts) -> list[Explained]:
    num = len(task.classes)
    mean = f" Mean over the {num} classes." if num > 1 else ""
    right = "A finding is right where its box overlaps a true one by half or more of both together."
    return [
        Explained(
            "mAP (mean average precision)",
            test["map50"],
            "How many of the boxes are found and how few findings are wrong, over all thresholds: "
            f"1 is all found before the first wrong one. {right}{mean}",
        ),
        Explained(
            "FROC",
            test["froc"],
            "Share of the boxes found, where the threshold lets through a quarter, a half, 1, 2, 4 "
            f"and 8 wrong findings for each image: the mean of the six.{mean}",
        ),
        Explained(
            "Recall (sensitivity)",
            test["recall"],
            f"Of the true boxes, the share found with a score from {task.threshold:g}.{mean}",
        ),
        Explained(
            "Precision (positive predictive value)",
            test["precision"],
            f"Of the findings with a score from {task.threshold:g}, the share that are "
            f"right.{mean}",
        ),
    ]


def _of_two_classes(task: Classification, test: Facts, what: str) -> list[Explained]:
    negative, positive = task.classes
    return [
        Explained(
            "AUROC",
            test["auroc"],
            f"The chance that a random “{positive}” {what} scores above a random “{negative}” one: "
            "0.5 is no better than chance, 1 is perfect. No threshold is involved.",
        ),
        Explained(
            "Accuracy",
            test["accuracy"],
            f"Share of all test {what}s that were put in the right class. Depends on how common "
            "each class is.",
        ),
        Explained(
            "Recall (sensitivity)",
            test["recall"],
            f"Of the “{positive}” {what}s, the share the model found.",
        ),
        Explained(
            "Specificity",
            test["by_class"][0]["specificity"],
            f"Of the “{negative}” {what}s, the share the model recognised as such.",
        ),
        Explained(
            "Precision (positive predictive value)",
            test["precision"],
            f"Of the {what}s the model called “{positive}”, the share that truly were. It is lower "
            f"wherever “{positive}” is rarer than among these test {what}s.",
        ),
        Explained(
            "F1", test["f1"], "Harmonic mean of precision and recall: high only if both are."
        ),
        _calibration(test),
    ]


def _calibration(test: Facts) -> Explained:
    return Explained(
        "Calibration error",
        test["calibration_error"],
        "How far the probabilities of the model are from how often it is right, on average: with "
        "0.1, seven of ten may be true where it says 0.8. 0 is perfect.",
    )


def _of_many_classes(task: Classification, test: Facts, what: str) -> list[Explained]:
    if task.labels == "multilabel":
        each, every, right = "label", "labels", f"Share of the test {what}s with every label right."
    else:
        each, every = "class", "classes"
        right = (
            f"Share of all test {what}s that were put in the right class. Common classes weigh "
            "more."
        )
    return [
        Explained(
            "AUROC",
            test["auroc"],
            f"The chance that a random {what} of a {each} scores above a random one without it, "
            f"mean over the {every}: 0.5 is no better than chance, 1 is perfect. No threshold is "
            "involved.",
        ),
        Explained("Accuracy", test["accuracy"], right),
        Explained(
            "Recall (sensitivity)",
            test["recall"],
            f"Of the {what}s of a {each}, the share the model found; every {each} weighs the same.",
        ),
        Explained(
            "Precision (positive predictive value)",
            test["precision"],
            f"Of the {what}s the model gave a {each}, the share that truly have it; every {each} "
            f"weighs the same. It is lower wherever a {each} is rarer than among these test "
            f"{what}s.",
        ),
        Explained(
            "F1",
            test["f1"],
            f"Harmonic mean of precision and recall, mean over the {every}: high only if both are.",
        ),
        _calibration(test),
    ]
