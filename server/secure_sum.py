"""The coordinator's half of one sum: collect, add on arrival, unmask. It learns the sum alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, LocalProtocolError, RemoteProtocolError, RoundAborted
from common.identity import read_revocation_list
from common.manifest import Manifest, most_colluders
from common.messages import Message, RoundTask
from common.quantize import dequantize
from common.secagg.masking import THREADS, signed
from common.secagg.task import digest_of_task
from common.statement import Statement
from server.collected import Collected
from server.epoch import Epoch
from server.exchange import Exchange
from server.unmasking import unmask

OnUpload = Callable[[str, int, int], None]  # site, uploads so far, members
KeepPending = Callable[[Collected], None]


@dataclass(frozen=True)
class Total:
    """What one sum taught: one update, one weight, one set of counts over all survivors."""

    task: RoundTask
    survivors: tuple[str, ...]  # sorted
    refusals: dict[str, str]  # who is not in it, and why in a word
    values: NDArray[np.int32]  # (num_params,), or (0,) for an evaluation
    weight: int
    clipped: NDArray[np.int64]  # (num_tensors,)
    counts: NDArray[np.int64]  # (num_counts,)
    statements: tuple[Statement, ...]  # of the survivors; empty without privacy
    bytes_up: dict[str, int]
    seconds: dict[str, float]  # by phase
    convicted: dict[str, str] = field(default_factory=dict)  # by signed evidence, and of what
    disputes: tuple[str, ...] = ()

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
    """Nothing was unmasked, nothing learned; nothing is retried with the same updates."""

    task: RoundTask
    survivors: tuple[str, ...]
    refusals: dict[str, str]
    convicted: dict[str, str] = field(default_factory=dict)
    disputes: tuple[str, ...] = ()


def secure_sum(
    exchange: Exchange,
    epoch: Epoch,
    task: RoundTask,
    *,
    min_sites: int,
    is_private: bool,
    pending: Collected | None,
    keep_pending: KeepPending,
    on_upload: OnUpload = lambda *_: None,
) -> Total | Void:
    """Ask every member for its masked answer, add the answers up and remove the masks.

    Args:
      exchange: Reaches the members.
      epoch: The members and their keys.
      task: What to ask for; ciphertexts and signature are filled in for each site.
      min_sites: With fewer survivors the sum is void.
      is_private: Whether uploads bring privacy statements.
      pending: What was collected before a restart; then nobody is asked for an upload again.
      keep_pending: Puts what was collected on disk: from the first request to unmask on, these
        survivors are the only ones.
      on_upload: Told of each upload, for progress.

    Raises:
      RoundAborted: The sum was collected and too few sites are there to unmask it.
    """
    manifest, started = epoch.manifest, time.perf_counter()
    collected, adding_s = pending, 0.0
    if collected is not None and collected.sum_number != task.sum_number:
        collected = None  # left behind by the sum before
    if collected is not None and collected.task != digest_of_task(task):
        raise LocalProtocolError(f"sum {task.sum_number} was collected for another task")
    if collected is None:
        collected, adding_s = _collect(exchange, epoch, task, on_upload, is_private=is_private)
        void = _void(exchange, epoch, task, collected, min_sites=min_sites)
        if void is not None:
            return void
        keep_pending(collected)
    at_deadline = time.perf_counter()
    answers = unmask(exchange, epoch, collected, threads=THREADS)
    numbers = collected.tail.view(np.int64)
    num_tensors = len(manifest.exponents)
    names = manifest.names
    heaviest = manifest.weight_cap * len(collected.survivors)
    if not 0 < numbers[0] <= heaviest or numbers[1:].min(initial=0) < 0:
        # Behind the masks nobody can see who did it, and sites never sum over this model again.
        raise RoundAborted(
            f"sum {task.sum_number}: a weight of {numbers[0]} or a count below zero: a site sent "
            "numbers that none can have; the run ends with the model before, in models/"
        )
    return Total(
        task=task,
        survivors=tuple(sorted(names[site] for site in collected.survivors)),
        refusals=collected.missing,
        values=signed(collected.values, bits=manifest.ring_bits),
        weight=int(numbers[0]),
        clipped=numbers[1 : 1 + num_tensors],
        counts=numbers[1 + num_tensors :],
        statements=collected.statements(),
        bytes_up={names[site]: kept.num_bytes for site, kept in collected.uploads.items()},
        seconds={
            "sites": at_deadline - started - adding_s,
            "sum": adding_s,
            "unmask": time.perf_counter() - at_deadline,
        },
        convicted={names[site]: what for site, what in answers.convicted.items()},
        disputes=tuple(answers.disputes),
    )


def _collect(
    exchange: Exchange,
    epoch: Epoch,
    task: RoundTask,
    on_upload: OnUpload,
    *,
    is_private: bool,
) -> tuple[Collected, float]:
    """Ask for uploads until the deadline; also the seconds spent on adding."""
    names = epoch.manifest.names
    collected = Collected.nothing(task, epoch.manifest)
    spent = 0.0

    def keep(site: int, reply: Message) -> None:
        nonlocal spent
        arrived = time.perf_counter()
        collected.take(site, reply, epoch, is_private=is_private)
        spent += time.perf_counter() - arrived
        on_upload(names[site], len(collected.uploads), len(names))

    identity, revoked = exchange.credentials.identity, exchange.credentials.revoked()
    tasks = {name: epoch.task_for(site, task, identity, revoked) for site, name in enumerate(names)}
    collected.missing = exchange.ask_all(
        names,
        tasks,
        keep,
        exchange.deadlines.upload_s,
        barred=lambda: _barred(exchange, epoch),
    )
    epoch.delivered.update(collected.uploads)
    return collected, spent


def _barred(exchange: Exchange, epoch: Epoch) -> set[str]:
    """Members whose certificate was revoked meanwhile: the door lets none of them in.

    A list that cannot be used names nobody here; the next sum ends with what is wrong with it.
    """
    credentials = exchange.credentials
    try:
        content = credentials.revoked()
        listed = read_revocation_list(content, credentials.trust.ca, exchange.now())
    except (ConfigError, RemoteProtocolError):
        return set()
    return epoch.on_list(listed)


def _void(
    exchange: Exchange, epoch: Epoch, task: RoundTask, collected: Collected, *, min_sites: int
) -> Void | None:
    """Whether the sum must not be unmasked, and why."""
    names = epoch.manifest.names
    survivors = tuple(sorted(names[site] for site in collected.survivors))
    pairs = list(collected.disagreements())
    if pairs:
        # With masks that do not cancel the sum is noise. Who disagrees with more peers than may
        # collude is wrong; of any other two that disagree nobody can say which, and both leave.
        count = Counter(site for pair in pairs for site in pair)
        bound = most_colluders(len(exchange.credentials.trust.members), len(names))
        wrong = {site for site, number in count.items() if number > bound}
        in_doubt = {site for pair in pairs if not wrong & set(pair) for site in pair}
        convicted = {
            names[site]: "committed to other pair keys than its peers"
            if site in wrong
            else "in a dispute about a pair's key that nobody can settle"
            for site in sorted(wrong | in_doubt)
        }
        disputes = tuple(f"{names[one]} and {names[other]}" for one, other in pairs)
        error = RemoteProtocolError(
            f"sum {task.sum_number}: unequal commitments of {'; '.join(disputes)}", rule="R13"
        )
        for site in sorted({site for pair in pairs for site in pair}):
            header, now = collected.uploads[site].header, exchange.now()
            exchange.evidence.keep_header(site, header, error, now=now, by=names[site])
        return Void(task, survivors, collected.missing, convicted, disputes)
    if len(survivors) < max(min_sites, epoch.manifest.threshold):
        return Void(task, survivors, collected.missing)
    return None
