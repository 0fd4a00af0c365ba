"""Raw grey values and masks to what the network takes.

Preparation uses the study's constants and each image's own values, never a statistic of the data
set: such a statistic would be a release of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import set_track_meta
from monai.transforms import Compose, NormalizeIntensity, Resize, ScaleIntensityRange, SpatialPad
from numpy.typing import NDArray
from torch import Tensor

from client.readers.case import Case
from common.errors import DataError
from common.study import Detection, Input
from common.tasks.boxes import BOX, NO_BOX
from common.tasks.losses import OUTSIDE

set_track_meta(False)  # arrays here have no spatial header


def load_pixels(case: Case, config: Input) -> NDArray[Any]:
    """Raw grey values of a case that the study can use, shape (config.channels, *its size).

    Raises:
      DataError: The file cannot be read, or its values cannot be prepared; the message names it.
    """
    pixels = case.load()
    if pixels.ndim - 1 != len(config.size):
        found, wanted = pixels.ndim - 1, len(config.size)
        raise DataError(f"{case.name}: {found} dimensions, input.size in the study has {wanted}")
    if not np.isfinite(pixels).all():
        raise DataError(f"{case.name}: some grey values are not finite")
    if pixels.shape[0] == 1 < config.channels:
        pixels = np.repeat(pixels, config.channels, axis=0)
    if pixels.shape[0] != config.channels:
        raise DataError(f"{case.name}: {pixels.shape[0]} channels, {config.channels} expected")
    if config.intensity == "file-window" and pixels.dtype != np.float32:
        raise DataError(
            f"{case.name}: only grey DICOM files name a window; set input.window = [low, high] and "
            'input.intensity = "window" in the study'
        )
    if config.intensity == "dtype" and pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{case.name}: grey values of type {pixels.dtype} have no usual range; set "
            'input.intensity = "image" in the study'
        )
    return pixels


def load_mask(case: Case, pixels: NDArray[Any], num_classes: int) -> NDArray[np.uint8]:
    """The mask of a case: class numbers and ``OUTSIDE``, in the size of its pixels.

    Raises:
      DataError: The mask is missing or broken, has another size, or a number that is no class.
    """
    if case.load_mask is None:
        raise DataError(f"{case.name}: no mask; a segmentation study needs one for every image")
    mask = case.load_mask()
    if mask.shape != pixels.shape[1:]:
        found, wanted = _size(mask.shape), _size(pixels.shape[1:])
        raise DataError(f"{case.name}: its mask has {found} pixels, the image {wanted}")
    unknown = mask[(mask >= num_classes) & (mask != OUTSIDE)]
    if unknown.size:
        raise DataError(
            f"{case.name}: its mask holds {int(unknown[0])}, the study's classes are 0 to "
            f"{num_classes - 1}"
        )
    return mask


def load_boxes(case: Case, pixels: NDArray[Any], task: Detection) -> NDArray[np.float32]:
    """Boxes of a case as shares of its sides, shape (task.max_boxes, 5); see common.tasks.boxes.

    Boxes without an area have nothing to find in them and are left out.

    Raises:
      DataError: There are none to read, too many, or one lies outside the image.
    """
    if case.load_boxes is None:
        raise DataError(f"{case.name}: no boxes; a detection study needs them for every image")
    boxes = case.load_boxes()
    height, width = pixels.shape[1:]
    if (boxes[:, :4] < 0).any() or (boxes[:, :4] > [width, height, width, height]).any():
        raise DataError(f"{case.name}: a box reaches beyond the image's {width}x{height} pixels")
    boxes = boxes[has_area(boxes)]
    if len(boxes) > task.max_boxes:
        raise DataError(
            f"{case.name}: {len(boxes)} boxes, task.max_boxes in the study is {task.max_boxes}; "
            "ask the coordinator"
        )
    padded = np.full((task.max_boxes, BOX), NO_BOX, np.float32)
    padded[: len(boxes)] = boxes / [width, height, width, height, 1]
    return padded


def has_area(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which boxes are wider and higher than one pixel, shape (num_boxes,)."""
    width, height = (boxes[:, 2:4] - boxes[:, :2]).T
    large: NDArray[np.bool_] = np.minimum(width, height) > 1
    return large


