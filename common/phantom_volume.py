"""Chest volumes of ellipsoids: a body, two lungs, a heart and lesions, for segmentation in 3D.

The films of ``common.phantom`` and these volumes share scanners and the values of a mask, not the
patients: patient 3 of a site has other lesions here than there. Axes are depth (head to feet),
height (front to back) and width (the patient's left is at the high end), each from -1 to 1.

Source:
  Ellipsoid phantoms in the spirit of Shepp and Logan (1974), The Fourier reconstruction of a head
  section.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.phantom import HEART, LESION, LUNG, MIN_SIZE, Scanner

Float32: TypeAlias = NDArray[np.float32]
Point: TypeAlias = tuple[float, float, float]  # depth, height, width

_STREAM: Final = 3  # of the random numbers; the films use 0 to 2
_BODY_GREY, _LUNG_GREY, _HEART_GREY = 0.55, 0.15, 0.68


@dataclass(frozen=True)
class PhantomVolume:
    """One volume with everything that is true about it. No patient stands behind it."""

    volume: Float32  # (size, size, size), grey 0..1, dense tissue is bright
    mask: NDArray[np.uint8]  # (size, size, size), BACKGROUND, LUNG, HEART or LESION


@dataclass(frozen=True)
class _Ellipsoid:
    center: Point
    semi_axes: Point


def draw_volume(
    seed: int, site_index: int, patient_index: int, *, scanner: Scanner, size: int
) -> PhantomVolume:
    """Draw the volume of one patient.

    Args:
      seed: Of the whole federation of phantoms.
      site_index: From 0; only chooses the patients, the look comes from ``scanner``.
      patient_index: From 0, within the site.
      scanner: Look of the volume and share of patients with lesions.
      size: Voxels along each axis, at least ``MIN_SIZE``.

    Returns:
      A cube of ``size`` voxels a side and its mask.

    Guarantees:
      Equal arguments give equal volumes.

    Raises:
      ValueError: ``size`` is below ``MIN_SIZE``.
    """
    if size < MIN_SIZE:
        raise ValueError(f"a volume of {size} voxels would lose lesions; use {MIN_SIZE} or more")
    entropy = np.random.SeedSequence((seed, site_index, patient_index), spawn_key=(_STREAM,))
    rng = np.random.default_rng(entropy)
    has_lesions = rng.random() < scanner.prevalence
    lungs, heart = _draw_lungs(rng), _draw_heart(rng)
    lesions = _draw_lesions(lungs, heart, rng) if has_lesions else []

    body = _inside(_Ellipsoid((0, 0, 0), (1.6, 0.68, 0.95)), size)
    mask = np.zeros(body.shape, dtype=np.uint8)
    for lung in lungs:
        mask[_inside(lung, size)] = LUNG
    mask[_inside(heart, size)] = HEART
    tissue = np.choose(mask, [body * _BODY_GREY, _LUNG_GREY, _HEART_GREY]).astype(np.float32)
    for lesion in lesions:
        inside = _inside(lesion, size)
        mask[inside] = LESION
        tissue[inside] += np.float32(rng.uniform(0.10, 0.35))
    return PhantomVolume(volume=_scan(tissue, scanner, rng), mask=mask)


def _draw_lungs(rng: np.random.Generator) -> tuple[_Ellipsoid, _Ellipsoid]:
    """Draw the right and the left lung; the left one is narrower and reaches lower."""
    depth, height, width = rng.uniform(0.66, 0.76), rng.uniform(0.42, 0.50), rng.uniform(0.30, 0.34)
    right = _Ellipsoid((-0.06, 0.0, -0.44), (depth, height, width))
    left = _Ellipsoid((0.0, 0.0, 0.44), (depth, height, 0.9 * width))
    return right, left


def _draw_heart(rng: np.random.Generator) -> _Ellipsoid:
    """Draw the heart: in front, left of the midline."""
    radius = rng.uniform(0.24, 0.32)
    return _Ellipsoid((0.28, -0.14, rng.uniform(0.08, 0.14)), (radius, 0.85 * radius, 1.1 * radius))


def _draw_lesions(
    lungs: tuple[_Ellipsoid, _Ellipsoid], heart: _Ellipsoid, rng: np.random.Generator
) -> list[_Ellipsoid]:
    """Place one to three lesions, each inside a lung and clear of heart and other lesions."""
    num_lesions = int(rng.integers(1, 4))
    lesions: list[_Ellipsoid] = []
    while len(lesions) < num_lesions:
        axes = rng.uniform(0.08, 0.16, size=3)
        lung = lungs[int(rng.integers(2))]
        room = np.array(lung.semi_axes) - axes.max()
        center = np.array(lung.center) + room * rng.uniform(-0.57, 0.57, size=3)  # 1 / sqrt(3)
        if all(_gap(center, axes, other) > 4 / MIN_SIZE for other in (heart, *lesions)):
            lesions.append(_Ellipsoid(_point(center), _point(axes)))
    return lesions


def _point(values: NDArray[np.float64]) -> Point:
    depth, height, width = values.tolist()
    return depth, height, width


def _gap(center: NDArray[np.float64], axes: NDArray[np.float64], other: _Ellipsoid) -> float:
    """Return the distance between the spheres round two ellipsoids."""
    distance = float(np.linalg.norm(center - np.array(other.center)))
    return distance - float(axes.max()) - max(other.semi_axes)


def _inside(shape: _Ellipsoid, size: int) -> NDArray[np.bool_]:
    """Return which voxel centres lie in an ellipsoid, shape (size, size, size)."""
    axis = np.linspace(1 / size - 1, 1 - 1 / size, size, dtype=np.float32)
    depth, height, width = (
        ((axis - np.float32(center)) / np.float32(semi_axis)) ** 2
        for center, semi_axis in zip(shape.center, shape.semi_axes, strict=True)
    )
    inside: NDArray[np.bool_] = depth[:, None, None] + height[:, None] + width < 1
    return inside


def _scan(tissue: Float32, scanner: Scanner, rng: np.random.Generator) -> Float32:
    """Turn tissue into the volume of one scanner; noise comes after blur, as in a detector."""
    blurred = ndimage.gaussian_filter(tissue, scanner.blur_px * len(tissue) / 64)
    noise = scanner.noise * rng.standard_normal(tissue.shape, dtype=np.float32)
    grey = 0.5 + scanner.contrast * (blurred - 0.45) + scanner.brightness + noise
    return np.asarray(np.clip(grey, 0, 1), dtype=np.float32)
