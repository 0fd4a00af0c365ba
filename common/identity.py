"""Who somebody is: certificates, signatures, the chain to the consortium CA.

Certificates are X.509 over ECDSA P-256. What a site is known by is the fingerprint of its public
key: a renewed certificate keeps the key, a new key is a new approval. No clock is read here:
whoever asks says what time it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.errors import ConfigError, RemoteProtocolError

Role = Literal["site", "coordinator"]
Paper = x509.Certificate | x509.CertificateSigningRequest  # both state a name, a role and a key

_ALGORITHM = ec.ECDSA(hashes.SHA256())
# What parsing a stranger's certificate or list may raise.
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)


@dataclass(frozen=True)
class Identity:
    """Secret. A private key and the certificate that goes with it."""

    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: bytes  # DER

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Identity:
        """Read both files.

        Raises:
          ConfigError: A file is missing, is not PEM, or the two do not belong together.
        """
        certified = read_certificate(certificate)
        try:
            private = serialization.load_pem_private_key(key.read_bytes(), password=None)
        except OSError as error:
            raise ConfigError(f"{key}: {error.strerror}; give the private key's file") from None
        except (ValueError, TypeError):
            raise ConfigError(f"{key}: not an unencrypted private key in PEM") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{key}: not an elliptic-curve key; make one on P-256")
        try:
            name, public = _name(certified), _key_of(certified)
        except (*_UNREADABLE, ConfigError) as error:
            raise ConfigError(f"{certificate}: {error}; let the CA issue another one") from None
        if fingerprint(private.public_key()) != fingerprint(public):
            raise ConfigError(f"{key} is not the key of {certificate}; give the pair made together")
        return cls(name, private, certified.public_bytes(serialization.Encoding.DER))

    @property
    def fingerprint(self) -> str:
        """Of the public key; 64 hex digits."""
        return fingerprint(self.key.public_key())

    def sign(self, content: bytes) -> bytes:
        """ECDSA with SHA-256, DER."""
        return self.key.sign(content, _ALGORITHM)


@dataclass(frozen=True)
class Certified:
    """What a certificate that was found good says."""

    name: str
    role: Role
    key: ec.EllipticCurvePublicKey
    serial_number: int

    @property
    def fingerprint(self) -> str:
        """Of the public key; 64 hex digits."""
        return fingerprint(self.key)


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo, DER); 64 hex digits."""
    encoded = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(encoded).hexdigest()


def check_signature(key: ec.EllipticCurvePublicKey, signature: bytes, content: bytes) -> bool:
    """Whether a signature is good; the caller raises and says whose it should be."""
    try:
        key.verify(signature, content, _ALGORITHM)
    except InvalidSignature:
        return False
    return True


def read_certified(certificate: bytes) -> Certified:
    """What a certificate says, nothing of it checked but its form.

    Raises:
      RemoteProtocolError: R3. It is none of a site or coordinator.
    """
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        return Certified(_name(parsed), _role(parsed), _key_of(parsed), parsed.serial_number)
    except (*_UNREADABLE, ConfigError):
        raise _refused("a certificate is none of a site or coordinator") from None


def check_certificate(
    certificate: bytes, ca: x509.Certificate, revoked: x509.CertificateRevocationList, now: datetime
) -> Certified:
    """Hold a certificate against the consortium CA, the time and the revocation list.

    Raises:
      RemoteProtocolError: R3, with what is wrong.
    """
    certified = read_certified(certificate)
    parsed, name = x509.load_der_x509_certificate(certificate), certified.name
    try:
        parsed.verify_directly_issued_by(ca)
    except (InvalidSignature, *_UNREADABLE):
        raise _refused(f"the certificate of {name} was not issued by this site's CA") from None
    # The CA first: who is told to renew a certificate that ended with its CA would ask in vain.
    for one, whose in ((ca, "of this site's CA"), (parsed, f"of {name}")):
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            raise _refused(
                f"the certificate {whose} is valid from {one.not_valid_before_utc:%Y-%m-%d} to "
                f"{one.not_valid_after_utc:%Y-%m-%d}, it is {now:%Y-%m-%d}; renew it"
            )
    try:
        entry = revoked.get_revoked_certificate_by_serial_number(certified.serial_number)
    except _UNREADABLE:
        raise _refused("the revocation list has an entry that cannot be read") from None
    if entry is not None:
        raise _refused(f"the certificate of {name} was revoked")
    return certified


def read_revocation_list(
    content: bytes, ca: x509.Certificate, now: datetime
) -> x509.CertificateRevocationList:
    """The CA's list of revoked certificates.

    Raises:
      RemoteProtocolError: R3. It is not the CA's, or it is stale: whom it would name is unknown.
    """
    try:
        revoked = x509.load_der_x509_crl(content)
        is_genuine = revoked.issuer == ca.subject and revoked.is_signature_valid(_key_of(ca))
        until, since = revoked.next_update_utc, revoked.last_update_utc
    except _UNREADABLE:
        raise _refused("what came is no revocation list") from None
    if not is_genuine:
        raise _refused("the revocation list was not signed by this site's CA")
    if until is None or not since <= now <= until:
        raise _refused(
            f"the revocation list is not valid now ({now:%Y-%m-%d %H:%M}): it covers "
            f"{since:%Y-%m-%d %H:%M} to {until or 'no end'}; fetch a fresh one"
        )
    return revoked


def revocation_number(revoked: x509.CertificateRevocationList) -> int:
    """Which of the CA's lists this is; they are counted from 1, and 0 is one without a number.

    Raises:
      RemoteProtocolError: R3. The list's extensions cannot be read.
    """
    try:
        return revoked.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0
    except (*_UNREADABLE, x509.DuplicateExtension):
        raise _refused("the revocation list has a number that cannot be read") from None


def read_party(paper: Paper) -> tuple[str, Role, ec.EllipticCurvePublicKey]:
    """The name, role and key that a certificate or a request for one states.

    Raises:
      ConfigError: It states none, several, or a key that is not on P-256.
    """
    try:
        return _name(paper), _role(paper), _key_of(paper)
    except _UNREADABLE as error:
        raise ConfigError(str(error)) from None


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate from a PEM file.

    Raises:
      ConfigError: The file is missing or holds none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the certificate's file") from None
    except _UNREADABLE:
        raise ConfigError(f"{path}: not a certificate in PEM") from None


def _name(paper: Paper) -> str:
    return _attribute(paper, NameOID.COMMON_NAME)


def _role(paper: Paper) -> Role:
    role = _attribute(paper, NameOID.ORGANIZATIONAL_UNIT_NAME)
    if role == "site":
        return "site"
    if role == "coordinator":
        return "coordinator"
    raise ValueError(f"the role is {role!r}, not site or coordinator")


def _attribute(paper: Paper, kind: x509.ObjectIdentifier) -> str:
    found = paper.subject.get_attributes_for_oid(kind)
    if len(found) != 1:
        raise ConfigError("a certificate names its owner once, and its role once")
    return str(found[0].value)


def _key_of(paper: Paper) -> ec.EllipticCurvePublicKey:
    key = paper.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("a certificate's key is on the curve P-256")
    return key


def _refused(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, rule="R3")
