"""What does an update show? An image is looked for whose gradient points where the update does.

From the plain update of one image the image comes back. From an update with noise, and from what
really leaves a site, nothing may come back that is closer to the patient's image than to another
of the same class.

Source: Geiping et al. (2020), Inverting Gradients - How easy is it to break privacy in federated
learning?
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.metrics.regression import SSIMMetric
from numpy.typing import NDArray
from torch import Tensor

from client.images import Images
from client.noise import Keystream
from client.train import train, train_privately
from common.errors import ConfigError
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.plan import plan_privacy
from common.quantize import Ring, dequantize, first_exponents, quantize
from common.secagg.masking import Mask, mask, signed, split_body, unpack
from common.study import Augmentation, Study, Training
from common.tasks import Task, task_of

STEPS, RATE, SMOOTHNESS = 2500, 0.1, 1e-4  # of the search
BRIGHTEST = 3.0  # a prepared image's values lie within this; wider ranges hold nothing
# One step by the gradient of one image: the update that shows most.
ONE_STEP = {
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "proximal": 0.0,
    "batch_size": 1,
    "local_steps": 1,
    "local_epochs": None,
    "augmentation": Augmentation(),
}
LEAVING = ("plain", "noised", "masked")


@dataclass(frozen=True)
class Recovered:
    """What the attack made of one update of one image.

    Attributes:
      kind: ``plain`` (no protection), ``noised`` (the study's clipping and noise), ``masked`` (what
        leaves a site that trained without noise).
      image: What was found, (channels, *size).
      to_own: Likeness (SSIM) to the image that was trained on; 1 is the same.
      to_others: The same to each of the other images.
    """

    kind: str
    image: NDArray[np.float32]
    to_own: float
    to_others: tuple[float, ...]


def attack_update(
    study: Study,
    images: Images,
    row: int,
    *,
    kind: str,
    declared: int,
    seed: int,
    steps: int = STEPS,
) -> Recovered:
    """Train one step on one image, take what leaves, and look for the image.

    Args:
      study: With ``[privacy]``; its task must be classification of whole images.
      images: One is trained on; the others are what the result is compared with.
      row: Which one.
      kind: See ``Recovered``.
      declared: Patients of the site, from which the study's noise follows.
      seed: Where the search begins, and of seeded noise.
      steps: Of the search.

    Raises:
      ConfigError: The task is another one: the attack does not know where its labels come from.
    """
    if study.task.kind != "classification":
        raise ConfigError(f"task {study.task.kind}: inversion is for classification of images")
    network, task = build_network(study), task_of(study)
    own = Images(images.pixels[row : row + 1], images.targets[row : row + 1], ("one",))
    update = (
        _noised(study, own, declared, network, task, seed)
        if kind == "noised"
        else _leaving(study, own, network, task, kind, seed)
    )
    # The label is given to the attacker: for one image it follows from the last layer's sign.
    found = invert(-update, own.targets, network, task, own.pixels.shape, seed=seed, steps=steps)
    others = [k for k in range(len(images)) if k != row]
    return Recovered(
        kind=kind,
        image=found[0].numpy(),
        to_own=likeness(found, own.pixels),
        to_others=tuple(likeness(found, images.pixels[k : k + 1]) for k in others),
    )


def invert(
    gradient: NDArray[np.float32],
    target: Tensor,
    network: FlatNetwork,
    task: Task,
    shape: torch.Size,
    *,
    seed: int,
    steps: int,
) -> Tensor:
    """The image, of this shape, whose gradient points most in this direction."""
    parameters = [p for p in network.module.parameters() if p.requires_grad]
    loss = task.local_loss(None)
    wanted = torch.from_numpy(gradient)
    wanted = wanted / wanted.norm()
    generator = torch.Generator().manual_seed(seed)
    found = (0.1 * torch.randn(shape, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([found], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.module.eval()
    for _ in range(steps):
        optimizer.zero_grad()
        made = torch.autograd.grad(
            loss(network.module(found), target), parameters, create_graph=True
        )
        own = torch.cat([part.flatten() for part in made])
        distance = 1 - (own @ wanted) / own.norm().clamp_min(1e-12)
        (distance + SMOOTHNESS * _roughness(found)).backward()
        assert found.grad is not None  # noqa: S101 - backward has just made it
        found.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            found.clamp_(-BRIGHTEST, BRIGHTEST)
    return found.detach()


def likeness(one: Tensor, other: Tensor) -> float:
    """Structural similarity of two images, each (1, channels, *size); 1 is the same.

    Source:
      Wang et al. (2004), Image Quality Assessment: From Error Visibility to Structural Similarity.
    """
    low, high = other.min(), other.max()
    scaled = [((each - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) for each in (one, other)]
    metric = SSIMMetric(spatial_dims=one.ndim - 2, data_range=1.0, win_size=7, kernel_sigma=1.5)
    return float(metric(*scaled))


def _leaving(
    study: Study, own: Images, network: FlatNetwork, task: Task, kind: str, seed: int
) -> NDArray[np.float32]:
    """An update as the attacker holds it; what it cannot read it takes for what it should be."""
    training = Training(**{**dict(study.training), **ONE_STEP})
    model = network.vector()
    rng = torch.Generator().manual_seed(seed)
    update = train(model, own, training, network=network, task=task, rate=1.0, rng=rng)
    network.load(model)
    if kind == "plain":
        return update.values
    sizes = network.schema.sizes
    ring = Ring(study.aggregation.ring_bits, 3)
    exponents = first_exponents(len(sizes), float(np.abs(update.values).max()), ring)
    quantized = quantize(
        update,
        np.zeros(1, np.int64),
        sizes=sizes,
        exponents=exponents,
        weight=1,
        weight_cap=1,
        ring=ring,
    )
    masks = [Mask(secrets.token_bytes(32), is_added=k % 2 == 0) for k in range(3)]
    sent = mask(quantized, masks, bits=ring.bits)
    packed, _ = split_body(sent.body, network.schema.num_params, bits=ring.bits)
    seen = signed(unpack(packed, bits=ring.bits).copy(), bits=ring.bits)
    return dequantize(seen, sizes=sizes, exponents=exponents, weight=1, weight_cap=1)


def _noised(
    study: Study, own: Images, declared: int, network: FlatNetwork, task: Task, seed: int
) -> NDArray[np.float32]:
    """The study's clipping and noise; the attacker even knows that this image alone was drawn."""
    plan = plan_privacy(study, declared)
    if plan is None:
        raise ConfigError(f"study {study.name}: [privacy] is needed to see what noise hides")
    alone = replace(plan, event=replace(plan.event, sampling_probability=1.0, steps=1))
    model = network.vector()
    training = Training(**{**dict(study.training), **ONE_STEP})
    is_seeded = plan.terms.randomness == "seeded"
    source = Keystream.from_seed("inversion", seed) if is_seeded else Keystream.from_os()
    update = train_privately(
        model, own, training, alone, network=network, task=task, rate=1.0, secrets=source
    )
    network.load(model)
    return update.values


def _roughness(image: Tensor) -> Tensor:
    """Mean difference of neighbours, added up over the dimensions."""
    steps = [image.diff(dim=dim).abs().mean() for dim in range(2, image.ndim)]
    return torch.stack(steps).sum()
