"""What an authority issued and revoked, read from its folder or a copy; its key is not needed."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError
from common.identity import read_certificate, read_party
from common.request import is_name

ISSUED = "issued"  # in the authority's folder
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion)


def read_issued(folder: Path, ca: x509.Certificate) -> tuple[x509.Certificate, ...]:
    """The copies that an authority keeps, the newest first.

    Raises:
      ConfigError: One is damaged, or is not of this authority.
    """
    found = [read_own(file, ca) for file in sorted((folder / ISSUED).glob("*.pem"))]
    return tuple(sorted(found, key=lambda one: one.not_valid_before_utc, reverse=True))


def read_list(path: Path, ca: x509.Certificate) -> x509.CertificateRevocationList:
    """An authority's list as it stands in a file; it may be stale.

    Raises:
      ConfigError: It is missing, damaged, or was signed by somebody else.
    """
    # Without its last list an authority would start from none, and everybody revoked come back.
    advice = "copy the coordinator's revoked.crl there"
    try:
        revoked = x509.load_der_x509_crl(path.read_bytes())
        is_genuine = revoked.issuer == ca.subject and _is_signed_by(ca, revoked)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {advice}") from None
    except _UNREADABLE:
        raise ConfigError(f"{path}: not a revocation list; {advice}") from None
    if not is_genuine:
        raise ConfigError(f"{path}: not signed by this CA; {advice}")
    return revoked


def read_own(path: Path, ca: x509.Certificate) -> x509.Certificate:
    """A certificate that this authority issued to a site or coordinator.

    Raises:
      ConfigError: The file is missing or damaged, or holds another one.
    """
    certificate = read_certificate(path)
    if not is_issued_by(ca, certificate):
        raise ConfigError(f"{path}: not issued by this CA; give one that it issued")
    try:
        name, *_ = read_party(certificate)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not is_name(name):
        raise ConfigError(f"{path}: {name!r} is no name of a site or coordinator")
    return certificate


def is_issued_by(ca: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except _UNREADABLE:
        return False
    return True


def is_on(revoked: x509.CertificateRevocationList, certificate: x509.Certificate) -> bool:
    """Whether a list names a certificate."""
    number = certificate.serial_number
    return revoked.get_revoked_certificate_by_serial_number(number) is not None


def _is_signed_by(ca: x509.Certificate, revoked: x509.CertificateRevocationList) -> bool:
    key = ca.public_key()
    return isinstance(key, ec.EllipticCurvePublicKey) and revoked.is_signature_valid(key)
