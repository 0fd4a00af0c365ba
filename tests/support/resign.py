"""Signatures that make a changed message look good: its sender's, and its sender's friends'.

Only so are the checks behind the signatures reached.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from mutate import Forgery

from common.errors import RemoteProtocolError
from common.identity import Identity
from common.messages import (
    Agreement,
    Encapsulated,
    Roster,
    RoundTask,
    Shares,
    Survivors,
    Unmask,
    Upload,
    Vote,
    digest_of_model,
)
from common.secagg.encoding import decode, encode
from common.secagg.header import DIGEST_BYTES, digest_of_rows, row_digest
from common.secagg.view import digest_of_view
from common.signing import sign

PART_NAMES = (  # of a header, as its signer writes it down
    "label",
    "run",
    "sum_number",
    "task",
    "site",
    "body",
    "statement",
    "commitments",
    "rows",
    "signature",
)


@dataclass(frozen=True)
class Hostile:
    """The keys that the sender and its friends hold: everybody's but the receiver's."""

    sender: Identity
    sender_site: int  # -1: the coordinator
    receiver_site: int  # -1: the coordinator
    sites: Mapping[int, Identity]  # whose keys the sender can use; not the receiver's

    def sign(self, forged: Forgery, *, deep: bool) -> None:
        """Sign what was changed; ``deep`` also whatever lies inside, so that it all fits."""
        message = forged.message()
        if message is None:
            return
        fitted = _tried(lambda: _fitted(message, self)) if deep else None
        signed = _tried(lambda: self._signed(fitted or message))
        if signed is None:
            return
        forged.values = {each.name: getattr(signed, each.name) for each in fields(signed)}
        forged.is_signed = True
        forged.notes.append("signed, inside too" if fitted else "signed")

    def _signed(self, message: Any) -> Any:
        if isinstance(message, Upload):
            return replace(message, header=_signed_header(message.header, self.sender))
        return sign(message, self.sender) if hasattr(message, "signature") else None


UNSIGNABLE = (
    TypeError,
    AttributeError,
    ValueError,
    LookupError,
    OverflowError,
    RuntimeWarning,
    RemoteProtocolError,
)


def _tried(build: Callable[[], Any]) -> Any:
    """None where the changed values have no types or lengths that can be signed."""
    try:
        return build()
    except UNSIGNABLE:
        return None


def _fitted(message: Any, hostile: Hostile) -> Any:
    """A message whose inner digests and signatures fit its changed content."""
    fit = FITTED.get(type(message))
    return fit(message, hostile) if fit else message


def _fitted_upload(upload: Upload, _: Hostile) -> Upload:
    parts = decode(upload.header)
    if len(parts) != len(PART_NAMES):
        return upload
    parts[5] = hashlib.sha256(np.ascontiguousarray(upload.body).tobytes()).digest()
    parts[6] = hashlib.sha256(upload.statement.encode()).digest()
    pairs = zip(upload.share_commitments, upload.sealed, strict=False)
    parts[8] = digest_of_rows([row_digest(*pair) for pair in pairs])
    return replace(upload, header=encode(*parts))


def _signed_header(header: bytes, identity: Identity) -> bytes:
    parts = decode(header)[: len(PART_NAMES) - 1]
    return encode(*parts, identity.sign(encode(*parts)))


def _signed_headers(headers: Sequence[bytes], hostile: Hostile) -> tuple[bytes, ...]:
    return tuple(
        _signed_header(header, hostile.sites[site])
        if (site := _site_of(header)) in hostile.sites
        else header
        for header in headers
    )


def _site_of(header: bytes) -> int:
    try:
        return int.from_bytes(decode(header)[4], "big")
    except (RemoteProtocolError, IndexError):
        return -1


def _fitted_task(task: RoundTask, hostile: Hostile) -> RoundTask:
    signatures = list(task.ciphertext_signatures)
    for site, ciphertext in enumerate(task.ciphertexts[: len(signatures)]):
        if site in hostile.sites:
            relayed = Encapsulated(task.run, site, hostile.receiver_site, ciphertext)
            signatures[site] = sign(relayed, hostile.sites[site]).signature
    return replace(
        task,
        ciphertext_signatures=tuple(signatures),
        model_digest=digest_of_model(task.model),
    )


def _fitted_agreement(reply: Agreement, hostile: Hostile) -> Agreement:
    own = hostile.sender_site
    signed = [
        sign(Encapsulated(reply.run, own, own + 1 + k, ciphertext), hostile.sender)
        for k, ciphertext in enumerate(reply.ciphertexts)
    ]
    return replace(reply, ciphertext_signatures=tuple(one.signature for one in signed))


def _fitted_roster(roster: Roster, hostile: Hostile) -> Roster:
    signatures = list(roster.signatures)
    for site, identity in hostile.sites.items():
        if site < len(signatures):
            signatures[site] = sign(roster.keys_of(site), identity).signature
    return replace(roster, signatures=tuple(signatures))


def _fitted_request(request: Unmask, hostile: Hostile) -> Unmask:
    headers, digests = list(request.headers), list(request.row_digests)
    rows = zip(request.sealed, request.share_commitments, strict=False)
    start = hostile.receiver_site * DIGEST_BYTES
    for k, (sealed, commitments) in enumerate(itertools.islice(rows, len(headers))):
        parts = decode(headers[k])
        if _site_of(headers[k]) not in hostile.sites or len(parts) != len(PART_NAMES):
            continue
        if k < len(digests):
            own = row_digest(commitments, sealed)
            digests[k] = digests[k][:start] + own + digests[k][start + DIGEST_BYTES :]
            of_rows = [digests[k][j : j + 32] for j in range(0, len(digests[k]), DIGEST_BYTES)]
            parts[8] = digest_of_rows(of_rows)
        headers[k] = encode(*parts)
    signed = _signed_headers(headers, hostile)
    votes = list(request.votes)
    for k, site in enumerate(request.voters[: len(votes)]):
        if site in hostile.sites:
            view = _view(request, signed)
            vote = Vote(request.run, request.sum_number, site, view)
            votes[k] = sign(vote, hostile.sites[site]).signature
    return replace(request, headers=signed, row_digests=tuple(digests), votes=tuple(votes))


def _view(request: Unmask, headers: tuple[bytes, ...]) -> bytes:
    task = decode(headers[0])[3] if headers else b""
    return digest_of_view(bytes.fromhex(request.run), request.sum_number, task, headers)


def _fitted_shares(reply: Shares, _: Hostile) -> Shares:
    """Whoever complains returns nothing; the tests' survivors are the first sites."""
    complaints = reply.complaints
    shares = (b"" if k in complaints else share for k, share in enumerate(reply.shares))
    return replace(reply, shares=tuple(shares))


def _fitted_view(view: Survivors, hostile: Hostile) -> Survivors:
    return replace(view, headers=_signed_headers(view.headers, hostile))


FITTED: dict[type, Callable[[Any, Hostile], Any]] = {
    Upload: _fitted_upload,
    RoundTask: _fitted_task,
    Agreement: _fitted_agreement,
    Roster: _fitted_roster,
    Unmask: _fitted_request,
    Survivors: _fitted_view,
    Shares: _fitted_shares,
}
