"""What is in a certificate, request, key or revocation list, and how long it is good."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.authority import CERTIFICATE, REVOKED
from common.errors import ConfigError
from common.hosts import hosts_of
from common.identity import fingerprint, read_certificate, read_party, revocation_number
from common.issued import is_issued_by, is_on, read_issued, read_list
from common.request import Request, read_request

CERTIFICATE_WARNING = timedelta(days=30)  # a hospital needs weeks
LIST_WARNING = timedelta(days=7)
SUFFIXES = (".pem", ".key", ".crl")  # of the files of a folder that are looked at

Key = ec.EllipticCurvePrivateKey
Paper = x509.Certificate | Request | x509.CertificateRevocationList | Key


@dataclass(frozen=True)
class Described:
    """One file in words."""

    lines: tuple[str, ...]
    is_expired: bool = False


@dataclass(frozen=True)
class Viewer:
    """What files are held against: the time, an authority if one is given, and each other."""

    now: datetime
    ca: x509.Certificate | None = None
    revoked: x509.CertificateRevocationList | None = None
    known: tuple[x509.Certificate, ...] = ()

    def describe(self, path: Path, paper: Paper) -> Described:
        """A file in words."""
        if isinstance(paper, Request):
            return Described(("request for a certificate", *_request_lines(paper)))
        if isinstance(paper, Key):
            return Described(tuple(_key_lines(path, paper)))
        if isinstance(paper, x509.CertificateRevocationList):
            return self._list(paper)
        return self._certificate(paper)

    def _certificate(self, one: x509.Certificate) -> Described:
        ends = one.not_valid_after_utc
        lines = [*_owner_lines(one), _validity(one.not_valid_before_utc, ends)]
        lines.append(f"serial       {one.serial_number:x}")
        standing, is_unknown = self._standing(one)
        lines += standing
        if self._is_revoked(one):
            return Described(tuple(lines))  # when it ends does not matter any more
        if self.now < one.not_valid_before_utc:
            lines.append("NOT VALID YET: set this machine's clock, or wait")
        newer = self._renewed(one)
        if newer is not None:
            lines.append(f"renewed: another certificate of this key is valid until {_day(newer)}")
            return Described(tuple(lines), is_unknown)
        lines += _expiry(self.now, ends, CERTIFICATE_WARNING, _remedy(one))
        return Described(tuple(lines), is_unknown or ends < self.now)

    def _standing(self, one: x509.Certificate) -> tuple[list[str], bool]:
        """What the authority says of a certificate, and whether it says so on a list that ended."""
        if self.ca is None or self.revoked is None or one == self.ca:
            return [], False
        if not is_issued_by(self.ca, one):
            return ["NOT OF THIS CA: nobody who pins it accepts this"], False
        number, ends = revocation_number(self.revoked), _end(self.revoked)
        entry = self.revoked.get_revoked_certificate_by_serial_number(one.serial_number)
        if entry is not None:
            return [f"REVOKED on {_day(entry.revocation_date_utc)} (list {number})"], False
        if ends < self.now:
            return [
                f"not on list {number}, which EXPIRED on {_day(ends)}: fetch the CA's latest"
            ], True
        return [f"not revoked (list {number}, valid until {_day(ends)})"], False

    def _is_revoked(self, one: x509.Certificate) -> bool:
        if self.ca is None or self.revoked is None or not is_issued_by(self.ca, one):
            return False
        return is_on(self.revoked, one)

    def _renewed(self, one: x509.Certificate) -> datetime | None:
        """When the last certificate of the same key and issuer ends, where that is later."""
        ends = [
            other.not_valid_after_utc
            for other in self.known
            if other.public_key() == one.public_key() and other.issuer == one.issuer
        ]
        latest = max(ends, default=one.not_valid_after_utc)
        return latest if latest > one.not_valid_after_utc else None

    def _list(self, revoked: x509.CertificateRevocationList) -> Described:
        ends = _end(revoked)
        lines = [
            f"revocation list number {revocation_number(revoked)}",
            _validity(revoked.last_update_utc, ends),
            *on_list(revoked, self.known),
        ]
        if self.ca is not None and revoked.issuer != self.ca.subject:
            lines.append("NOT OF THIS CA")
        lines += _expiry(self.now, ends, LIST_WARNING, "fl-certs revoke --ca CA (a fresh list)")
        return Described(tuple(lines), ends < self.now)


def viewer(papers: Sequence[Paper], ca: Path | None, now: datetime) -> Viewer:
    """What papers are held against.

    Raises:
      ConfigError: The authority's certificate or list is missing or damaged.
    """
    shown = tuple(paper for paper in papers if isinstance(paper, x509.Certificate))
    if ca is None:
        return Viewer(now, known=shown)
    authority = read_certificate(ca / CERTIFICATE)
    listed = read_list(ca / REVOKED, authority)
    return Viewer(now, authority, listed, shown + read_issued(ca, authority))


def papers_at(path: Path) -> Iterator[tuple[Path, Paper]]:
    """The file, or every file of a folder that can be shown.

    Raises:
      ConfigError: There is none, or one is damaged.
    """
    if not path.is_dir():
        yield path, _read(path)
        return
    files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
    if not files:
        raise ConfigError(f"{path}: no {', '.join(SUFFIXES)} in this folder; give another one")
    for file in files:
        yield file, _read(file)


def on_list(
    revoked: x509.CertificateRevocationList, known: Sequence[x509.Certificate]
) -> list[str]:
    """Who is on a list, one line each; whose certificate is not known is a number."""
    names = {one.serial_number: _name(one) for one in known if one.issuer == revoked.issuer}
    lines = [
        f"revoked      {names.get(entry.serial_number, 'name not known here')}, "
        f"serial {entry.serial_number:x}, since {_day(entry.revocation_date_utc)}"
        for entry in revoked
    ]
    return lines or ["revoked      nobody"]


def party_lines(certificate: x509.Certificate) -> list[str]:
    """Whom a certificate names and how long."""
    began, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return [*_owner_lines(certificate), _validity(began, ends)]


def _read(path: Path) -> Paper:
    try:
        content = path.read_bytes()
        if b"-----BEGIN CERTIFICATE REQUEST-----" in content:
            return read_request(path)
        if b"-----BEGIN CERTIFICATE-----" in content:
            return x509.load_pem_x509_certificate(content)
        if b"PRIVATE KEY-----" in content:
            return _private(content)
        return x509.load_der_x509_crl(content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file that can be read") from None
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise ConfigError(
            f"{path}: none of a certificate, request, unencrypted P-256 key or revocation list"
        ) from None


def _private(content: bytes) -> Key:
    key = serialization.load_pem_private_key(content, password=None)
    if not isinstance(key, Key):
        raise TypeError
    return key


def _owner_lines(one: x509.Certificate) -> list[str]:
    try:
        return ["certificate", *_request_lines(Request(*read_party(one), hosts_of(one)))]
    except ConfigError:
        pass
    key = one.public_key()
    is_ours = isinstance(key, ec.EllipticCurvePublicKey) and one.subject == one.issuer
    lines = ["certificate of a CA" if is_ours else "certificate of neither site nor coordinator"]
    lines.append(f"name         {_name(one)}")
    if isinstance(key, ec.EllipticCurvePublicKey):
        lines.append(f"fingerprint  {fingerprint(key)}")
    return lines


def _request_lines(request: Request) -> list[str]:
    lines = [
        f"name         {request.name}",
        f"role         {request.role}",
        f"fingerprint  {request.fingerprint}",
    ]
    return [*lines, f"hosts        {', '.join(request.hosts)}"] if request.hosts else lines


def _key_lines(path: Path, key: Key) -> Iterator[str]:
    yield "private key"
    yield f"fingerprint  {fingerprint(key.public_key())}"
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & ~0o600:
        yield f"WARNING: mode {mode:04o}, a key's is 0600: chmod 600 {path}"


def _expiry(now: datetime, ends: datetime, warning: timedelta, remedy: str) -> list[str]:
    if ends < now:
        return [f"EXPIRED on {_day(ends)}: {remedy}"]
    days = (ends - now).days
    if ends - now <= warning:
        return [f"expires in {days} day{'' if days == 1 else 's'}: {remedy}"]
    return []


def _remedy(one: x509.Certificate) -> str:
    if one.subject == one.issuer:
        return "make a new CA; everybody pins it and is certified anew"
    return f"fl-certs renew --ca CA {_name(one)}"


def _end(revoked: x509.CertificateRevocationList) -> datetime:
    """A list without an end is none that anybody accepts."""
    return revoked.next_update_utc or revoked.last_update_utc


def _name(one: x509.Certificate) -> str:
    names = one.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return ", ".join(str(name.value) for name in names) or one.subject.rfc4514_string()


def _validity(began: datetime, ends: datetime) -> str:
    return f"valid        {_day(began)} to {_day(ends)} (UTC)"


def _day(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}"
