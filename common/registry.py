"""The authority's folder: its key, a copy of every certificate it issued, the list of the revoked.

    ca.pem  ca.key  revoked.crl  issued/<name>-<serial number>.pem

A name stands for one key and a key for one name, as long as neither is revoked. What was issued is
kept before it is handed out, so that whatever is out there can be revoked.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from common.authority import CERTIFICATE, KEY, REVOKED, Authority, pem
from common.disk import replace_file
from common.errors import ConfigError
from common.identity import fingerprint, read_party, revocation_number
from common.issued import ISSUED, is_on, read_issued, read_list, read_own
from common.request import Request, is_name, request_of

LIST_DAYS = 30


@dataclass(frozen=True)
class Registry:
    """Secret. An authority and what it remembers."""

    folder: Path
    authority: Authority

    @classmethod
    def create(cls, folder: Path, name: str, now: datetime, *, days: int) -> Registry:
        """A new authority, with a list on which nobody is.

        Raises:
          ConfigError: There is an authority in the folder already.
        """
        for file in (CERTIFICATE, KEY, REVOKED, ISSUED):
            if (folder / file).exists():
                raise ConfigError(
                    f"{folder / file} exists: a CA is never overwritten, every certificate would "
                    "be void; choose another folder"
                )
        registry = cls(folder, Authority.create(name, now, days=days))
        with writing(folder):
            (folder / ISSUED).mkdir(parents=True)
            registry.authority.save(folder)
            first = registry.authority.revocation_list([], now, days=LIST_DAYS)
            replace(folder / REVOKED, first)
        return registry

    @classmethod
    def open(cls, folder: Path) -> Registry:
        """The authority in a folder.

        Raises:
          ConfigError: A file is missing or damaged.
        """
        return cls(folder, Authority.load(folder))

    def issued(self) -> tuple[x509.Certificate, ...]:
        """Every certificate that was ever issued, the newest first."""
        return read_issued(self.folder, self.authority.certificate)

    def revoked(self) -> x509.CertificateRevocationList:
        """The current list."""
        return read_list(self.folder / REVOKED, self.authority.certificate)

    def issue(self, request: Request, now: datetime, *, days: int) -> x509.Certificate:
        """Certify a key and keep a copy.

        Raises:
          ConfigError: Name or key belong to somebody else, or the key was revoked.
        """
        with self._alone():
            _check_free(request, self.issued(), self.revoked())
            certificate = self.authority.issue(
                request.name, request.role, request.key, now, days=days, hosts=request.hosts
            )
            self._keep(certificate)
        return certificate

    def find(self, word: str) -> tuple[x509.Certificate, ...]:
        """The certificates meant by a name (all of that name) or a file (all of that key).

        Raises:
          ConfigError: Nobody of that name was certified, or the file is not of this authority.
        """
        issued = self.issued()
        if is_name(word):
            found = tuple(one for one in issued if read_party(one)[0] == word)
            if not found:
                known = ", ".join(sorted({read_party(one)[0] for one in issued})) or "nobody"
                raise ConfigError(f"{word}: this CA certified nobody of that name; known: {known}")
            return found
        given = read_own(Path(word), self.authority.certificate)
        others = (one for one in issued if _key(one) == _key(given) and one != given)
        return (given, *others)

    def renewal(self, word: str) -> Request:
        """What the holder of a certificate would ask for again.

        Raises:
          ConfigError: Nobody is meant, or whoever is meant was revoked.
        """
        revoked = self.revoked()
        for one in self.find(word):
            if not is_on(revoked, one):
                return request_of(one)
        raise ConfigError(f"{word} was revoked; a new key is needed: fl-certs request")

    def revoke(
        self, words: Sequence[str], now: datetime, *, days: int
    ) -> x509.CertificateRevocationList:
        """Put certificates on a new list; without words, sign a fresh list of the same.

        Raises:
          ConfigError: A word means nobody; then nothing was changed.
        """
        with self._alone():
            last = self.revoked()
            since = {entry.serial_number: entry.revocation_date_utc for entry in last}
            for one in (one for word in words for one in self.find(word)):
                self._keep(one)  # of a file: its name stays known
                since.setdefault(one.serial_number, now)
            number = revocation_number(last) + 1
            content = self.authority.revocation_list(
                list(since), now, days=days, number=number, since=since
            )
            replace(self.folder / REVOKED, content)
        return self.revoked()

    def _keep(self, certificate: x509.Certificate) -> None:
        name = f"{read_party(certificate)[0]}-{certificate.serial_number:x}.pem"
        path = self.folder / ISSUED / name
        if not path.exists():
            replace(path, pem(certificate))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two commands at once must not lose a revocation, or give a name to two keys."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with writing(self.folder):
                (self.folder / ISSUED).mkdir(exist_ok=True)
            yield
        finally:
            os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Write a file that everybody may read; it takes its place only when it is whole and on disk.

    Raises:
      ConfigError: The folder cannot be written to.
    """
    with writing(path):
        replace_file(path, content, mode=0o644)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A file that cannot be written is the operator's to settle."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; choose a folder you can write to") from None


def _check_free(
    request: Request,
    issued: Sequence[x509.Certificate],
    revoked: x509.CertificateRevocationList,
) -> None:
    """A name stands for one key and one role, a key for one name; nothing revoked comes back."""
    for one in issued:
        name, role, key = read_party(one)
        is_revoked, is_same_key = is_on(revoked, one), fingerprint(key) == request.fingerprint
        if is_same_key and is_revoked:
            raise ConfigError(
                f"the key {request.fingerprint} of {request.name} was revoked; a new one is "
                "needed: fl-certs request in another folder"
            )
        if is_revoked:
            continue
        if is_same_key and name != request.name:
            raise ConfigError(f"{request.name}: its key is {name}'s; every party makes its own")
        if name == request.name and not is_same_key:
            raise ConfigError(
                f"{name} is certified with another key, {fingerprint(key)}; "
                f"revoke that first if it was lost: fl-certs revoke {name}"
            )
        if name == request.name and role != request.role:
            raise ConfigError(f"{name} is certified as a {role}; choose another name")


def _key(certificate: x509.Certificate) -> str:
    return fingerprint(read_party(certificate)[2])
