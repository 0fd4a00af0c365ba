"""What a site keeps on its disk, what it erases there, and what it makes of a damaged journal."""

import base64
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_site import MODEL, SITE, is_exact, refused, same
from protocol import Bare, Cast

from client.journal import EpochMemory, Journal, Releases, SumMemory
from common.errors import DataError, FederationError
from common.messages import Purpose
from common.secagg.phases import Phase

EPOCH = EpochMemory(manifest="", phase=Phase.READY)
SUM = SumMemory(
    sum_number=0, task=b"", model_digest="m" * 64, purpose="train", round_number=1, header=b"",
    sealed=(), share_commitments=(), statement="", own_share=b"",
)  # fmt: skip

# Secrets


def pieces(secret: bytes) -> set[bytes]:
    """Parts of a secret as the journal writes it; a page of the file may end anywhere in it."""
    text = base64.urlsafe_b64encode(secret)
    return {text[k : k + 10] for k in range(len(text) - 10)}


def on_disk(site: Bare) -> bytes:
    """Everything in the site's folder but its long-lived key."""
    files = [path for path in site.state_dir.rglob("*") if path.is_file()]
    return b"\n".join(path.read_bytes() for path in files if path.name != "key.pem")


def holds(site: Bare, secret: bytes) -> bool:
    content = on_disk(site)
    return any(piece in content for piece in pieces(secret))


def test_the_keys_of_an_epoch_are_erased_as_soon_as_the_pairs_have_agreed(
    cast: Cast, site: Bare
) -> None:
    cast.invite()
    epoch = site.journal.epoch()
    assert holds(site, epoch.dh)
    assert holds(site, epoch.kem)
    cast.agree()
    assert not holds(site, epoch.dh)
    assert holds(site, epoch.kem)  # it waits for the ciphertexts of the first task
    (exchanged, *_) = site.journal.epoch().exchanged
    assert holds(site, exchanged)
    cast.uploads()
    assert not holds(site, epoch.kem)
    assert not holds(site, exchanged)


def test_the_first_site_waits_for_nobody(cast: Cast) -> None:
    first = cast.members[0]
    cast.invite()
    epoch = first.journal.epoch()
    cast.agree()
    assert not holds(first, epoch.dh)
    assert not holds(first, epoch.kem)
    assert not any(first.journal.epoch().exchanged)


def chains(site: Bare) -> Sequence[bytes]:
    return [chain for chain in site.journal.epoch().chains if chain]


def test_what_opens_a_sum_is_erased_with_the_answer(cast: Cast, site: Bare) -> None:
    uploads = cast.enrol().uploads(2)
    before, own_share = chains(site), site.journal.sum().own_share
    assert len(before) == 3
    assert all(holds(site, secret) for secret in (*before, own_share))
    cast.shares(uploads)
    assert not any(holds(site, secret) for secret in (*before, own_share))
    assert site.journal.sum().own_share == b""
    slots = [own_share[k : k + 32].hex().encode() for k in range(0, len(own_share), 32)]
    assert [slot in on_disk(site) for slot in slots] == [k == SITE for k in cast.sites]  # returned


def test_what_opens_a_void_sum_is_erased_with_the_next_upload(cast: Cast, site: Bare) -> None:
    cast.enrol().uploads(0)
    before, own_share = chains(site), site.journal.sum().own_share
    cast.uploads(3)
    assert not any(holds(site, secret) for secret in (*before, own_share))


def test_a_new_epoch_erases_the_keys_of_the_one_before(cast: Cast, site: Bare) -> None:
    cast.enrol().uploads(0)
    before = chains(site)
    cast.renewed().invite()
    assert not any(holds(site, secret) for secret in before)


def test_the_chain_keys_move_on_with_the_answer(cast: Cast, site: Bare) -> None:
    uploads = cast.enrol().uploads(0)
    before = chains(site)
    cast.shares(uploads)
    assert set(before).isdisjoint(chains(site))
    assert site.journal.epoch().chain_step == 1


