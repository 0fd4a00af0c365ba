"""What a coordinator can make of all it sees: nothing about one site, even against the rules.

An attacker gets every message of a federation. The same attacker reads a study of plain sums
exactly, so that these tests can fail.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacker import Attacker, Loot, Seen, chance_of_correlation, chances
from faulty_network import Fault, FaultyNetwork
from federation import answers_of, federate, open_sites, tiny_study
from numpy.typing import NDArray
from plain import plain_upload, run_plainly
from vectors_federation import VectorFederation, fast_folder, silent_when

from common.errors import RoundAborted
from common.messages import Message, Purpose, RoundTask, Survivors, Unmask
from common.models.build import build_network
from common.secagg import protect as protecting
from common.secagg.sharing import recover
from common.study import Study
from common.update import QuantizedUpdate
from server.run_dir import RunDir

BITS = (16, 24, 32)
NUM_PARAMS, NUM_TAIL = 20_000, 6_000
SIGNIFICANCE = 1e-9  # for each of a few hundred tests: a false alarm in millions of runs


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as path:
        yield path


def uneven(lanes: NDArray[Any], *, bits: int) -> dict[str, float]:
    """What gives lanes away as not random."""
    unsigned = lanes.view(lanes.dtype.str.replace("i", "u"))
    found = chances(unsigned, bits=bits)
    return {what: chance for what, chance in found.items() if chance < SIGNIFICANCE}


def check_hidden(
    values: NDArray[np.int32], tail: NDArray[np.int64], truth: QuantizedUpdate, *, bits: int
) -> None:
    """Fail if what an attacker is left with differs from noise, or goes along with the truth."""
    assert uneven(values, bits=bits) == {}
    assert uneven(tail, bits=64) == {}
    if values.size:
        assert chance_of_correlation(values, truth.values) > SIGNIFICANCE
    assert chance_of_correlation(tail, truth.tail) > SIGNIFICANCE


def typical(task: RoundTask, site: int) -> QuantizedUpdate:
    """Small numbers of which many are zero: far from random, as updates are."""
    rng = np.random.default_rng([site, 7])
    size = NUM_PARAMS if task.purpose == Purpose.TRAIN else 0
    values = np.rint(rng.standard_t(3, size) * 8).clip(-5000, 5000).astype(np.int32)
    return QuantizedUpdate(values, rng.integers(0, 300, NUM_TAIL, np.int64))


def federation_of(folder: Path, num_sites: int, bits: int = 32) -> VectorFederation:
    return VectorFederation(
        folder, num_sites, bits=bits, num_params=NUM_PARAMS, num_tail=NUM_TAIL, draw=typical
    )


def attacker_of(federation: VectorFederation, colluders: Sequence[int] = ()) -> Attacker:
    """It has all that passed the coordinator, its key, and the journals of some sites."""
    network = federation.network
    return Attacker(
        [*network.sent, *network.received],
        federation.names,
        bits=federation.bits,
        num_params=NUM_PARAMS,
        identity=federation.exchange.credentials.identity,
        colluders={k: Loot.of(federation.sites[federation.names[k]].journal) for k in colluders},
    )


# The tests themselves


def test_random_lanes_pass(rng: np.random.Generator) -> None:
    for bits in BITS:
        lanes = rng.integers(0, 2**bits, NUM_PARAMS, np.uint32)
        assert uneven(lanes, bits=bits) == {}
    assert uneven(rng.integers(0, 2**64, NUM_TAIL, np.uint64), bits=64) == {}


@pytest.mark.parametrize("bits", BITS)
def test_lanes_that_are_not_quite_random_are_found_out(bits: int, rng: np.random.Generator) -> None:
    noise = rng.integers(0, 2**bits, NUM_PARAMS, np.uint32)
    truth = typical_values()
    often = rng.random(NUM_PARAMS) < 0.2
    flawed = {
        "one bit is always 0": noise & ~np.uint32(1 << (bits - 1)),
        "one bit is set in 55 of 100": noise | (rng.random(NUM_PARAMS) < 0.1).astype(np.uint32),
        "a fifth is not masked": np.where(often, truth.view(np.uint32), noise),
        "a mask of 8 bits": truth.view(np.uint32) + (noise & 0xFF),
        "one mask for all": truth.view(np.uint32) + noise[0],
        "a mask that is repeated": np.repeat(noise[: NUM_PARAMS // 2], 2),
    }
    assert [title for title, lanes in flawed.items() if not uneven(lanes, bits=bits)] == []


def test_a_correlation_is_found_out(rng: np.random.Generator) -> None:
    truth = typical_values()
    noise = rng.integers(-(2**31), 2**31, NUM_PARAMS).astype(np.int32)
    assert chance_of_correlation(noise, truth) > SIGNIFICANCE
    scale = np.std(noise) / np.std(truth)
    leaking = noise + (0.1 * scale * truth).astype(np.int64)
    assert chance_of_correlation(leaking, truth) < SIGNIFICANCE


def typical_values() -> NDArray[np.int32]:
    rng = np.random.default_rng(1)
    return np.rint(rng.standard_t(3, NUM_PARAMS) * 8).astype(np.int32)


# Uploads


@pytest.mark.parametrize("bits", BITS)
def test_an_upload_looks_like_noise(bits: int, folder: Path) -> None:
    federation = federation_of(folder, 4, bits)
    task = federation.next_task()
    federation.check(federation.sum(task), federation.names)
    attacker = attacker_of(federation)
    for site in range(4):
        values = attacker.entries(0, site).view(np.int32)
        check_hidden(values, attacker.tail(0, site).view(np.int64), typical(task, site), bits=bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_same_attacker_reads_plain_uploads_exactly(bits: int) -> None:
    names = ["site-1", "site-2", "site-3", "site-4"]
    task = RoundTask("", 0, 1, Purpose.TRAIN, (), "", (), (), b"", np.empty(0, np.float32))
    truths = [typical(task, site) for site in range(4)]
    seen = [(name, plain_upload(truth, 0, bits)) for name, truth in zip(names, truths, strict=True)]
    attacker = Attacker(seen, names, bits=bits, num_params=NUM_PARAMS)
    for site, truth in enumerate(truths):
        values, tail = attacker.stripped(0, site)
        assert np.array_equal(values, truth.values)
        assert np.array_equal(tail, truth.tail)
        with pytest.raises(AssertionError):
            check_hidden(values, tail, truth, bits=bits)


def test_a_study_that_trains_shows_nothing_of_a_sites_update_and_a_plain_one_all_of_it(
    folder: Path,
) -> None:
    study = tiny_study(num_rounds=2, model={"name": "cnn", "width": 16})
    network = FaultyNetwork(answers_of(open_sites(study, folder / "sites")))
    federate(study, folder / "run", network=network, sites_in=folder / "sites")
    plain = run_plainly(study, folder / "plain")
    masked_view = attacker_in(study, [*network.sent, *network.received])
    plain_view = attacker_in(study, plain.seen)
    truths = {place: truth for place, truth in plain.updates.items() if truth.values.size}
    assert len(truths) == 2 * 4
    for (number, name), truth in truths.items():
        site = study.site_names.index(name)
        assert np.array_equal(plain_view.stripped(number, site)[0], truth.values)
        assert uneven(plain_view.entries(number, site), bits=32)
        for values in (
            masked_view.entries(number, site).view(np.int32),
            masked_view.stripped(number, site)[0],
        ):
            assert uneven(values, bits=32) == {}
            assert chance_of_correlation(values, truth.values) > SIGNIFICANCE


def attacker_in(study: Study, seen: Seen) -> Attacker:
    num_params = build_network(study).schema.num_params
    assert num_params > NUM_PARAMS  # enough for the tests to tell
    return Attacker(seen, study.site_names, bits=32, num_params=num_params)


@pytest.mark.parametrize("purpose", [Purpose.VALIDATE, Purpose.TEST])
def test_the_counts_of_an_evaluation_look_like_noise(purpose: Purpose, folder: Path) -> None:
    federation = federation_of(folder, 4)
    task = federation.next_task(purpose)
    federation.check(federation.sum(task), federation.names)
    network = federation.network
    seen = [*network.sent, *network.received]
    attacker = Attacker(seen, federation.names, bits=32, num_params=0)
    for site in range(4):
        check_hidden(*attacker.stripped(0, site), typical(task, site), bits=32)


@pytest.mark.parametrize("is_void", [False, True], ids=["two sums", "a void sum and the next"])
def test_the_same_update_sent_twice_shows_no_difference(is_void: bool, folder: Path) -> None:
    federation = federation_of(folder, 4)
    if is_void:
        federation.network.faults = silent_when(lambda site, message: site in ("site-3", "site-4"))
    federation.sum(federation.next_task(model=1))
    federation.network.faults = silent_when(lambda site, message: False)
    federation.sum(federation.next_task(model=1 if is_void else 2))
    attacker = attacker_of(federation)
    for site in attacker.sites(0):
        (one, one_tail), (other, other_tail) = (attacker.stripped(k, site) for k in (0, 1))
        assert uneven(one - other, bits=32) == {}
        assert uneven(one_tail - other_tail, bits=64) == {}


# What can be taken off


@pytest.mark.parametrize("bits", BITS)
def test_the_attacker_learns_the_sum_and_no_part_of_it(bits: int, folder: Path) -> None:
    federation = federation_of(folder, 4, bits)
    task = federation.next_task()
    federation.check(federation.sum(task), federation.names)
    attacker = attacker_of(federation)
    assert sorted(attacker.keys(0)) == [(site, site) for site in range(4)]  # every self mask
    truths = [typical(task, site) for site in range(4)]
    for size in (1, 2, 3):
        for sites in itertools.combinations(range(4), size):
            values, tail = sum_of(attacker, sites)
            check_hidden(values, tail, added(truths, sites), bits=bits)
    values, tail = sum_of(attacker, range(4))
    everything = added(truths, range(4))
    assert np.array_equal(as_ring(values, bits), as_ring(everything.values, bits))
    assert np.array_equal(tail, everything.tail)


def sum_of(attacker: Attacker, sites: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    parts = [attacker.stripped(0, site) for site in sites]
    values = np.sum([values for values, _ in parts], axis=0, dtype=np.int64)
    return values.astype(np.int32), np.sum([tail for _, tail in parts], axis=0)


def added(truths: Sequence[QuantizedUpdate], sites: Sequence[int]) -> QuantizedUpdate:
    chosen = [truths[site] for site in sites]
    return QuantizedUpdate(
        np.sum([one.values for one in chosen], axis=0, dtype=np.int32),
        np.sum([one.tail for one in chosen], axis=0),
    )


def as_ring(values: NDArray[np.int32], bits: int) -> NDArray[np.int64]:
    return values.astype(np.int64) % 2**bits


@pytest.mark.parametrize(("num_sites", "late"), [(4, [1]), (5, [0]), (8, [2, 7])])
def test_an_upload_that_comes_too_late_stays_masked_without_all_its_pair_masks(
    num_sites: int, late: list[int], folder: Path
) -> None:
    federation = federation_of(folder, num_sites)
    names = [federation.names[site] for site in late]
    federation.network.faults = lambda site, message: (
        Fault.LATE if site in names and isinstance(message, RoundTask) else None
    )
    task = federation.next_task()
    survivors = [name for name in federation.names if name not in names]
    federation.check(federation.sum(task), survivors)
    attacker = attacker_of(federation)
    known = attacker.keys(0)
    for site in late:
        others = [k for k in range(num_sites) if k not in late]
        assert [k for k in range(num_sites) if (site, k) in known] == others
        check_hidden(*attacker.stripped(0, site), typical(task, site), bits=32)


def test_the_self_mask_alone_hides_an_upload_that_comes_too_late(folder: Path) -> None:
    """With the one key that its owner never gave away, the rest would be the update itself."""
    federation = federation_of(folder, 4)
    federation.network.faults = lambda site, message: (
        Fault.LATE if site == "site-2" and isinstance(message, RoundTask) else None
    )
    task = federation.next_task()
    federation.network.faults = no_answers(federation.network.faults)
    with pytest.raises(RoundAborted):
        federation.sum(task)
    for colluders, is_read in (([0, 2], False), ([0, 2, 3], True)):
        attacker = attacker_of(federation, colluders)
        values, tail = attacker.stripped(0, 1)
        assert ((1, 1) in attacker.keys(0)) == is_read
        if is_read:
            assert np.array_equal(values, typical(task, 1).values)
            assert np.array_equal(tail, typical(task, 1).tail)
        else:
            check_hidden(values, tail, typical(task, 1), bits=32)


def no_answers(others: Any) -> Any:
    """Nobody answers a request to unmask."""
    return lambda site, message: (
        Fault.SILENT if isinstance(message, Survivors | Unmask) else others(site, message)
    )


@pytest.mark.parametrize("asked", [(Survivors, Unmask), (Unmask,)], ids=["vote", "unmasking"])
def test_a_site_that_falls_silent_after_its_upload_stays_masked(
    asked: tuple[type[Message], ...], folder: Path
) -> None:
    """Its self mask is taken off with the others' shares; its pair masks stay."""
    federation = federation_of(folder, 8)
    federation.network.faults = silent_when(
        lambda site, message: (
            (site == "site-5" and isinstance(message, asked))
            or (site == "site-1" and isinstance(message, RoundTask))
        )
    )
    task = federation.next_task()
    federation.check(federation.sum(task), federation.names[1:])
    attacker = attacker_of(federation)
    known = attacker.keys(0)
    for site in range(1, 8):
        assert [k for k in range(8) if (site, k) in known] == [0, site]
        check_hidden(*attacker.stripped(0, site), typical(task, site), bits=32)


