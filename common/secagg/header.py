"""What a site signs with every upload: it binds the body, the sealed shares and their secrets.

A site's secrets of one sum stand in slots: slot i is its own self mask key, slot l the key of its
pair mask with site l. A commitment to each lets the coordinator see that it recovered the right
one; a commitment to each share names whoever returns a wrong one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import RemoteProtocolError
from common.identity import Identity, check_signature
from common.secagg.encoding import decode, digest, encode

SECRET_BYTES = 32
SHARE_COMMITMENT_BYTES = 16
DIGEST_BYTES = 32
SEAL_BYTES = 16  # that sealing adds to a share
LARGEST_SIGNATURE_BYTES = 72  # of ECDSA on P-256 in DER
_LABEL = "msum1/header"
_NUM_PARTS = 10
_BIGGEST = 1 << 63


@dataclass(frozen=True)
class Header:
    """The signed summary of one upload."""

    run: bytes
    sum_number: int
    task: bytes  # digest of the task that is answered
    site: int
    body: bytes  # SHA-256
    statement: bytes  # SHA-256
    commitments: bytes  # 32 bytes per slot
    rows: bytes  # digest of all row digests
    signature: bytes = b""

    def encode(self) -> bytes:
        """With the signature, as it travels."""
        return encode(*self._parts(), self.signature)

    @classmethod
    def decode(cls, content: bytes) -> Header:
        """Read a header that came over the wire; its signature is not checked yet.

        Raises:
          RemoteProtocolError: R11. It is not a header of this version.
        """
        parts = decode(content)
        sizes = [len(part) for part in parts]
        fixed = [len(_LABEL), 32, 8, 32, 8, 32, 32]
        if len(parts) != _NUM_PARTS or sizes[:7] != fixed or parts[0] != _LABEL.encode():
            raise RemoteProtocolError("what came is no header of this version", rule="R11")
        _, run, number, task, site, body, statement, commitments, rows, signature = parts
        if len(commitments) % SECRET_BYTES or len(rows) != DIGEST_BYTES:
            text = "a header with commitments of the wrong length came"
            raise RemoteProtocolError(text, rule="R11")
        whole = int.from_bytes(number, "big"), int.from_bytes(site, "big")
        if max(whole) >= _BIGGEST:
            raise RemoteProtocolError("a header with a number beyond all sums came", rule="R11")
        return cls(run, whole[0], task, whole[1], body, statement, commitments, rows, signature)

    def signed(self, identity: Identity) -> Header:
        """The same header with its site's signature."""
        return dataclasses.replace(self, signature=identity.sign(encode(*self._parts())))

    def check_signature(self, key: ec.EllipticCurvePublicKey, sender: str) -> None:
        """Refuse a header that its site did not sign.

        Raises:
          RemoteProtocolError: R11.
        """
        if not check_signature(key, self.signature, encode(*self._parts())):
            raise RemoteProtocolError(f"{sender} did not sign its header", rule="R11")

    def commitment(self, slot: int) -> bytes:
        """The commitment to one slot's secret."""
        return self.commitments[slot * SECRET_BYTES : (slot + 1) * SECRET_BYTES]

    @property
    def num_slots(self) -> int:
        """Sites of the epoch, as this header has it."""
        return len(self.commitments) // SECRET_BYTES

    def _parts(self) -> list[bytes | int | str]:
        return [
            _LABEL,
            self.run,
            self.sum_number,
            self.task,
            self.site,
            self.body,
            self.statement,
            self.commitments,
            self.rows,
        ]


def commit(run: bytes, sum_number: int, one: int, other: int, secret: bytes) -> bytes:
    """Commitment to one secret of a sum, 32 bytes; both sites of a pair commit to the same."""
    return digest("secret", run, sum_number, min(one, other), max(one, other), secret)


def commit_share(
    run: bytes, sum_number: int, sender: int, receiver: int, slot: int, share: bytes
) -> bytes:
    """Commitment to one slot of one share, 16 bytes."""
    whole = digest("share", run, sum_number, sender, receiver, slot, share)
    return whole[:SHARE_COMMITMENT_BYTES]


def commit_row(run: bytes, sum_number: int, sender: int, receiver: int, share: bytes) -> bytes:
    """Commitments to every slot of the share vector that one receiver gets."""
    slots = range(len(share) // SECRET_BYTES)
    return b"".join(
        commit_share(run, sum_number, sender, receiver, slot, slot_of(share, slot))
        for slot in slots
    )


def slot_of(share: bytes, slot: int) -> bytes:
    """One slot of a share vector."""
    return share[slot * SECRET_BYTES : (slot + 1) * SECRET_BYTES]


def row_digest(share_commitments: bytes, sealed: bytes) -> bytes:
    """What binds a sealed share and its commitments to the header, 32 bytes."""
    return hashlib.sha256(encode(share_commitments, sealed)).digest()


def digest_of_rows(row_digests: Sequence[bytes]) -> bytes:
    """The header's digest of all rows: one row can be shown to belong without the others."""
    return hashlib.sha256(b"".join(row_digests)).digest()


def overhead_bytes(num_sites: int) -> int:
    """What an upload carries at most besides its body: shares, commitments and header."""
    sealed = (num_sites - 1) * (num_sites * SECRET_BYTES + SEAL_BYTES)
    share_commitments = num_sites**2 * SHARE_COMMITMENT_BYTES
    return sealed + share_commitments + _header_bytes(num_sites)


def relayed_bytes(num_sites: int) -> int:
    """What a site gets at most to unmask a sum, where nobody dropped out."""
    sealed = num_sites * SECRET_BYTES + SEAL_BYTES
    share_commitments = num_sites * SHARE_COMMITMENT_BYTES
    row_digests = num_sites * DIGEST_BYTES
    return num_sites * (_header_bytes(num_sites) + sealed + share_commitments + row_digests)


def _header_bytes(num_sites: int) -> int:
    empty = Header(bytes(32), 0, bytes(32), 0, bytes(32), bytes(32), b"", bytes(32))
    return len(empty.encode()) + num_sites * SECRET_BYTES + LARGEST_SIGNATURE_BYTES
