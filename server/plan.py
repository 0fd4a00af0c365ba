"""What a study would do, before anything runs: digest, rounds, sizes and privacy."""

from __future__ import annotations

from collections.abc import Iterator

from common.models.build import build_network
from common.study import Study
from common.tasks import task_of


def plan_lines(study: Study) -> Iterator[str]:
    """The plan of a study in plain lines."""
    training = study.training
    schema = build_network(study).schema
    task = task_of(study)
    tail_bytes = 8 * (1 + len(schema.names) + task.num_counts)
    body_bytes = schema.num_params * study.aggregation.ring_bits // 8
    yield f"study {study.name}"
    yield f"digest {study.digest()}"
    yield f"privacy: {privacy_sentence(study)}"
    yield f"task: {study.task.labels} {study.task.kind} of {', '.join(study.task.classes)}"
    num_params, num_tensors = schema.num_params, len(schema.names)
    yield f"model: {study.model.name}, {num_params} parameters in {num_tensors} tensors"
    length = (
        f"{training.local_steps} steps"
        if training.local_steps
        else f"{training.local_epochs} epoch(s)"
    )
    yield (
        f"rounds: {study.num_rounds}, each {length} of {training.optimizer} in batches of "
        f"{training.batch_size}"
    )
    if training.early_stopping:
        stopping = training.early_stopping
        yield f"early stopping: {stopping.figure} without gain for {stopping.patience} rounds"
    yield f"members: {', '.join(study.site_names) or 'filled in by the simulation'}"
    yield (
        f"each site per round: {body_bytes + tail_bytes:,} bytes up "
        f"({study.aggregation.ring_bits} bits a parameter, {tail_bytes:,} bytes of counts), "
        f"{4 * schema.num_params:,} bytes down"
    )


def privacy_sentence(study: Study) -> str:
    """The first thing anybody must know about a study."""
    del study
    return "no differential privacy: the model and every sum may reveal training images"