# Too few shares


@pytest.mark.parametrize("num_answers", [0, 1, 2, 3])
def test_with_fewer_shares_than_the_threshold_no_key_is_found(
    num_answers: int, folder: Path
) -> None:
    federation = federation_of(folder, 5)
    answering = federation.names[:num_answers]
    federation.network.faults = silent_when(
        lambda site, message: isinstance(message, Unmask) and site not in answering
    )
    task = federation.next_task()
    with pytest.raises(RoundAborted):
        federation.sum(task)
    attacker = attacker_of(federation)
    assert {len(shares) for shares in attacker.shares(0).values()} <= {num_answers}
    assert attacker.keys(0) == {}
    for site in range(5):
        check_hidden(*attacker.stripped(0, site), typical(task, site), bits=32)


def test_shares_short_of_the_threshold_fit_every_key(folder: Path) -> None:
    """For any self mask key there is a last share that makes the known ones give just that key."""
    federation = federation_of(folder, 4)
    answering = federation.names[:2]  # 3 are needed
    federation.network.faults = silent_when(
        lambda site, message: isinstance(message, Unmask) and site not in answering
    )
    with pytest.raises(RoundAborted):
        federation.sum(federation.next_task())
    known = attacker_of(federation).shares(0)[0, 0]
    assert sorted(known) == [0, 1]
    possible = {
        recover({**known, 2: bytes([last]) * 32})[0] for last in range(256)
    }  # byte by byte, like all of them
    assert possible == set(range(256))


