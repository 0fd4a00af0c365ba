"""What the secure sum costs: masking, summing and unmasking, memory, bytes on the wire.

The limit of masking is raw AES-256-CTR over as many bytes, in chunks of the same size; that of the
coordinator is the same and one numpy addition per body, which is added when it arrives. Beside it
stands AES-256-GCM, whose key stream is a counter's too and on some processors comes faster. The
peer calls the functions that Flower ships for SecAgg+ as its client and its server call them, on
one array and with every other site as a neighbour, as here. Nobody's quantisation is measured.

BENCH_SCALE=0.01 takes a hundredth of the parameters, to try this file out.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray

from common.identity import Identity
from common.manifest import default_threshold
from common.messages import Upload
from common.secagg.header import SECRET_BYTES, slot_of
from common.secagg.keys import share_key
from common.secagg.masking import CHUNK, Mask, add_masks, add_packed, mask, signed
from common.secagg.protect import Place, Protected, protect, share_context
from common.secagg.sharing import recover, unseal
from common.update import QuantizedUpdate
from common.wire import pack
from server.collected import Collected

SCALE = float(os.environ.get("BENCH_SCALE", "1"))
SMALL, LARGE = int(11_181_642 * SCALE), int(45_000_000 * SCALE)  # as ResNet-18, as ResNet-101
NUM_SITES = (8, 16, 32)
THREADS = (1, 2)
NUM_TAIL = 80  # 64-bit numbers, as a ResNet-18 has tensors and a task counts
REPEATS, FEW_REPEATS = 5, 2
PATIENCE = 500_000_000 * SCALE  # numbers that Flower draws; with more it gets fewer repeats
MODULUS = 1 << 32  # Flower's default
MIB, KB = 1 << 20, 1000
RUN, TASK = bytes(32), bytes(32)

FLOWER, CTR_LIMIT, GCM_LIMIT = "Flower SecAgg+", "raw AES-256-CTR", "raw AES-256-GCM"

Row = dict[str, Any]
Cases = dict[str, Callable[[], object]]


def rows() -> list[Row]:
    """Sites, coordinator, memory, wire."""
    sizes = [(num_params, num_sites) for num_params in (SMALL, LARGE) for num_sites in NUM_SITES]
    masking = [row for size in sizes for row in site_rows(*size, bits=32)]
    least = [least_part_row(masking, threads) for threads in THREADS]
    masking += [row for bits in (24, 16) for row in site_rows(SMALL, 8, bits=bits)]
    summing = [
        row
        for size in sizes
        for num_dropped in (0, size[1] // 4)
        for row in coordinator_rows(*size, num_dropped)
    ]
    return [
        *least,
        *masking,
        *summing,
        *site_memory_rows(),
        *coordinator_memory_rows(),
        *wire_rows(),
    ]


# Time


def site_rows(num_params: int, num_sites: int, *, bits: int) -> list[Row]:
    """Seconds in which a site masks an update, and in which it makes its whole upload."""
    update, keys = some_update(num_params), some_keys(num_sites)
    flower_seeds = [os.urandom(32), *flower_pair_seeds(num_sites - 1)]
    masks = [Mask(key, is_added=site % 2 == 0) for site, key in enumerate(keys)]
    body = np.ones(num_params * bits // 8, np.uint8)
    cases: Cases = {
        FLOWER: partial(flower_mask, update.values, flower_seeds),
        "SHA-256": lambda: hashlib.sha256(body.data).digest(),
    }
    for threads in THREADS:
        cases |= raw_cases(keys, 4 * num_params, threads)
        cases[f"mask {threads}"] = partial(mask, update, masks, bits=bits, threads=threads)
        site = Site(0, num_sites)
        cases[f"whole {threads}"] = partial(upload_of, site, update, bits=bits, threads=threads)
    times = take_turns(cases, few={FLOWER} if num_sites * num_params > PATIENCE else ())
    settings = {"num_params": num_params, "num_sites": num_sites, "bits": bits}
    where = case_of(num_params, num_sites) + (f", {bits} bits" if bits < 32 else "")  # noqa: PLR2004
    made = []
    for threads in THREADS:
        limits = {name: [f"{name} {threads}"] for name in (CTR_LIMIT, GCM_LIMIT)}
        with_digest = {f"{name} and SHA-256": [*parts, "SHA-256"] for name, parts in limits.items()}
        for kind, what, limit in (
            ("mask", "site masks", limits),
            ("whole", "site makes its upload", with_digest),
        ):
            case = f"{what}, {where}, {plural(threads)}"
            own = {**settings, "kind": kind, "threads": threads, "flower": "masks alone, 1 thread"}
            made.append(timed_row(case, times, f"{kind} {threads}", limit, own))
    return made


def coordinator_rows(num_params: int, num_sites: int, num_dropped: int) -> list[Row]:
    """Seconds in which the coordinator adds up the survivors' bodies and removes the masks."""
    survivors = num_sites - num_dropped
    keys = some_keys(survivors * (1 + num_dropped))
    masks = [Mask(key, is_added=number % 2 == 0) for number, key in enumerate(keys)]
    # Flower also removes the masks between two dropouts, once from either side.
    seeds = some_keys(survivors) + flower_pair_seeds(num_dropped * (num_sites - 1))
    body = np.frombuffer(np.random.default_rng(0).bytes(4 * num_params), np.uint8)
    flower_body = body.view("<u4").astype(np.int64)
    cases: Cases = {
        FLOWER: partial(flower_sum, flower_body, survivors, seeds),
        "additions": partial(add_up, body, survivors),
        "SHA-256": lambda: hashlib.sha256(body.data).digest(),
    }
    for threads in THREADS:
        cases |= raw_cases(keys, 4 * num_params, threads)
        cases[f"ours {threads}"] = partial(add_up_and_unmask, body, survivors, masks, threads)
    times = take_turns(cases, few={FLOWER} if len(seeds) * num_params > PATIENCE else ())
    settings = {
        "num_params": num_params,
        "num_sites": num_sites,
        "num_dropped": num_dropped,
        "bits": 32,
        "masks": len(masks),
        "bodies": "one stands for all",
        "additions_s": times.median(["additions"]),
        "digests_s": survivors * times.median(["SHA-256"]),  # not in ours: Flower checks nothing
        "flower": f"{len(seeds)} masks, 1 thread",
    }
    made = []
    for threads in THREADS:
        limits = {
            f"{name} and additions": [f"{name} {threads}", "additions"]
            for name in (CTR_LIMIT, GCM_LIMIT)
        }
        case = f"coordinator, {case_of(num_params, num_sites)}, {num_dropped} dropped"
        own = {**settings, "threads": threads}
        made.append(timed_row(f"{case}, {plural(threads)}", times, f"ours {threads}", limits, own))
    return made


