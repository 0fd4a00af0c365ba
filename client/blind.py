"""What a model says that never looks: the least that a figure is compared with.

It knows how training images are labelled, and gives every image the same answer: each class as
likely as it is common, each pixel the class that is usual at its place, boxes of usual size where
there are most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from torch import Tensor

from client.dataset import Samples
from client.images import Images
from common.study import Classification, Detection, Segmentation, Study
from common.study.model import STRIDE
from common.study.task import NUM_SIDES
from common.tasks import SegmentationTask, Task, task_of
from common.tasks.boxes import centres_of

MAX_ENTRIES = 1 << 22  # of what is made of targets that are looked at together
# How much a rare class is preferred to a common one; the training images choose.
PREFERENCES = (0.0, 0.5, 1.0, 2.0)


def blind_answer(study: Study, train: Samples) -> Tensor:
    """What to say of any image, as the network's output for one; shape (num_outputs, ...)."""
    if isinstance(study.task, Classification):
        return _usual_classes(study.task, torch.cat(list(_targets(train, 1))))
    targets = list(_targets(train, math.prod(study.input.size)))
    if isinstance(study.task, Detection):
        return _usual_boxes(study.task, study.input.size, targets)
    return _usual_pixels(study, study.task, targets)


def blind_counts(answer: Tensor, samples: Samples, task: Task) -> NDArray[np.int64]:
    """Counts of that answer on one split, shape (num_counts,)."""
    counts = np.zeros(task.num_counts, np.int64)
    for targets in _targets(samples, answer.numel()):
        one = answer.unsqueeze(0)
        if isinstance(task, SegmentationTask):
            one = _resized(one, targets.shape[1:])
        counts += task.counts(one.expand(len(targets), *one.shape[1:]), targets)
    return counts


def _targets(samples: Samples, entries: int) -> Iterator[Tensor]:
    """Batch by batch, by what is made of each image; a scan is a batch, and nothing is none."""
    if isinstance(samples, Images):
        if len(samples):
            yield from torch.split(samples.targets, max(1, MAX_ENTRIES // entries))
    else:
        yield from (target.unsqueeze(0) for target in samples.targets)


def _usual_classes(config: Classification, targets: Tensor) -> Tensor:
    """Logits of the classes' shares, with half an image of each assumed beside the others."""
    if config.labels == "multilabel":
        shares = (targets.double().sum(dim=0) + 0.5) / (len(targets) + 1)
        return torch.logit(shares).float()
    logs = (torch.bincount(targets, minlength=len(config.classes)) + 0.5).log()
    return (logs[1:] - logs[0]) if config.labels == "binary" else logs.log_softmax(dim=0)


def _usual_pixels(study: Study, config: Segmentation, masks: Sequence[Tensor]) -> Tensor:
    """How likely each class is at each place; by itself, or as against how common it is."""
    num, size = len(config.classes), masks[0].shape[1:]
    seen = torch.zeros((num, *size))
    total = torch.zeros(num)
    for batch in masks:
        kinds = torch.stack([(batch == k).float() for k in range(num)], dim=1)
        total += kinds.transpose(0, 1).flatten(1).sum(dim=1)
        seen += _resized(kinds, size).sum(dim=0)
    shares = ((total + 1) / (total + 1).sum()).reshape(num, *[1] * len(size))
    # One image is assumed in which classes are everywhere as common as they are.
    likely = ((seen + shares) / (seen.sum(dim=0) + 1)).log()
    answers = (likely - preference * shares.log() for preference in PREFERENCES)
    if config.num_outputs == 1:
        answers = (answer[1:] - answer[:1] for answer in answers)
    task = task_of(study)
    assert isinstance(task, SegmentationTask)  # noqa: S101 - it was asked above
    return max(answers, key=lambda answer: _dice(task, answer, masks))


def _dice(task: SegmentationTask, answer: Tensor, masks: Sequence[Tensor]) -> float:
    counts = np.zeros(task.num_counts, np.int64)
    for batch in masks:
        decided = task.decide(_resized(answer.unsqueeze(0), batch.shape[1:]))
        counts += task.tally(decided.expand(batch.shape), batch)
    return float(task.figures(counts)["dice"] or 0.0)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """The same of another size: scans differ, and places in them correspond."""
    return maps if maps.shape[2:] == tuple(size) else F.interpolate(maps, size=tuple(size))


def _usual_boxes(config: Detection, size: Sequence[int], boxes: Sequence[Tensor]) -> Tensor:
    """How likely a centre is at each place, and sides as usual for the class that is likeliest."""
    num, (rows, columns) = len(config.classes), (side // STRIDE for side in size)
    heat = sum(
        (centres_of(batch, num, rows, columns).heat.sum(dim=0) for batch in boxes),
        start=torch.full((num, rows, columns), 1e-3),
    ) / (1 + sum(len(batch) for batch in boxes))
    real = torch.cat([batch[batch[..., NUM_SIDES] >= 0] for batch in boxes])
    sides = torch.ones((num, 2))  # width and height, in places
    for k in range(num):
        own = real[real[:, NUM_SIDES] == k]
        if len(own):
            sides[k] = (own[:, 2:4] - own[:, :2]).median(dim=0).values / STRIDE
    half = (sides / 2).log()[heat.argmax(dim=0)].movedim(-1, 0)  # (2, rows, columns)
    return torch.cat([torch.logit(heat), half, half])