@pytest.mark.parametrize(("num_sites", "threshold"), [(4, 3), (5, 4), (8, 6)])
def test_colluding_sites_below_the_threshold_read_nobody_and_at_it_everybody(
    num_sites: int, threshold: int, folder: Path
) -> None:
    federation = federation_of(folder, num_sites)
    assert federation.threshold == threshold
    federation.network.faults = silent_when(lambda site, message: isinstance(message, Unmask))
    task = federation.next_task()
    with pytest.raises(RoundAborted):
        federation.sum(task)
    few = attacker_of(federation, range(threshold - 1))
    for site in range(threshold - 1, num_sites):
        assert [k for k in range(num_sites) if (site, k) in few.keys(0)] == [*range(threshold - 1)]
        check_hidden(*few.stripped(0, site), typical(task, site), bits=32)
    enough = attacker_of(federation, range(threshold))
    for site in range(num_sites):
        values, tail = enough.stripped(0, site)
        assert np.array_equal(values, typical(task, site).values)
        assert np.array_equal(tail, typical(task, site).tail)


def test_what_all_sites_hold_after_their_answers_opens_nothing_of_that_sum(folder: Path) -> None:
    federation = federation_of(folder, 4)
    task = federation.next_task()
    federation.check(federation.sum(task), federation.names)
    assert {site.journal.sum().own_share for site in federation.sites.values()} == {b""}
    attacker = attacker_of(federation, range(4))
    assert sorted(attacker.keys(0)) == [(site, site) for site in range(4)]  # as without them
    for site in range(4):
        check_hidden(*attacker.stripped(0, site), typical(task, site), bits=32)