def least_part_row(masking: Sequence[Row], threads: int) -> Row:
    """The least of all parts of the raw AES rate at which a site masks."""
    kind = {"kind": "mask", "threads": threads}
    least = min(
        (row for row in masking if kind.items() <= row["settings"].items()),
        key=lambda row: row["settings"]["part_of_limit"],
    )
    settings = least["settings"]
    return {
        "case": f"site masks, least part of the raw AES-256-CTR rate, {plural(threads)}",
        "unit": "of 1",
        "ours": settings["part_of_limit"],
        "peers": {FLOWER: least["limit"][CTR_LIMIT] / least["peers"][FLOWER]},
        "limit": {CTR_LIMIT: 1.0},
        "better": "higher",
        "settings": {**settings, "of": least["case"]},
    }


@dataclass(frozen=True)
class Times:
    """Seconds of every case, one for each turn."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, cases: Collection[str]) -> float:
        """Of one case, or of several one after the other."""
        return sum(statistics.median(self.seconds[case]) for case in cases)

    def best(self, cases: Collection[str]) -> float:
        """The same of the fastest turns."""
        return sum(min(self.seconds[case]) for case in cases)


def take_turns(cases: Cases, *, few: Collection[str]) -> Times:
    """Time the cases in turn; those that are named take part in the first turns only."""
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(REPEATS):
        for case, call in cases.items():
            if case in few and turn >= FEW_REPEATS:
                continue
            started = time.perf_counter()
            result = call()
            seconds[case].append(time.perf_counter() - started)
            del result  # what it takes to give memory back is nobody's time
    return Times(seconds)


def timed_row(
    case: str, times: Times, ours: str, limits: Mapping[str, Collection[str]], settings: Row
) -> Row:
    """Medians; the best turns stand in the settings."""
    parts = next(iter(limits.values()))
    return plain_row(
        case,
        "s",
        times.median([ours]),
        {FLOWER: times.median([FLOWER])},
        {name: times.median(cases) for name, cases in limits.items()},
        {
            **settings,
            "chunk_bytes": CHUNK,
            "repeats": REPEATS,
            "flower_repeats": len(times.seconds[FLOWER]),
            "part_of_limit": times.median(parts) / times.median([ours]),
            "part_of_limit_best": times.best(parts) / times.best([ours]),
            "ours_best": times.best([ours]),
            "flower_best": times.best([FLOWER]),
        },
    )


def plain_row(
    case: str,
    unit: str,
    ours: float,
    peers: Mapping[str, float],
    limit: Mapping[str, float] | None,
    settings: Row,
) -> Row:
    """A row of what should be small; also one line for whoever waits."""
    print(f"{case}: {ours:.3f} {unit}", file=sys.stderr, flush=True)
    return {
        "case": case,
        "unit": unit,
        "ours": ours,
        "peers": peers,
        "limit": limit,
        "better": "lower",
        "settings": settings,
    }


def case_of(num_params: int, num_sites: int) -> str:
    """For example ``11.2M, N = 8``."""
    return f"{num_params / 1e6:.1f}M, N = {num_sites}"


def plural(threads: int) -> str:
    """For example ``2 threads``."""
    return "1 thread" if threads == 1 else f"{threads} threads"


# The limit


def raw_cases(keys: Sequence[bytes], num_bytes: int, threads: int) -> Cases:
    """Raw AES over a stream of every key."""
    return {
        f"{CTR_LIMIT} {threads}": partial(raw_aes, keys, num_bytes, threads, CTR(bytes(16))),
        f"{GCM_LIMIT} {threads}": partial(raw_aes, keys, num_bytes, threads, GCM(bytes(12))),
    }


def raw_aes(keys: Sequence[bytes], num_bytes: int, threads: int, mode: CTR | GCM) -> None:
    """Encrypt zeros and forget them."""
    whole, rest = divmod(-(-num_bytes // threads), CHUNK)

    def run() -> None:
        zeros, out = bytes(CHUNK), memoryview(bytearray(CHUNK))
        for key in keys:
            fill = Cipher(AES256(key), mode).encryptor().update_into
            for _ in range(whole):
                fill(zeros, out)
            fill(zeros[:rest], out[:rest])

    if threads == 1:
        run()
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(run) for _ in range(threads)]:
            future.result()


def add_up(body: NDArray[np.uint8], survivors: int) -> NDArray[np.uint32]:
    """One addition per body, and nothing else."""
    numbers = body.view("<u4")
    total = np.zeros(numbers.size, np.uint32)
    for _ in range(survivors):
        np.add(total, numbers, out=total)
    return total


# Ours


def add_up_and_unmask(
    body: NDArray[np.uint8], survivors: int, masks: Sequence[Mask], threads: int
) -> NDArray[np.int32]:
    """What the coordinator does with the bodies; one stands for all of them."""
    total = np.zeros(body.size // 4, np.uint32)
    for _ in range(survivors):
        add_packed(total, body, bits=32)
    add_masks(total, masks, threads=threads)
    return signed(total, bits=32)


@dataclass(frozen=True)
class Site:
    """One of ``num_sites``; its chain keys are made up, and its peers make up the same ones."""

    index: int
    num_sites: int

    @property
    def place(self) -> Place:
        """In the only sum."""
        return Place(RUN, 0, TASK, self.index, default_threshold(self.num_sites))

    def chain(self, other: int) -> bytes:
        """The chain key with another site; none with itself."""
        pair = bytes(sorted((self.index, other)))
        return b"" if other == self.index else hashlib.sha256(pair).digest()

    def open_share(self, sealed: bytes, sender: int) -> bytes:
        """The share that another site sealed for this one."""
        key = share_key(self.chain(sender), 0, TASK, sender, self.index)
        return unseal(key, sealed, share_context(RUN, 0, TASK, sender, self.index))


IDENTITY = Identity("site", ec.generate_private_key(ec.SECP256R1()), b"")


def upload_of(site: Site, update: QuantizedUpdate, *, bits: int, threads: int) -> Protected:
    """A site's whole calculation."""
    chains = [site.chain(other) for other in range(site.num_sites)]
    return protect(update, site.place, chains, IDENTITY, statement="", bits=bits, threads=threads)


