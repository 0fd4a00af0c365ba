"""The coordinator's half of one sum: collect, add on arrival, unmask."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.manifest import Manifest
from common.messages import Message, Purpose, Refusal, RoundTask, Upload
from common.quantize import dequantize
from common.secagg.masking import add, unmask, unpack
from common.statement import Statement
from server.network import Network

OnUpload = Callable[[str, int, int], None]  # site, uploads so far, members


@dataclass(frozen=True)
class Total:
    """What one sum taught: one update, one weight, one set of counts over all survivors."""

    task: RoundTask
    survivors: tuple[str, ...]  # sorted
    refusals: dict[str, str]  # site to one word
    values: NDArray[np.int32]  # (num_params,), or (0,) for an evaluation
    weight: int
    clipped: NDArray[np.int64]  # (num_tensors,)
    counts: NDArray[np.int64]  # (num_counts,)
    statements: tuple[Statement, ...]  # of the survivors; empty without privacy
    bytes_up: dict[str, int]
    seconds: dict[str, float]  # by phase

    def mean_update(self, manifest: Manifest, sizes: tuple[int, ...]) -> NDArray[np.float32]:
        """The weighted mean of the survivors' updates, shape (num_params,)."""
        return dequantize(
            self.values,
            sizes=sizes,
            exponents=self.task.exponents,
            weight=self.weight,
            weight_cap=manifest.weight_cap,
        )


@dataclass(frozen=True)
class Void:
    """Too few sites answered: nothing was learned, and nothing is retried with the same updates."""

    task: RoundTask
    survivors: tuple[str, ...]
    refusals: dict[str, str]


def secure_sum(
    network: Network,
    manifest: Manifest,
    task: RoundTask,
    *,
    min_sites: int,
    on_upload: OnUpload = lambda *_: None,
) -> Total | Void:
    """Ask every member for its masked answer and add the answers up.

    Each body is added on arrival and dropped, so memory does not grow with the number of sites.

    Args:
      network: Reaches the members.
      manifest: The epoch's numbers.
      task: What to ask for.
      min_sites: With fewer survivors the sum is void.
      on_upload: Told of each upload, for progress.
    """
    num_params = manifest.num_params if task.purpose == Purpose.TRAIN else 0
    values = np.zeros(num_params, np.uint32)
    tail = np.zeros(manifest.num_tail, np.uint64)
    bytes_up: dict[str, int] = {}
    refusals: dict[str, str] = {}
    statements: list[Statement] = []
    adding_s = 0.0
    started = time.perf_counter()
    for site, reply in network.ask(manifest.members, task):
        arrived = time.perf_counter()
        if isinstance(reply, Refusal):
            refusals[site] = reply.reason
            continue
        upload = _check_upload(site, reply, task, manifest, seen=bytes_up)
        add(values, unpack(upload.body, bits=manifest.ring_bits))
        np.add(tail, upload.tail, out=tail)
        bytes_up[site] = upload.body.nbytes + upload.tail.nbytes + len(upload.statement)
        statements += _check_statement(site, upload)
        on_upload(site, len(bytes_up), len(manifest.members))
        adding_s += time.perf_counter() - arrived
    survivors = tuple(sorted(bytes_up))
    if len(survivors) < min_sites:
        return Void(task, survivors, refusals)
    collected = time.perf_counter()
    signed = tail.view(np.int64)
    num_tensors = len(manifest.exponents)
    return Total(
        task=task,
        survivors=survivors,
        refusals=refusals,
        values=unmask(values, bits=manifest.ring_bits),
        weight=int(signed[0]),
        clipped=signed[1 : 1 + num_tensors],
        counts=signed[1 + num_tensors :],
        statements=tuple(statements),
        bytes_up=bytes_up,
        seconds={
            "sites": collected - started - adding_s,
            "sum": adding_s + time.perf_counter() - collected,
        },
    )


def _check_upload(
    site: str, reply: Message, task: RoundTask, manifest: Manifest, *, seen: dict[str, int]
) -> Upload:
    """Refuse what is not exactly one answer of this site to this task."""
    if not isinstance(reply, Upload):
        raise RemoteProtocolError(f"{site} answered a task with {type(reply).__name__}")
    if (reply.run, reply.sum_number) != (task.run, task.sum_number) or site in seen:
        raise RemoteProtocolError(f"{site} sent an upload that was not asked for")
    num_params = manifest.num_params if task.purpose == Purpose.TRAIN else 0
    num_bytes = num_params * manifest.ring_bits // 8
    if reply.body.shape != (num_bytes,) or reply.tail.shape != (manifest.num_tail,):
        raise RemoteProtocolError(
            f"{site} sent {reply.body.nbytes} bytes and a tail of {reply.tail.size}, expected "
            f"{num_bytes} and {manifest.num_tail}"
        )
    return reply


def _check_statement(site: str, upload: Upload) -> list[Statement]:
    if not upload.statement:
        return []
    statement = Statement.parse(upload.statement)
    if (statement.site, statement.run) != (site, upload.run):
        raise RemoteProtocolError(f"{site} sent the privacy statement of {statement.site}")
    return [statement]
