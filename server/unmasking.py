"""The second exchange of a sum: votes if somebody dropped, shares, and the masks removed."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.errors import RemoteProtocolError, RoundAborted
from common.manifest import most_colluders
from common.messages import Message, Shares, Survivors, Unmask, Vote
from common.secagg.header import (
    SECRET_BYTES,
    SHARE_COMMITMENT_BYTES,
    Header,
    commit,
    commit_share,
    slot_of,
)
from common.secagg.masking import Mask, add_masks, add_tail_masks
from common.secagg.sharing import recover
from common.secagg.view import digest_of_view
from common.signing import check_signed, sign
from server.collected import Collected
from server.epoch import Epoch
from server.exchange import Exchange

MAX_ASKS = 5  # times that survivors are asked, within the study's deadline
MAX_SUBSETS = 2000  # of shares that are tried where a site shared wrongly and committed to it
SHARED_WRONGLY = "shared a secret wrongly"


@dataclass
class Answers:
    """Shares that match their commitments: by (owner, slot), then by the site that gave it."""

    view: bytes
    good: dict[tuple[int, int], dict[int, bytes]]
    answered: set[int] = field(default_factory=set)
    convicted: dict[int, str] = field(default_factory=dict)  # who signed something wrong, and what
    complaints: Counter[int] = field(default_factory=Counter)  # by the site complained about
    disputes: list[str] = field(default_factory=list)  # one of a pair is wrong, nobody can say who

    def is_enough(self, threshold: int) -> bool:
        """Whether every secret can be recovered."""
        return all(len(shares) >= threshold for shares in self.good.values())


def unmask(exchange: Exchange, epoch: Epoch, collected: Collected, *, threads: int = 1) -> Answers:
    """Remove every mask from the sum, in place.

    Args:
      exchange: Reaches the members.
      epoch: Their keys.
      collected: The masked sum; holds the exact one afterwards.
      threads: For the masks.

    Returns:
      Who answered, and what was wrong.

    Raises:
      RoundAborted: Fewer than the threshold answer, or a site shared its secrets wrongly: the sum
        cannot be finished, and it can never be asked for again.
    """
    answers = _ask_for_shares(exchange, epoch, collected)
    dropouts = _dropouts(epoch, collected)
    masks = []
    for owner, slot in answers.good:
        secret = _secret(exchange, epoch, collected, answers, owner, slot)
        # A site adds its self mask and the pair masks with later sites, and subtracts the others.
        was_added = slot >= owner
        masks.append(Mask(secret, is_added=not was_added))
    assert len(masks) == len(collected.uploads) * (1 + len(dropouts))  # noqa: S101
    add_masks(collected.values, masks, threads=threads)
    add_tail_masks(collected.tail, masks, collected.values.size)
    return answers


def _dropouts(epoch: Epoch, collected: Collected) -> list[int]:
    return [site for site in range(len(epoch.members)) if site not in collected.uploads]


def _ask_for_shares(exchange: Exchange, epoch: Epoch, collected: Collected) -> Answers:
    survivors, threshold = collected.survivors, epoch.manifest.threshold
    number, headers = collected.sum_number, collected.headers()
    view = digest_of_view(epoch.run, number, collected.task, headers)
    votes: dict[int, bytes] = {}
    if len(survivors) < len(epoch.members):
        votes = _ask_for_votes(exchange, epoch, collected, view)
    wanted = itertools.chain.from_iterable(
        [(owner, owner), *((owner, slot) for slot in _dropouts(epoch, collected))]
        for owner in survivors
    )
    answers = Answers(view, {secret: {} for secret in wanted})
    names = epoch.manifest.names
    digests = [collected.uploads[site].row_digests() for site in survivors]

    def request(site: int) -> Unmask:
        kept = [collected.uploads[owner] for owner in survivors]
        message = Unmask(
            run=epoch.run.hex(),
            sum_number=number,
            survivors=survivors,
            headers=headers,
            voters=tuple(votes),
            votes=tuple(votes.values()),
            sealed=tuple(one.sealed[site] for one in kept),
            share_commitments=tuple(one.share_commitments[site] for one in kept),
            row_digests=tuple(digests),
        )
        return sign(message, exchange.credentials.identity)

    def keep(site: int, reply: Message) -> None:
        _take_shares(site, reply, epoch, collected, answers)
        if isinstance(reply, Shares) and reply.complaints:
            named = ", ".join(names[owner] for owner in reply.complaints)
            error = RemoteProtocolError(f"complains of the shares of {named}", rule="R13")
            exchange.evidence.keep(reply, error, now=exchange.now(), by=names[site])

    for left_s in _asks(exchange.deadlines.unmask_s):
        waiting = {names[k]: request(k) for k in survivors if k not in answers.answered}
        exchange.ask_all(names, waiting, keep, left_s, lambda: answers.is_enough(threshold))
        if answers.is_enough(threshold):
            return answers
    fewest = min(len(shares) for shares in answers.good.values())
    silent = [names[site] for site in survivors if site not in answers.answered]
    wrong = [f"{names[site]} {what}" for site, what in answers.convicted.items()]
    what_else = "; ".join([*wrong, *answers.disputes]) or "nothing wrong came"
    raise RoundAborted(
        f"sum {number}: {fewest} good shares of a secret came, {threshold} are needed. Silent: "
        f"{', '.join(silent) or 'nobody'}; {what_else}. Bring silent sites back and resume: the "
        "same request is repeated. If none is silent, approve a study without the sites named"
    )


def _ask_for_votes(
    exchange: Exchange, epoch: Epoch, collected: Collected, view: bytes
) -> dict[int, bytes]:
    names, threshold = epoch.manifest.names, epoch.manifest.threshold
    number, survivors = collected.sum_number, collected.survivors
    message = Survivors(epoch.run.hex(), number, survivors, collected.headers())
    message = sign(message, exchange.credentials.identity)
    votes: dict[int, bytes] = {}

    def keep(site: int, reply: Message) -> None:
        if not isinstance(reply, Vote) or not _is_about(reply, site, epoch, collected, view):
            raise RemoteProtocolError("a vote for other survivors came", rule="R11")
        check_signed(reply, epoch.members[site].key, sender=names[site], rule="R12")
        votes[site] = reply.signature

    for left_s in _asks(exchange.deadlines.unmask_s):
        waiting = {names[k]: message for k in survivors if k not in votes}
        exchange.ask_all(names, waiting, keep, left_s, lambda: len(votes) >= threshold)
        if len(votes) >= threshold:
            return dict(sorted(votes.items()))
    silent = ", ".join(names[site] for site in survivors if site not in votes)
    raise RoundAborted(
        f"sum {number}: {len(votes)} sites voted, {threshold} are needed; bring {silent} back "
        "and resume: the same request is repeated"
    )


def _asks(deadline_s: float) -> Iterator[float]:
    """The seconds that are left, each time that silent survivors are asked."""
    end = time.monotonic() + deadline_s
    for _ in range(MAX_ASKS):
        left_s = end - time.monotonic()
        if left_s <= 0:
            return
        yield left_s


def _is_about(
    reply: Vote | Shares, site: int, epoch: Epoch, collected: Collected, view: bytes
) -> bool:
    """Whether a reply says that it is this site's, about this sum and these survivors."""
    about = (epoch.run.hex(), collected.sum_number, site, view)
    return (reply.run, reply.sum_number, reply.site, reply.view) == about


