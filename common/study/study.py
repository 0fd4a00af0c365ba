"""The whole study, its digest, and the values that are right alone and wrong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from common.config import Frozen
from common.errors import ConfigError
from common.study.model import Model, model_misfits
from common.study.privacy import DifferentialPrivacy, Privacy
from common.study.statistics import Statistics
from common.study.table import Table
from common.study.task import Task
from common.study.training import Augmentation, FedAvg, Input, Positive, ServerOptimizer, Training

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]

MIN_SITES = 3  # below three, a site could compute the only other site's update from the sum


class Aggregation(Frozen):
    """The secure sum's number format."""

    ring_bits: Literal[16, 24, 32] = 32
    weight_cap: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000  # patients; n_max
    first_round_bound: Positive = 2.0**-6
    """Largest entry of an update, times weight / weight_cap, expected in round 1. Larger ones are
    clipped, and the step grows fourfold a round; much smaller ones are lost with few bits."""


class Cohort(Frozen):
    """Who must take part."""

    min_sites: Annotated[int, Field(ge=MIN_SITES, le=255)] = MIN_SITES


class Deadlines(Frozen):
    """How long the coordinator waits in each phase, in seconds.

    Until then a site that cannot be reached is asked again as soon as it is back; after it, the
    others go on without it.
    """

    keys_s: Positive = 3600.0  # for fresh keys, and then for what sites agree on
    upload_s: Positive = 3600.0  # for training and the masked update
    unmask_s: Positive = 3600.0  # for votes, and then for shares


class Member(Frozen):
    """One site that takes part."""

    name: Name
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Fingerprint of its public key; a simulation makes keys of its own."""


class Keyed(Frozen):
    """The coordinator of a deployed study."""

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Fingerprint of its public key: no other coordinator can run this study."""


