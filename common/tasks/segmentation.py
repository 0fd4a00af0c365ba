"""Segmentation: one class for every pixel or voxel.

The counts hold, per class, the pixels that are rightly, in all and truly of it. Dice, intersection
over union, sensitivity and precision follow from them for the pixels of all sites together, and
only pixels inside the valid region count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.quantize import FIXED_POINT
from common.study import Segmentation, TrainingLoss
from common.tasks.base import Figures, Loss, mean, ratio
from common.tasks.losses import OUTSIDE, missed_overlap, surprise

MAX_LOSS = 2.0**10  # per image: two million diverged images still fit the sum


@dataclass(frozen=True)
class PixelCounts:
    """Named views of one count vector."""

    num_examples: NDArray[np.int64]  # (1,) images
    loss: NDArray[np.int64]  # (1,), fixed point
    right: NDArray[np.int64]  # (num_classes,) pixels of the class that the model gave it
    predicted: NDArray[np.int64]  # (num_classes,) pixels that the model gave the class
    actual: NDArray[np.int64]  # (num_classes,) pixels of the class


class SegmentationTask:
    """Loss, counts and figures of ``common.study.Segmentation``."""

    def __init__(self, config: Segmentation, loss: TrainingLoss, size: Sequence[int]) -> None:
        self.classes = config.classes
        self.loss = loss
        # A score must not depend on how images were batched.
        self._scored = loss.model_copy(update={"dice_over": "image"})
        self.size = tuple(size)
        self.num_counts = 2 + 3 * len(config.classes)

    def local_loss(self, targets: object | None) -> Loss:  # noqa: ARG002 - see ``Task.local_loss``
        """The study's loss, mean over the images; it does not depend on the site's targets."""
        return lambda outputs, masks: self._losses(outputs, masks, self.loss).mean()

    def made_up_targets(self, num: int) -> Tensor:
        """Stripes of every class and some pixels outside, shape (num, *size)."""
        kinds = len(self.classes) + 1
        places = torch.arange(num * int(np.prod(self.size))).reshape(num, *self.size) // 3 % kinds
        return torch.where(places == len(self.classes), OUTSIDE, places).to(torch.uint8)

    def counts(self, outputs: Tensor, targets: Tensor) -> NDArray[np.int64]:
        """Summable counts of one batch of masks; see ``Task.counts``."""
        with torch.no_grad():
            each = self._losses(outputs, targets, self._scored).double().clamp(0, MAX_LOSS)
            losses = each.nan_to_num(nan=MAX_LOSS).cpu().numpy()
            counts = self.tally(self.decide(outputs), targets)
        self.view(counts).loss[0] = int(np.rint(losses * FIXED_POINT).sum())
        return counts

    def tally(self, decided: Tensor, masks: Tensor) -> NDArray[np.int64]:
        """Counts of images and pixels alone, no loss; both masks (batch, *size)."""
        vector = np.zeros(self.num_counts, np.int64)
        counts, num = self.view(vector), len(self.classes)
        inside = masks != OUTSIDE
        truth, given = masks[inside].long(), decided[inside].long()
        table = torch.bincount(num * truth + given, minlength=num * num)
        pixels = table.reshape(num, num).cpu().numpy()  # true class by predicted class
        counts.num_examples[0] = len(masks)
        counts.right[:] = np.diagonal(pixels)
        counts.predicted[:] = pixels.sum(axis=0)
        counts.actual[:] = pixels.sum(axis=1)
        return vector

    def decide(self, outputs: Tensor) -> Tensor:
        """The class of every pixel: (batch, num_outputs, *size) to (batch, *size) uint8."""
        if outputs.shape[1] == 1:
            return (outputs[:, 0] > 0).to(torch.uint8)
        return outputs.argmax(dim=1).to(torch.uint8)

    def figures(self, counts: NDArray[np.int64]) -> Figures:
        """Means over the classes but the background, and Dice of each; see ``Task.figures``."""
        view = self.view(counts)
        num_examples = int(view.num_examples[0])
        by_class = self.figures_by_class(counts)
        return {
            "loss": ratio(float(view.loss[0]) / FIXED_POINT, num_examples),
            "num_examples": num_examples,
            **{
                figure: mean([of_class[figure] for of_class in by_class[1:]])
                for figure in ("dice", "iou", "sensitivity", "precision")
            },
            "dice_by_class": {
                name: of_class["dice"]
                for name, of_class in zip(self.classes, by_class, strict=True)
            },
        }

    def figures_by_class(self, counts: NDArray[np.int64]) -> list[dict[str, float | None]]:
        """Dice, IoU, sensitivity and precision of every class, the background first."""
        view = self.view(counts)
        return [
            {
                "dice": ratio(2 * right, predicted + actual),
                "iou": ratio(right, predicted + actual - right),
                "sensitivity": ratio(right, actual),
                "precision": ratio(right, predicted),
            }
            for right, predicted, actual in zip(
                view.right.tolist(), view.predicted.tolist(), view.actual.tolist(), strict=True
            )
        ]

    def view(self, counts: NDArray[np.int64]) -> PixelCounts:
        """Named views of a count vector of shape (num_counts,)."""
        right, predicted, actual = counts[2:].reshape(3, -1)
        return PixelCounts(counts[0:1], counts[1:2], right, predicted, actual)

    def _losses(self, outputs: Tensor, masks: Tensor, config: TrainingLoss) -> Tensor:
        """One loss per image, shape (batch,)."""
        losses = outputs.new_zeros(len(outputs))
        inside = masks != OUTSIDE
        # Whatever the network says outside, infinities too, must not reach the sums.
        outputs = torch.where(inside.unsqueeze(1), outputs, torch.zeros_like(outputs))
        if config.has_dice:
            losses = losses + missed_overlap(outputs, masks, config)
        if config.kind != "dice":
            known = torch.where(inside, masks, torch.zeros_like(masks))
            pixels = surprise(outputs, known, config) * inside
            total, num = pixels.flatten(1).sum(dim=1), inside.flatten(1).sum(dim=1)
            losses = losses + total / num.clamp_min(1)
        return losses
