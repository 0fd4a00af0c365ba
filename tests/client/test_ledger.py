"""What a data set has cost: never less than what could have been released."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from client.config import Budget
from client.ledger import Ledger, charge_key
from common.accounting import Event, epsilon_of
from common.errors import BudgetExhausted, DataError

EVENT = Event(1.0, 0.05, 50)
BUDGET = Budget(epsilon=4.0, delta=1e-5)


def _ledger(path: Path, budget: Budget | None = BUDGET) -> Ledger:
    return Ledger(path / "xrays.jsonl", "xrays", budget)


def test_a_debit_is_on_disk_when_it_returns_and_for_this_user_alone(tmp_path: Path) -> None:
    _ledger(tmp_path).debit("run", 0, EVENT, num_rounds=9)
    assert stat.S_IMODE((tmp_path / "xrays.jsonl").stat().st_mode) == 0o600
    assert _ledger(tmp_path).spent(1e-5) == epsilon_of([EVENT], 1e-5)


def test_the_same_sum_is_charged_once_and_a_new_sum_anew(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    ledger.debit("run", 0, EVENT, num_rounds=9)
    ledger.debit("run", 0, EVENT, num_rounds=9)
    assert ledger.events_of("run") == [EVENT]
    ledger.debit("run", 1, EVENT, num_rounds=9)
    assert ledger.spent(1e-5) == epsilon_of([EVENT, EVENT], 1e-5)


def test_two_studies_on_one_data_set_add_up(tmp_path: Path) -> None:
    one, other = _ledger(tmp_path), _ledger(tmp_path)
    one.debit("first study", 0, EVENT, num_rounds=9)
    other.debit("second study", 0, Event(2.0, 0.1, 10), num_rounds=9)
    expected = epsilon_of([EVENT, Event(2.0, 0.1, 10)], 1e-5)
    assert one.spent(1e-5) == pytest.approx(expected)  # also what another process has charged


def test_what_does_not_fit_is_refused_and_not_charged(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    ledger.debit("run", 0, EVENT, num_rounds=9)
    before = (tmp_path / "xrays.jsonl").read_bytes()
    with pytest.raises(BudgetExhausted, match=r"of 4 is spent; ask the data owner"):
        ledger.debit("another", 1, Event(1.0, 0.05, 5000), num_rounds=9)
    assert (tmp_path / "xrays.jsonl").read_bytes() == before


def test_without_a_budget_everything_is_recorded_and_nothing_refused(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path, budget=None)
    ledger.debit("run", 0, Event(0.5, 1.0, 1000), num_rounds=9)
    assert len(ledger.events_of("run")) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:-20],
        lambda content: content.replace(b"steps", b"stops"),
        lambda content: b"x" + content,
        lambda content: content + b"{}\n",
    ],
    ids=["no last newline", "cut", "renamed key", "rubbish", "empty line of JSON"],
)
def test_a_damaged_ledger_stops_the_site(damage, tmp_path: Path) -> None:
    _ledger(tmp_path).debit("run", 0, EVENT, num_rounds=9)
    path = tmp_path / "xrays.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="what was spent is unknown"):
        _ledger(tmp_path)


def test_a_run_is_never_charged_for_more_sums_than_its_epsilon_pays_for(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledgers" / "xrays.jsonl", "xrays", None)
    for number in (0, 3, 4):  # void sums between them were charged at other sites
        ledger.debit("run", number, EVENT, num_rounds=3)
    ledger.debit("run", 3, EVENT, num_rounds=3)  # asked again, charged once
    with pytest.raises(BudgetExhausted, match="charged for 3 sums on data set"):
        ledger.debit("run", 5, EVENT, num_rounds=3)
    ledger.debit("another run", 5, EVENT, num_rounds=3)
    assert len(ledger.events_of("run")) == 3


def test_two_studies_whose_runs_the_coordinator_names_alike_are_charged_apart(
    tmp_path: Path,
) -> None:
    ledger = _ledger(tmp_path)
    for study in ("a" * 64, "b" * 64):
        ledger.debit(charge_key("run", study), 0, EVENT, num_rounds=9)
    assert ledger.spent(1e-5) == epsilon_of([EVENT, EVENT], 1e-5)


def test_a_full_disk_charges_nothing_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = _ledger(tmp_path)
    ledger.debit("run", 0, EVENT, num_rounds=9)
    before = (tmp_path / "xrays.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*xrays\.jsonl'"):
            ledger.debit("run", 1, EVENT, num_rounds=9)
    assert (tmp_path / "xrays.jsonl").read_bytes() == before
    ledger.debit("run", 1, EVENT, num_rounds=9)
    assert len(_ledger(tmp_path).events_of("run")) == 2


def test_a_disk_that_fails_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = _ledger(tmp_path)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DataError, match=r"nothing was charged.*repair the disk"):
            ledger.debit("run", 0, EVENT, num_rounds=9)
    assert (tmp_path / "xrays.jsonl").read_bytes() == b""


def test_a_head_stays_true_while_lines_are_added_and_is_missed_when_they_are_cut(
    tmp_path: Path,
) -> None:
    ledger = _ledger(tmp_path, None)
    heads = [ledger.head()]
    for number in range(3):
        ledger.debit("run", number, EVENT, num_rounds=9)
        heads.append(ledger.head())
    assert len(set(heads)) == 4
    assert all(map(ledger.holds, heads))
    path = tmp_path / "xrays.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert [ledger.holds(head) for head in heads] == [True, True, True, False]


def test_a_run_is_charged_with_the_same_numbers_from_beginning_to_end(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path, None)
    ledger.debit("run", 0, EVENT, num_rounds=9)
    with pytest.raises(DataError, match=r"data\.declared_patients was changed"):
        ledger.debit("run", 1, Event(1.0, 0.01, 50), num_rounds=9)
    assert ledger.events_of("run") == [EVENT]


def test_what_protected_images_bounds_nothing_for_patients(tmp_path: Path) -> None:
    _ledger(tmp_path, None).debit("run", 0, EVENT, num_rounds=9, unit="image")
    for unit, spent in (("image", epsilon_of([EVENT], 1e-5)), ("patient", float("inf"))):
        budget = Budget(unit=unit, epsilon=4.0, delta=1e-5)
        assert _ledger(tmp_path, budget).spent(1e-5) == spent
