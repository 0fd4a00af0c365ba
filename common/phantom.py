"""Chest-film phantoms: images whose masks, boxes and labels come from one drawn anatomy.

They stand in for patient data in the demo, the tests and the examples. Each patient is a set of
shapes (cage, lungs, heart, ribs, lesions) in anatomy coordinates: x and y run from -1 to 1 over
the film, y points to the feet, and the patient's left is on the right of the image. An image is
the anatomy seen in one view (shift, rotation, breath) by the scanner of one site.

Source:
  Geometric phantoms in the spirit of Shepp and Logan (1974), The Fourier reconstruction of a head
  section. The cardiothoracic ratio follows Danzer (1919), The cardiothoracic ratio.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Float32: TypeAlias = NDArray[np.float32]
Finding: TypeAlias = Literal["lesion", "cardiomegaly", "effusion"]

FINDINGS: Final[tuple[Finding, ...]] = ("lesion", "cardiomegaly", "effusion")
BACKGROUND, LUNG, HEART, LESION = range(4)  # values of a mask
MIN_SIZE: Final = 32  # pixels; below this a small lesion can fall between the pixel centres

_WIDE_HEART: Final = 0.5  # cardiothoracic ratio above which a heart counts as enlarged
_CARDIOMEGALY_SHARE: Final = 0.2
_EFFUSION_SHARE: Final = 0.15
_NODULE_SHARE: Final = 0.5  # of lesions; the others are consolidations
_SUBTLE_SHARE: Final = 0.15  # of patients with lesions; they keep a good reader below AUROC 1
_ANATOMY, _VIEW, _SCANNER = range(3)  # one random stream each, so that none moves another
_CAGE_Y: Final = 0.2  # height at which the rib cage is widest
_TEXTURE_CELLS: Final = 28


@dataclass(frozen=True)
class Scanner:
    """How one site's films look, and how often its patients have lesions."""

    contrast: float  # gain around mid-grey
    brightness: float  # offset, in grey values
    noise: float  # standard deviation, in grey values
    blur_px: float  # standard deviation of the point spread, in pixels of a 64-pixel film
    shading: float  # grey difference between the left and the right edge (heel effect)
    prevalence: float  # share of patients with lesions


@dataclass(frozen=True)
class Phantom:
    """One film with everything that is true about it. No patient stands behind it."""

    image: Float32  # (size, size), grey 0..1, dense tissue is bright
    mask: NDArray[np.uint8]  # (size, size), BACKGROUND, LUNG, HEART or LESION
    boxes: Float32  # (num_lesions, 4), pixel edges x0, y0, x1, y1, x1 and y1 outside
    label: int  # 1 if there is a lesion, else 0
    findings: tuple[Finding, ...]  # those present, in the order of FINDINGS


@dataclass(frozen=True)
class _Lesion:
    """A soft bright ellipse; its mask ends where its brightness falls to one half."""

    x: float
    y: float
    radius: float
    flattening: float  # short axis over long axis
    angle: float  # radians
    density: float  # grey values at the centre


@dataclass(frozen=True)
class _Anatomy:
    """One patient's shapes, in anatomy coordinates."""

    cage_half_width: float
    apex_y: float
    base_right_y: float  # outer lung corners; the liver lifts the right one
    base_left_y: float
    dome: float  # height of the diaphragm above the corners
    heart_x: float
    heart_y: float
    heart_ratio: float  # heart width over cage width
    heart_tilt: float  # radians
    rib_spacing: float
    rib_phase: float
    thickness: float  # soft tissue, relative
    fluid_side: int  # -1 patient's right, 1 left, 0 no effusion
    fluid_y: float  # level of the effusion
    texture: Float32  # (cells, cells), smooth, about -1..1
    lesions: tuple[_Lesion, ...] = ()


@dataclass(frozen=True)
class _View:
    """One exposure: how the patient stood and breathed."""

    shift_x: float
    shift_y: float
    rotation: float  # radians
    breath: float  # chest height relative to the anatomy


