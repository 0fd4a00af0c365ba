"""This hospital's certificate, key, CA and list, read anew all the time: they may be exchanged.

While a new one is copied to its place it is not there yet, and what was read before still counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography import x509

from client.config import Certificates
from common.errors import ConfigError, RemoteProtocolError
from common.identity import Identity, read_certificate
from common.roster import Trust

log = logging.getLogger("consilium.site")


class OwnFiles:
    """What ``[certificates]`` names."""

    def __init__(self, files: Certificates, newest_list: Path, now: Callable[[], datetime]) -> None:
        """Read all of it once.

        Raises:
          ConfigError: A file cannot be used; nothing was read before that could stand in.
        """
        self._files, self._now = files, now
        self._identity = Identity.load(files.cert, files.key)
        self._ca = read_certificate(files.ca)
        self._list: bytes | None = None  # as it was looked at last
        self.take_list(Trust(self._ca, {}, "", newest_list))

    def identity(self) -> Identity:
        """This site's; a renewed certificate needs no restart."""
        try:
            self._identity = Identity.load(self._files.cert, self._files.key)
        except ConfigError as error:
            log.warning("%s; the one that was read before is used", error)
        return self._identity

    def ca(self) -> x509.Certificate:
        """The consortium's."""
        return self._ca

    def take_list(self, trust: Trust) -> None:
        """Remember this hospital's own copy of the CA's list, where it is the newest.

        It is one voice among others: a copy that is old, stale or half there is passed over, and
        whom a newer list names stays out.
        """
        if self._files.revoked is None:
            return
        try:
            content = self._files.revoked.read_bytes()
        except OSError:
            content = b""
        if content == self._list:
            return
        try:
            trust.revoked_by(content, self._now())
        except (RemoteProtocolError, ValueError) as error:
            log.warning("certificates.revoked %s was not taken: %s", self._files.revoked, error)
        self._list = content  # once is enough, also where it is not taken