# The journal's files


def modes(site: Bare) -> dict[str, int]:
    files = [path for path in site.state_dir.iterdir() if path.suffix != ".pem"]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}


def test_the_journal_is_for_this_user_alone(cast: Cast, site: Bare) -> None:
    assert modes(site) == {"journal.sqlite": 0o600, "released.sqlite": 0o600}
    uploads = cast.enrol().uploads()
    private = {"journal.sqlite": 0o600, "journal.mark": 0o600, "answer-0.bin": 0o600}
    private |= {"released.sqlite": 0o600}
    assert modes(site) == private
    cast.shares(uploads)
    site.restart()
    assert modes(site) == private


def test_the_journal_keeps_one_body(cast: Cast, site: Bare) -> None:
    first = cast.enrol().uploads(0)[SITE]
    assert (site.state_dir / "answer-0.bin").read_bytes() == first.body.tobytes()
    cast.uploads(1, purpose=Purpose.TEST)
    assert sorted(site.state_dir.glob("answer-*")) == [site.state_dir / "answer-1.bin"]
    site.restart()
    assert site.journal.sum().sum_number == 1


def test_an_upload_is_stored_whole(cast: Cast, site: Bare) -> None:
    upload = cast.enrol().uploads()[SITE]
    site.restart()
    last = site.journal.sum()
    assert last is not None
    assert (last.header, last.sealed) == (upload.header, upload.sealed)
    assert last.share_commitments == upload.share_commitments
    assert np.array_equal(site.journal.body(0), upload.body)


def leaves(says: str) -> Any:
    """The site must leave the run: what was said is unknown."""
    return pytest.raises(DataError, match=rf"{says}.* must leave the run \[R6\]$")


BACKUPS = {
    "before the upload": lambda cast: cast.uploads(0),
    "before the vote": lambda cast: cast.votes(cast.uploads(0, sites=[0, 1, 2])),
    "before the shares": lambda cast: cast.shares(cast.uploads(0)),
    "before a new epoch": lambda cast: cast.renewed().enrol(),
}


@pytest.mark.parametrize("title", BACKUPS)
def test_a_journal_that_was_put_back_is_refused(title: str, cast: Cast, site: Bare) -> None:
    cast.enrol()
    path = site.state_dir / "journal.sqlite"
    shutil.copy(path, site.state_dir / "backup")
    BACKUPS[title](cast)
    site.journal.close()
    shutil.copy(site.state_dir / "backup", path)
    with leaves("has 2 entries, this site wrote .* put back from a backup"):
        site.restart()


def test_a_journal_that_is_put_back_while_the_site_runs_is_noticed(cast: Cast, site: Bare) -> None:
    cast.enrol()
    path = site.state_dir / "journal.sqlite"
    shutil.copy(path, site.state_dir / "backup")
    cast.uploads(0)
    shutil.copy(site.state_dir / "backup", path)
    with leaves("put back from a backup"):
        site.answer(cast.task(SITE, 1))
    with leaves("put back from a backup"):
        site.answer(cast.renewed().invitation())


def test_a_journal_that_is_gone_is_not_begun_anew(cast: Cast, site: Bare) -> None:
    cast.enrol()
    site.journal.close()
    (site.state_dir / "journal.sqlite").unlink()
    with leaves("is gone"):
        site.restart()
    assert not (site.state_dir / "journal.sqlite").exists()


@pytest.mark.parametrize("content", [b"no database", b"\0" * 4096])
def test_a_journal_that_is_damaged_stops_the_site(content: bytes, cast: Cast, site: Bare) -> None:
    cast.enrol()
    site.journal.close()
    (site.state_dir / "journal.sqlite").write_bytes(content)
    with leaves("is damaged"):
        site.restart()


@pytest.mark.parametrize("content", ["", "-", "many"])
def test_a_mark_that_is_damaged_stops_the_site(content: str, cast: Cast, site: Bare) -> None:
    cast.enrol()
    (site.state_dir / "journal.mark").write_text(content)
    with leaves("journal.mark is damaged"):
        site.restart()


