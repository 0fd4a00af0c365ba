"""A coordinator that keeps all it ever saw and takes from every upload what it can take off."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from client.journal import EpochMemory, Journal, SumMemory
from common.errors import RemoteProtocolError
from common.identity import Identity
from common.messages import Message, Roster, Shares, Unmask, Upload
from common.secagg.header import SECRET_BYTES, Header, commit, slot_of
from common.secagg.keys import advance, exchange, first_chain_key, mask_key, share_key
from common.secagg.masking import Mask, add_masks, add_tail_masks, signed, split_body, unpack
from common.secagg.protect import share_context
from common.secagg.sharing import recover, unseal

Seen = Sequence[tuple[str, Message]]


@dataclass(frozen=True)
class Loot:
    """What a colluding site hands over between its upload and its answer."""

    epoch: EpochMemory
    last: SumMemory

    @classmethod
    def of(cls, journal: Journal) -> Loot:
        epoch, last = journal.epoch(), journal.sum()
        assert epoch is not None
        assert last is not None
        return cls(epoch, last)


class Attacker:
    """It holds every message that was sent and received, its own key, and what colluders know."""

    def __init__(
        self,
        seen: Seen,
        names: Sequence[str],
        *,
        bits: int,
        num_params: int,
        identity: Identity | None = None,
        colluders: Mapping[int, Loot] | None = None,
    ) -> None:
        self.bits, self.num_params = bits, num_params
        self._identity = identity
        self._colluders = colluders or {}
        self._num_sites = len(names)
        self._uploads = {
            (message.sum_number, names.index(site)): message
            for site, message in seen
            if isinstance(message, Upload)
        }
        self._survivors = {
            message.sum_number: message.survivors
            for _, message in seen
            if isinstance(message, Unmask)
        }
        self._rosters = [message for _, message in seen if isinstance(message, Roster)]
        self._answers = [message for _, message in seen if isinstance(message, Shares)]

    def sites(self, sum_number: int) -> list[int]:
        """Whose uploads it has."""
        return sorted(site for number, site in self._uploads if number == sum_number)

    def entries(self, sum_number: int, site: int) -> NDArray[np.uint32]:
        """An upload as it came, shape (num_params,)."""
        return unpack(self._packed(sum_number, site), bits=self.bits).copy()

    def tail(self, sum_number: int, site: int) -> NDArray[np.uint64]:
        body = self._uploads[sum_number, site].body
        return split_body(body, self.num_params, bits=self.bits)[1].copy()

    def stripped(self, sum_number: int, site: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Entries and tail of an upload without every mask whose key is known."""
        known = self.keys(sum_number)
        masks = [
            Mask(known[site, slot], is_added=slot < site)  # off again what the site put on
            for slot in range(self._num_sites)
            if (site, slot) in known
        ]
        values, tail = self.entries(sum_number, site), self.tail(sum_number, site)
        add_masks(values, masks)
        add_tail_masks(tail, masks, self.num_params)
        return signed(values, bits=self.bits), tail.view(np.int64)

    def keys(self, sum_number: int) -> dict[tuple[int, int], bytes]:
        """Keys of masks by site and slot, each of them compared with the site's commitment."""
        found: dict[tuple[int, int], bytes] = {}
        for place, shares in self.shares(sum_number).items():
            for size in range(1, 1 + len(shares)):
                key = recover(dict(list(shares.items())[:size]))
                if self._is_right(sum_number, place, key):
                    found[place] = key
        for site, loot in self._colluders.items():
            for other, chain in enumerate(loot.epoch.chains):
                if chain:
                    key = mask_key(chain, sum_number, loot.last.task, site, other)
                    found[site, other] = key
        found |= {
            place: key
            for place, key in self._guesses(sum_number)
            if self._is_right(sum_number, place, key)
        }
        both = {**{(slot, owner): key for (owner, slot), key in found.items()}, **found}
        return {place: key for place, key in both.items() if self._is_right(sum_number, place, key)}

    def shares(self, sum_number: int) -> dict[tuple[int, int], dict[int, bytes]]:
        """Every share it has of a sum's secrets: by owner and slot, then by who held it."""
        found: dict[tuple[int, int], dict[int, bytes]] = {}
        for answer in self._answers:
            if answer.sum_number == sum_number:
                for owner, slot, share in self._answered(answer):
                    found.setdefault((owner, slot), {})[answer.site] = share
        for site, loot in self._colluders.items():
            for owner, whole in self._opened(sum_number, site, loot):
                for slot in range(self._num_sites):
                    found.setdefault((owner, slot), {})[site] = slot_of(whole, slot)
        return found

    def _guesses(self, sum_number: int) -> Iterable[tuple[tuple[int, int], bytes]]:
        """Keys that would be right if a pair key followed from what is public, or from its own."""
        for roster in self._rosters[:1]:
            known = {bytes(32), *roster.public_keys}
            if self._identity is not None:
                own = self._identity.key.private_numbers().private_value.to_bytes(32, "big")
                known |= {own, *(exchange(own, public) for public in roster.public_keys)}
            for site in self.sites(sum_number):
                header = Header.decode(self._uploads[sum_number, site].header)
                for other, key in itertools.product(range(self._num_sites), known):
                    yield (site, other), key
                    first = first_chain_key(header.run, key, b"", site, other)
                    for chain in (key, first):
                        at = advance(chain, at=0, to=sum_number)
                        yield (site, other), mask_key(at, sum_number, header.task, site, other)

    def _answered(self, answer: Shares) -> Iterable[tuple[int, int, bytes]]:
        survivors = self._survivors[answer.sum_number]
        dropouts = [site for site in range(self._num_sites) if site not in survivors]
        for owner, shares in zip(survivors, answer.shares, strict=True):
            for place, slot in enumerate((owner, *dropouts)):
                yield owner, slot, shares[place * SECRET_BYTES :][:SECRET_BYTES]

    def _opened(self, sum_number: int, site: int, loot: Loot) -> Iterable[tuple[int, bytes]]:
        """The share vectors that a colluding site was sent, and its own."""
        if loot.last.own_share:
            yield site, loot.last.own_share
        for owner in self.sites(sum_number):
            if owner == site:
                continue
            sealed = self._uploads[sum_number, owner].sealed[site]
            about = (sum_number, loot.last.task, owner, site)
            key = share_key(loot.epoch.chains[owner], *about)
            with suppress(RemoteProtocolError):  # a key that has moved on
                yield owner, unseal(key, sealed, share_context(loot.epoch.run, *about))

    def _is_right(self, sum_number: int, place: tuple[int, int], key: bytes) -> bool:
        site, slot = place
        if (sum_number, site) not in self._uploads:
            return False
        header = Header.decode(self._uploads[sum_number, site].header)
        return commit(header.run, sum_number, site, slot, key) == header.commitment(slot)

    def _packed(self, sum_number: int, site: int) -> NDArray[np.uint8]:
        body = self._uploads[sum_number, site].body
        return split_body(body, self.num_params, bits=self.bits)[0]


