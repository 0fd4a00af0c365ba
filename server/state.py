"""Where a run stands between two sums: the model, what follows from the sums, what is to come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.manifest import Manifest
from common.messages import Purpose, RoundTask, digest_of_model
from common.models.flat import Schema
from common.quantize import EXPONENT_RANGE, Ring, next_exponents
from common.study import DifferentialPrivacy, Study
from common.tasks import Figures
from server.global_model import (
    OptimizerState,
    apply_mean_update,
    averaged_model,
    initial_optimizer_state,
)
from server.scaffold import Last, blocks_after
from server.secure_sum import Total

HIGHER_IS_BETTER = {
    "loss": False,
    "hd95": False,
    "calibration_error": False,
}  # every other figure is better when larger


@dataclass(frozen=True)
class State:
    """Everything the next sum depends on. Saving and loading it loses no bit.

    Attributes:
      round_number: Rounds finished, and the number of ``model``; 0 is the initial model.
      sum_number: The next sum; counts void ones and evaluations too.
      model: The global model after ``round_number`` rounds, shape (num_params,).
      optimizer: The server optimizer's own arrays.
      exponents: Steps of the next sum.
      num_members: The summands that these steps leave room for.
      validation: Figures of model 0, 1, ... as far as they are known.
    """

    round_number: int
    sum_number: int
    model: NDArray[np.float32]
    optimizer: OptimizerState
    exponents: tuple[int, ...]
    num_members: int
    validation: tuple[Figures, ...] = ()

    @property
    def is_scored(self) -> bool:
        """Whether the current model's validation figures are known."""
        return len(self.validation) > self.round_number

    def step(
        self,
        total: Total,
        figures: Figures,
        study: Study,
        manifest: Manifest,
        schema: Schema,
    ) -> State:
        """One round further: the mean update applied, the incoming model's figures noted."""
        sizes = schema.sizes
        update = total.mean_update(manifest, sizes)
        keeps = study.training.keeps_state
        last = Last(self.round_number + 1, total.survivors, total.weight)
        blocks = blocks_after(self.model, update, schema, last, study) if keeps else None
        model, optimizer = apply_mean_update(
            self.model, update, self.optimizer, study.server_optimizer
        )
        if blocks is not None:
            model[schema.num_own :] = blocks
        exponents = next_exponents(
            total.values,
            total.clipped,
            sizes=sizes,
            exponents=self.exponents,
            num_summands=len(total.survivors),
            ring=manifest.ring,
        )
        return State(
            round_number=self.round_number + 1,
            sum_number=self.sum_number + 1,
            model=model,
            optimizer=optimizer,
            exponents=exponents,
            num_members=manifest.ring.num_members,
            validation=(*self.validation, figures),
        )

    def scored(self, figures: Figures) -> State:
        """The figures of the current model became known by a sum of their own."""
        return replace(self, sum_number=self.sum_number + 1, validation=(*self.validation, figures))

    def for_ring(self, ring: Ring) -> State:
        """The same with steps for another number of members: more of them leave less room each."""
        before = replace(ring, num_members=self.num_members)
        coarser = math.ceil(math.log2(max(1.0, before.max_magnitude / ring.max_magnitude)))
        raised = (min(exponent + coarser, EXPONENT_RANGE[1]) for exponent in self.exponents)
        return replace(self, exponents=tuple(raised), num_members=ring.num_members)

    def skip_sum(self) -> State:
        """A void sum: nothing was learned; the next sum is a new training."""
        return replace(self, sum_number=self.sum_number + 1)


def initial_state(study: Study, manifest: Manifest, model: NDArray[np.float32]) -> State:
    """Before the first round."""
    return State(
        round_number=0,
        sum_number=0,
        model=model,
        optimizer=initial_optimizer_state(study.server_optimizer, model),
        exponents=manifest.exponents,
        num_members=manifest.ring.num_members,
    )


def statistics_task(state: State, run: str) -> RoundTask:
    """Count what the images are like, before the first round."""
    return _task(state, run, Purpose.STATISTICS, 0, state.model)


def training_task(state: State, run: str) -> RoundTask:
    """Score the current model on validation and train the next one."""
    return _task(state, run, Purpose.TRAIN, state.round_number + 1, state.model)


def validation_task(state: State, run: str) -> RoundTask:
    """Score the last model, which no training follows."""
    return _task(state, run, Purpose.VALIDATE, state.round_number, state.model)


def test_task(state: State, run: str, model: NDArray[np.float32], round_number: int) -> RoundTask:
    """Score the returned model on the test split."""
    return _task(state, run, Purpose.TEST, round_number, model)


def finished(state: State, study: Study) -> bool:
    """Whether no further training round is due."""
    if state.round_number >= study.num_rounds or state.is_scored:
        return True
    if isinstance(study.privacy, DifferentialPrivacy) and state.sum_number >= study.num_rounds:
        return True  # a void sum was paid for like any other: the sites have no epsilon left
    stopping = study.training.early_stopping
    if stopping is None or len(state.validation) < 2:  # noqa: PLR2004
        return False
    return len(state.validation) - 1 - best_round(state, study) >= stopping.patience


def best_round(state: State, study: Study) -> int:
    """The round whose model is returned: the best on validation with early stopping, else the last.

    The untrained model 0 is never returned; of equal rounds the first wins.
    """
    stopping = study.training.early_stopping
    if stopping is None:
        return state.round_number
    return best_of(state.validation[1:], stopping.figure) or state.round_number


def best_of(by_round: Sequence[Figures], figure: str) -> int:
    """The round, from 1, with the best value of a figure; of equal rounds the first; 0 of none."""
    values = [known[figure] for known in by_round]
    if not HIGHER_IS_BETTER.get(figure, True):
        values = [None if value is None else -value for value in values]
    ranked = [-np.inf if value is None else value for value in values]
    return 1 + int(np.argmax(ranked)) if ranked else 0


def returned_model(state: State, study: Study, model: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the run returns: the average of its models where the study asks for one."""
    if not study.server_optimizer.ema:
        return model
    return averaged_model(state.optimizer, study.server_optimizer, state.round_number)


def _task(
    state: State,
    run: str,
    purpose: Purpose,
    round_number: int,
    model: NDArray[np.float32],
) -> RoundTask:
    """A task before it is made out to a site: see ``Epoch.task_for``."""
    return RoundTask(
        run=run,
        sum_number=state.sum_number,
        round_number=round_number,
        purpose=purpose,
        exponents=state.exponents,
        model_digest=digest_of_model(model),
        ciphertexts=(),
        ciphertext_signatures=(),
        revoked=b"",
        model=model,
    )