def test_a_mark_that_a_crash_left_behind_its_journal_stops_nobody(cast: Cast, site: Bare) -> None:
    mark = site.state_dir / "journal.mark"
    cast.enrol()
    before = mark.read_text()
    uploads = cast.uploads()
    mark.write_text(before)
    site.restart()
    assert is_exact(cast, uploads, cast.shares(uploads))
    assert int(mark.read_text()) > int(before) + 1


def test_a_mark_that_was_left_behind_follows_before_anything_is_said_again(
    cast: Cast, site: Bare
) -> None:
    mark, path = site.state_dir / "journal.mark", site.state_dir / "journal.sqlite"
    cast.enrol()
    before = mark.read_text()
    shutil.copy(path, site.state_dir / "backup")
    upload = cast.uploads()[SITE]
    mark.write_text(before)
    assert same(site.answer(cast.task(SITE)), upload)
    shutil.copy(site.state_dir / "backup", path)
    with leaves("put back from a backup"):
        site.restart()


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_stored_body_that_is_not_the_one_sent_is_not_sent(
    damage: str, cast: Cast, site: Bare
) -> None:
    upload = cast.enrol().uploads()[SITE]
    path = site.state_dir / "answer-0.bin"
    content = upload.body.tobytes()
    path.write_bytes(
        {"cut": content[:-1], "changed": content[:-1] + bytes([content[-1] ^ 1]), "gone": b""}[
            damage
        ]
    )
    if damage == "gone":
        path.unlink()
    with pytest.raises(FederationError, match=r"leave the run \[R6\]$"):
        site.answer(cast.task(SITE))


def test_a_journal_that_was_closed_can_be_opened_again(cast: Cast, site: Bare) -> None:
    cast.enrol()
    before = site.journal.epoch()
    site.restart()
    assert site.journal.epoch() == before
    assert site.session().manifest == cast.manifest


def test_an_unmasked_sum_can_be_asked_for_until_the_next_one(cast: Cast, site: Bare) -> None:
    """A coordinator that lost its answers in a crash gets the same bytes, upload and shares."""
    uploads = cast.enrol().uploads()
    shares = cast.shares(uploads)
    site.restart()
    assert same(site.answer(cast.task(SITE)), uploads[SITE])
    assert same(site.answer(cast.request(SITE, uploads)), shares[SITE])


# What all studies of a site have in common


def test_a_model_that_one_study_summed_is_not_summed_in_another(tmp_path: Path) -> None:
    said = Releases("run", {"update": 1, "validation": 0})
    one, other = (
        Journal(tmp_path / name / "journal.sqlite", tmp_path / "released.sqlite") for name in "ab"
    )
    one.record_answer(EPOCH, SUM, said)
    assert other.has_released("m" * 64, "update")
    assert other.has_released("m" * 64, "validation")
    assert not other.has_released("m" * 64, "test")
    assert other.last_round("run", "update") is None  # rounds are counted in each study


def test_a_round_that_was_summed_does_not_come_back_with_another_model(
    cast: Cast, site: Bare
) -> None:
    cast.enrol()
    cast.shares(cast.uploads(0))
    nearly = MODEL * np.float32(1 + 1e-7)
    with refused("R4", "the update of round 1: this run has it for round 1 already"):
        site.answer(cast.task(SITE, 1, round_number=1, model=nearly))
    with refused("R4", "the validation of round 0: this run has it for round 0 already"):
        site.answer(cast.task(SITE, 1, purpose=Purpose.VALIDATE, round_number=0, model=nearly))


def test_a_memory_of_all_studies_that_is_gone_stops_the_site(cast: Cast, site: Bare) -> None:
    cast.enrol()
    cast.shares(cast.uploads(0))
    site.journal.close()
    (site.state_dir / "released.sqlite").unlink()
    with pytest.raises(DataError, match=r"released\.sqlite lacks sums .*\[R6\]$"):
        site.restart()
