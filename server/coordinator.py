"""A whole run: all rounds of one study, from the first model to the summary.

Start reading at ``run``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from common.audit import AuditLog
from common.errors import RoundAborted
from common.evidence import Evidence
from common.manifest import plan_epoch
from common.messages import Purpose, RoundTask
from common.models.build import build_network, digest_of_weights
from common.models.flat import Schema
from common.roster import CoordinatorCredentials
from common.statement import Statement
from common.study import DifferentialPrivacy, Study
from common.tasks import Figures, Task, task_of
from common.tasks.statistics import StatisticsTask
from server.cohort import Cohort
from server.epoch import Epoch
from server.exchange import Exchange, utc_now
from server.heads import Heads
from server.network import Network
from server.run_dir import AUDIT, STATISTICS, RunDir
from server.secure_sum import Total, Void, secure_sum
from server.state import (
    State,
    best_round,
    finished,
    initial_state,
    returned_model,
    statistics_task,
    test_task,
    training_task,
    validation_task,
)
from server.transcript import ObservedNetwork

Summary = dict[str, Any]
IN_SUMMARY = (  # of a site's last statement
    "epsilon",
    "delta",
    "unit",
    "noise_multiplier",
    "sampling_probability",
    "steps",
    "accountant",
    "randomness",
)


class Observer(Protocol):
    """Somebody who watches a run."""

    def started(self, study: Study, round_number: int, sites: Sequence[str]) -> None:
        """The sites have agreed; ``round_number`` rounds are already done."""
        ...

    def counted(self, figures: Figures) -> None:
        """The statistics that the study asks for are known."""
        ...

    def uploaded(self, site: str, num_uploads: int, num_sites: int) -> None:
        """A site's answer arrived."""
        ...

    def finished_round(self, line: dict[str, Any]) -> None:
        """A round is on disk."""
        ...

    def voided(self, void: Void) -> None:
        """A sum had too few survivors."""
        ...

    def renewed(self, number: int, sites: Sequence[str]) -> None:
        """The members changed, and those that are there agreed on new keys."""
        ...


class Coordinator:
    """The parts of one run that every step needs."""

    def __init__(
        self,
        study: Study,
        network: Network,
        run_dir: RunDir,
        observer: Observer,
        credentials: CoordinatorCredentials,
        heads: Heads,
    ) -> None:
        self.study = study
        self.run_dir = run_dir
        self.observer = observer
        self.network = ObservedNetwork(network, run_dir.path)
        self.audit = AuditLog(run_dir.path / AUDIT, utc_now)
        evidence = Evidence(run_dir.path)
        self.exchange = Exchange(self.network, credentials, evidence, self.audit, study.deadlines)
        self.task: Task = task_of(study)
        first = build_network(study)
        self.schema: Schema = first.schema
        self.frozen = first.kept()  # weights that never travel; the others change in every round
        plan = partial(
            plan_epoch, study, self.schema, self.task, first_model=digest_of_weights(first)
        )
        self.heads = heads
        self.cohort = Cohort(study, self.exchange, run_dir, plan, heads)

    def keep(self, statements: Sequence[Statement]) -> None:
        """File what sites stated, and remember the heads of their books."""
        self.run_dir.save_statements(statements)
        self.heads.keep(statements, self.exchange.credentials.trust.members)