def scanner_of_site(seed: int, site_index: int) -> Scanner:
    """Return the scanner of one site.

    Args:
      seed: Of the whole federation of phantoms.
      site_index: From 0.

    Returns:
      A scanner that depends on the two arguments alone.

    Guarantees:
      Prevalence lies in 0.25..0.65. Sites with neighbouring indices differ clearly: each property
      walks round its range by an irrational step (a Kronecker sequence), so few sites spread out.
    """
    start = _rng((seed,), _SCANNER).random(6)
    steps = np.array([0.6180, 0.4142, 0.7321, 0.2361, 0.8284, 0.7183])
    contrast, brightness, noise, blur, shading, prevalence = (start + site_index * steps) % 1
    return Scanner(
        contrast=float(0.75 + 0.45 * contrast),
        brightness=float(-0.09 + 0.18 * brightness),
        noise=float(0.01 + 0.045 * noise),
        blur_px=float(0.3 + 0.7 * blur),
        shading=float(-0.12 + 0.24 * shading),
        prevalence=float(0.25 + 0.4 * prevalence),
    )


def draw_patient(
    seed: int,
    site_index: int,
    patient_index: int,
    *,
    scanner: Scanner,
    size: int,
    num_images: int,
) -> list[Phantom]:
    """Draw the films of one patient.

    Args:
      seed: Of the whole federation of phantoms.
      site_index: From 0; only chooses the patients, the look comes from ``scanner``.
      patient_index: From 0, within the site.
      scanner: Look of the films and share of patients with lesions.
      size: Height and width in pixels, at least ``MIN_SIZE``.
      num_images: Views to draw.

    Returns:
      ``num_images`` films that share anatomy, label and findings.

    Guarantees:
      Equal arguments give equal films. Film k is the same whatever ``num_images`` is.

    Raises:
      ValueError: ``size`` is below ``MIN_SIZE``.
    """
    if size < MIN_SIZE:
        raise ValueError(f"a film of {size} pixels would lose lesions; use {MIN_SIZE} or more")
    patient = (seed, site_index, patient_index)
    anatomy = _draw_anatomy(_rng(patient, _ANATOMY), scanner.prevalence)
    rngs = [_rng(patient, _VIEW, index) for index in range(num_images)]
    return [_expose(anatomy, _draw_view(rng), scanner, size, rng) for rng in rngs]


def has_lesions(seed: int, site_index: int, patient_index: int, prevalence: float) -> bool:
    """Whether a patient has lesions, without drawing a film: what ``draw_patient`` draws first."""
    rng = _rng((seed, site_index, patient_index), _ANATOMY)
    return bool(rng.random() < prevalence)


def _rng(entropy: tuple[int, ...], *stream: int) -> np.random.Generator:
    """Return the generator of one stream; spawn keys stay apart where a trailing 0 would not."""
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=stream))


# What a patient is made of.


def _draw_anatomy(rng: np.random.Generator, prevalence: float) -> _Anatomy:
    """Draw one patient; the same draws are made whatever the prevalence."""
    has_lesions = rng.random() < prevalence
    is_cardiomegaly = rng.random() < _CARDIOMEGALY_SHARE
    has_effusion = rng.random() < _EFFUSION_SHARE
    side = int(rng.choice((-1, 1)))
    base = rng.uniform(0.60, 0.68)
    anatomy = _Anatomy(
        cage_half_width=rng.uniform(0.70, 0.79),
        apex_y=rng.uniform(-0.80, -0.70),
        base_right_y=base - rng.uniform(0.02, 0.06),
        base_left_y=base,
        dome=rng.uniform(0.17, 0.25),
        heart_x=rng.uniform(0.09, 0.13),
        heart_y=rng.uniform(0.24, 0.30),
        # The gap round _WIDE_HEART keeps the films unambiguous.
        heart_ratio=rng.uniform(0.55, 0.63) if is_cardiomegaly else rng.uniform(0.38, 0.46),
        heart_tilt=rng.uniform(0.4, 0.7),
        rib_spacing=rng.uniform(0.15, 0.175),
        rib_phase=rng.random(),
        thickness=rng.uniform(0.92, 1.08),
        fluid_side=side if has_effusion else 0,
        fluid_y=base - rng.uniform(0.20, 0.36),
        texture=_draw_texture(rng),
    )
    return replace(anatomy, lesions=_draw_lesions(anatomy, rng)) if has_lesions else anatomy


def _draw_texture(rng: np.random.Generator) -> Float32:
    """Draw smooth tissue that belongs to the patient, so that it moves with every view."""
    cells = rng.standard_normal((_TEXTURE_CELLS, _TEXTURE_CELLS), dtype=np.float32)
    smooth: Float32 = ndimage.gaussian_filter(cells, 0.7, mode="wrap")
    return smooth


