"""Phantoms: image, mask, boxes and label tell one story, and every story can be told again."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from common.phantom import (
    BACKGROUND,
    FINDINGS,
    HEART,
    LESION,
    LUNG,
    MIN_SIZE,
    Phantom,
    Scanner,
    draw_patient,
    scanner_of_site,
)
from common.phantom_volume import PhantomVolume, draw_volume

SEED = 7
ALWAYS = Scanner(contrast=1, brightness=0, noise=0.02, blur_px=0.5, shading=0, prevalence=1)
NEVER = Scanner(contrast=1, brightness=0, noise=0.02, blur_px=0.5, shading=0, prevalence=0)


def draw(
    patient_index: int, *, scanner: Scanner = ALWAYS, size: int = 64, num_images: int = 1
) -> list[Phantom]:
    return draw_patient(SEED, 0, patient_index, scanner=scanner, size=size, num_images=num_images)


def regions(mask: NDArray[np.uint8]) -> list[tuple[slice, ...]]:
    found, _ = ndimage.label(mask == LESION, structure=np.ones((3,) * mask.ndim))
    return list(ndimage.find_objects(found))


def width_of(inside: NDArray[np.bool_]) -> int:
    columns = np.flatnonzero(inside.any(axis=0))
    return int(columns[-1] - columns[0] + 1)


def has_equal_fields(one: Phantom, other: Phantom) -> bool:
    arrays = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("image", "mask", "boxes")
    )
    return arrays and (one.label, one.findings) == (other.label, other.findings)


def test_the_same_patient_can_be_drawn_again() -> None:
    for one, other in zip(draw(3, num_images=2), draw(3, num_images=2), strict=True):
        assert has_equal_fields(one, other)


def test_a_film_does_not_depend_on_how_many_are_drawn() -> None:
    assert has_equal_fields(draw(3)[0], draw(3, num_images=4)[0])


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy state is the subject
    draw(0)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("other", [(8, 0, 0), (7, 1, 0), (7, 0, 1), (0, 7, 0)])
def test_other_seeds_sites_and_patients_give_other_anatomy(other: tuple[int, int, int]) -> None:
    film = draw_patient(*other, scanner=ALWAYS, size=64, num_images=1)[0]
    assert not np.array_equal(film.mask, draw(0)[0].mask)


def test_films_of_one_patient_share_findings_and_lesions_but_not_pixels() -> None:
    for patient in range(40):
        first, *rest = draw(patient, num_images=3)
        for film in rest:
            assert (film.label, film.findings) == (first.label, first.findings)
            assert len(film.boxes) == len(first.boxes)
            assert not np.array_equal(film.mask, first.mask)


def test_healthy_and_ill_patients_differ_by_their_lesions_alone() -> None:
    for patient in range(20):
        ill, healthy = draw(patient)[0], draw(patient, scanner=NEVER)[0]
        assert np.array_equal(ill.mask[ill.mask != LESION], healthy.mask[ill.mask != LESION])
        assert not healthy.boxes.size


def test_image_and_mask_have_the_stated_types_and_ranges() -> None:
    for site in range(6):
        film = draw(0, scanner=scanner_of_site(SEED, site), size=48)[0]
        assert film.image.dtype == np.float32
        assert film.mask.dtype == np.uint8
        assert film.boxes.dtype == np.float32
        assert film.image.shape == film.mask.shape == (48, 48)
        assert film.image.min() >= 0
        assert film.image.max() <= 1
        assert film.image.std() > 0.1


def test_lungs_are_dark_the_heart_is_bright_and_left_of_the_midline() -> None:
    for patient in range(20):
        film = draw(patient, scanner=NEVER)[0]
        assert set(np.unique(film.mask)) == {BACKGROUND, LUNG, HEART}
        assert film.image[film.mask == HEART].mean() > film.image[film.mask == LUNG].mean() + 0.2
        heart_x = np.nonzero(film.mask == HEART)[1].mean()
        lung_x = np.nonzero(film.mask == LUNG)[1]
        assert heart_x > (lung_x.min() + lung_x.max()) / 2


@pytest.mark.parametrize("size", [MIN_SIZE, 64, 128])
def test_boxes_enclose_exactly_the_connected_regions_of_lesion_pixels(size: int) -> None:
    for patient in range(60):
        for film in draw(patient, size=size, num_images=2):
            enclosing = {(c.start, r.start, c.stop, r.stop) for r, c in regions(film.mask)}
            assert {tuple(map(int, box)) for box in film.boxes} == enclosing
            assert 1 <= len(film.boxes) == len(enclosing) <= 3
            assert film.boxes.min() >= 0
            assert film.boxes.max() <= size


def test_lesions_lie_in_a_lung_and_are_brighter_than_it() -> None:
    contrasts = []
    for patient in range(60):
        ill, healthy = draw(patient)[0], draw(patient, scanner=NEVER)[0]
        lesion = ill.mask == LESION
        assert np.mean(healthy.mask[lesion] == LUNG) > 0.95
        contrasts.append(np.mean(ill.image[lesion] - healthy.image[lesion]))
    assert min(contrasts) > 0
    assert min(contrasts) < 0.12 < max(contrasts)  # some are faint, or the task would be trivial


def test_cardiomegaly_means_a_heart_wider_than_half_the_thorax() -> None:
    for patient in range(60):
        film = draw(patient, scanner=NEVER, size=128)[0]
        ratio = width_of(film.mask == HEART) / width_of(film.mask != BACKGROUND)
        assert (ratio > 0.5) == ("cardiomegaly" in film.findings)


def test_effusion_takes_air_from_one_lung() -> None:
    drowned = {True: 0, False: 0}
    for patient in range(80):
        film = draw(patient, scanner=NEVER)[0]
        rows = [np.nonzero((half == LUNG).any(axis=1))[0].max() for half in halves(film.mask)]
        drowned["effusion" in film.findings] += abs(rows[0] - rows[1]) > 6
    assert drowned[True] > 0
    assert drowned[False] == 0


def halves(mask: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return np.split(mask, 2, axis=1)


def test_findings_are_named_in_order_and_lesion_is_the_label() -> None:
    scanner = scanner_of_site(SEED, 0)
    seen = set()
    for patient in range(80):
        film = draw(patient, scanner=scanner, size=MIN_SIZE)[0]
        assert film.label == ("lesion" in film.findings) == bool(len(film.boxes))
        assert list(film.findings) == [name for name in FINDINGS if name in film.findings]
        seen.update(film.findings)
    assert seen == set(FINDINGS)


def test_the_share_of_patients_with_lesions_is_the_prevalence() -> None:
    num_patients, prevalence = 400, 0.3
    scanner = Scanner(1, 0, 0.02, 0.5, 0, prevalence=prevalence)
    num_ill = sum(draw(index, scanner=scanner, size=32)[0].label for index in range(num_patients))
    sd = np.sqrt(num_patients * prevalence * (1 - prevalence))
    assert abs(num_ill - num_patients * prevalence) < 3.5 * sd  # 0.2 or 0.4 would be 4.4 sd away


def test_scanners_are_reproducible_and_prevalence_stays_in_its_range() -> None:
    for site in range(50):
        scanner = scanner_of_site(SEED, site)
        assert scanner == scanner_of_site(SEED, site)
        assert 0.25 <= scanner.prevalence <= 0.65
    assert scanner_of_site(SEED, 0) != scanner_of_site(SEED + 1, 0)


def test_sites_differ_more_than_groups_of_patients() -> None:
    scanners = [scanner_of_site(SEED, site) for site in range(4)]
    looks = [look_of(scanner, 0) for scanner in scanners]
    within = [distance(look, look_of(scanners[i], 10)) for i, look in enumerate(looks)]
    between = [distance(one, other) for one, other in itertools.combinations(looks, 2)]
    assert min(between) > 2 * max(within)


def distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.abs(np.log(one / other)).max())


def look_of(scanner: Scanner, first_patient: int = 0) -> NDArray[np.float64]:
    """Mean, spread and grain of the films of ten patients."""
    patients = range(first_patient, first_patient + 10)
    films = np.stack([draw(patient, scanner=scanner)[0].image for patient in patients])
    return np.array([films.mean(), films.std(), np.abs(np.diff(films, axis=2)).mean()])


def test_more_noise_and_more_blur_can_be_measured() -> None:
    clean = Scanner(1, 0, noise=0, blur_px=0.3, shading=0, prevalence=0)
    noisy = Scanner(1, 0, noise=0.05, blur_px=0.3, shading=0, prevalence=0)
    soft = Scanner(1, 0, noise=0, blur_px=1.0, shading=0, prevalence=0)
    grains = [look_of(scanner)[2] for scanner in (soft, clean, noisy)]
    assert grains[0] < 0.9 * grains[1]
    assert grains[1] < 0.7 * grains[2]


def test_a_film_or_volume_too_small_for_its_lesions_is_refused() -> None:
    with pytest.raises(ValueError, match="31 pixels"):
        draw(0, size=31)
    with pytest.raises(ValueError, match="31 voxels"):
        draw_volume(SEED, 0, 0, scanner=ALWAYS, size=31)


def volume(patient_index: int, scanner: Scanner = ALWAYS) -> PhantomVolume:
    return draw_volume(SEED, 0, patient_index, scanner=scanner, size=32)


def test_the_same_volume_can_be_drawn_again_and_patients_differ() -> None:
    assert np.array_equal(volume(1).volume, volume(1).volume)
    assert np.array_equal(volume(1).mask, volume(1).mask)
    assert not np.array_equal(volume(1).mask, volume(2).mask)


def test_volumes_hold_every_class_with_separate_lesions_inside_the_lungs() -> None:
    for patient in range(20):
        ill, healthy = volume(patient), volume(patient, NEVER)
        assert set(np.unique(ill.mask)) == {BACKGROUND, LUNG, HEART, LESION}
        assert set(np.unique(healthy.mask)) == {BACKGROUND, LUNG, HEART}
        assert (healthy.mask[ill.mask == LESION] == LUNG).all()
        assert 1 <= len(regions(ill.mask)) <= 3
        assert ill.volume.shape == ill.mask.shape == (32, 32, 32)
        assert ill.volume.dtype == np.float32
        assert ill.volume.min() >= 0
        assert ill.volume.max() <= 1