def some_update(num_params: int) -> QuantizedUpdate:
    """Small numbers."""
    rng = np.random.default_rng(0)
    values = rng.integers(-400, 400, num_params, dtype=np.int32)
    return QuantizedUpdate(values, np.arange(NUM_TAIL, dtype=np.int64))


def some_keys(number: int) -> list[bytes]:
    """Fresh ones."""
    return [os.urandom(SECRET_BYTES) for _ in range(number)]


# Flower


def flower_pair_seeds(number: int) -> list[bytes]:
    """Seeds of pairwise masks as Flower derives them."""
    own = ec.generate_private_key(ec.SECP384R1())
    other = ec.generate_private_key(ec.SECP384R1())
    return [generate_shared_key(own, other.public_key())] * number


def flower_mask(values: NDArray[np.int32], seeds: Sequence[bytes]) -> list[NDArray[np.int64]]:
    """As ``_collect_masked_vectors`` of its client does between quantising and sending."""
    masked = [values]
    shapes = [values.shape]
    own, *pairs = seeds
    masked = parameters_addition(masked, pseudo_rand_gen(own, MODULUS, shapes))
    for number, seed in enumerate(pairs):
        change = parameters_addition if number % 2 else parameters_subtraction
        masked = change(masked, pseudo_rand_gen(seed, MODULUS, shapes))
    return parameters_mod(masked, MODULUS)