def _draw_lesions(anatomy: _Anatomy, rng: np.random.Generator) -> tuple[_Lesion, ...]:
    """Place one to three lesions, each inside a lung and clear of the others."""
    num_lesions = int(rng.integers(1, 4))
    visibility = 0.25 if rng.random() < _SUBTLE_SHARE else 1.0
    lesions: list[_Lesion] = []
    while len(lesions) < num_lesions:
        lesion = _draw_lesion(rng, visibility)
        x, y = rng.uniform(-0.75, 0.75, size=(2, 48)).astype(np.float32)
        room = _air_depth(anatomy, x, y)
        for other in lesions:
            gap = np.hypot(x - other.x, y - other.y) - other.radius - 4 / MIN_SIZE
            room = np.minimum(room, gap)
        first = int(np.argmax(room > lesion.radius))
        if room[first] > lesion.radius:
            lesions.append(replace(lesion, x=float(x[first]), y=float(y[first])))
    return tuple(lesions)


def _draw_lesion(rng: np.random.Generator, visibility: float) -> _Lesion:
    """Draw a small round nodule or a larger, flatter consolidation, not yet in its place."""
    is_nodule = rng.random() < _NODULE_SHARE
    return _Lesion(
        x=0,
        y=0,
        radius=rng.uniform(0.09, 0.15) if is_nodule else rng.uniform(0.16, 0.24),
        flattening=rng.uniform(0.75, 1.0) if is_nodule else rng.uniform(0.6, 0.9),
        angle=rng.uniform(0, np.pi),
        density=visibility * rng.uniform(0.16, 0.40),
    )


# Depths: about the distance to the border of a shape, positive inside, in anatomy units.


def _body_depth(x: Float32, y: Float32) -> Float32:
    """Neck, shoulders that leave the film, and the flanks below the armpits."""
    shoulder = 0.19 + 0.95 * np.clip((y + 0.97) / 0.42, 0, 1) ** 0.8
    flank = 0.90 + 0.35 * np.clip((-0.28 - y) / 0.3, 0, 1)
    return np.asarray(np.minimum(shoulder, flank) - np.abs(x), dtype=np.float32)


def _cage_depth(anatomy: _Anatomy, x: Float32, y: Float32) -> Float32:
    """Rib cage: half a superellipse above its widest height, nearly straight below."""
    above = np.maximum(_CAGE_Y - y, 0) / (_CAGE_Y - anatomy.apex_y)
    below = np.maximum(y - _CAGE_Y, 0) * 0.6
    across = np.abs(x) / anatomy.cage_half_width
    radius: Float32 = (across**2.4 + (above + below) ** 2.4) ** (1 / 2.4)
    return anatomy.cage_half_width * (1 - radius)


def _diaphragm_depth(anatomy: _Anatomy, x: Float32, y: Float32) -> Float32:
    """Height above the diaphragm, one dome on each side and flat under the heart."""
    base = np.where(x < 0, anatomy.base_right_y, anatomy.base_left_y)
    dome = anatomy.dome * (1 - ((np.maximum(np.abs(x), 0.15) - 0.36) / 0.40) ** 2)
    return np.asarray(base - dome - y, dtype=np.float32)


def _mediastinum_depth(x: Float32, y: Float32) -> Float32:
    """Vessels between the lungs: the aortic knob on the left, the hilum on the right."""
    knob = 0.07 * np.exp(-(((y + 0.30) / 0.10) ** 2))
    hilum = 0.06 * np.exp(-(((y - 0.02) / 0.16) ** 2))
    return np.asarray(0.10 + np.where(x > 0, knob, hilum) - np.abs(x), dtype=np.float32)


def _heart_depth(anatomy: _Anatomy, x: Float32, y: Float32) -> Float32:
    """Tilted ellipse whose width is exactly the cardiothoracic ratio times the cage width."""
    cos, sin, flattening = np.cos(anatomy.heart_tilt), np.sin(anatomy.heart_tilt), 0.74
    half_width = anatomy.heart_ratio * anatomy.cage_half_width
    axis = half_width / np.hypot(cos, flattening * sin)
    radius = _ellipse(x - anatomy.heart_x, y - anatomy.heart_y, anatomy.heart_tilt, flattening)
    return np.asarray(axis - radius, dtype=np.float32)


def _fluid_depth(anatomy: _Anatomy, x: Float32, y: Float32) -> Float32:
    """Effusion: a level that climbs the outer chest wall (meniscus); nowhere if there is none."""
    climb = 0.22 * np.clip(np.abs(x) / anatomy.cage_half_width - 0.45, 0, 1) ** 2 / 0.3
    depth = np.where(x * anatomy.fluid_side > 0, y - anatomy.fluid_y + climb, -1)
    return depth.astype(np.float32)