def run(
    study: Study,
    network: Network,
    run_dir: RunDir,
    observer: Observer,
    credentials: CoordinatorCredentials,
    heads: Heads | None = None,
) -> Summary:
    """Train one global model, score it and write the summary.

    Args:
      study: What the sites approved.
      network: Reaches them.
      run_dir: Where the run is kept; one with finished rounds is continued.
      observer: Told of every round.
      credentials: The coordinator's key, and whom it believes.
      heads: What sites stated about their books in earlier runs; a simulation keeps its own.

    Returns:
      What ``summary.json`` holds.

    Raises:
      RoundAborted: So many sums were void, or so many sites left, that the run cannot end.
    """
    if done := run_dir.summary():
        if not run_dir.is_sealed:
            # The last step of a run, and the only one a crash may have left out.
            run_dir.seal(credentials.identity)
        return done
    heads = heads or Heads(run_dir.path)
    this = Coordinator(study, network, run_dir, observer, credentials, heads)
    this.audit.append("started", study=study.name, digest=study.digest())
    epoch = this.cohort.resume()
    state = run_dir.latest(this.schema)
    if state is None:
        state = initial_state(study, epoch.manifest, build_network(study).vector())
        run_dir.save_model(0, state.model, this.schema)
    state = state.for_ring(epoch.manifest.ring)
    observer.started(study, state.round_number, epoch.manifest.names)
    epoch, state = count_images(this, epoch, state)
    if not study.num_rounds:
        return summarised(this, state, returned=0, final=None, digest="")
    while not finished(state, study):
        started = time.perf_counter()
        total = sum_of(this, epoch, training_task(state, epoch.run.hex()))
        if isinstance(total, Void):
            state = state.skip_sum()  # nothing was learned; the next sum is a new training
            run_dir.save_state(state)
        else:
            figures = this.task.figures(total.counts)
            run_dir.save_counts(f"validation-{state.round_number:04d}", total.counts)
            this.keep(total.statements)
            before, state = (
                state,
                state.step(total, figures, study, epoch.manifest, this.schema),
            )
            line = {
                "round": state.round_number,
                "incoming_validation": figures,  # of the model the round began with
                **sum_line(total, time.perf_counter() - started),
            }
            run_dir.save(state, this.schema, line)
            run_dir.drop_pending()
            observer.finished_round(line)
            check_progress(before, state, study)
            del before
        epoch, state = renew_if_members_changed(this, epoch, state, total)
        del total  # a sum and a model: the next ones come in their place
    if state.round_number == 0:
        raise RoundAborted("every sum was void and nothing was learned; see the sites' logs")
    return conclude(this, epoch, state)


def count_images(this: Coordinator, epoch: Epoch, state: State) -> tuple[Epoch, State]:
    """Statistics of all sites' images, once, where the study asks for them."""
    counted = [line["sum"] for line in this.run_dir.evaluations() if line["counts"] == STATISTICS]
    # A sum that was recorded and not left behind is asked for again: sites stored their answers.
    if this.study.statistics is None or (counted and counted[0] < state.sum_number):
        return epoch, state
    epoch, state, total = evaluated(this, epoch, state, statistics_task)
    figures = StatisticsTask(this.study).figures(total.counts)
    this.run_dir.save_statistics(figures)
    state = state.skip_sum()
    this.run_dir.save_state(state)
    this.run_dir.drop_pending()
    this.observer.counted(figures)
    return renew_if_members_changed(this, epoch, state, total)


def check_progress(before: State, after: State, study: Study) -> None:
    """Stop where a round changed nothing: sites never train twice on one model.

    Raises:
      RoundAborted: With what to change.
    """
    if finished(after, study) or not np.array_equal(before.model, after.model):
        return
    bound = study.aggregation.first_round_bound
    raise RoundAborted(
        f"round {after.round_number} changed no parameter: every weighted entry became zero in the "
        f"ring; a new study needs aggregation.first_round_bound below {bound:g}, an "
        "aggregation.weight_cap nearer to the largest site, or more ring_bits"
    )


def renew_if_members_changed(
    this: Coordinator, epoch: Epoch, state: State, last: Total | Void
) -> tuple[Epoch, State]:
    """New keys between sums where somebody left for good or came late; the study is the same."""
    renewed = this.cohort.renew(epoch, last)
    if renewed is epoch:
        return epoch, state
    this.observer.renewed(renewed.manifest.epoch, renewed.manifest.names)
    return renewed, state.for_ring(renewed.manifest.ring)


def conclude(this: Coordinator, epoch: Epoch, state: State) -> Summary:
    """Score the last model on validation and the returned one on test; write the results."""
    if not state.is_scored:
        epoch, state, total = evaluated(this, epoch, state, validation_task)
        state = state.scored(this.task.figures(total.counts))
        this.run_dir.save_state(state)
        this.run_dir.drop_pending()
    returned = best_round(state, this.study)
    model = returned_model(state, this.study, this.run_dir.model(returned, this.schema))
    make_task = partial(test_task, model=model, round_number=returned)
    epoch, state, total = evaluated(this, epoch, state, make_task)
    final = this.task.figures(total.counts)
    digest = this.run_dir.save_final(model, this.schema, this.frozen)
    return summarised(this, state, returned=returned, final=final, digest=digest)


