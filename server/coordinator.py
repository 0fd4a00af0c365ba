"""A whole run: all rounds of one study, from the first model to the summary.

Start reading at ``run``.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from common.errors import RemoteProtocolError, RoundAborted
from common.manifest import Manifest, plan_epoch
from common.messages import Invitation, Present, Purpose, Refusal, RoundTask
from common.models.build import build_network, digest_of_weights
from common.models.flat import FlatNetwork, Schema
from common.study import Study
from common.tasks import Figures, Task, task_of
from server.network import Network
from server.run_dir import RunDir
from server.secure_sum import Total, Void, secure_sum
from server.state import (
    State,
    best_round,
    finished,
    initial_state,
    returned_model,
    test_task,
    training_task,
    validation_task,
)

Summary = dict[str, Any]


class Observer(Protocol):
    """Somebody who watches a run."""

    def started(self, study: Study, round_number: int, sites: Sequence[str]) -> None:
        """The sites have agreed; ``round_number`` rounds are already done."""
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


class Coordinator:
    """The parts of one run that every step needs."""

    def __init__(self, study: Study, network: Network, run_dir: RunDir, observer: Observer) -> None:
        self.study = study
        self.network = network
        self.run_dir = run_dir
        self.observer = observer
        self.task: Task = task_of(study)
        self.first: FlatNetwork = build_network(study)
        self.schema: Schema = self.first.schema


def run(study: Study, network: Network, run_dir: RunDir, observer: Observer) -> Summary:
    """Train one global model, score it and write the summary.

    Args:
      study: What the sites approved.
      network: Reaches them.
      run_dir: Where the run is kept; one with finished rounds is continued.
      observer: Told of every round.

    Returns:
      What ``summary.json`` holds.

    Raises:
      RoundAborted: So many sums were void that the run cannot end.
    """
    if done := run_dir.summary():
        if not run_dir.is_sealed:
            run_dir.seal()  # the last step of a run, and the only one a crash may have left out
        return done
    this = Coordinator(study, network, run_dir, observer)
    manifest = agree(this)
    state = run_dir.latest(this.schema)
    if state is None:
        state = initial_state(study, manifest, this.first.vector())
        run_dir.save_model(0, state.model, this.schema)
    observer.started(study, state.round_number, manifest.members)
    while not finished(state, study):
        started = time.perf_counter()
        total = sum_of(this, manifest, training_task(state, manifest))
        if isinstance(total, Void):
            state = state.skip_sum()  # nothing was learned; the next sum is a new training
            run_dir.save_state(state)
            continue
        figures = this.task.figures(total.counts)
        run_dir.save_counts(f"validation-{state.round_number:04d}", total.counts)
        run_dir.save_statements(total.statements)
        state = state.step(total, figures, study, manifest, this.schema.sizes)
        line = {
            "round": state.round_number,
            "incoming_validation": figures,  # of the model the round began with
            **sum_line(total, time.perf_counter() - started),
        }
        run_dir.save(state, this.schema, line)
        observer.finished_round(line)
    if state.round_number == 0:
        raise RoundAborted("every sum was void and nothing was learned; see the sites' logs")
    return conclude(this, manifest, state)


def agree(this: Coordinator) -> Manifest:
    """Have every member check the manifest of this epoch; a resumed run keeps its epoch."""
    manifest = this.run_dir.epoch() or plan_epoch(
        this.study,
        this.schema,
        this.task,
        first_model=digest_of_weights(this.first),
        epoch=1,
        nonce=secrets.token_hex(16),
    )
    present = set()
    refused = {}
    for site, reply in this.network.ask(manifest.members, Invitation(manifest.canonical())):
        if isinstance(reply, Present) and (reply.run, reply.site) != (manifest.digest(), site):
            raise RemoteProtocolError(f"{site} answered for {reply.site} and run {reply.run}")
        if isinstance(reply, Present):
            present.add(site)
        if isinstance(reply, Refusal):
            refused[site] = f" ({reply.reason})"
    if missing := sorted(set(manifest.members) - present):
        named = ", ".join(site + refused.get(site, "") for site in missing)
        raise RoundAborted(f"{named} did not agree to the study; see their logs")
    this.run_dir.save_epoch(manifest)
    return manifest


def conclude(this: Coordinator, manifest: Manifest, state: State) -> Summary:
    """Score the last model on validation and the returned one on test; write the results."""
    if not state.is_scored:
        state, figures = evaluated(this, manifest, state, validation_task(state, manifest))
        state = state.scored(figures)
        this.run_dir.save_state(state)
    returned = best_round(state, this.study)
    model = returned_model(state, this.study, this.run_dir.model(returned, this.schema))
    _, final = evaluated(this, manifest, state, test_task(state, manifest, model, returned))
    digest = this.run_dir.save_final(model, this.schema, this.first.kept())
    rounds = this.run_dir.rounds()
    seconds = [line["seconds"] for line in rounds]
    sums = [*rounds, *this.run_dir.evaluations()]
    summary: Summary = {
        "study": {"name": this.study.name, "digest": this.study.digest()},
        "num_rounds": state.round_number,
        "returned_round": returned,
        "sites": list(manifest.members),
        "survivors": [line["survivors"] for line in rounds],
        "metrics": {
            "by_round": list(state.validation[1:]),
            "final": final,
        },
        "privacy": {
            statement.site: statement.model_dump(exclude={"run", "site"})
            for statement in this.run_dir.statements()
        },
        "wall_s": {
            "total": sum(line["seconds"]["total"] for line in sums),
            "per_round": [line["total"] for line in seconds],
        },
        "bytes_up_per_site": {
            site: sum(line["bytes_up"].get(site, 0) for line in sums) for site in manifest.members
        },
        "num_params": this.schema.num_params,
        "final_model_sha256": digest,
    }
    this.run_dir.save_summary(summary)
    this.run_dir.seal()
    return summary


def evaluated(
    this: Coordinator, manifest: Manifest, state: State, task: RoundTask
) -> tuple[State, Figures]:
    """Figures of an evaluation; a void one is asked again under the next sum number."""
    started = time.perf_counter()
    while isinstance(total := sum_of(this, manifest, task), Void):
        state = state.skip_sum()
        this.run_dir.save_state(state)
        task = replace(task, sum_number=state.sum_number)
    this.run_dir.save_statements(total.statements)
    line = sum_line(total, time.perf_counter() - started)
    if task.purpose == Purpose.TEST:
        this.run_dir.save_evaluation("test", total.counts, line)
    else:
        this.run_dir.save_evaluation(f"validation-{task.round_number:04d}", total.counts, line)
    return state, this.task.figures(total.counts)


def sum_of(this: Coordinator, manifest: Manifest, task: RoundTask) -> Total | Void:
    """One secure sum over the members, watched.

    Raises:
      RoundAborted: The sum was void and no spare one is left.
    """
    needed = this.study.cohort.min_sites
    total = secure_sum(
        this.network, manifest, task, min_sites=needed, on_upload=this.observer.uploaded
    )
    if isinstance(total, Void):
        this.observer.voided(total)
        if task.sum_number + 1 >= manifest.num_sums:
            raise RoundAborted(
                f"sum {task.sum_number}: {len(total.survivors)} sites answered, {needed} are "
                "needed, and no spare sum is left; bring the sites back and start a new run"
            )
    return total


def sum_line(total: Total, seconds: float) -> dict[str, Any]:
    """What the run folder says of one sum."""
    return {
        "sum": total.task.sum_number,
        "purpose": total.task.purpose,
        "survivors": list(total.survivors),
        "refusals": total.refusals,
        "bytes_up": total.bytes_up,
        "clipped": int(total.clipped.sum()),
        "seconds": {**total.seconds, "total": seconds},
    }