def _lung_depth(anatomy: _Anatomy, x: Float32, y: Float32) -> Float32:
    """Both lungs before heart and fluid take their room."""
    inside = np.minimum(_cage_depth(anatomy, x, y), _diaphragm_depth(anatomy, x, y))
    return np.asarray(np.minimum(inside, -_mediastinum_depth(x, y)))


def _air_depth(anatomy: _Anatomy, x: Float32, y: Float32) -> Float32:
    """Lung that looks dark: beside the heart and above the fluid."""
    solid = np.maximum(_heart_depth(anatomy, x, y), _fluid_depth(anatomy, x, y))
    return np.asarray(np.minimum(_lung_depth(anatomy, x, y), -solid))


def _ellipse(x: Float32, y: Float32, angle: float, flattening: float) -> Float32:
    """Distance from the origin, stretched so that an ellipse has the radius of its long axis."""
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return np.asarray(np.hypot(cos * x + sin * y, (cos * y - sin * x) / flattening))


# From anatomy to film.


def _draw_view(rng: np.random.Generator) -> _View:
    """Draw how the patient stood and breathed; small enough to keep the lungs on the film."""
    return _View(
        shift_x=rng.uniform(-0.06, 0.06),
        shift_y=rng.uniform(-0.05, 0.05),
        rotation=rng.uniform(-0.07, 0.07),
        breath=rng.uniform(0.93, 1.07),
    )


def _expose(
    anatomy: _Anatomy, view: _View, scanner: Scanner, size: int, rng: np.random.Generator
) -> Phantom:
    """Draw one film and read its mask, boxes and findings from the same shapes."""
    x, y = _film_grid(view, size)
    lesion_radii = [_lesion_radius(lesion, x, y) for lesion in anatomy.lesions]
    tissue = _draw_tissue(anatomy, x, y)
    for lesion, radius in zip(anatomy.lesions, lesion_radii, strict=True):
        tissue += np.float32(lesion.density) * np.exp2(-(radius**4))  # one half where radius is 1
    boxes = [_box_of(radius < 1) for radius in lesion_radii]
    return Phantom(
        image=_scan(tissue, scanner, rng),
        mask=_draw_mask(anatomy, x, y, lesion_radii),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        label=int(bool(anatomy.lesions)),
        findings=_findings_of(anatomy),
    )


def _film_grid(view: _View, size: int) -> tuple[Float32, Float32]:
    """Return the anatomy coordinates of every pixel centre."""
    axis = np.linspace(1 / size - 1, 1 - 1 / size, size, dtype=np.float32)
    across, down = axis[None, :] - view.shift_x, axis[:, None] - view.shift_y
    cos, sin = float(np.cos(view.rotation)), float(np.sin(view.rotation))
    x: Float32 = cos * across + sin * down
    y: Float32 = cos * down - sin * across
    return x, (y + 0.7) / view.breath - 0.7  # breathing moves the diaphragm, not the apex


def _draw_tissue(anatomy: _Anatomy, x: Float32, y: Float32) -> Float32:
    """Sum what the rays pass through, in grey values."""
    side = np.abs(x)
    body, cage = _body_depth(x, y), _cage_depth(anatomy, x, y)
    air = _ramp(_air_depth(anatomy, x, y), 0.05)
    texture = _sample_texture(anatomy.texture, x, y)
    soft = _ramp(body, 0.05) * (0.46 + 0.16 * np.clip(body / 0.5, 0, 1) + 0.08 * y)
    tissue = anatomy.thickness * soft * (1 - 0.62 * air)
    tissue += 0.09 * _ramp(_heart_depth(anatomy, x, y), 0.08)
    tissue += 0.10 * _ramp(0.085 - side, 0.04) * (1 + 0.25 * np.cos(y * 55))  # spine
    tissue -= 0.13 * _ramp(0.045 - side, 0.03) * _ramp(-0.30 - y, 0.10)  # trachea
    tissue += _ribs(anatomy, side, y) * _ramp(cage + 0.03, 0.04)
    tissue += 0.13 * _clavicles(side, y)
    stomach = 0.16 - _ellipse(x - 0.42, y - anatomy.base_left_y - 0.10, 0.2, 0.55)
    tissue -= 0.14 * _ramp(stomach, 0.06)  # its bubble of gas marks the left side
    hilum = np.exp(-(((side - 0.17) / 0.14) ** 2) - ((y - 0.02) / 0.20) ** 2)
    tissue += air * (0.09 * hilum + (0.022 + 0.05 * hilum) * texture)  # vessels fan out from it
    tissue += 0.012 * texture * _ramp(body, 0.05)
    return np.asarray(tissue, dtype=np.float32)