def chances(lanes: NDArray[np.unsignedinteger], *, bits: int) -> dict[str, float]:
    """How likely lanes at least this uneven are if every bit is random, by what is looked at."""
    if not lanes.size:
        return {}
    columns = lanes.astype(lanes.dtype.newbyteorder("<")).view(np.uint8)
    columns = columns.reshape(lanes.size, -1)[:, : bits // 8]
    differences = columns[1:] - columns[:-1]
    found = {
        "all bytes": _even(columns),
        "bits": _bits_even(columns),
        "differences of neighbours": _even(differences[::2]),  # of no lane twice
    }
    return found | {f"byte {k}": _even(columns[:, k]) for k in range(bits // 8)}


def _even(values: NDArray[np.uint8]) -> float:
    """Chi-square of a histogram of bytes."""
    found, expected = np.bincount(values.reshape(-1), minlength=256), values.size / 256
    return float(chi2.sf(np.square(found - expected).sum() / expected, 255))


def _bits_even(columns: NDArray[np.uint8]) -> float:
    """Chi-square of how often each bit of a lane is set."""
    num_set = np.unpackbits(columns, axis=1).sum(axis=0, dtype=np.int64)
    num_lanes = len(columns)
    return float(chi2.sf(np.square(2 * num_set - num_lanes).sum() / num_lanes, num_set.size))


def chance_of_correlation(one: NDArray[np.integer], other: NDArray[np.integer]) -> float:
    """How likely a correlation this far from 0 is if one of the two is random."""
    correlation = np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1]
    return float(2 * norm.sf(abs(correlation) * np.sqrt(one.size)))
