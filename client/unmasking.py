"""The end of a sum at a site: one vote on the survivors, one answer with its shares.

A site answers for exactly one view of the survivors per sum. Before it answers, its chain keys have
moved on, on disk: nothing it holds afterwards opens a share of this sum again.
"""

from __future__ import annotations

import json
import logging

from client.journal import EpochMemory, Releases, SumMemory
from client.session import Session, releases
from common.errors import RemoteProtocolError
from common.messages import Shares, Survivors, Unmask, Vote
from common.record import as_table, from_table
from common.secagg.header import (
    DIGEST_BYTES,
    SECRET_BYTES,
    SHARE_COMMITMENT_BYTES,
    Header,
    commit_row,
    digest_of_rows,
    row_digest,
    slot_of,
)
from common.secagg.keys import advance, share_key
from common.secagg.phases import Phase
from common.secagg.protect import share_context
from common.secagg.sharing import unseal
from common.secagg.view import check_view, check_votes, digest_of_view
from common.signing import sign

log = logging.getLogger("consilium.site")


def vote(session: Session, view: Survivors) -> Vote:
    """Confirm a view of the survivors; from here on no other one is answered.

    Raises:
      RemoteProtocolError: R7 to R11 or R14.
    """
    said, own = _current(session, view)
    about = digest_of_view(own.run, own.sum_number, own.task, view.headers)
    if said.view == about and said.vote:
        return from_table(json.loads(said.vote), Vote)
    phase = session.epoch.phase
    if said.view != about and phase != Phase.VOTED:
        phase = phase.after(view)
    _check(session, view, own, said, about)
    reply = sign(Vote(view.run, view.sum_number, session.index, about), session.party.identity)
    update = {"view": about, "vote": json.dumps(as_table(reply))}
    session.epoch = session.epoch.model_copy(update={"phase": phase})
    session.journal.go_on(session.epoch, said.model_copy(update=update))
    return reply


def unmask(session: Session, request: Unmask) -> Shares:
    """Return this site's shares of the survivors' self masks and of the dropouts' pair masks.

    Raises:
      RemoteProtocolError: R7 to R14; nothing was answered.
    """
    said, own = _current(session, request)
    about = digest_of_view(own.run, own.sum_number, own.task, request.headers)
    if said.view == about and said.shares:
        return from_table(json.loads(said.shares), Shares)
    if said.shares:
        raise RemoteProtocolError(
            f"sum {said.sum_number} was answered for other survivors", rule="R8"
        )
    phase = session.epoch.phase.after(request)
    headers = _check(session, request, own, said, about)
    check_votes(request, view=about, threshold=session.manifest.threshold, keys=session.member_keys)
    _check_rows(session, request, headers)
    chains = _chains_of(session.epoch, said.sum_number)
    shares: list[bytes] = []
    complaints: list[int] = []
    dropouts = sorted(set(range(len(chains))) - set(headers))
    for position, sender in enumerate(request.survivors):
        share = said.own_share if sender == session.index else b""
        if sender != session.index:
            share = _opened(session, request, position, headers[sender], chains[sender])
        if not share:
            complaints.append(sender)
        shares.append(b"".join(slot_of(share, slot) for slot in (sender, *dropouts)))
    reply = Shares(
        request.run,
        request.sum_number,
        session.index,
        about,
        tuple(shares),
        tuple(complaints),
    )
    reply = sign(reply, session.party.identity)
    onwards = tuple(
        advance(key, at=said.sum_number, to=said.sum_number + 1) if key else b"" for key in chains
    )
    answered = {"own_share": b"", "view": about, "shares": json.dumps(as_table(reply))}
    session.epoch = session.epoch.model_copy(
        update={"phase": phase, "chains": onwards, "chain_step": said.sum_number + 1}
    )
    told = Releases(session.manifest.run, releases(said.purpose, said.round_number))
    session.journal.record_answer(session.epoch, said.model_copy(update=answered), told)
    return reply


def _current(session: Session, message: Survivors | Unmask) -> tuple[SumMemory, Header]:
    """The upload that a message is about."""
    session.check_sender(message)
    if message.run != session.epoch.run.hex():
        raise RemoteProtocolError("a request of another run arrived", rule="R7")
    said = session.journal.sum()
    if said is None or message.sum_number != said.sum_number:
        last = "none" if said is None else said.sum_number
        raise RemoteProtocolError(
            f"a request about sum {message.sum_number}; this site's last is {last}", rule="R14"
        )
    own = Header.decode(said.header)
    if own.run != session.epoch.run:
        raise RemoteProtocolError("a request about a sum of another epoch", rule="R14")
    return said, own


def _check(
    session: Session, view: Survivors | Unmask, own: Header, said: SumMemory, about: bytes
) -> dict[int, Header]:
    headers = check_view(
        view, own=own, threshold=session.manifest.threshold, keys=session.member_keys
    )
    if said.view not in (b"", about):
        raise RemoteProtocolError("this site has voted for other survivors", rule="R11")
    return dict(headers)


def _check_rows(session: Session, request: Unmask, headers: dict[int, Header]) -> None:
    """The sealed shares and commitments must be those that the survivors' headers bind."""
    num_sites = len(session.manifest.members)
    lists = (request.sealed, request.share_commitments, request.row_digests)
    if any(len(entries) != len(headers) for entries in lists):
        raise RemoteProtocolError("there is not one sealed share per survivor", rule="R13")
    for (site, header), sealed, commitments, digests in zip(headers.items(), *lists, strict=True):
        own = digests[session.index * DIGEST_BYTES :][:DIGEST_BYTES]
        rows = [digests[k : k + DIGEST_BYTES] for k in range(0, len(digests), DIGEST_BYTES)]
        if (
            len(commitments) != num_sites * SHARE_COMMITMENT_BYTES
            or len(digests) != num_sites * DIGEST_BYTES
            or own != row_digest(commitments, sealed)
            or digest_of_rows(rows) != header.rows
        ):
            raise RemoteProtocolError(
                f"the share of site {site} is not the one its header binds", rule="R13"
            )


def _chains_of(epoch: EpochMemory, sum_number: int) -> tuple[bytes, ...]:
    if epoch.chain_step != sum_number:
        raise RemoteProtocolError(f"the keys of sum {sum_number} are gone", rule="R14")
    return epoch.chains


def _opened(
    session: Session, request: Unmask, position: int, header: Header, chain: bytes
) -> bytes:
    """One sealed share, or nothing where its sender sealed a bad one: that names the pair."""
    about = (header.run, header.sum_number, header.site, session.index)
    number = header.sum_number
    key = share_key(chain, number, header.task, header.site, session.index)
    context = share_context(header.run, number, header.task, header.site, session.index)
    name = session.manifest.names[header.site]
    try:
        share = unseal(key, request.sealed[position], context)
    except RemoteProtocolError as error:
        log.error("sum %d: the share of %s: %s", number, name, error)  # noqa: TRY400
        return b""
    if len(share) != SECRET_BYTES * len(session.manifest.members):
        log.error("sum %d: the share of %s has the wrong length", number, name)
        return b""
    if commit_row(*about, share) != request.share_commitments[position]:
        log.error("sum %d: the share of %s is unlike its commitment", number, name)
        return b""
    return share
