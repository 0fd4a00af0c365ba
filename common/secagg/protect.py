"""A site's whole calculation for one sum: masks, shares, seals, commitments and the header.

It has no state and reads no clock; client/session.py decides whether it may happen and keeps the
result before anything leaves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numpy import uint8
from numpy.typing import NDArray

from common.identity import Identity
from common.secagg.encoding import encode
from common.secagg.header import (
    SECRET_BYTES,
    Header,
    commit,
    commit_row,
    digest_of_rows,
    row_digest,
)
from common.secagg.keys import mask_key, share_key
from common.secagg.masking import Mask, mask
from common.secagg.sharing import seal, split
from common.update import QuantizedUpdate


@dataclass(frozen=True)
class Place:
    """Where a site stands in a sum."""

    run: bytes
    sum_number: int
    task: bytes  # digest
    site: int
    threshold: int


@dataclass(frozen=True)
class Protected:
    """An upload, and the share of its secrets that its own site keeps."""

    body: NDArray[uint8]
    header: Header
    sealed: tuple[bytes, ...]  # by receiver; its own is empty
    share_commitments: tuple[bytes, ...]  # by receiver
    own_share: bytes  # private


def protect(
    update: QuantizedUpdate,
    place: Place,
    chains: Sequence[bytes],
    identity: Identity,
    *,
    statement: str,
    bits: int,
    threads: int = 1,
    random: Callable[[int], bytes] = os.urandom,
) -> Protected:
    """Turn an update into what may leave the site.

    Args:
      update: What to hide.
      place: The sum, the task and this site.
      chains: Chain keys of this sum by site; its own is empty.
      identity: Signs the header.
      statement: Travels in clear; the header binds it.
      bits: Of the ring.
      threads: For the masks; the result is the same.
      random: Where the self mask key and the sharing come from; tests only.
    """
    run, number, task, own = place.run, place.sum_number, place.task, place.site
    secrets = [mask_key(chain, number, task, own, site) for site, chain in enumerate(chains)]
    secrets[own] = random(SECRET_BYTES)
    masks = [
        Mask(secret, is_added=site >= own)  # a pair's mask is added on one side only
        for site, secret in enumerate(secrets)
    ]
    masked = mask(update, masks, bits=bits, threads=threads)
    shares = split(
        b"".join(secrets), threshold=place.threshold, num_shares=len(chains), random=random
    )
    rows = tuple(commit_row(run, number, own, site, share) for site, share in enumerate(shares))
    sealed = tuple(
        b"" if site == own else _sealed(share, place, site, chains[site])
        for site, share in enumerate(shares)
    )
    header = Header(
        run=run,
        sum_number=number,
        task=task,
        site=own,
        body=hashlib.sha256(masked.body.data).digest(),
        statement=hashlib.sha256(statement.encode()).digest(),
        commitments=b"".join(
            commit(run, number, own, site, secret) for site, secret in enumerate(secrets)
        ),
        rows=digest_of_rows([row_digest(*pair) for pair in zip(rows, sealed, strict=True)]),
    )
    return Protected(masked.body, header.signed(identity), sealed, rows, shares[own])


def _sealed(share: bytes, place: Place, receiver: int, chain: bytes) -> bytes:
    key = share_key(chain, place.sum_number, place.task, place.site, receiver)
    context = share_context(place.run, place.sum_number, place.task, place.site, receiver)
    return seal(key, share, context)


def share_context(run: bytes, sum_number: int, task: bytes, sender: int, receiver: int) -> bytes:
    """What a sealed share is bound to besides its key."""
    return encode("msum1/share-ad", run, sum_number, task, sender, receiver)