def _take_shares(
    site: int, reply: Message, epoch: Epoch, collected: Collected, answers: Answers
) -> None:
    """Keep the shares that match their commitments; skip and name the others."""
    number, view = collected.sum_number, answers.view
    if not isinstance(reply, Shares) or not _is_about(reply, site, epoch, collected, view):
        raise RemoteProtocolError("an answer about other survivors came", rule="R8")
    name = epoch.members[site].name
    check_signed(reply, epoch.members[site].key, sender=name, rule="R13")
    survivors, dropouts = collected.survivors, _dropouts(epoch, collected)
    others = [owner for owner in survivors if owner != site]
    if list(reply.complaints) != [owner for owner in others if owner in reply.complaints]:
        raise RemoteProtocolError(f"{name} complains of sites it had no share of", rule="R13")
    answers.answered.add(site)
    bound = most_colluders(len(epoch.members), len(epoch.members))
    num_bytes = SECRET_BYTES * (1 + len(dropouts))
    sizes = [0 if owner in reply.complaints else num_bytes for owner in survivors]
    if [len(share) for share in reply.shares] != sizes:
        answers.convicted[site] = "returned shares of the wrong length"
        raise RemoteProtocolError(f"{name} returned shares of the wrong length", rule="R13")
    wrong = []
    for owner, share in zip(survivors, reply.shares, strict=True):
        if owner in reply.complaints:
            other = epoch.members[owner].name
            answers.disputes.append(f"{name} cannot open the share that {other} sealed for it")
            answers.complaints[owner] += 1
            if answers.complaints[owner] > bound:
                answers.convicted[owner] = "sealed shares that its peers cannot open"
            continue
        row = collected.uploads[owner].share_commitments[site]
        for place, slot in enumerate((owner, *dropouts)):
            part = slot_of(share, place)
            committed = row[slot * SHARE_COMMITMENT_BYTES :][:SHARE_COMMITMENT_BYTES]
            if commit_share(epoch.run, number, owner, site, slot, part) == committed:
                answers.good[owner, slot][site] = part
            else:
                wrong.append(epoch.members[owner].name)
    if wrong:
        answers.convicted[site] = "returned shares unlike their commitments"
        text = f"{name} returned shares of {', '.join(sorted(set(wrong)))} unlike their commitments"
        raise RemoteProtocolError(text, rule="R13")


def _secret(
    exchange: Exchange,
    epoch: Epoch,
    collected: Collected,
    answers: Answers,
    owner: int,
    slot: int,
) -> bytes:
    """One secret, recovered and compared with its commitment; who shared it wrongly is named."""
    number, content = collected.sum_number, collected.uploads[owner].header
    header, name = Header.decode(content), epoch.members[owner].name
    shares = answers.good[owner, slot]
    subsets = itertools.combinations(sorted(shares), epoch.manifest.threshold)
    for tried, subset in enumerate(itertools.islice(subsets, MAX_SUBSETS)):
        secret = recover({site: shares[site] for site in subset})
        if commit(epoch.run, number, owner, slot, secret) != header.commitment(slot):
            continue
        if tried and answers.convicted.get(owner) != SHARED_WRONGLY:  # one line per site is enough
            answers.convicted[owner] = SHARED_WRONGLY
            error = RemoteProtocolError("shared a secret unlike its commitment", rule="R13")
            exchange.evidence.keep_header(owner, content, error, now=exchange.now(), by=name)
        return secret
    raise RoundAborted(
        f"sum {number}: {name} shared a secret that is not the one it committed to; its signed "
        "upload shows it. The sum is lost; approve a study without this site"
    )