def flower_sum(
    body: NDArray[np.int64], survivors: int, seeds: Sequence[bytes]
) -> list[NDArray[np.int64]]:
    """As its server does: first all the bodies, then one mask after the other."""
    total = [body]
    for _ in range(survivors - 1):
        total = parameters_addition(total, [body])
    total = parameters_mod(total, MODULUS)
    for number, seed in enumerate(seeds):
        change = parameters_addition if number % 2 else parameters_subtraction
        total = change(total, pseudo_rand_gen(seed, MODULUS, [body.shape]))
    return parameters_mod(total, MODULUS)


# Memory


def site_memory_rows() -> list[Row]:
    """What a site needs beyond the update it has and the upload it makes."""
    flower = in_fresh_process(flower_extra_mib, 4)  # more masks take longer, not more memory
    made = []
    for num_sites in (min(NUM_SITES), max(NUM_SITES)):
        for what, is_whole in (("site masks", False), ("site makes its upload", True)):
            ours = in_fresh_process(site_extra_mib, num_sites, is_whole)
            case = f"{what}, {case_of(SMALL, num_sites)}, memory beyond input and output"
            made.append(memory_row(case, num_sites, ours, flower, {"promised": 1.0}))
    return made


def coordinator_memory_rows() -> list[Row]:
    """What a sum needs on the coordinator, with many sites beside few."""
    few, many = min(NUM_SITES), max(NUM_SITES)
    peaks = {num_sites: in_fresh_process(coordinator_mib, num_sites) for num_sites in (few, many)}
    case = f"coordinator, {case_of(SMALL, many)}, memory for the sum and one upload"
    return [memory_row(case, many, peaks[many], {}, {f"N = {few}": peaks[few]["traced"]})]


def memory_row(
    case: str,
    num_sites: int,
    ours: Mapping[str, float],
    flower: Mapping[str, float],
    limit: Mapping[str, float],
) -> Row:
    """What Python and numpy had at most; what the kernel counted stands in the settings."""
    settings: Row = {"num_params": SMALL, "num_sites": num_sites, "bits": 32, "threads": 2}
    settings |= {"resident_mib": ours["resident"]}
    if flower:
        settings |= {"flower_resident_mib": flower["resident"]}
    peers = {FLOWER: flower["traced"]} if flower else {}
    return plain_row(case, "MiB", ours["traced"], peers, limit, settings)


