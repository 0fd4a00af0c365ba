"""One file per task: loss, summable counts, figures from the sums."""

from __future__ import annotations

from common.study import Classification, Detection, Study
from common.tasks.base import Figures, Loss, Task
from common.tasks.classification import ClassificationTask
from common.tasks.detection import DetectionTask
from common.tasks.segmentation import SegmentationTask

__all__ = [
    "ClassificationTask",
    "DetectionTask",
    "Figures",
    "Loss",
    "SegmentationTask",
    "Task",
    "task_of",
]


def task_of(study: Study) -> Task:
    """The task a study names."""
    training = study.training
    if isinstance(study.task, Classification):
        return ClassificationTask(
            study.task, training.loss, adjust_logits=training.logit_adjustment
        )
    if isinstance(study.task, Detection):
        return DetectionTask(study.task, training.loss, study.input.size)
    return SegmentationTask(study.task, training.loss, study.input.size, study.input.spacing)