def resample(
    case: Case, pixels: NDArray[Any], mask: NDArray[Any] | None, config: Input
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Pixels and mask at the study's spacing, where it asks for one.

    Raises:
      DataError: The file does not say how far apart its pixels are.
    """
    if config.spacing is None:
        return pixels, mask
    found = case.look().spacing if case.look else None
    if found is None or len(found) != len(config.spacing):
        raise DataError(
            f"{case.name}: does not say how far apart its pixels are, and the study asks for "
            "input.spacing; give DICOM or NIfTI files, or leave input.spacing out"
        )
    size = tuple(
        max(1, round(num * have / want))
        for num, have, want in zip(pixels.shape[1:], found, config.spacing, strict=True)
    )
    if size == pixels.shape[1:]:
        return pixels, mask
    shrinking = all(new <= old for new, old in zip(size, pixels.shape[1:], strict=True))
    between = "bilinear" if len(size) == 2 else "trilinear"  # noqa: PLR2004
    resized = Resize(size, mode="area" if shrinking else between)(pixels.astype(np.float32))
    if mask is not None:
        mask = np.asarray(Resize(size, mode="nearest-exact")(mask[None])[0]).astype(mask.dtype)
    return np.asarray(resized), mask


def prepare(images: NDArray[Any], config: Input) -> Tensor:
    """Raw grey values to the network's input.

    Args:
      images: Any number type, shape (num_images, channels, *size).
      config: The study's ``[input]``.

    Returns:
      Float32, shape (num_images, channels, *config.size); with ``config.patches`` images keep their
      size and are only enlarged by their own edge to that of a patch.
    """
    num_images, channels, *size = images.shape
    # Images and channels share one axis: MONAI's array transforms then treat a whole stack at once.
    stack = images.reshape(num_images * channels, *size)
    transformed = _preparation(config, images.dtype, tuple(size))(stack)
    prepared: Tensor = torch.as_tensor(transformed, dtype=torch.float32)
    return prepared.reshape(num_images, channels, *prepared.shape[1:])


def prepare_masks(masks: NDArray[np.uint8], config: Input) -> Tensor:
    """Masks in the same size as ``prepare`` gives their images, shape (num_images, *size) uint8."""
    if config.patches:
        padded = SpatialPad(config.size, mode="constant", value=OUTSIDE)(masks)
        return torch.as_tensor(padded, dtype=torch.uint8)
    if masks.shape[1:] == config.size:
        return torch.from_numpy(masks)
    resized = Resize(config.size, mode="nearest-exact")(masks)
    return torch.as_tensor(resized, dtype=torch.uint8)


def prepare_boxes(boxes: NDArray[np.float32], config: Input) -> Tensor:
    """Boxes as shares of the sides to pixels of the input, shape (num_images, max_boxes, 5)."""
    height, width = config.size
    sides = torch.tensor([width, height, width, height, 1.0])
    known = torch.from_numpy(boxes)
    return torch.where(known[..., 4:] >= 0, known * sides, known)


def _preparation(config: Input, dtype: np.dtype[Any], size: tuple[int, ...]) -> Compose:
    steps: list[Any] = []
    if config.intensity == "dtype":
        steps.append(ScaleIntensityRange(0, np.iinfo(dtype).max, 0.0, 1.0))
    if not config.patches and size != config.size:
        # Averaging keeps thin structures when shrinking; between pixels it interpolates.
        shrinking = all(have >= want for have, want in zip(size, config.size, strict=True))
        between = "bilinear" if len(size) == 2 else "trilinear"  # noqa: PLR2004
        steps.append(Resize(config.size, mode="area" if shrinking else between))
    if config.window is not None:
        steps.append(ScaleIntensityRange(*config.window, 0.0, 1.0, clip=True))
    if config.intensity == "image":
        steps.append(NormalizeIntensity(channel_wise=True))
    steps.append(NormalizeIntensity(subtrahend=config.mean, divisor=config.std))
    if config.patches:
        steps.append(SpatialPad(config.size, mode="edge"))
    return Compose(steps)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