def in_fresh_process(measure: Callable[..., dict[str, float]], *about: object) -> dict[str, float]:
    """Call a function where nothing has been allocated yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *about).result()


def site_extra_mib(num_sites: int, is_whole: bool) -> dict[str, float]:
    """Beyond the body, while a site masks or makes its upload."""
    site = Site(0, num_sites)
    masks = [Mask(key, is_added=True) for key in some_keys(num_sites)]

    def work(update: QuantizedUpdate) -> int:
        if is_whole:
            return upload_of(site, update, bits=32, threads=2).body.nbytes
        return mask(update, masks, bits=32, threads=2).body.nbytes

    return peaks_mib(work)


def flower_extra_mib(num_sites: int) -> dict[str, float]:
    """The same of Flower."""
    seeds = some_keys(num_sites)
    return peaks_mib(lambda update: flower_mask(update.values, seeds)[0].nbytes)


def coordinator_mib(num_sites: int) -> dict[str, float]:
    """While real uploads arrive one after the other and are unmasked with real shares."""

    def work(update: QuantizedUpdate) -> int:
        total = exactly_summed(update, num_sites)
        for low in range(0, total.size, CHUNK):
            part = slice(low, low + CHUNK)
            if not np.array_equal(total[part], num_sites * update.values[part]):
                raise AssertionError("the sum is not the sum of the updates")
        return 0

    return peaks_mib(work)


def peaks_mib(work: Callable[[QuantizedUpdate], int]) -> dict[str, float]:
    """The most memory that a call has beyond what it returns the size of.

    Traced: by Python and numpy, to the byte. Resident: by the whole process, as the kernel counts.
    """
    update = some_update(SMALL)
    work(some_update(SMALL // 8))  # threads, code and tables are there afterwards
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew from here
    before = resident_peak()
    num_bytes = work(update)
    resident = resident_peak() - before
    tracemalloc.start()
    work(update)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"traced": (traced - num_bytes) / MIB, "resident": (resident - num_bytes) / MIB}


def resident_peak() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def exactly_summed(update: QuantizedUpdate, num_sites: int) -> NDArray[np.int32]:
    """The sum over sites that all have the same update, through the coordinator's own code."""
    manifest = SimpleNamespace(ring_bits=32, num_tail=NUM_TAIL, members=range(num_sites))
    member = SimpleNamespace(key=IDENTITY.key.public_key(), name=IDENTITY.name)
    epoch: Any = SimpleNamespace(manifest=manifest, run=RUN, members=[member] * num_sites)
    values, tail = np.zeros(update.values.size, np.uint32), np.zeros(NUM_TAIL, np.uint64)
    collected = Collected(0, TASK, values, tail)
    for index in range(num_sites):
        upload = as_message(upload_of(Site(index, num_sites), update, bits=32, threads=2))
        collected.take(index, upload, epoch, is_private=False)
        del upload
    masks = [Mask(self_mask_key(owner, num_sites, collected), False) for owner in collected.uploads]
    add_masks(collected.values, masks, threads=2)
    return signed(collected.values, bits=32)


def self_mask_key(owner: int, num_sites: int, collected: Collected) -> bytes:
    """From the shares of as many of the next sites as it takes."""
    shares = {}
    for step in range(1, default_threshold(num_sites) + 1):
        index = (owner + step) % num_sites
        sealed = collected.uploads[owner].sealed[index]
        shares[index] = slot_of(Site(index, num_sites).open_share(sealed, owner), owner)
    return recover(shares)


# Wire


def wire_rows() -> list[Row]:
    """Bytes of real uploads."""
    made = []
    update = some_update(SMALL)
    flower = flower_mask(update.values[:1], some_keys(2))[0].dtype
    flower_bytes = len(ndarray_to_bytes(np.zeros(SMALL, flower)))
    for bits in (32, 24, 16):
        upload = upload_of(Site(0, 8), update, bits=bits, threads=2)
        entries = upload.body.nbytes - 8 * NUM_TAIL
        case = f"upload per parameter, {bits} bits"
        settings = {"num_params": SMALL, "num_sites": 8, "bits": bits}
        limit = {"no masks": bits / 8}
        peers = {FLOWER: flower_bytes / SMALL}
        made.append(plain_row(case, "bytes", entries / SMALL, peers, limit, settings))
    for num_sites, promised in ((8, 3.8), (50, 124.0)):
        upload = upload_of(Site(0, num_sites), some_update(1000), bits=32, threads=1)
        parts = (upload.header.encode(), *upload.sealed, *upload.share_commitments)
        message = recorddict_to_proto(pack(as_message(upload))).ByteSize()
        settings = {
            "num_sites": num_sites,
            "tail_bytes": 8 * NUM_TAIL,
            "as_a_flower_message": (message - upload.body.nbytes) / KB,
        }
        case = f"upload beyond the body, N = {num_sites}"
        made.append(
            plain_row(case, "KB", sum(map(len, parts)) / KB, {}, {"promised": promised}, settings)
        )
    return made


def as_message(upload: Protected) -> Upload:
    """As it leaves the site."""
    header = upload.header.encode()
    return Upload(RUN.hex(), 0, header, upload.sealed, upload.share_commitments, upload.body)