def _ribs(anatomy: _Anatomy, side: Float32, y: Float32) -> Float32:
    """Back ribs fall outwards, front ribs fall inwards and are fainter."""
    back = (y - 0.42 * (side - 0.12) ** 2) / anatomy.rib_spacing + anatomy.rib_phase
    front = (y + 0.45 * side) / anatomy.rib_spacing - anatomy.rib_phase
    above_diaphragm = _ramp(0.55 - y, 0.3)
    bands = 0.075 * _bands(back) + 0.035 * _bands(front) * _ramp(side - 0.30, 0.2)
    return np.asarray(bands * (0.3 + 0.7 * above_diaphragm), dtype=np.float32)


def _bands(phase: NDArray[np.floating]) -> Float32:
    """Soft bands, one for each turn of the phase."""
    return np.asarray(np.exp(2.5 * (np.cos(2 * np.pi * phase) - 1)), dtype=np.float32)


def _clavicles(side: Float32, y: Float32) -> Float32:
    """Two bars that rise from the breastbone to the shoulders."""
    height = y + 0.47 + 0.22 * (side - 0.08) + 0.03 * np.sin(7 * side)
    bar = np.exp(-((height / 0.035) ** 2)) * _ramp(side - 0.08, 0.05) * _ramp(0.72 - side, 0.1)
    return np.asarray(bar, dtype=np.float32)


def _sample_texture(texture: Float32, x: Float32, y: Float32) -> Float32:
    """Read the patient's texture at anatomy coordinates."""
    cells = (np.stack([y, x]) + 1) * (0.5 * _TEXTURE_CELLS)
    sampled: Float32 = ndimage.map_coordinates(texture, cells, order=1, mode="grid-wrap")
    return sampled


def _ramp(depth: NDArray[np.floating], width: float) -> Float32:
    """Turn a depth into a share from 0 to 1, with a border of the given width."""
    return np.asarray(np.clip(depth / width + 0.5, 0, 1), dtype=np.float32)


def _scan(tissue: Float32, scanner: Scanner, rng: np.random.Generator) -> Float32:
    """Turn tissue into the film of one scanner; noise comes after blur, as in a detector."""
    size = len(tissue)
    blurred = ndimage.gaussian_filter(tissue, scanner.blur_px * size / 64)
    heel = scanner.shading * (np.arange(size, dtype=np.float32) / (size - 1) - 0.5)
    grey = 0.5 + scanner.contrast * (blurred - 0.45) + scanner.brightness + heel
    noise = scanner.noise * rng.standard_normal(tissue.shape, dtype=np.float32)
    return np.asarray(np.clip(grey + noise, 0, 1), dtype=np.float32)


def _draw_mask(
    anatomy: _Anatomy, x: Float32, y: Float32, lesion_radii: list[Float32]
) -> NDArray[np.uint8]:
    """Paint the classes in order, so that a lesion is never hidden."""
    mask = np.zeros(x.shape, dtype=np.uint8)
    mask[_air_depth(anatomy, x, y) > 0] = LUNG
    heart = np.minimum(_heart_depth(anatomy, x, y), _diaphragm_depth(anatomy, x, y))
    mask[heart > 0] = HEART
    for radius in lesion_radii:
        mask[radius < 1] = LESION
    return mask


def _lesion_radius(lesion: _Lesion, x: Float32, y: Float32) -> Float32:
    """Distance from the centre of a lesion, 1 at its border."""
    radius = _ellipse(x - lesion.x, y - lesion.y, lesion.angle, lesion.flattening)
    return radius / np.float32(lesion.radius)


def _box_of(inside: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return the smallest box round the pixels, x0, y0, x1, y1."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _findings_of(anatomy: _Anatomy) -> tuple[Finding, ...]:
    """Name what is present."""
    present = (bool(anatomy.lesions), anatomy.heart_ratio > _WIDE_HEART, anatomy.fluid_side != 0)
    return tuple(name for name, is_present in zip(FINDINGS, present, strict=True) if is_present)
