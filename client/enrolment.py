"""Once per epoch at a site: fresh keys out, everybody's keys in, one chain key per other site."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from client.journal import EpochMemory, Journal
from client.session import Party, Session
from common.errors import RemoteProtocolError
from common.manifest import Manifest
from common.messages import (
    Agreement,
    Encapsulated,
    Invitation,
    Roster,
    SiteKeys,
    signed_content,
)
from common.record import as_table, from_table
from common.roster import check_invitation, check_roster
from common.secagg.keys import EpochKeys, encapsulate, exchange, first_chain_key, run_id
from common.secagg.phases import Phase
from common.signing import sign


def join(
    invitation: Invitation,
    journal: Journal,
    party: Party,
    approve: Callable[[Manifest], None],
) -> SiteKeys:
    """Answer an invitation with fresh keys.

    Args:
      invitation: Of the coordinator.
      journal: This site's.
      party: This site.
      approve: Holds the manifest against the approved study and the policy; raises R2.

    Raises:
      RemoteProtocolError: R1, R2 or R3.
    """
    journal.check()
    manifest = Manifest.parse(invitation.manifest)
    check_invitation(invitation, manifest, party.trust, party.now)
    approve(manifest)
    epoch = journal.epoch()
    if epoch and epoch.phase == Phase.KEYS and epoch.manifest == invitation.manifest:
        return from_table(json.loads(epoch.reply), SiteKeys)
    if journal.has_seen(manifest.digest()):
        raise RemoteProtocolError("this manifest was answered before", rule="R1")
    is_new_run = epoch is None or Manifest.parse(epoch.manifest).run != manifest.run
    if is_new_run and journal.has_seen_run(manifest.run):
        # Its sums were charged to the ledger already: they would be trained again for nothing.
        raise RemoteProtocolError("a run that another one has followed came again", rule="R1")
    keys = EpochKeys.generate()
    reply = SiteKeys(
        run=manifest.digest(),
        site=manifest.names.index(party.identity.name),
        public_key=keys.public_key,
        kem_key=keys.kem_key,
        nonce=keys.nonce,
        certificate=party.identity.certificate,
    )
    reply = sign(reply, party.identity)
    before = epoch.phase if epoch else Phase.NEW
    begun = EpochMemory(
        manifest=invitation.manifest,
        phase=before.after(invitation),
        dh=keys.dh,
        kem=keys.kem,
        reply=json.dumps(as_table(reply)),
        certificates=(invitation.certificate,),
    )
    journal.begin_epoch(begun, manifest.digest(), manifest.run, is_new_run=is_new_run)
    return reply


def agree(session: Session, roster: Roster) -> Agreement:
    """Check everybody's keys, derive the pair keys and sign the roster.

    Raises:
      RemoteProtocolError: R3, R7 or R8.
    """
    epoch, own = session.epoch, session.index
    session.check_sender(roster)
    request = hashlib.sha256(signed_content(roster)).hexdigest()
    if epoch.phase == Phase.READY and epoch.request == request:
        return from_table(json.loads(epoch.reply), Agreement)
    phase = epoch.phase.after(roster)
    if roster.run != session.manifest.digest():
        raise RemoteProtocolError("a roster of another epoch came", rule="R7")
    members = check_roster(roster, session.manifest, session.party.trust, session.party.now)
    if roster.keys_of(own) != from_table(json.loads(epoch.reply), SiteKeys):
        raise RemoteProtocolError("this site's own keys were altered", rule="R3")
    run = run_id(bytes.fromhex(roster.run), roster.public_keys, roster.kem_keys, roster.nonces)
    others = [site for site in range(len(members)) if site != own]
    exchanged = {site: exchange(epoch.dh, roster.public_keys[site]) for site in others}
    sent = {site: encapsulate(roster.kem_keys[site]) for site in others if site > own}
    signed = [
        sign(Encapsulated(run.hex(), own, site, ciphertext), session.party.identity)
        for site, (_, ciphertext) in sent.items()
    ]
    reply = Agreement(
        run=run.hex(),
        site=own,
        ciphertexts=tuple(one.ciphertext for one in signed),
        ciphertext_signatures=tuple(one.signature for one in signed),
    )
    reply = sign(reply, session.party.identity)
    chains = {
        site: first_chain_key(run, exchanged.pop(site), secret, own, site)
        for site, (secret, _) in sent.items()
    }
    agreed = epoch.model_copy(
        update={
            "phase": phase,
            "dh": b"",
            "kem": epoch.kem if exchanged else b"",
            "request": request,
            "reply": json.dumps(as_table(reply)),
            "run": run,
            "certificates": (epoch.certificates[0], *roster.certificates),
            "exchanged": _by_site(exchanged, len(members)),
            "chains": _by_site(chains, len(members)),
        }
    )
    session.journal.go_on(agreed)
    session.epoch = agreed
    return reply


def _by_site(values: dict[int, bytes], num_sites: int) -> tuple[bytes, ...]:
    return tuple(values.get(site, b"") for site in range(num_sites))
