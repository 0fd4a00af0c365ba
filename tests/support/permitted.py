"""What a sender is free to choose: where an accepted message may differ from the honest one.

``FREE`` lists it; every other difference is malformed, and accepting it is a fault.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from recorded import COORDINATOR, HERO, NUM_SITES, THRESHOLD, Recording
from resign import PART_NAMES

from common.errors import RemoteProtocolError
from common.identity import Identity
from common.messages import (
    Agreement,
    Encapsulated,
    Message,
    Purpose,
    Roster,
    RoundTask,
    Shares,
    SiteKeys,
    Survivors,
    Unmask,
    Upload,
    Vote,
    digest_of_model,
    signed_content,
)
from common.quantize import EXPONENT_RANGE
from common.secagg.encoding import decode, encode
from common.secagg.header import DIGEST_BYTES, Header, digest_of_rows, row_digest
from common.secagg.keys import CIPHERTEXT_BYTES, encapsulate, exchange
from common.secagg.view import digest_of_view

if TYPE_CHECKING:
    from doors import Door, SharesDoor, SiteDoor

DH = b"\x07" * 32  # any key of X25519


@dataclass(frozen=True)
class Change:
    """A place where a message differs from an honest one."""

    path: str  # Kind.field, and what is inside it
    at: int | None = None  # which entry, or None: the list as a whole

    def __str__(self) -> str:
        return self.path if self.at is None else f"{self.path}[{self.at}]"


def differences(honest: Message, other: Message) -> list[Change]:
    """Every place where the two differ; headers, manifest and statement are looked into."""
    if type(honest) is not type(other):
        return [Change("kind")]
    kind = type(honest).__name__
    found = [
        change
        for each in fields(honest)
        for change in _compared(
            f"{kind}.{each.name}", getattr(honest, each.name), getattr(other, each.name), None
        )
    ]
    return list(dict.fromkeys(found))


def _compared(path: str, one: Any, other: Any, at: int | None) -> Iterator[Change]:
    if isinstance(one, np.ndarray):
        if one.dtype != other.dtype or one.tobytes() != other.tobytes():
            yield Change(path, at)
    elif isinstance(one, tuple):
        if len(one) != len(other):
            yield Change(path)
            return
        for k, pair in enumerate(zip(one, other, strict=True)):
            yield from _compared(path, *pair, k)
    elif one != other:
        yield from _inside(path, one, other, at)


def _inside(path: str, one: Any, other: Any, at: int | None) -> Iterator[Change]:
    if path.endswith((".header", ".headers")):
        parts = decode(one), decode(other)
        if len(parts[0]) == len(parts[1]):
            for k, (mine, theirs) in enumerate(zip(*parts, strict=True)):
                if mine != theirs:
                    yield Change(f"{path}.{PART_NAMES[k]}", at)
            return
    if path.endswith((".manifest", ".statement")) and one and other:
        tables = json.loads(one), json.loads(other)
        different = [
            key for key in sorted(set(tables[0]) | set(tables[1])) if not _same(key, *tables)
        ]
        yield from [Change(f"{path}.{key}") for key in different] or [Change(f"{path} (written)")]
        return
    yield Change(path, at)


def _same(key: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    return key in one and key in other and json.dumps(one[key]) == json.dumps(other[key])


def is_signed_by(identity: Identity, signature: bytes, content: bytes) -> bool:
    """Whether a signature is this party's."""
    try:
        identity.key.public_key().verify(signature, content, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _is_by(door: Any, site: int, signature: bytes, content: bytes) -> bool:
    return is_signed_by(door.recording.identities[site], signature, content)


# What a sender is free to choose

Free = Callable[[Any, Any, Change], bool]  # door, message, place


def _always(*_: Any) -> bool:
    return True


def table_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def is_signed(door: Door, message: Any, _: Change | None = None) -> bool:
    """Whether the sender has signed all of it."""
    return is_signed_by(door.hostile.sender, message.signature, signed_content(message))


def _certificate_of(who: int) -> Free:
    def is_good(door: Door, message: Any, _: Change) -> bool:
        return message.certificate in door.recording.good_certificates[who]

    return is_good


def _is_good_list(door: Door, message: Any, _: Change) -> bool:
    return message.revoked in door.recording.good_lists


def _begins_before(door: Door, message: Any, _: Change) -> bool:
    return 0 <= table_of(message.manifest)["valid_from"] <= door.recording.now.timestamp()


def _ends_after(door: Door, message: Any, _: Change) -> bool:
    return table_of(message.manifest)["valid_until"] >= door.recording.now.timestamp()


def _is_new_run(door: SiteDoor, message: Any, _: Change) -> bool:
    run = table_of(message.manifest)["run"]
    return len(run) == 32 and int(run, 16) >= 0


def _entry_of_friend(door: Door, message: Roster, change: Change) -> bool:
    """Another member may choose its keys anew, as long as it signs them and they are keys."""
    if change.at is None or change.at not in door.hostile.sites:
        return False
    entry = message.keys_of(change.at)
    others = [key for k, key in enumerate(message.public_keys) if k != change.at]
    return (
        _is_by(door, change.at, entry.signature, signed_content(entry))
        and entry.certificate in door.recording.good_certificates[change.at]
        and are_keys(entry, is_kem_used=change.at > HERO)
        and entry.public_key not in others
    )


def are_keys(keys: SiteKeys, *, is_kem_used: bool = True) -> bool:
    """Whether fresh keys are what the other sites take; the sites before it use its KEM key."""
    if [len(keys.public_key), len(keys.kem_key), len(keys.nonce)] != [32, 1184, 16]:
        return False
    try:
        exchange(DH, keys.public_key)
        if is_kem_used:
            encapsulate(keys.kem_key)
    except RemoteProtocolError:
        return False
    return True


def _own_keys(door: Door, message: SiteKeys, _: Change) -> bool:
    roster = door.recording.epoch.roster
    taken = set(roster.public_keys) - {roster.public_keys[HERO]}
    return are_keys(message) and message.public_key not in taken


def _number_is_due(door: SiteDoor, message: RoundTask, _: Change) -> bool:
    return door.last < message.sum_number < door.recording.manifest.num_sums


def _round_exists(door: SiteDoor, message: RoundTask, _: Change) -> bool:
    first = 1 if message.purpose == Purpose.TRAIN else 0
    return first <= message.round_number <= door.site.study.num_rounds


def _is_exponent(door: SiteDoor, message: RoundTask, change: Change) -> bool:
    least, most = EXPONENT_RANGE
    return change.at is not None and least <= message.exponents[change.at] <= most


def _has_its_digest(door: SiteDoor, message: RoundTask, _: Change) -> bool:
    size = door.recording.manifest.num_params
    return message.model.shape == (size,) and (
        digest_of_model(message.model) == message.model_digest
    )


def _is_relayed(door: SiteDoor, message: RoundTask, change: Change) -> bool:
    """Read with the first task only."""
    if door.last >= 0:
        return True
    if change.at is None:
        return False
    ciphertext = message.ciphertexts[change.at]
    signature = message.ciphertext_signatures[change.at]
    relayed = Encapsulated(message.run, change.at, HERO, ciphertext)
    return len(ciphertext) == CIPHERTEXT_BYTES and _is_by(
        door, change.at, signature, signed_content(relayed)
    )


def _is_good_list_or_unread(door: SiteDoor, message: RoundTask, change: Change) -> bool:
    return door.repeats(message) or _is_good_list(door, message, change)


def _is_view(door: SiteDoor, message: Survivors | Unmask, _: Change) -> bool:
    """Another list of survivors, each with a header that it signed for this very sum."""
    recording, number, survivors = door.recording, door.last, message.survivors
    if door.has_answered or door.has_voted:
        said = recording.collected[number].headers()
        is_repeat = door.has_answered or isinstance(message, Survivors)
        return message.headers == said and (is_repeat or survivors == _survivors(recording, number))
    return (
        list(survivors) == sorted(set(survivors))
        and set(survivors) <= set(range(NUM_SITES))
        and len(survivors) == len(message.headers) >= THRESHOLD
        and all(
            _is_header(door, site, content)
            for site, content in zip(survivors, message.headers, strict=True)
        )
        and HERO in survivors
    )


def _survivors(recording: Recording, number: int) -> tuple[int, ...]:
    return recording.collected[number].survivors


def _is_header(door: SiteDoor, site: int, content: bytes) -> bool:
    honest = door.recording.header(door.last, site)
    if site == HERO:
        return content == honest.encode()
    header = Header.decode(content)
    unsigned = encode(*header._parts())
    return (
        _is_by(door, site, header.signature, unsigned)
        and len(header.commitments) == len(honest.commitments)
        and (header.run, header.sum_number, header.task, header.site)
        == (honest.run, honest.sum_number, honest.task, site)
    )


def _are_votes(door: SiteDoor, message: Unmask, _: Change) -> bool:
    if door.has_answered or len(message.survivors) == NUM_SITES:
        return True  # not read
    own = door.recording.header(door.last, HERO)
    view = digest_of_view(own.run, own.sum_number, own.task, message.headers)
    return (
        len(set(message.voters)) == len(message.voters) == len(message.votes) >= THRESHOLD
        and set(message.voters) <= set(message.survivors)
        and all(
            _is_by(door, site, vote, signed_content(Vote(message.run, door.last, site, view)))
            for site, vote in zip(message.voters, message.votes, strict=True)
        )
    )


def _are_rows(door: SiteDoor, message: Unmask, _: Change) -> bool:
    if door.has_answered:
        return True  # not read
    lists = (message.headers, message.sealed, message.share_commitments, message.row_digests)
    if len({len(entries) for entries in lists}) != 1:
        return False
    for content, sealed, commitments, digests in zip(*lists, strict=True):
        rows = [digests[k : k + DIGEST_BYTES] for k in range(0, len(digests), DIGEST_BYTES)]
        if len(rows) != NUM_SITES or len(commitments) != 16 * NUM_SITES:
            return False
        is_bound = Header.decode(content).rows == digest_of_rows(rows)
        if not is_bound or rows[HERO] != row_digest(commitments, sealed):
            return False
    return True


def _own_ciphertexts(door: Door, message: Agreement, change: Change) -> bool:
    """A site may send other secrets: it harms its own sums alone."""
    if change.at is None:
        return False
    ciphertext = message.ciphertexts[change.at]
    signature = message.ciphertext_signatures[change.at]
    sent = Encapsulated(message.run, HERO, HERO + 1 + change.at, ciphertext)
    return len(ciphertext) == CIPHERTEXT_BYTES and _is_by(
        door, HERO, signature, signed_content(sent)
    )


def _own_header(door: Door, message: Upload, _: Change) -> bool:
    """A site may commit to what it likes; the commitments of others show it later."""
    header, honest = Header.decode(message.header), Header.decode(door.due.header)
    return len(header.commitments) == len(honest.commitments) and _is_by(
        door, HERO, header.signature, encode(*header._parts())
    )


def _is_bound(door: Door, message: Upload, _: Change) -> bool:
    """Whatever the signed header binds, in the lengths of the honest upload."""
    header, honest = Header.decode(message.header), door.due
    rows = zip(message.share_commitments, message.sealed, strict=True)
    return (
        message.body.shape == honest.body.shape
        and _lengths(message.sealed) == _lengths(honest.sealed)
        and _lengths(message.share_commitments) == _lengths(honest.share_commitments)
        and header.body == hashlib.sha256(message.body.tobytes()).digest()
        and header.statement == hashlib.sha256(message.statement.encode()).digest()
        and header.rows == digest_of_rows([row_digest(*row) for row in rows])
    )


def _lengths(entries: Sequence[bytes]) -> list[int]:
    return [len(entry) for entry in entries]


def _complains(door: SharesDoor, message: Shares, change: Change) -> bool:
    """A site may say that it cannot open a share, rightly or not; then it returns none."""
    survivors = _survivors(door.recording, door.due.sum_number)
    complaints = message.complaints
    is_list = list(complaints) == sorted(set(complaints))
    if not is_list or not set(complaints) <= set(survivors) - {HERO}:
        return False
    return all(
        (share == b"") if site in complaints else (share == right)
        for site, share, right in zip(survivors, message.shares, door.due.shares, strict=True)
    )


FREE: dict[str, Free] = {
    # K1: a coordinator may open another epoch, or run, of the same study.
    "Invitation.manifest.run": _is_new_run,
    "Invitation.manifest.epoch": _always,
    "Invitation.manifest.nonce": _always,
    "Invitation.manifest.valid_from": _begins_before,
    "Invitation.manifest.valid_until": _ends_after,
    "Invitation.certificate": _certificate_of(COORDINATOR),
    "Invitation.revoked": _is_good_list,
    "Invitation.signature": is_signed,
    "SiteKeys.public_key": _own_keys,
    "SiteKeys.kem_key": _own_keys,
    "SiteKeys.nonce": _own_keys,
    "SiteKeys.certificate": _certificate_of(HERO),
    "SiteKeys.signature": is_signed,
    # K2
    **{
        f"Roster.{name}": _entry_of_friend
        for name in ("public_keys", "kem_keys", "nonces", "certificates", "signatures")
    },
    "Roster.revoked": _is_good_list,
    "Roster.signature": is_signed,
    "Agreement.ciphertexts": _own_ciphertexts,
    "Agreement.ciphertext_signatures": _own_ciphertexts,
    "Agreement.signature": is_signed,
    # A sum: any model, round and purpose of the study, in the manifest's numbers.
    "RoundTask.sum_number": _number_is_due,
    "RoundTask.round_number": _round_exists,
    "RoundTask.purpose": _round_exists,
    "RoundTask.exponents": _is_exponent,
    "RoundTask.model": _has_its_digest,
    "RoundTask.model_digest": _has_its_digest,
    "RoundTask.ciphertexts": _is_relayed,
    "RoundTask.ciphertext_signatures": _is_relayed,
    "RoundTask.revoked": _is_good_list_or_unread,
    "RoundTask.signature": is_signed,
    # An upload is masked: nobody can see whether its content is right.
    "Upload.body": _is_bound,
    "Upload.sealed": _is_bound,
    "Upload.share_commitments": _is_bound,
    "Upload.header.body": _own_header,
    "Upload.header.statement": _own_header,
    "Upload.header.commitments": _own_header,
    "Upload.header.rows": _own_header,
    "Upload.header.signature": _own_header,
    **{
        f"Upload.statement.{name}": _is_bound
        for name in (
            "epsilon", "delta", "unit", "noise_multiplier", "sampling_probability", "steps",
            "accountant", "randomness",
        )
    },
    "Upload.statement (written)": _is_bound,
    # The end of a sum: any view that every survivor signed for.
    **{
        f"{kind}.{name}": _is_view
        for kind in ("Survivors", "Unmask")
        for name in (
            "survivors", "headers", "headers.body", "headers.statement", "headers.commitments",
            "headers.rows", "headers.signature",
        )
    },
    "Survivors.signature": is_signed,
    "Vote.signature": is_signed,
    "Unmask.voters": _are_votes,
    "Unmask.votes": _are_votes,
    "Unmask.sealed": _are_rows,
    "Unmask.share_commitments": _are_rows,
    "Unmask.row_digests": _are_rows,
    "Unmask.signature": is_signed,
    "Shares.shares": _complains,
    "Shares.complaints": _complains,
    "Shares.signature": is_signed,
}  # fmt: skip
