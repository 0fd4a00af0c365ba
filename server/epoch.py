"""Keys: the coordinator invites, collects everybody's keys and passes them on.

The coordinator sees public keys only. It checks what the sites will check, so that a faulty member
is named here instead of stopping everybody there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cryptography import x509

from common.errors import RemoteProtocolError
from common.identity import Certified, Identity, read_certified, read_revocation_list
from common.manifest import Manifest
from common.messages import (
    Agreement,
    Encapsulated,
    Invitation,
    Message,
    Roster,
    RoundTask,
    SiteKeys,
)
from common.roster import check_encapsulated, check_site_keys
from common.secagg.keys import run_id
from common.signing import check_signed, sign
from server.exchange import Exchange


@dataclass(frozen=True)
class Epoch:
    """What a manifest became: its members' checked keys and the secrets they sent each other."""

    manifest: Manifest
    roster: Roster
    agreements: tuple[Agreement, ...]  # by site
    # Sites that answered a task and so hold every pair key; after a restart they are told again.
    delivered: set[int] = field(default_factory=set, compare=False)

    @functools.cached_property
    def run(self) -> bytes:
        """The run's id; 32 bytes."""
        roster = self.roster
        manifest = bytes.fromhex(roster.run)
        return run_id(manifest, roster.public_keys, roster.kem_keys, roster.nonces)

    @functools.cached_property
    def members(self) -> tuple[Certified, ...]:
        """Who takes part, by site."""
        return tuple(map(read_certified, self.roster.certificates))

    def on_list(self, listed: x509.CertificateRevocationList) -> set[str]:
        """Members whose certificate was revoked."""
        by_serial = listed.get_revoked_certificate_by_serial_number
        return {one.name for one in self.members if by_serial(one.serial_number) is not None}

    def encapsulated_for(self, site: int) -> Iterator[tuple[bytes, bytes]]:
        """(Ciphertext, signature) from each site before this one, in order."""
        for sender in self.agreements[:site]:
            place = site - sender.site - 1
            yield sender.ciphertexts[place], sender.ciphertext_signatures[place]

    def task_for(
        self, site: int, task: RoundTask, coordinator: Identity, revoked: bytes
    ) -> RoundTask:
        """A task as one site gets it, with the current revocation list."""
        relayed = [] if site in self.delivered else list(self.encapsulated_for(site))
        whole = replace(
            task,
            ciphertexts=tuple(ciphertext for ciphertext, _ in relayed),
            ciphertext_signatures=tuple(signature for _, signature in relayed),
            revoked=revoked,
        )
        return sign(whole, coordinator)


def exchange_keys(exchange: Exchange, manifest: Manifest) -> tuple[Epoch | None, dict[str, str]]:
    """Both exchanges of an epoch.

    Returns:
      The epoch, or None where a member did not take part; and those members with a word each.
    """
    credentials = exchange.credentials
    trust, revoked = credentials.trust, credentials.revoked()
    # The members are held against the list that the sites are told; every sum brings a newer one.
    listed = read_revocation_list(revoked, trust.ca, exchange.now())
    invitation = Invitation(manifest.canonical(), credentials.identity.certificate, revoked)
    invitation = sign(invitation, credentials.identity)
    keys: dict[int, SiteKeys] = {}

    def keep(index: int, reply: Message) -> None:
        if not isinstance(reply, SiteKeys) or reply.site != index:
            raise RemoteProtocolError("an invitation was not answered with this site's keys")
        check_site_keys(reply, manifest, trust, listed, exchange.now())
        known = {key for other in keys.values() for key in (other.public_key, other.kem_key)}
        if known & {reply.public_key, reply.kem_key}:
            raise RemoteProtocolError("a site sent the fresh key of another one", rule="R3")
        keys[index] = reply

    invitations = dict.fromkeys(manifest.names, invitation)
    missing = exchange.ask_all(manifest.names, invitations, keep, exchange.deadlines.keys_s)
    if missing:
        return None, missing
    ordered = [keys[site] for site in range(len(manifest.members))]
    roster = Roster(
        run=manifest.digest(),
        public_keys=tuple(one.public_key for one in ordered),
        kem_keys=tuple(one.kem_key for one in ordered),
        nonces=tuple(one.nonce for one in ordered),
        certificates=tuple(one.certificate for one in ordered),
        signatures=tuple(one.signature for one in ordered),
        revoked=revoked,
    )
    epoch = Epoch(manifest, sign(roster, credentials.identity), ())
    return _agreed(exchange, epoch)


def _agreed(exchange: Exchange, epoch: Epoch) -> tuple[Epoch | None, dict[str, str]]:
    names = epoch.manifest.names
    agreements: dict[int, Agreement] = {}

    def keep(index: int, reply: Message) -> None:
        if not isinstance(reply, Agreement) or reply.site != index:
            raise RemoteProtocolError("a roster was not answered with this site's agreement")
        _check_agreement(reply, epoch)
        agreements[index] = reply

    rosters = dict.fromkeys(names, epoch.roster)
    missing = exchange.ask_all(names, rosters, keep, exchange.deadlines.keys_s)
    if missing:
        return None, missing
    ordered = tuple(agreements[site] for site in range(len(names)))
    return replace(epoch, agreements=ordered), {}


def _check_agreement(reply: Agreement, epoch: Epoch) -> None:
    sender, run = epoch.members[reply.site], epoch.run.hex()
    if reply.run != run:
        raise RemoteProtocolError("a site agreed to another roster", rule="R7")
    check_signed(reply, sender.key, sender=sender.name, rule="R3")
    receivers = range(reply.site + 1, len(epoch.members))
    if not len(reply.ciphertexts) == len(reply.ciphertext_signatures) == len(receivers):
        raise RemoteProtocolError("there is not one ciphertext for each later site", rule="R3")
    for receiver, *signed in zip(
        receivers, reply.ciphertexts, reply.ciphertext_signatures, strict=True
    ):
        check_encapsulated(Encapsulated(run, reply.site, receiver, *signed), sender)
