"""Who may come in: the members, by certificates of the consortium's CA that are not revoked."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from common.errors import RemoteProtocolError
from common.identity import (
    Certified,
    check_certificate,
    read_certificate,
    read_revocation_list,
    revocation_number,
)

CHECKED_FOR_S = 10.0  # a certificate is held against the clock again after so long

log = logging.getLogger("consilium.listener")


class Doorkeeper:
    """Decides whether a certificate may come in, at this moment."""

    def __init__(self, ca: Path, revocation_list: Path, members: Mapping[str, str]) -> None:
        self._ca = read_certificate(ca)
        self._revocation_list = revocation_list
        self._members = dict(members)  # fingerprint by name
        self._admitted: dict[bytes, tuple[int, float, Certified]] = {}
        self._newest, self._number = b"", 0  # of the lists that were in force

    def admit(self, certificate: bytes) -> Certified:
        """Who calls.

        Raises:
          RemoteProtocolError: R3. The certificate is none of this CA, ended, was revoked, or is
            of nobody in this study; or the revocation list is not valid now.
          OSError: The list cannot be read: nobody comes in.
        """
        stamp = self._revocation_list.stat().st_mtime_ns
        known, until, site = self._admitted.get(certificate, (0, 0.0, None))
        if site is None or known != stamp or time.monotonic() > until:
            site = self._check(certificate)
            self._admitted = {k: v for k, v in self._admitted.items() if v[0] == stamp}
            self._admitted[certificate] = stamp, time.monotonic() + CHECKED_FOR_S, site
        return site

    def _check(self, certificate: bytes) -> Certified:
        now = datetime.now(UTC)
        site = check_certificate(certificate, self._ca, self._revoked(now), now)
        if self._members.get(site.name) != site.fingerprint or site.role != "site":
            raise RemoteProtocolError(f"{site.name} is not a member of this study", rule="R3")
        return site

    def _revoked(self, now: datetime) -> x509.CertificateRevocationList:
        """The list in force: an older one, put back by mistake, lets nobody in again."""
        content = self._revocation_list.read_bytes()
        revoked = read_revocation_list(content, self._ca, now)
        number = revocation_number(revoked)
        if number < self._number:
            log.error(
                "%s went back from list %d to %d; list %d stays in force: put the newest one there",
                *(self._revocation_list, self._number, number, self._number),
            )
            return read_revocation_list(self._newest, self._ca, now)
        self._newest, self._number = content, number
        return revoked
