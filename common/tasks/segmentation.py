"""Segmentation: one class for every pixel or voxel.

The counts hold, per class, the pixels that are rightly, in all and truly of it. Dice, intersection
over union, sensitivity and precision follow from them for the pixels of all sites together, and
only pixels inside the valid region count. How far outlines are apart is added up over images.
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
from common.tasks.base import MAX_LOSS, Figures, Loss, mean, mean_loss, ratio, summed_loss
from common.tasks.intervals import Interval, of_ratio
from common.tasks.losses import OUTSIDE, missed_overlap, surprise
from common.tasks.outline import hausdorff_95

NUM_VECTORS = 8  # of one entry per class
MOST_SQUARED = 2**53  # per image: a thousand images of 90 million pixels of a class fit the sum


@dataclass(frozen=True)
class PixelCounts:
    """Named views of one count vector."""

    num_examples: NDArray[np.int64]  # (1,) images
    loss: NDArray[np.int64]  # (1,), fixed point
    right: NDArray[np.int64]  # (num_classes,) pixels of the class that the model gave it
    predicted: NDArray[np.int64]  # (num_classes,) pixels that the model gave the class
    actual: NDArray[np.int64]  # (num_classes,) pixels of the class
    apart: NDArray[np.int64]  # (num_classes,) sum of the images' HD95, fixed point
    compared: NDArray[np.int64]  # (num_classes,) images in which both outlines are
    # Sums over images of squares and products of pixels.
    both_squared: NDArray[np.int64]  # (num_classes,) of twice the right pixels
    both_by_all: NDArray[np.int64]  # (num_classes,) of these times predicted and actual ones
    all_squared: NDArray[np.int64]  # (num_classes,) of predicted and actual ones


class SegmentationTask:
    """Loss, counts and figures of ``common.study.Segmentation``."""

    def __init__(
        self,
        config: Segmentation,
        loss: TrainingLoss,
        size: Sequence[int],
        spacing: Sequence[float] | None = None,
    ) -> None:
        self.classes = config.classes
        self.loss = loss
        # A score must not depend on how images were batched.
        self._scored = loss.model_copy(update={"dice_over": "image"})
        self.size = tuple(size)
        self._spacing = spacing
        self.num_counts = 2 + NUM_VECTORS * len(config.classes)

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
            loss = summed_loss(self._losses(outputs, targets, self._scored))
            decided = self.decide(outputs)
            counts = self.tally(decided, targets)
            self._compare(decided, targets, self.view(counts))
        self.view(counts).loss[0] = loss
        return counts

    def _compare(self, decided: Tensor, masks: Tensor, counts: PixelCounts) -> None:
        """Add how far each image's outlines are apart, class by class without the background."""
        for given, truth in zip(decided, masks, strict=True):
            inside = truth != OUTSIDE
            for number in range(1, len(self.classes)):
                apart = hausdorff_95(
                    (given == number) & inside, (truth == number) & inside, self._spacing
                )
                if apart is not None:
                    counts.apart[number] += int(np.rint(min(apart, MAX_LOSS) * FIXED_POINT))
                    counts.compared[number] += 1

    def tally(self, decided: Tensor, masks: Tensor) -> NDArray[np.int64]:
        """Counts of images and pixels alone, no loss; both masks (batch, *size)."""
        vector = np.zeros(self.num_counts, np.int64)
        counts, num = self.view(vector), len(self.classes)
        inside = masks != OUTSIDE
        # True class by predicted class, image by image.
        image = torch.arange(len(masks), device=masks.device).reshape(-1, *[1] * (masks.ndim - 1))
        image = image.expand(masks.shape)[inside]
        place = (image * num + masks[inside].long()) * num + decided[inside].long()
        table = torch.bincount(place, minlength=len(masks) * num * num)
        by_image = table.reshape(len(masks), num, num).cpu().numpy()
        pixels = by_image.sum(axis=0)
        both = 2 * np.diagonal(by_image, axis1=1, axis2=2)  # (batch, num_classes)
        whole = by_image.sum(axis=1) + by_image.sum(axis=2)
        for kept, product in (
            (counts.both_squared, both * both),
            (counts.both_by_all, both * whole),
            (counts.all_squared, whole * whole),
        ):
            kept[:] = np.minimum(product, MOST_SQUARED).sum(axis=0)
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
            "loss": mean_loss(int(view.loss[0]), num_examples),
            "num_examples": num_examples,
            **{
                figure: mean([of_class[figure] for of_class in by_class[1:]])
                for figure in ("dice", "iou", "sensitivity", "precision", "hd95")
            },
            "dice_by_class": {
                name: of_class["dice"]
                for name, of_class in zip(self.classes, by_class, strict=True)
            },
            "intervals": {"dice": self.dice_intervals(counts)[1]} if len(self.classes) == 2 else {},  # noqa: PLR2004
        }

    def dice_intervals(self, counts: NDArray[np.int64]) -> list[Interval | None]:
        """The 95 % interval of every class's Dice; None with fewer than two images, or no pixel."""
        view = self.view(counts)
        num_images = int(view.num_examples[0])
        squares = np.stack([view.both_squared, view.both_by_all, view.all_squared], axis=1)
        return [
            of_ratio(2 * right, whole, tuple(of_class), num_images)
            if num_images > 1 and whole
            else None
            for right, whole, of_class in zip(
                view.right.tolist(),
                (view.predicted + view.actual).tolist(),
                squares.tolist(),
                strict=True,
            )
        ]

    def figures_by_class(self, counts: NDArray[np.int64]) -> list[dict[str, float | None]]:
        """Dice, IoU, sensitivity, precision and HD95 of every class, the background first.

        HD95 is the mean over the images in which both outlines are, in millimetres where the study
        has ``input.spacing`` and else in pixels; the background has none.
        """
        view = self.view(counts)
        return [
            {
                "dice": ratio(2 * right, predicted + actual),
                "iou": ratio(right, predicted + actual - right),
                "sensitivity": ratio(right, actual),
                "precision": ratio(right, predicted),
                "hd95": ratio(apart / FIXED_POINT, compared),
            }
            for right, predicted, actual, apart, compared in zip(
                *(each.tolist() for each in (view.right, view.predicted, view.actual)),
                *(each.tolist() for each in (view.apart, view.compared)),
                strict=True,
            )
        ]

    def view(self, counts: NDArray[np.int64]) -> PixelCounts:
        """Named views of a count vector of shape (num_counts,)."""
        return PixelCounts(counts[0:1], counts[1:2], *counts[2:].reshape(NUM_VECTORS, -1))

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
