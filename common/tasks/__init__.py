"""One file per task: loss, summable counts, figures from the sums."""

from __future__ import annotations

from common.study import Classification, Study
from common.tasks.base import Figures, Loss, Task
from common.tasks.classification import ClassificationTask
from common.tasks.segmentation import SegmentationTask

__all__ = ["ClassificationTask", "Figures", "Loss", "SegmentationTask", "Task", "task_of"]


def task_of(study: Study) -> Task:
    """The task a study names."""
    training = study.training
    if isinstance(study.task, Classification):
        return ClassificationTask(
            study.task, training.loss, adjust_logits=training.logit_adjustment
        )
    return SegmentationTask(study.task, training.loss, study.input.size)
