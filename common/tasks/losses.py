"""What training lowers, one value per image.

No term mixes the images of a batch unless the study says ``dice_over = "batch"``, so the same
losses serve training with per-patient clipping. Class weights are constants of the study; they are
not divided by their sum over the batch, as torch does: that sum would couple the images.

Source: Lin et al. (2017), Focal Loss for Dense Object Detection; Milletari et al. (2016), V-Net.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from common.study import TrainingLoss

OUTSIDE = 255  # in a mask: nobody knows the class here, so neither loss nor figures count it
SMOOTH = 1.0  # pixels added to both sides of an overlap: an image without the class has one too


def surprise(outputs: Tensor, targets: Tensor, config: TrainingLoss) -> Tensor:
    """Weighted (focal) cross-entropy of each example; one class each.

    Args:
      outputs: Logits, shape (batch, num_outputs, ...); with one output the second class's logit.
      targets: Classes, shape (batch, ...).
      config: Kind and class weights.

    Returns:
      Shape (batch, ...).
    """
    classes = targets.long()
    if outputs.shape[1] == 1:
        logits = outputs.squeeze(1)
        losses = F.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype), reduction="none"
        )
    else:
        losses = F.cross_entropy(outputs, classes, reduction="none")
    losses = _focused(losses, config)
    if config.class_weights:
        losses = losses * outputs.new_tensor(config.class_weights)[classes]
    return losses


def surprise_by_label(outputs: Tensor, targets: Tensor, config: TrainingLoss) -> Tensor:
    """The same for labels that go together freely; outputs, targets and result (batch, labels)."""
    wanted = targets.to(outputs.dtype)
    losses = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
    losses = _focused(losses, config)
    if config.class_weights:
        losses = losses * outputs.new_tensor(config.class_weights)
    return losses


def missed_overlap(outputs: Tensor, masks: Tensor, config: TrainingLoss) -> Tensor:
    """One minus the soft Dice of the classes but the background, shape (batch,).

    Pixels that are ``OUTSIDE`` are left out on both sides. (MONAI's masked loss sets their logits
    to 0, which still counts them as one half.)
    """
    inside = (masks != OUTSIDE).unsqueeze(1).to(outputs.dtype)
    if outputs.shape[1] == 1:
        shares = outputs.sigmoid()
        truth = (masks == 1).unsqueeze(1).to(outputs.dtype)
    else:
        shares = outputs.softmax(dim=1)[:, 1:]
        numbers = torch.arange(1, outputs.shape[1], device=masks.device)
        classes = numbers.reshape(1, -1, *[1] * (masks.ndim - 1))
        truth = (masks.unsqueeze(1) == classes).to(outputs.dtype)
    shares = shares * inside
    common = (shares * truth).flatten(2).sum(dim=2)  # (batch, classes)
    both = (shares + truth * inside).flatten(2).sum(dim=2)
    if config.dice_over == "batch":
        common, both = common.sum(dim=0, keepdim=True), both.sum(dim=0, keepdim=True)
    missed = 1 - ((2 * common + SMOOTH) / (both + SMOOTH)).mean(dim=1)
    return missed.expand(len(outputs))


def _focused(losses: Tensor, config: TrainingLoss) -> Tensor:
    """With the focal loss an example counts less, the surer the network is of what is right."""
    if config.kind != "focal":
        return losses
    return losses * (1 - (-losses).exp()) ** config.focal_gamma
