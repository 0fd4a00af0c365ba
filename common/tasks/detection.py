"""Detection: boxes around what an image shows, each of one class.

The counts hold, per class, the true boxes and two histograms of the findings' scores: of findings
that are right and of those that are not. Average precision and FROC follow from them for all
sites together. A finding is right where it overlaps a true box of its class by one half or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from torch import Tensor

from common.study import Detection, TrainingLoss
from common.tasks.base import Figures, Loss, mean, mean_loss, ratio, summed_loss
from common.tasks.boxes import (
    BOX,
    NO_BOX,
    Found,
    centres_of,
    found_in,
    lost_overlap,
    partners_of,
    sides_of,
)
from common.tasks.scores import NUM_BINS, average_precision, bins_of, froc_score

FALL = 4.0  # how much less a place counts, the nearer it is to a centre
WEIGHT_OF_SIDES = 2.0  # beside the boxes' centres


@dataclass(frozen=True)
class BoxCounts:
    """Named views of one count vector."""

    num_examples: NDArray[np.int64]  # (1,) images
    loss: NDArray[np.int64]  # (1,), fixed point
    boxes: NDArray[np.int64]  # (num_classes,) true ones
    scores: NDArray[np.int64]  # (num_classes, 2, NUM_BINS): wrong and right findings, by score


class DetectionTask:
    """Loss, counts and figures of ``common.study.Detection``."""

    def __init__(self, config: Detection, loss: TrainingLoss, size: Sequence[int]) -> None:
        self.classes = config.classes
        self.max_boxes = config.max_boxes
        self.size = tuple(size)
        self.loss = loss
        self.threshold = float(np.log(config.threshold / (1 - config.threshold)))  # a logit
        self.num_counts = 2 + len(config.classes) * (1 + 2 * NUM_BINS)

    def local_loss(self, targets: object | None) -> Loss:  # noqa: ARG002 - see ``Task.local_loss``
        """The study's loss, mean over the images; it does not depend on the site's targets."""
        return lambda outputs, boxes: self._losses(outputs, boxes).mean()

    def made_up_targets(self, num: int) -> Tensor:
        """One box of every class in turn, a quarter of the image, shape (num, max_boxes, 5)."""
        height, width = self.size
        boxes = torch.full((num, self.max_boxes, BOX), NO_BOX)
        for k in range(num):
            x, y = width * (k % 3) / 4, height * (k % 2) / 4
            kind = k % len(self.classes)
            boxes[k, 0] = torch.tensor([x, y, x + width / 2, y + height / 2, kind])
        return boxes

    def counts(self, outputs: Tensor, targets: Tensor) -> NDArray[np.int64]:
        """Summable counts of one batch of boxes; see ``Task.counts``."""
        with torch.no_grad():
            loss = summed_loss(self._losses(outputs, targets))
            found = [self.decide(image) for image in outputs]
        counts = self.tally(found, targets)
        self.view(counts).loss[0] = loss
        return counts

    def tally(self, found: Sequence[Found], targets: Tensor) -> NDArray[np.int64]:
        """Counts of findings alone, no loss."""
        vector = np.zeros(self.num_counts, np.int64)
        counts = self.view(vector)
        for image, padded in zip(found, targets, strict=True):
            boxes = padded[padded[:, 4] >= 0]
            right = (partners_of(image.as_boxes(), boxes) >= 0).long().numpy()
            bins = bins_of(image.logits.double().cpu().numpy())
            np.add.at(counts.scores, (image.classes.cpu().numpy(), right, bins), 1)
            np.add.at(counts.boxes, boxes[:, 4].long().cpu().numpy(), 1)
        counts.num_examples[0] = len(targets)
        return vector

    def decide(self, outputs: Tensor) -> Found:
        """Findings in one image, whatever their score; outputs (num_outputs, rows, columns)."""
        return found_in(outputs, len(self.classes), self.size)

    def figures(self, counts: NDArray[np.int64]) -> Figures:
        """Mean average precision, FROC, recall and precision; see ``Task.figures``.

        Means over the classes of which there is a box.
        """
        view = self.view(counts)
        num_examples = int(view.num_examples[0])
        by_class = self.figures_by_class(counts)
        return {
            "loss": mean_loss(int(view.loss[0]), num_examples),
            "num_examples": num_examples,
            "map50": mean([of_class["ap50"] for of_class in by_class]),
            "froc": mean([of_class["froc"] for of_class in by_class]),
            "recall": mean([of_class["recall"] for of_class in by_class]),
            "precision": mean([of_class["precision"] for of_class in by_class]),
            "ap50_by_class": {
                name: of_class["ap50"]
                for name, of_class in zip(self.classes, by_class, strict=True)
            },
        }

    def figures_by_class(self, counts: NDArray[np.int64]) -> list[dict[str, float | None]]:
        """Average precision, FROC, and recall and precision of findings above the threshold."""
        view = self.view(counts)
        num_images, shown = int(view.num_examples[0]), self.first_shown
        return [
            {
                "ap50": average_precision(wrong, right, num_true),
                "froc": froc_score(wrong, right, num_true, num_images),
                "recall": ratio(right[shown:].sum(), num_true),
                "precision": ratio(right[shown:].sum(), right[shown:].sum() + wrong[shown:].sum())
                if num_true
                else None,
            }
            for num_true, (wrong, right) in zip(view.boxes.tolist(), view.scores, strict=True)
        ]

    @property
    def first_shown(self) -> int:
        """The first bin of scores whose findings are shown."""
        return int(bins_of(np.array([self.threshold]))[0])

    def view(self, counts: NDArray[np.int64]) -> BoxCounts:
        """Named views of a count vector of shape (num_counts,)."""
        num = len(self.classes)
        return BoxCounts(
            num_examples=counts[0:1],
            loss=counts[1:2],
            boxes=counts[2 : 2 + num],
            scores=counts[2 + num :].reshape(num, 2, NUM_BINS),
        )

    def _losses(self, outputs: Tensor, boxes: Tensor) -> Tensor:
        """One loss per image, shape (batch,): centres, and the sides of boxes near them."""
        num = len(self.classes)
        wanted = centres_of(boxes, num, *outputs.shape[-2:])
        logits, gamma = outputs[:, :num], self.loss.focal_gamma
        is_centre = wanted.heat == 1
        sure, unsure = F.logsigmoid(logits), F.logsigmoid(-logits)
        missed = -sure * unsure.exp() ** gamma
        extra = -unsure * sure.exp() ** gamma * (1 - wanted.heat) ** FALL
        centres = torch.where(is_centre, missed, extra)
        if self.loss.class_weights:
            weights = outputs.new_tensor(self.loss.class_weights)
            centres = centres * weights[:, None, None]
        lost = lost_overlap(sides_of(outputs[:, num:]).movedim(1, -1), wanted.sides.movedim(1, -1))
        near, num_near = wanted.near, wanted.near.flatten(1).sum(dim=1)
        sides = torch.where(near, lost, 0).flatten(1).sum(dim=1) / num_near.clamp_min(1)
        at_centres: Tensor = centres.flatten(1).sum(dim=1) / wanted.num_boxes.clamp_min(1)
        return at_centres + WEIGHT_OF_SIDES * sides
