"""Our max-pooling beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from client.pooling import is_two_by_two, pooled

SHAPES = [(3, 2, 8, 6), (3, 2, 7, 6), (3, 2, 8, 5), (1, 1, 3, 3), (2, 3, 2, 2), (4, 6, 8)]


def images_of(shape: tuple[int, ...], levels: int = 3) -> Tensor:
    """Of so few values that most of four are equal to another."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, levels, shape, generator=rng).float()


def gradients(images: Tensor, made: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    (found,) = torch.autograd.grad(made, images, torch.randn(made.shape, generator=rng))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], levels: int) -> None:
    images = images_of(shape, levels).requires_grad_()
    ours, theirs = pooled(images), max_pool2d(images, 2)
    assert torch.equal(ours, theirs)
    assert torch.equal(gradients(images, ours), gradients(images, theirs))


def test_channels_may_lie_side_by_side_in_memory() -> None:
    images = images_of((3, 4, 6, 6)).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.equal(pooled(images), max_pool2d(images, 2))
    assert torch.equal(gradients(images, pooled(images)), gradients(images, max_pool2d(images, 2)))


def test_one_that_is_not_a_number_stays_among_its_four() -> None:
    images = images_of((1, 1, 4, 4))
    images[0, 0, 0, 1] = torch.nan
    assert torch.equal(pooled(images).isnan(), max_pool2d(images, 2).isnan())


class Other(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return -super().forward(input)


@pytest.mark.parametrize(
    ("module", "is_ours"),
    [
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d((2, 2), (2, 2), (0, 0), (1, 1)), True),
        (nn.MaxPool2d(3), False),
        (nn.MaxPool2d(2, 1), False),
        (nn.MaxPool2d(2, padding=1), False),
        (nn.MaxPool2d(2, dilation=2), False),
        (nn.MaxPool2d(2, ceil_mode=True), False),
        (nn.MaxPool2d(2, return_indices=True), False),
        (nn.MaxPool2d((2, 1)), False),
        (nn.MaxPool3d(2), False),
        (nn.AvgPool2d(2), False),
        (Other(2), False),
    ],
)
def test_others_are_left_to_torch(module: nn.Module, is_ours: bool) -> None:
    assert is_two_by_two(module) is is_ours