def summarised(
    this: Coordinator, state: State, *, returned: int, final: Figures | None, digest: str
) -> Summary:
    """Write what the run came to; it is finished then.

    Args:
      this: Of the run.
      state: After the last sum.
      returned: The round whose model is returned.
      final: Its figures on test; None where nothing was trained.
      digest: Of its file; empty where there is none.
    """
    rounds = this.run_dir.rounds()
    seconds = [line["seconds"] for line in rounds]
    sums = [*rounds, *this.run_dir.evaluations()]
    everybody = {name for known in this.run_dir.manifests() for name in known.names}
    sites = [name for name in this.study.site_names if name in everybody]
    summary: Summary = {
        "study": {"name": this.study.name, "digest": this.study.digest()},
        "num_rounds": state.round_number,
        "returned_round": returned,
        "sites": sites,
        "survivors": [line["survivors"] for line in rounds],
        "metrics": {
            "by_round": list(state.validation[1:]),
            "final": final,
        },
        "privacy": {
            statement.site: statement.model_dump(include=set(IN_SUMMARY))
            for statement in this.run_dir.statements()
        },
        "wall_s": {
            "total": sum(line["seconds"]["total"] for line in sums),
            "per_round": [line["total"] for line in seconds],
        },
        "bytes_up_per_site": {
            site: sum(line["bytes_up"].get(site, 0) for line in sums) for site in sites
        },
        "num_params": this.schema.num_own,
        "final_model_sha256": digest,
    }
    this.run_dir.save_summary(summary)
    this.run_dir.drop_pending()
    this.audit.append("finished", study=this.study.name, final_model=digest)
    this.run_dir.seal(this.exchange.credentials.identity)
    return summary


def evaluated(
    this: Coordinator, epoch: Epoch, state: State, make_task: Callable[[State, str], RoundTask]
) -> tuple[Epoch, State, Total]:
    """A sum that no training is part of; a void sum is asked again under the next sum number."""
    started = time.perf_counter()
    while isinstance(total := sum_of(this, epoch, make_task(state, epoch.run.hex())), Void):
        state = state.skip_sum()
        this.run_dir.save_state(state)
        epoch, state = renew_if_members_changed(this, epoch, state, total)
    task = total.task
    this.keep(total.statements)
    name = f"{task.purpose}"
    if task.purpose == Purpose.VALIDATE:
        name = f"validation-{task.round_number:04d}"
    line = sum_line(total, time.perf_counter() - started)
    this.run_dir.save_evaluation(name, total.counts, line)
    return epoch, state, total


def sum_of(this: Coordinator, epoch: Epoch, task: RoundTask) -> Total | Void:
    """One secure sum over the members, watched.

    Raises:
      RoundAborted: The sum was void and no spare one is left.
    """
    needed = this.study.cohort.min_sites
    total = secure_sum(
        this.exchange,
        epoch,
        task,
        min_sites=needed,
        is_private=isinstance(this.study.privacy, DifferentialPrivacy),
        pending=this.run_dir.pending(),
        keep_pending=this.run_dir.save_pending,
        on_upload=this.observer.uploaded,
    )
    if isinstance(total, Void):
        this.observer.voided(total)
        if task.sum_number + 1 >= epoch.manifest.num_sums:
            needed = max(needed, epoch.manifest.threshold)
            seed = ", with another seed: images are counted once" if this.study.statistics else ""
            raise RoundAborted(
                f"sum {task.sum_number}: {len(total.survivors)} sites answered, {needed} are "
                f"needed, and no spare sum is left; bring the sites back and start a new run{seed}"
            )
    return total


def sum_line(total: Total, seconds: float) -> dict[str, Any]:
    """What the run folder says of one sum."""
    return {
        "sum": total.task.sum_number,
        "purpose": total.task.purpose,
        "survivors": list(total.survivors),
        "refusals": total.refusals,
        "convicted": total.convicted,
        "disputes": list(total.disputes),
        "bytes_up": total.bytes_up,
        "clipped": int(total.clipped.sum()),
        "seconds": {**total.seconds, "total": seconds},
    }
