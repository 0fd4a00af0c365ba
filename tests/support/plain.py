"""The plain session that tests compare with: the same study, its updates added in the clear.

It lives under tests/ alone. It trains and rounds with the sites' code and steps the model with the
coordinator's; what it leaves out is all that hides an update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from federation import open_sites
from numpy.typing import NDArray
from safetensors.numpy import save

from client.evaluate import evaluate
from client.round import local_update
from client.site import Site
from common.manifest import KeyedMember, Manifest, Opening, plan_epoch
from common.messages import Message, Purpose, RoundTask, Upload
from common.models.build import build_network, digest_of_weights
from common.quantize import only_counts, quantize
from common.secagg.masking import pack
from common.study import Study
from common.tasks import Figures, task_of
from common.update import QuantizedUpdate
from server.secure_sum import Total
from server.state import (
    State,
    best_round,
    finished,
    initial_state,
    returned_model,
    training_task,
    validation_task,
)

NOBODY: Mapping[int, Collection[str]] = {}


@dataclass
class PlainRun:
    """What came of a run, and everything that its coordinator saw."""

    final_model_sha256: str = ""
    validation: list[Figures] = field(default_factory=list)
    updates: dict[tuple[int, str], QuantizedUpdate] = field(default_factory=dict)  # sum, site
    seen: list[tuple[str, Message]] = field(default_factory=list)


def run_plainly(
    study: Study,
    folder: Path,
    *,
    dropouts: Mapping[int, Collection[str]] = NOBODY,
    leavers: Mapping[int, Collection[str]] = NOBODY,
) -> PlainRun:
    """Train one model in the clear over the tiny sites in ``folder``.

    Args:
      study: What to train.
      folder: Where the sites are opened.
      dropouts: By sum: sites whose upload is not in it.
      leavers: By sum: sites that are no longer members from it on.
    """
    run, sites, network = PlainRun(), open_sites(study, folder), build_network(study)
    task, schema = task_of(study), network.schema
    names = list(sites)
    manifest = _manifest(study, names)
    state = initial_state(study, manifest, network.vector())
    models = [state.model]

    def total_of(asked: RoundTask) -> Total | None:
        answering = [name for name in names if name not in dropouts.get(asked.sum_number, ())]
        updates = {name: _update(asked, sites[name], manifest) for name in answering}
        for name, update in updates.items():
            run.updates[asked.sum_number, name] = update
            run.seen.append((name, plain_upload(update, asked.sum_number, manifest.ring_bits)))
        if len(answering) < max(study.cohort.min_sites, manifest.threshold):
            return None
        return _total(asked, updates, len(manifest.exponents))

    def as_members_are(state: State) -> State:
        nonlocal names, manifest
        staying = [name for name in names if name not in leavers.get(state.sum_number, ())]
        if staying == names:
            return state
        names, manifest = staying, _manifest(study, staying)
        return state.for_ring(manifest.ring)

    while not finished(state, study):
        total = total_of(training_task(state, run=""))
        if total is None:
            state = as_members_are(state.skip_sum())
            continue
        state = state.step(total, task.figures(total.counts), study, manifest, schema)
        state = as_members_are(state)
        models.append(state.model)
    while not state.is_scored:
        total = total_of(validation_task(state, run=""))
        state = state.scored(task.figures(total.counts)) if total else state.skip_sum()
    run.validation = list(state.validation)
    model = returned_model(state, study, models[best_round(state, study)])
    content = save({**schema.split(model), **network.kept()})
    run.final_model_sha256 = hashlib.sha256(content).hexdigest()
    return run


def plain_upload(update: QuantizedUpdate, sum_number: int, bits: int) -> Upload:
    """An upload in the same layout as a masked one, with nothing hidden."""
    body = plain_body(update, bits)
    return Upload("", sum_number, header=b"", sealed=(), share_commitments=(), body=body)


def plain_body(update: QuantizedUpdate, bits: int) -> NDArray[np.uint8]:
    packed = np.empty(update.values.size * bits // 8, np.uint8)
    pack(update.values.view(np.uint32), out=packed)
    return np.concatenate([packed, update.tail.astype("<i8").view(np.uint8)])


def _manifest(study: Study, names: Collection[str]) -> Manifest:
    network = build_network(study)
    opening = Opening(
        run="0" * 32,
        epoch=1,
        members=tuple(KeyedMember(name=name, key="0" * 64) for name in names),
        coordinator="0" * 64,
        valid_from=0,
        valid_until=0,
        nonce="0" * 32,
    )
    first = digest_of_weights(network)
    return plan_epoch(study, network.schema, task_of(study), opening, first_model=first)


def _update(task: RoundTask, site: Site, manifest: Manifest) -> QuantizedUpdate:
    counts = evaluate(task.model, site.data.validation, network=site.network, task=site.task)
    if task.purpose != Purpose.TRAIN:
        return only_counts(counts, site.weight, len(task.exponents))
    return quantize(
        local_update(task, site, {}),
        counts,
        sizes=site.network.schema.sizes,
        exponents=task.exponents,
        weight=site.weight,
        weight_cap=manifest.weight_cap,
        ring=manifest.ring,
    )


def _total(task: RoundTask, updates: Mapping[str, QuantizedUpdate], num_tensors: int) -> Total:
    values = np.sum([update.values for update in updates.values()], axis=0, dtype=np.int64)
    tail = np.sum([update.tail for update in updates.values()], axis=0, dtype=np.int64)
    assert np.abs(values).max(initial=0) < 2**31
    return Total(
        task=task,
        survivors=tuple(sorted(updates)),
        refusals={},
        values=values.astype(np.int32),
        weight=int(tail[0]),
        clipped=tail[1 : 1 + num_tensors],
        counts=tail[1 + num_tensors :],
        statements=(),
        bytes_up={},
        seconds={},
    )