# Keys


def test_no_secret_ever_passes_the_coordinator(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bytes] = []
    genuine = protecting.mask

    def watched(update: QuantizedUpdate, masks: Any, **settings: Any) -> Any:
        used.extend(mask.key for mask in masks)
        return genuine(update, masks, **settings)

    monkeypatch.setattr(protecting, "mask", watched)
    federation = VectorFederation(folder, 5)
    federation.network.faults = silent_when(
        lambda site, message: site == "site-2" and isinstance(message, RoundTask)
    )
    secrets = secrets_of(federation)
    for _ in range(2):
        total = federation.sum(federation.next_task())
        federation.check(total, [name for name in federation.names if name != "site-2"])
        secrets |= secrets_of(federation)
    assert len(set(used)) == 2 * (4 + 4 + 3 + 2 + 1)  # self masks, and one key for each pair
    passed = all_bytes([*federation.network.sent, *federation.network.received])
    kept = b"".join(file.read_bytes() for file in files_of(federation.run_dir))
    for secret in [*used, *secrets]:
        assert len(secret) >= 32
        assert secret not in passed
        assert secret.hex() not in kept.decode("latin-1")
        assert secret not in kept


def secrets_of(federation: VectorFederation) -> set[bytes]:
    """What the sites' journals hold now."""
    found = set()
    for site in federation.sites.values():
        epoch = site.journal.epoch()
        found |= {epoch.dh, epoch.kem, *epoch.exchanged, *epoch.chains}
    return found - {b""}


def files_of(run_dir: RunDir) -> list[Path]:
    return [file for file in run_dir.path.rglob("*") if file.is_file()]


def all_bytes(messages: Sequence[tuple[str, Message]]) -> bytes:
    """Every field of every message, one after the other."""
    return b"/".join(
        _as_bytes(getattr(message, field.name))
        for _, message in messages
        for field in dataclasses.fields(message)
    )


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, tuple):
        return b"/".join(map(_as_bytes, value))
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value if isinstance(value, bytes) else str(value).encode()
