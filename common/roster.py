"""Everybody's keys of an epoch, checked against the manifest and the consortium CA: rule R3."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from common.disk import replace_file
from common.errors import ConfigError, RemoteProtocolError
from common.identity import (
    Certified,
    Identity,
    check_certificate,
    read_revocation_list,
    revocation_number,
)
from common.manifest import Manifest
from common.messages import Encapsulated, Invitation, Roster, SiteKeys
from common.secagg.keys import (
    CIPHERTEXT_BYTES,
    KEM_KEY_BYTES,
    KEY_BYTES,
    NONCE_BYTES,
    encapsulate,
    exchange,
)
from common.signing import check_signed


@dataclass(frozen=True)
class Trust:
    """Whom a party believes: pinned by people, never learned from a message."""

    ca: x509.Certificate
    members: Mapping[str, str]  # approved fingerprints by name, in the study's order
    coordinator: str  # fingerprint
    newest_list: Path | None = None  # the newest revocation list that this party has seen

    def revoked_by(self, content: bytes, now: datetime) -> x509.CertificateRevocationList:
        """Read a revocation list that came, and remember it if it is the newest.

        Raises:
          RemoteProtocolError: R3. It is not valid now, or an older one than this party has seen:
            whom the newer one names would be let in again.
        """
        listed = read_revocation_list(content, self.ca, now)
        if self.newest_list is None:
            return listed
        number = revocation_number(listed)
        seen = self.newest_list.read_bytes() if self.newest_list.exists() else b""
        newest = revocation_number(x509.load_der_x509_crl(seen)) if seen else -1
        if number < newest:
            raise _refused(f"revocation list {number} came, this site has seen number {newest}")
        if number > newest:
            replace_file(self.newest_list, content)
        return listed


@dataclass(frozen=True)
class Credentials:
    """Who a party is, and whom it believes."""

    identity: Identity
    trust: Trust


@dataclass(frozen=True)
class CoordinatorCredentials(Credentials):
    """The coordinator's; it also passes on who was revoked."""

    revocation_list: Path  # DER, read anew for every sum and every epoch

    def revoked(self) -> bytes:
        """The current revocation list.

        Raises:
          ConfigError: The file cannot be read.
        """
        try:
            return self.revocation_list.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"revocation list {self.revocation_list}: {error.strerror}; fetch the CA's latest"
            ) from None


def check_invitation(
    invitation: Invitation, manifest: Manifest, trust: Trust, now: datetime
) -> Certified:
    """Check who proposes an epoch; what it proposes is common.manifest's to check.

    Raises:
      RemoteProtocolError: R3.
    """
    revoked = trust.revoked_by(invitation.revoked, now)
    coordinator = check_certificate(invitation.certificate, trust.ca, revoked, now)
    if coordinator.role != "coordinator":
        raise _refused(f"{coordinator.name} is certified as a {coordinator.role}")
    if not coordinator.fingerprint == manifest.coordinator == trust.coordinator:
        raise _refused(f"the coordinator's key is not the one approved for {coordinator.name}")
    check_signed(invitation, coordinator.key, sender=coordinator.name, rule="R3")
    return coordinator


def check_site_keys(
    keys: SiteKeys,
    manifest: Manifest,
    trust: Trust,
    revoked: x509.CertificateRevocationList,
    now: datetime,
) -> Certified:
    """Check one member's keys.

    Raises:
      RemoteProtocolError: R3, naming the member.
    """
    if keys.run != manifest.digest() or not 0 <= keys.site < len(manifest.members):
        raise _refused("keys of another epoch, or of no member, came")
    member = manifest.members[keys.site]
    sizes = [len(keys.public_key), len(keys.kem_key), len(keys.nonce)]
    if sizes != [KEY_BYTES, KEM_KEY_BYTES, NONCE_BYTES]:
        raise _refused(f"the keys of {member.name} have the wrong length")
    certified = check_certificate(keys.certificate, trust.ca, revoked, now)
    if (certified.name, certified.role) != (member.name, "site"):
        raise _refused(f"a certificate of {certified.name} came in the place of {member.name}")
    if certified.fingerprint != member.key:
        raise _refused(f"the key of {member.name} is not the one in the manifest")
    check_signed(keys, certified.key, sender=member.name, rule="R3")
    exchange(os.urandom(KEY_BYTES), keys.public_key)  # refuses what nobody could agree with
    encapsulate(keys.kem_key)
    return certified


def check_roster(
    roster: Roster, manifest: Manifest, trust: Trust, now: datetime
) -> tuple[Certified, ...]:
    """Check that a roster holds exactly the manifest's members, in order, each with its own key.

    Raises:
      RemoteProtocolError: R3.
    """
    lists = (
        roster.public_keys,
        roster.kem_keys,
        roster.nonces,
        roster.certificates,
        roster.signatures,
    )
    if any(len(entries) != len(manifest.members) for entries in lists):
        raise _refused("the roster does not hold exactly the manifest's members")
    revoked = trust.revoked_by(roster.revoked, now)
    certified = tuple(
        check_site_keys(roster.keys_of(site), manifest, trust, revoked, now)
        for site in range(len(manifest.members))
    )
    _check_distinct(roster.public_keys)
    _check_distinct(roster.kem_keys)
    return certified


def check_still_certified(
    certificates: Iterable[bytes], revoked: bytes, trust: Trust, now: datetime
) -> None:
    """Refuse to go on with a member whose certificate ended or was revoked meanwhile.

    Raises:
      RemoteProtocolError: R3, naming the member; a new epoch goes on without it.
    """
    listed = trust.revoked_by(revoked, now)
    for certificate in certificates:
        check_certificate(certificate, trust.ca, listed, now)


def check_encapsulated(message: Encapsulated, sender: Certified) -> None:
    """Check a ciphertext that was relayed.

    Raises:
      RemoteProtocolError: R3.
    """
    if len(message.ciphertext) != CIPHERTEXT_BYTES:
        raise _refused(f"a ciphertext of {sender.name} has the wrong length")
    check_signed(message, sender.key, sender=sender.name, rule="R3")


def _check_distinct(keys: tuple[bytes, ...]) -> None:
    if len(set(keys)) != len(keys):
        raise _refused("two members have the same fresh key")


def _refused(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, rule="R3")