class Study(Frozen):
    """A whole study; ``common.config.load(path, Study)`` reads one."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    num_rounds: Annotated[int, Field(ge=0, le=100_000)]
    """0 only counts what the images are like: nothing is trained, and no model is scored."""
    torch_threads: Annotated[int, Field(ge=1, le=256)] = 1
    task: Task
    model: Model
    input: Input = Input(size=())  # as given: no images
    table: Table | None = None
    statistics: Statistics | None = None
    training: Training
    server_optimizer: ServerOptimizer = FedAvg()
    privacy: Privacy
    aggregation: Aggregation = Aggregation()
    cohort: Cohort = Cohort()
    deadlines: Deadlines = Deadlines()
    coordinator: Keyed | None = None
    members: Annotated[tuple[Member, ...], Field(max_length=255)] = ()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Values that are right alone and wrong together."""
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            yield "members", "two members have the same name"
        if names and len(names) < self.cohort.min_sites:
            yield "members", f"{len(names)} given, cohort.min_sites is {self.cohort.min_sites}"
        yield from self._training_conflicts()
        yield from self._statistics_conflicts()
        if isinstance(self.privacy, DifferentialPrivacy):
            yield from self._privacy_conflicts()
        task = self.task.kind
        yield from model_misfits(
            self.model, task=task, size=self.input.size, has_table=self.table is not None
        )
        yield from self.training.loss.misfits(task=task, num_classes=len(self.task.classes))
        if self.input.patches and task != "segmentation":
            yield "input.patches", f"{task} looks at whole images; leave patches out"
        if self.input.patches and self.training.local_steps is None:
            yield "training.local_epochs", "an epoch of patches has no end; give local_steps"
        if self.input.colour != "luminance" and self.input.channels != 1:
            yield "input.colour", "chooses one grey value; set input.channels = 1"

    def _training_conflicts(self) -> Iterator[tuple[str, str]]:
        training, stopping = self.training, self.training.early_stopping
        if stopping and stopping.figure not in self.task.figures:
            choices = ", ".join(self.task.figures)
            yield "training.early_stopping.figure", f"this task has {choices}"
        if stopping and self.server_optimizer.ema:
            text = "returns an average of models, early stopping a single one; leave one out"
            yield "server_optimizer.ema", text
        if training.logit_adjustment and self.task.kind != "classification":
            yield "training.logit_adjustment", "shifts labels of whole images; leave it out"
        if self.task.kind == "detection" and training.augmentation.rotate_degrees:
            text = "a turned box is no box along the edges; leave it out, or use quarter_turns"
            yield "training.augmentation.rotate_degrees", text
        if not self.input.size and training.augmentation != Augmentation():
            yield "training.augmentation", "changes images, and there are none; leave it out"
        if training.keeps_state:
            yield from self._state_conflicts()
        if training.warmup_rounds >= self.num_rounds > 1:
            yield "training.warmup_rounds", f"the study has {self.num_rounds} rounds in all"

    def _statistics_conflicts(self) -> Iterator[tuple[str, str]]:
        """Statistics are exact: noise on them is not planned for, so private studies have none."""
        if self.statistics is None:
            if not self.num_rounds:
                yield "num_rounds", "0 rounds ask for nothing but [statistics], and there are none"
            return
        if isinstance(self.privacy, DifferentialPrivacy):
            text = "exact sums, which the noise of [privacy] does not cover; leave [statistics] out"
            yield "statistics", f"{text}, or ask for them in a study of their own without privacy"
        if self.input.size and self.statistics.intensity is None:
            text = "[low, high] of the files' grey values: [0, 255] of 8 bits, [-1024, 3071] of CT"
            yield "statistics.intensity", text
        if self.input.spacing is not None:
            text = "statistics are of the files as they are; leave it out to see their own spacing"
            yield "input.spacing", text
        if not self.input.size and self.statistics.intensity is not None:
            yield "statistics.intensity", "there are no images; leave it out"

    def _state_conflicts(self) -> Iterator[tuple[str, str]]:
        """What sites that keep something from round to round cannot do besides."""
        training, server = self.training, self.server_optimizer
        which = "control_variates" if training.control_variates else "local_normalisation"
        if training.early_stopping:
            text = f"{which} keeps what belongs to the last round's model alone; leave one out"
            yield "training.early_stopping", text
        if server.ema:
            yield "server_optimizer.ema", f"{which} belongs to one model, not an average; leave out"
        if training.control_variates:
            plain = training.optimizer == "sgd" and not training.momentum
            if not plain or training.weight_decay:
                text = "control variates are means of gradients: use plain sgd, without momentum"
                yield "training.control_variates", text + " and weight_decay"
            if not isinstance(server, FedAvg):
                yield "server_optimizer.name", "control variates go with fedavg"
            if training.proximal:
                yield "training.proximal", "control variates correct drift already; leave one out"

    def _privacy_conflicts(self) -> Iterator[tuple[str, str]]:
        """What would release more about a patient than the noise covers."""
        if self.training.logit_adjustment:
            text = "uses the site's own class shares, which are private; leave it out"
            yield "training.logit_adjustment", text
        if self.training.early_stopping:
            text = "would choose by figures of patients that are not noised; leave it out"
            yield "training.early_stopping", text
        if self.training.loss.has_dice and self.training.loss.dice_over == "batch":
            text = "would make one patient's gradient depend on another's; set it to image"
            yield "training.loss.dice_over", text
        if self.training.control_variates:
            text = "sends the site's mean gradient besides, which the noise does not cover"
            yield "training.control_variates", f"{text}; leave it out"
        if self.training.mixed_precision:
            text = "rounds what the clip norm is measured on; leave it out"
            yield "training.mixed_precision", text

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the members in the study's order; a site's index is its place here."""
        return tuple(member.name for member in self.members)

    def unpinned(self) -> Iterator[tuple[str, str]]:
        """What a deployment needs and a simulation fills in: keys that people compared."""
        if self.coordinator is None:
            yield "coordinator.key", "the fingerprint that fl-certs show prints for the coordinator"
        if not self.members:
            yield "members", "one [[members]] table for each site, with its name and key"
        for member in self.members:
            if member.key is None:
                yield "members.key", f"the fingerprint of {member.name}'s key"

    def check_pinned(self) -> None:
        """Refuse to deploy a study in which anybody could take part.

        Raises:
          ConfigError: With every key that is missing.
        """
        if missing := list(self.unpinned()):
            lines = "".join(f"\n  {key}: {text}" for key, text in missing)
            raise ConfigError(f"study {self.name} cannot be deployed; it lacks:{lines}")

    def with_members(self, names: tuple[str, ...]) -> Study:
        """The same study with these members: a simulation fills them in."""
        return self.model_copy(update={"members": tuple(Member(name=name) for name in names)})

    def as_table(self) -> dict[str, Any]:
        """The study as a plain table, ready for TOML; unset optional keys are left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of every value, defaults included; 64 hex digits."""
        canonical = json.dumps(self.as_table(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
