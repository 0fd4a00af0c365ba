"""One file per task: loss, summable counts, figures from the sums."""

from __future__ import annotations

from common.study import Study
from common.tasks.base import Figures, Loss, Task
from common.tasks.classification import ClassificationTask

__all__ = ["Figures", "Loss", "Task", "task_of"]


def task_of(study: Study) -> Task:
    """The task a study names."""
    return ClassificationTask(study.task, adjust_logits=study.training.logit_adjustment)
