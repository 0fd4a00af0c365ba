"""Is the site's certificate this key's, of this CA, in this site's name, and good now?"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from client.config import Certificates, SiteConfig
from client.finding import Finding, fault, ok, warning
from client.place import NEWEST_LIST
from common.certs_show import CERTIFICATE_WARNING
from common.errors import ConfigError
from common.identity import Identity, read_certificate, read_party
from common.issued import is_issued_by, is_on, read_list


def check_certificate(config: SiteConfig, files: Certificates, now: datetime) -> Iterator[Finding]:
    """Every fault of the site's certificate; or one line that says how long it is good."""
    try:
        Identity.load(files.cert, files.key)
        own, ca = read_certificate(files.cert), read_certificate(files.ca)
        name, role, _ = read_party(own)
    except ConfigError as error:
        yield fault(ConfigError(f"certificate: {error}"))
        return
    wrong = [
        *_wrong_owner(name, role, config.name),
        *_wrong_issuer(own, ca, files),
        *_wrong_time(own, ca, config.name, now),
        *_known_as_revoked(own, config.state_dir / NEWEST_LIST),
    ]
    if wrong:
        yield from (fault(ConfigError(f"certificate {files.cert}: {text}")) for text in wrong)
        return
    ends = min(own.not_valid_after_utc, ca.not_valid_after_utc)
    yield _lasting(config.name, ends - now, ends)


def check_own_list(files: Certificates, now: datetime) -> Iterator[Finding]:
    """Whether this hospital's own copy of the revocation list counts."""
    if files.revoked is None:
        return
    try:
        ends = read_list(files.revoked, read_certificate(files.ca)).next_update_utc
    except ConfigError as error:
        yield fault(ConfigError(f"certificates.revoked: {error}"))
        return
    if ends is None or ends < now:
        since = _day(ends) if ends else "ever"
        yield warning(f"revocation list {files.revoked}: stale since {since}; get the CA's newest")
    else:
        yield ok(f"revocation list {files.revoked}: of this CA, good until {_day(ends)}")


def _wrong_owner(name: str, role: str, site: str) -> Iterator[str]:
    if name != site:
        yield f"it is {name}'s, this site is {site}; give this site's own, or correct name"
    if role != "site":
        yield f"it is a {role}'s; a site needs one with the role site: fl-certs request"


def _wrong_issuer(
    own: x509.Certificate, ca: x509.Certificate, files: Certificates
) -> Iterator[str]:
    if not is_issued_by(ca, own):
        yield (
            f"not issued by the CA in {files.ca}; get ca.pem and the certificate from the same "
            "consortium"
        )


def _wrong_time(
    own: x509.Certificate, ca: x509.Certificate, site: str, now: datetime
) -> Iterator[str]:
    if now < own.not_valid_before_utc:
        yield f"valid from {_day(own.not_valid_before_utc)}, it is {_day(now)}; set the clock"
    if now > ca.not_valid_after_utc:
        yield f"the CA itself ended on {_day(ca.not_valid_after_utc)}; ask for a new kit"
    elif now > own.not_valid_after_utc:
        yield f"ended on {_day(own.not_valid_after_utc)}; {_renewal(site)}"


def _known_as_revoked(own: x509.Certificate, newest_list: Path) -> Iterator[str]:
    """What the newest list that came with a run says; the coordinator may have a newer one."""
    if not newest_list.exists():
        return
    try:
        is_revoked = is_on(x509.load_der_x509_crl(newest_list.read_bytes()), own)
    except (OSError, ValueError):
        yield f"the revocation list {newest_list} cannot be read; delete it, a new one comes"
        return
    if is_revoked:
        yield "it was revoked; make a new key and request: fl-certs request"


def _lasting(site: str, left: timedelta, ends: datetime) -> Finding:
    text = f"certificate of {site}: this key's, of this CA, valid until {_day(ends)}"
    if left <= CERTIFICATE_WARNING:
        return warning(f"{text}, {left.days} days; {_renewal(site)}")
    return ok(f"{text}, {left.days} days")


def _renewal(site: str) -> str:
    return f"ask the CA's operator to run: fl-certs renew --ca CA {site}"


def _day(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"
