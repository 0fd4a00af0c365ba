"""Binary, multi-class and multi-label classification of whole images.

The counts hold a confusion matrix and, per class, two histograms of the score: of images that have
the class and of those that do not. AUROC follows from the histograms within the width of a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from torch import Tensor

from common.study import Classification, TrainingLoss
from common.tasks.base import Figures, Loss, mean, mean_loss, ratio, summed_loss
from common.tasks.intervals import Interval, of_auroc, of_share
from common.tasks.losses import surprise, surprise_by_label
from common.tasks.scores import NUM_BINS, auroc, bins_of, calibration_error


@dataclass(frozen=True)
class Counts:
    """Named views of one count vector."""

    num_examples: NDArray[np.int64]  # (1,)
    loss: NDArray[np.int64]  # (1,), fixed point
    all_right: NDArray[np.int64]  # (1,), images with every label right
    confusion: NDArray[np.int64]  # (num_tables, k, k): true class by predicted class
    scores: NDArray[np.int64]  # (num_scores, 2, NUM_BINS): without and with the class, by score


class ClassificationTask:
    """Loss, counts and figures of ``common.study.Classification``."""

    def __init__(self, config: Classification, loss: TrainingLoss, *, adjust_logits: bool) -> None:
        self.loss = loss
        self.labels = config.labels
        self.num_outputs = config.num_outputs
        self.classes = config.classes
        self.adjust_logits = adjust_logits
        num_classes = len(config.classes)
        multilabel = config.labels == "multilabel"
        self._confusion_shape = (num_classes, 2, 2) if multilabel else (1, num_classes, num_classes)
        self._scores_shape = (config.num_outputs, 2, NUM_BINS)
        self.num_counts = 3 + int(np.prod(self._confusion_shape) + np.prod(self._scores_shape))

    def local_loss(self, targets: Tensor | None) -> Loss:
        """Cross-entropy, mean over the batch; see ``Task.local_loss``.

        With ``targets`` and logit adjustment, the log of the site's own class shares is added to
        the logits while training: the network then learns what an image says beyond how common a
        class is at the site, which is what sites with different shares can agree on.

        Source:
          Menon et al. (2021), Long-tail learning via logit adjustment; Zhang et al. (2022),
          Federated Learning with Label Distribution Skew via Logits Calibration.
        """
        if targets is None or not self.adjust_logits:
            return lambda outputs, batch: self._losses(outputs, batch).mean()
        shift = self._log_shares(targets)
        return lambda outputs, batch: self._losses(outputs + shift, batch).mean()

    def made_up_targets(self, num: int) -> Tensor:
        """Classes in turn; see ``Task.made_up_targets``."""
        classes = torch.arange(num) % len(self.classes)
        if self.labels == "multilabel":
            return F.one_hot(classes, len(self.classes))
        return classes

    def counts(self, outputs: Tensor, targets: Tensor) -> NDArray[np.int64]:
        """Summable counts of one batch; see ``Task.counts``."""
        vector = np.zeros(self.num_counts, np.int64)
        counts = self.view(vector)
        with torch.no_grad():
            loss = summed_loss(self._losses(outputs, targets))
            truth, predicted, logits = self._decisions(outputs, targets)
        counts.num_examples[0] += len(truth)
        counts.loss[0] += loss
        counts.all_right[0] += int((truth == predicted).reshape(len(truth), -1).all(axis=1).sum())
        if self.labels == "multilabel":
            for label in range(self.num_outputs):
                np.add.at(counts.confusion[label], (truth[:, label], predicted[:, label]), 1)
            has_class = truth
        else:
            np.add.at(counts.confusion[0], (truth, predicted), 1)
            one_hot = np.eye(len(self.classes), dtype=np.int64)[truth]
            has_class = one_hot[:, 1:] if self.labels == "binary" else one_hot
        bins = bins_of(logits)
        for score in range(self.num_outputs):
            np.add.at(counts.scores[score], (has_class[:, score], bins[:, score]), 1)
        return vector

    def figures(self, counts: NDArray[np.int64]) -> Figures:
        """Accuracy, precision, recall, F1, AUROC, loss and confusion; see ``Task.figures``.

        Probabilities are compared with what was true as well, class by class.

        Binary figures are those of the positive class. Above two classes they are macro averages
        over the classes for which they are defined. Multi-label accuracy is the share of images
        with every label right.
        """
        view = self.view(counts)
        num_examples = int(view.num_examples[0])
        true_positive, predicted, actual = self._class_totals(view.confusion)
        return {
            "loss": mean_loss(int(view.loss[0]), num_examples),
            "num_examples": num_examples,
            "auroc": mean([auroc(without, having) for without, having in view.scores]),
            "accuracy": ratio(int(view.all_right[0]), num_examples),
            "precision": mean(map(ratio, true_positive, predicted)),
            "recall": mean(map(ratio, true_positive, actual)),
            "f1": mean(map(ratio, 2 * true_positive, predicted + actual)),
            "calibration_error": mean([calibration_error(*pair) for pair in view.scores]),
            "intervals": self._intervals(view),
            "confusion": (
                view.confusion if self.labels == "multilabel" else view.confusion[0]
            ).tolist(),
        }

    def _intervals(self, view: Counts) -> dict[str, Interval | None]:
        """95 % intervals of the figures that are shares of images, or of pairs of them."""
        known = {"accuracy": of_share(int(view.all_right[0]), int(view.num_examples[0]))}
        if self.labels != "binary":
            return known
        (true_negative, false_positive), (false_negative, true_positive) = view.confusion[
            0
        ].tolist()
        return {
            "auroc": of_auroc(*view.scores[0]),
            **known,
            "precision": of_share(true_positive, true_positive + false_positive),
            "recall": of_share(true_positive, true_positive + false_negative),
            "specificity": of_share(true_negative, true_negative + false_positive),
        }

    def view(self, counts: NDArray[np.int64]) -> Counts:
        """Named views of a count vector of shape (num_counts,)."""
        end = 3 + int(np.prod(self._confusion_shape))
        return Counts(
            num_examples=counts[0:1],
            loss=counts[1:2],
            all_right=counts[2:3],
            confusion=counts[3:end].reshape(self._confusion_shape),
            scores=counts[end:].reshape(self._scores_shape),
        )

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        if self.labels == "multilabel":
            return surprise_by_label(outputs, targets, self.loss).mean(dim=1)
        return surprise(outputs, targets, self.loss)

    def _log_shares(self, targets: Tensor) -> Tensor:
        """What to add to the logits, shape (num_outputs,); every class counts one image more."""
        if self.labels == "multiclass":
            counted = torch.bincount(targets, minlength=self.num_outputs).double() + 1
            return (counted / counted.sum()).log().float()
        having = targets.double().reshape(len(targets), -1).sum(dim=0) + 1
        return (having / (len(targets) + 2 - having)).log().float()

    def _decisions(
        self, outputs: Tensor, targets: Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """True classes, predicted classes and one-against-rest logits (batch, num_outputs)."""
        truth = targets.cpu().numpy().astype(np.int64)
        if self.labels == "multiclass":
            log_shares = outputs.double().log_softmax(dim=1)
            # log(p / (1 - p)) without the cancellation of 1 - p.
            rest = torch.stack(
                [
                    torch.cat([log_shares[:, :k], log_shares[:, k + 1 :]], dim=1).logsumexp(dim=1)
                    for k in range(self.num_outputs)
                ],
                dim=1,
            )
            return truth, outputs.argmax(dim=1).cpu().numpy(), (log_shares - rest).cpu().numpy()
        predicted = (outputs > 0).cpu().numpy().astype(np.int64)
        logits = outputs.double().cpu().numpy()
        if self.labels == "binary":
            return truth, predicted[:, 0], logits
        return truth, predicted, logits

    def _class_totals(
        self, confusion: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """True positives, predicted and actual images, each of shape (classes that count,)."""
        if self.labels == "multilabel":
            return confusion[:, 1, 1], confusion[:, :, 1].sum(axis=1), confusion[:, 1].sum(axis=1)
        table = confusion[0]
        totals = np.diagonal(table), table.sum(axis=0), table.sum(axis=1)
        if self.labels == "binary":
            return totals[0][1:], totals[1][1:], totals[2][1:]
        return totals
