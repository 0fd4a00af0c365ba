"""Boxes in images: what a detector should say of them, and reading boxes from what it says.

A box is five float32 numbers: left, upper, right and lower side in pixels of the network's input,
and its class. An image's boxes are padded to a fixed number with rows of class ``NO_BOX``.

Source: Zhou, Wang and Krähenbühl (2019), Objects as Points; Liu et al. (2020), Training-Time-
Friendly Network for Real-Time Object Detection (ellipses around a centre, one overlap loss).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from common.study.model import STRIDE
from common.study.task import NUM_SIDES

BOX = NUM_SIDES + 1  # numbers of a box
NO_BOX = -1.0  # in the place of a class
SPREAD = 1 / 12  # standard deviation of a centre, as a share of the box's side
LEAST_SPREAD = 1 / 3  # in places: a small box's centre is one place
NEAR = 1.5  # places from a centre at which the sides are learned
MOST_FOUND = 100  # findings of one image, as COCO counts them
SAME = 0.5  # overlap from which two findings of a class are one, and a finding is right
FURTHEST = 6.0  # exponent of a side's distance, in places: e**6 places are 1,600 pixels


class Found(NamedTuple):
    """Private. What a detector found in one image, the surest first."""

    boxes: Tensor  # (num_found, 4) sides in pixels
    logits: Tensor  # (num_found,)
    classes: Tensor  # (num_found,) int64

    def as_boxes(self) -> Tensor:
        """Sides and class of each, shape (num_found, 5)."""
        return torch.cat([self.boxes, self.classes.unsqueeze(1)], dim=1)


class Centres(NamedTuple):
    """Private. What the network should say of a batch."""

    heat: Tensor  # (batch, num_classes, rows, columns): 1 at a centre, less around it
    sides: Tensor  # (batch, 4, rows, columns) of the box whose centre is near, in pixels
    near: Tensor  # (batch, rows, columns) bool
    num_boxes: Tensor  # (batch,)


def centres_of(boxes: Tensor, num_classes: int, rows: int, columns: int) -> Centres:
    """What a network should say of a batch of boxes, shape (batch, max_boxes, 5)."""
    real = boxes[..., 4] >= 0
    low, high = boxes[..., :2] / STRIDE, boxes[..., 2:4] / STRIDE
    middle, spread = (low + high) / 2, ((high - low) * SPREAD).clamp_min(LEAST_SPREAD)
    x, y = (torch.arange(num, device=boxes.device) for num in (columns, rows))
    place = middle.floor().clamp_min(0).unsqueeze(-1)  # of the centre; (batch, max_boxes, 2, 1)
    off_x, off_y = x - place[..., 0, :], y - place[..., 1, :]  # (batch, max_boxes, columns or rows)
    heat_x = (-0.5 * (off_x / spread[..., :1]) ** 2).exp()
    heat_y = (-0.5 * (off_y / spread[..., 1:]) ** 2).exp()
    around = heat_y.unsqueeze(-1) * heat_x.unsqueeze(-2)  # (batch, max_boxes, rows, columns)
    heat = torch.stack(
        [(around * (boxes[..., 4] == k)[..., None, None]).amax(dim=1) for k in range(num_classes)],
        dim=1,
    )
    far = (off_y.abs() > NEAR).unsqueeze(-1) | (off_x.abs() > NEAR).unsqueeze(-2)
    area = ((high - low).prod(dim=-1))[..., None, None].expand_as(around)
    # Where two centres are near, the smaller box is the one that is harder to find again.
    area = area.masked_fill(far | ~real[..., None, None], torch.inf)
    smallest, chosen = area.min(dim=1)
    batch = torch.arange(len(boxes), device=boxes.device)[:, None, None]
    sides = boxes[batch, chosen][..., :4].movedim(-1, 1)
    return Centres(heat, sides, smallest < torch.inf, real.sum(dim=1))


def sides_of(distances: Tensor) -> Tensor:
    """Sides of the box at every place, in pixels; both of shape (batch, 4, rows, columns)."""
    rows, columns = distances.shape[-2:]
    away = distances.clamp(-FURTHEST, FURTHEST).exp()
    x = torch.arange(columns, device=distances.device) + 0.5
    y = (torch.arange(rows, device=distances.device) + 0.5)[:, None]
    left, upper, right, lower = away.unbind(dim=1)
    return STRIDE * torch.stack([x - left, y - upper, x + right, y + lower], dim=1)


def found_in(outputs: Tensor, num_classes: int, size: tuple[int, ...]) -> Found:
    """Boxes of one image, from outputs of shape (num_classes + 4, rows, columns).

    A place is a finding where no neighbour has a higher score; of findings of a class that are the
    same, the surest is kept.
    """
    heat = outputs[:num_classes].double()
    peaks = heat == F.max_pool2d(heat[None], 3, stride=1, padding=1)[0]
    logits = heat.masked_fill(~peaks, -torch.inf).flatten().nan_to_num(nan=-torch.inf)
    logits, order = logits.sort(descending=True, stable=True)
    logits, order = logits[:MOST_FOUND], order[:MOST_FOUND]
    order, logits = order[logits > -torch.inf], logits[logits > -torch.inf]
    num_places = heat[0].numel()
    classes, places = order // num_places, order % num_places
    height, width = size
    edges = outputs.new_tensor([width, height, width, height])
    boxes = sides_of(outputs[None, num_classes:])[0].flatten(1)[:, places].T.nan_to_num()
    boxes = torch.minimum(boxes.clamp_min(0), edges)
    kept = _different(boxes, classes)
    return Found(boxes[kept], logits[kept], classes[kept])


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of every pair, (m, 4) and (n, 4) to (m, n); 0 without an area."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    common = (high - low).clamp_min(0).prod(dim=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(dim=1) for boxes in (one, other)]
    return common / (areas[0][:, None] + areas[1][None] - common).clamp_min(1e-9)


def lost_overlap(one: Tensor, other: Tensor) -> Tensor:
    """One minus the generalised overlap of boxes side by side; (..., 4) each, to (...).

    Source:
      Rezatofighi et al. (2019), Generalized Intersection over Union.
    """
    (low, high), (other_low, other_high) = ((box[..., :2], box[..., 2:]) for box in (one, other))
    common = _area(torch.maximum(low, other_low), torch.minimum(high, other_high))
    both = _area(low, high) + _area(other_low, other_high) - common
    hull = _area(torch.minimum(low, other_low), torch.maximum(high, other_high))
    both, hull = both.clamp_min(1e-6), hull.clamp_min(1e-6)
    lost: Tensor = 1 - common / both + (hull - both) / hull
    return lost


def partners_of(found: Tensor, boxes: Tensor) -> Tensor:
    """The true box that each finding found, shape (num_found,); -1 of a wrong finding.

    The first finding chooses first, and takes the box of its class that it overlaps most, from one
    half; no box is found twice.

    Args:
      found: Sides and class of each finding, the surest first, shape (num_found, 5).
      boxes: Of the image, shape (num_boxes, 5).
    """
    partners = torch.full((len(found),), -1)
    if not len(boxes):
        return partners
    shared = overlaps(found[:, :NUM_SIDES].double(), boxes[:, :NUM_SIDES].double())
    shared = shared.masked_fill(found[:, NUM_SIDES:] != boxes[None, :, NUM_SIDES], 0).cpu()
    for k in range(len(found)):
        best, place = shared[k].max(dim=0)
        if best >= SAME:
            partners[k] = place
            shared[:, place] = 0
    return partners


def _different(boxes: Tensor, classes: Tensor) -> Tensor:
    """Places of the boxes that no surer one of their class is the same as."""
    alike = (overlaps(boxes, boxes) > SAME) & (classes[:, None] == classes[None])
    same = alike.cpu().numpy()
    kept: list[int] = []
    for k in range(len(boxes)):
        if not same[k, kept].any():
            kept.append(k)
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp_min(0).prod(dim=-1)
