"""Local training: the same bits from the same model and stream, and nothing else plays a part."""

from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.augment import augment
from client.clipping import Units, by_brute_force
from client.evaluate import BATCH, evaluate
from client.images import Images
from client.noise import Keystream
from client.train import batches, learning_rate, train, train_privately
from common.accounting import Event
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.plan import PrivacyPlan
from common.study import Augmentation, DifferentialPrivacy, Study
from common.tasks import Task, task_of

FLIP = Augmentation(flip=1.0)
EVERYTHING = {
    "flip": 0.5, "rotate_degrees": 10, "shift": 0.1, "zoom": 0.1,
    "contrast": 0.2, "brightness": 0.1, "noise": 0.1,
}  # fmt: skip


def stream(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(num: int = 20, size: int = 16, seed: int = 5) -> Images:
    """Noise in which class 1 is a little brighter on the left."""
    targets = torch.arange(num) % 2
    pixels = torch.randn(num, 1, size, size, generator=stream(seed))
    pixels[..., : size // 2] += targets.reshape(-1, 1, 1, 1)
    return Images(pixels, targets, tuple(map(str, range(num))))


def augmented(batch: Tensor, config: Augmentation, rng: torch.Generator) -> Tensor:
    """The images alone: labels never change."""
    return augment(batch, torch.zeros(len(batch)), config, rng)[0]


class Trainer:
    """A network and a task of one study, to train with as often as needed."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.network: FlatNetwork = build_network(study)
        self.task: Task = task_of(study)
        self.model = self.network.vector()

    def train(
        self, data: Images, *, seed: int = 1, rate: float | None = None
    ) -> NDArray[np.float32]:
        return train(
            self.model,
            data,
            self.study.training,
            network=self.network,
            task=self.task,
            rate=self.study.training.learning_rate if rate is None else rate,
            rng=stream(seed),
        ).values


@pytest.fixture
def trainer(make_study: Callable[..., Study]) -> Callable[..., Trainer]:
    def make(**training: Any) -> Trainer:
        model = training.pop("model", {"name": "cnn", "width": 4})
        changes = {f"training.{name}": value for name, value in training.items()}
        return Trainer(make_study({"model": model, **changes}))

    return make


RECIPES = {
    "plain SGD": {},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"optimizer": "adam", "learning_rate": 0.01},
    "AdamW, cosine, two epochs": {"optimizer": "adamw", "schedule": "cosine", "local_epochs": 2},
    "dropout": {"model": {"name": "cnn", "width": 4, "dropout": 0.5}},
    "every augmentation": {"augmentation": EVERYTHING},
    "logit adjustment": {"logit_adjustment": True},
    "proximal term": {"proximal": 0.5, "local_epochs": 2},
    "mixed precision": {"mixed_precision": True},
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@every_recipe
def test_training_depends_on_model_images_and_stream_alone(
    recipe: str, trainer: Callable[..., Trainer]
) -> None:
    one, data = trainer(**RECIPES[recipe]), images()
    torch.manual_seed(1)
    first = one.train(data)
    torch.manual_seed(2)
    assert np.array_equal(one.train(data), first)  # the same network again
    assert np.array_equal(trainer(**RECIPES[recipe]).train(data), first)  # and another one
    assert not np.array_equal(one.train(data, seed=2), first)
    assert np.isfinite(first).all()
    assert first.any()


def test_what_was_trained_or_scored_before_leaves_no_trace(trainer: Callable[..., Trainer]) -> None:
    one = trainer(optimizer="adam", model={"name": "cnn", "width": 4, "dropout": 0.5})
    first = one.train(images())
    one.network.gradients.fill_(9)
    one.network.values.fill_(9)
    one.network.module.eval()
    assert np.array_equal(one.train(images()), first)


def test_the_update_is_local_minus_global(trainer: Callable[..., Trainer]) -> None:
    one = trainer()
    before = one.model.copy()
    update = one.train(images())
    assert np.array_equal(update, one.network.vector() - before)
    assert np.array_equal(one.model, before)
    assert update.dtype == np.float32


def test_one_step_of_sgd_is_the_learning_rate_times_the_gradient(
    trainer: Callable[..., Trainer],
) -> None:
    one, data = trainer(batch_size=64), images(20)
    update = one.train(data, rate=0.25)
    one.network.load(one.model)
    one.network.gradients.zero_()
    one.task.local_loss(None)(one.network(data.pixels), data.targets).backward()
    assert np.allclose(update, -0.25 * one.network.gradients.numpy(), atol=1e-6)


def gradient(one: Trainer, model: NDArray[np.float32], data: Images) -> NDArray[np.float32]:
    """By plain autograd, of the mean loss over all images."""
    one.network.load(model)
    loss = one.task.local_loss(None)(one.network(data.pixels), data.targets)
    parts = torch.autograd.grad(loss, list(one.network.module.parameters()))
    return torch.cat([part.reshape(-1) for part in parts]).numpy()


@pytest.mark.parametrize("proximal", [0.0, 1.5, 4.0])
def test_a_step_of_fedprox_is_the_rate_times_gradient_and_distance(
    proximal: float, trainer: Callable[..., Trainer]
) -> None:
    one, data, rate = trainer(batch_size=64, local_epochs=3, proximal=proximal), images(12), 0.2
    update = one.train(data, rate=rate)
    start = model = one.model.copy()
    for _ in range(3):
        model = model - rate * (gradient(one, model, data) + proximal * (model - start))
    assert np.allclose(update, model - start, atol=2e-6)
    assert np.abs(update).max() > 1e-2


def test_the_first_step_of_fedprox_knows_no_distance(trainer: Callable[..., Trainer]) -> None:
    plain, pulled = (trainer(batch_size=64, proximal=mu).train(images()) for mu in (0.0, 9.0))
    assert np.array_equal(plain, pulled)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_more_the_study_pulls_the_less_a_model_moves(
    optimizer: str, trainer: Callable[..., Trainer]
) -> None:
    def length(proximal: float) -> float:
        one = trainer(local_epochs=10, optimizer=optimizer, proximal=proximal)
        return float(np.linalg.norm(one.train(images(), rate=0.02)))

    free, light, strong = map(length, (0.0, 1.0, 20.0))
    assert free > light > strong > 0
    assert strong < free / 2


def private_update(
    one: Trainer, data: Images, *, probability: float, steps: int, noise: float = 1.0
) -> NDArray[np.float32]:
    """What DP-SGD gives with an expected batch of 4, always by the same stream."""
    terms = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-5, example_clip_norm=0.01)
    plan = PrivacyPlan(
        Event(noise, probability, steps), num_public=round(4 / probability), num_rounds=1,
        terms=terms,
    )  # fmt: skip
    return train_privately(
        one.model, data, one.study.training, plan, network=one.network, task=one.task, rate=0.5,
        secrets=Keystream.from_seed("test"),
    ).values  # fmt: skip


@pytest.mark.parametrize("probability", [1e-12, 1.0], ids=["nobody drawn", "everybody drawn"])
def test_under_privacy_the_pull_is_added_after_clipping_and_noise(
    probability: float, trainer: Callable[..., Trainer]
) -> None:
    data, proximal, rate = images(4), 1.6, 0.5
    plain, pulled = trainer(), trainer(proximal=proximal)
    first = private_update(plain, data, probability=probability, steps=1)
    assert np.array_equal(private_update(pulled, data, probability=probability, steps=1), first)
    two = private_update(plain, data, probability=probability, steps=2)
    together = private_update(pulled, data, probability=probability, steps=2)
    # Clipped to 0.01 or divided by the batch, the pull would be smaller; noised, it would differ.
    assert np.allclose(together - two, -rate * proximal * first, atol=1e-6)
    assert np.linalg.norm(rate * proximal * first) > 0.01


def test_without_noise_and_patients_only_the_pull_is_left(trainer: Callable[..., Trainer]) -> None:
    nothing = private_update(trainer(proximal=9.0), images(4), probability=1e-12, steps=5, noise=0)
    assert not nothing.any()  # the start pulls nowhere


def test_a_private_step_of_fedprox_by_hand(trainer: Callable[..., Trainer]) -> None:
    one, data = trainer(proximal=1.6), images(4)
    found = private_update(one, data, probability=1.0, steps=2, noise=0)
    start = model = one.model.copy()
    for _ in range(2):
        one.network.load(model)
        units = Units(data.pixels, data.targets, (1, 1, 1, 1))
        total = by_brute_force(one.network.module, units, one.task.local_loss(None), 0.01)
        model = model - 0.5 * (total.numpy() / 4 + 1.6 * (model - start))
    assert np.allclose(found, model - start, atol=1e-7)
    assert np.abs(found).max() > 1e-4


def test_mixed_precision_gives_almost_the_update_of_full_precision(
    trainer: Callable[..., Trainer],
) -> None:
    data = images(40)
    full, mixed = (trainer(mixed_precision=mixed).train(data) for mixed in (False, True))
    assert mixed.dtype == np.float32
    assert np.isfinite(mixed).all()
    assert 0 < np.linalg.norm(mixed - full) < 0.1 * np.linalg.norm(full)


def test_scoring_after_mixed_precision_is_in_full_precision(
    trainer: Callable[..., Trainer],
) -> None:
    one, other, data = trainer(mixed_precision=True), trainer(), images()
    one.train(data)
    counts = [evaluate(t.model, data, network=t.network, task=t.task) for t in (one, other)]
    assert np.array_equal(*counts)


def test_training_lowers_the_loss(trainer: Callable[..., Trainer]) -> None:
    one, data = trainer(local_epochs=15, optimizer="adam", learning_rate=0.01), images(40)
    update = one.train(data)

    def loss(model: NDArray[np.float32]) -> float:
        counts = evaluate(model, data, network=one.network, task=one.task)
        return float(one.task.figures(counts)["loss"])

    assert loss(one.model + update) < 0.7 * loss(one.model)


def test_training_does_not_change_the_images(trainer: Callable[..., Trainer]) -> None:
    data = images()
    before = data.pixels.clone()
    trainer(augmentation=EVERYTHING).train(data)
    assert torch.equal(data.pixels, before)


def test_an_update_is_as_large_as_its_rate(trainer: Callable[..., Trainer]) -> None:
    one, data = trainer(batch_size=64), images(20)
    whole, half, none = (np.abs(one.train(data, rate=rate)).sum() for rate in (0.05, 0.025, 0))
    assert half == pytest.approx(whole / 2, rel=1e-3)
    assert none == 0


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.5 + np.sqrt(0.125), 0.5, 0.5 - np.sqrt(0.125)]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 3, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_schedules_start_at_the_learning_rate_and_warm_up_to_it(
    schedule: str, warmup: int, expected: list[float], make_study: Callable[..., Study]
) -> None:
    changes = {"training.schedule": schedule, "training.warmup_rounds": warmup}
    training = make_study({**changes, "num_rounds": 4}).training
    rates = [learning_rate(training, number, 4) for number in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.05 * factor for factor in expected])


def numbered(num: int) -> Images:
    """Images that carry their own number."""
    pixels = torch.arange(num, dtype=torch.float32).reshape(num, 1, 1, 1).expand(num, 1, 8, 8)
    return Images(pixels, torch.arange(num), tuple(map(str, range(num))))


def drawn(study: Study, num: int) -> list[list[int]]:
    found = []
    for pixels, targets in batches(numbered(num), study.training, stream()):
        assert pixels[:, 0, 0, 0].tolist() == targets.tolist()  # image and target stay together
        found.append(targets.tolist())
    return found


@pytest.mark.parametrize(("num", "batch_size"), [(20, 8), (16, 8), (5, 8), (1, 1), (9, 1)])
def test_the_batches_of_an_epoch_hold_every_image_once(
    num: int, batch_size: int, make_study: Callable[..., Study]
) -> None:
    study = make_study({"training.batch_size": batch_size, "training.local_epochs": 3})
    found = drawn(study, num)
    per_epoch = -(-num // batch_size)
    assert len(found) == 3 * per_epoch
    epochs = [list(chain(*found[k : k + per_epoch])) for k in range(0, len(found), per_epoch)]
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    assert all(len(batch) == batch_size for batch in found[: per_epoch - 1])
    if num > 5:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_steps_go_on_through_the_epochs(num_steps: int, make_study: Callable[..., Study]) -> None:
    study = make_study({"training.local_epochs": None, "training.local_steps": num_steps})
    found = drawn(study, 20)
    assert [len(batch) for batch in found] == [8, 8, 4, 8, 8, 4, 8][:num_steps]
    seen = Counter(image for batch in found for image in batch)
    assert max(seen.values()) - min(seen[k] for k in range(20)) <= 1


def test_without_augmentation_a_batch_is_left_alone() -> None:
    batch = images().pixels
    assert augmented(batch, Augmentation(), stream()) is batch


def test_without_augmentation_nothing_is_drawn() -> None:
    rng = stream()
    before = rng.get_state()
    augmented(images().pixels, Augmentation(), rng)
    assert torch.equal(rng.get_state(), before)


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 3, 9, 14)])
def test_a_flip_is_a_flip(shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape, generator=stream())
    assert torch.allclose(augmented(batch, FLIP, stream()), batch.flip(-1), atol=1e-5)


def test_about_half_of_the_images_are_flipped_when_the_study_says_half() -> None:
    batch = torch.randn(400, 1, 8, 8, generator=stream())
    changed = augmented(batch, Augmentation(flip=0.5), stream())
    is_flipped = (changed - batch.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    is_same = (changed - batch).abs().amax((1, 2, 3)) < 1e-4
    assert (is_flipped ^ is_same).all()
    assert abs(int(is_flipped.sum()) - 200) < 4 * 10


def square(size: int = 32) -> Tensor:
    """A bright square a little right of and above the centre."""
    image = torch.zeros(1, 1, size, size)
    image[..., 10:14, 18:22] = 1
    return image


def centre(image: Tensor) -> Tensor:
    """Centre of mass, (row, column), in pixels from the centre of the image."""
    axis = torch.arange(32) - 15.5
    plane = image[0, 0] / image.sum()
    return torch.stack([(plane.sum(1) * axis).sum(), (plane.sum(0) * axis).sum()])


def test_a_shift_moves_at_most_its_share_of_the_side() -> None:
    moved = torch.stack([
        centre(augmented(square(), Augmentation(shift=0.125), stream(seed))) - centre(square())
        for seed in range(60)
    ])  # fmt: skip
    assert moved.abs().amax() <= 4 + 1e-3
    assert (moved.amax(0) > 2.5).all()
    assert (moved.amin(0) < -2.5).all()


def test_a_rotation_keeps_the_distance_to_the_centre() -> None:
    before = centre(square())
    turned = torch.stack([
        centre(augmented(square(), Augmentation(rotate_degrees=90), stream(seed)))
        for seed in range(60)
    ])  # fmt: skip
    assert torch.allclose(turned.norm(dim=1), before.norm().expand(60), atol=0.1)
    cosines = (turned @ before) / before.norm() ** 2
    assert cosines.min() > -0.05  # never beyond a quarter turn
    assert cosines.min() < 0.3
    crossed = turned[:, 0] * before[1] - turned[:, 1] * before[0]
    assert crossed.min() < 0 < crossed.max()  # both ways


def test_a_zoom_goes_in_and_out_up_to_its_share() -> None:
    sizes = torch.tensor([
        augmented(square(), Augmentation(zoom=0.25), stream(seed)).sum() / 16 for seed in range(60)
    ])  # fmt: skip
    assert 1 / 1.25**2 - 0.05 < sizes.min() < 0.85
    assert 1.3 < sizes.max() < 1 / 0.75**2 + 0.05


def test_contrast_brightness_and_noise_have_the_stated_size() -> None:
    flat = torch.ones(2000, 1, 8, 8)
    bright = augmented(flat, Augmentation(brightness=0.5), stream())[:, 0, 0, 0]
    assert 0.5 <= bright.min() < 0.52
    assert 1.48 < bright.max() <= 1.5
    gained = augmented(2 * flat, Augmentation(contrast=0.25), stream())[:, 0, 0, 0] / 2
    assert 0.75 <= gained.min() < 0.76
    assert 1.24 < gained.max() <= 1.25
    noise = augmented(flat, Augmentation(noise=0.1), stream()) - flat
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(noise.mean().item()) < 0.002


def test_every_image_of_a_batch_has_its_own_draw() -> None:
    batch = images(1).pixels.repeat(6, 1, 1, 1)
    changed = augmented(batch, Augmentation(**EVERYTHING), stream())
    for one in range(6):
        for other in range(one):
            assert not torch.allclose(changed[one], changed[other], atol=1e-2)


@pytest.mark.parametrize("num", [0, 1, BATCH, BATCH + 3])
def test_scoring_counts_every_image_once_in_whatever_batches(
    num: int, trainer: Callable[..., Trainer]
) -> None:
    one, data = trainer(), images(num, size=8)
    counts = evaluate(one.model, data, network=one.network, task=one.task)
    figures = one.task.figures(counts)
    assert figures["num_examples"] == num == np.sum(figures["confusion"])


def test_scoring_draws_no_dropout_and_keeps_the_model(trainer: Callable[..., Trainer]) -> None:
    one = trainer(model={"name": "cnn", "width": 4, "dropout": 0.9})
    first = evaluate(one.model, images(), network=one.network, task=one.task)
    assert np.array_equal(first, evaluate(one.model, images(), network=one.network, task=one.task))
    assert np.array_equal(one.network.vector(), one.model)
