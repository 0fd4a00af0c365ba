"""What a party asks the consortium's authority to certify, and the file that asks it.

The party makes its key itself and sends a request (PKCS#10), which holds the public key and is
signed with the private one: it proves that the sender has the key, not who the sender is. That the
right hospital sent it is found out over the telephone, by the fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import TypeAdapter, ValidationError

from common.errors import ConfigError
from common.hosts import alternative_names, hosts_of, normal
from common.identity import Role, fingerprint, read_party
from common.study import Name

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion)


@dataclass(frozen=True)
class Request:
    """A name, what its owner may do, the key, and where a coordinator is called."""

    name: str
    role: Role
    key: ec.EllipticCurvePublicKey
    hosts: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of the public key; 64 hex digits."""
        return fingerprint(self.key)


def is_name(text: str) -> bool:
    """Whether this may be the name of a site or coordinator; a path has a dot or a slash."""
    try:
        _NAME.validate_python(text)
    except ValidationError:
        return False
    return True


def make_request(
    name: str, role: Role, hosts: Sequence[str], key: ec.EllipticCurvePrivateKey
) -> bytes:
    """A request in PEM, signed with the key that it asks a certificate for.

    Raises:
      ConfigError: Name or hosts are none that a study could have.
    """
    asked = checked(Request(name, role, key.public_key(), normal(hosts)))
    subject = [
        x509.NameAttribute(NameOID.COMMON_NAME, asked.name),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, asked.role),
    ]
    builder = x509.CertificateSigningRequestBuilder(x509.Name(subject))
    if asked.hosts:
        builder = builder.add_extension(alternative_names(asked.hosts), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_request(path: Path) -> Request:
    """The request in a file, its signature checked.

    Raises:
      ConfigError: The file is missing, is no request, was altered, or asks for what nobody gets.
    """
    try:
        parsed = x509.load_pem_x509_csr(path.read_bytes())
        is_signed = parsed.is_signature_valid
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the request's file") from None
    except _UNREADABLE:
        raise ConfigError(f"{path}: not a request in PEM; make it with fl-certs request") from None
    if not is_signed:
        raise ConfigError(f"{path}: altered on its way (wrong signature); have it sent again")
    try:
        return checked(Request(*read_party(parsed), hosts_of(parsed)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def request_of(certificate: x509.Certificate) -> Request:
    """What a certificate was issued for: whoever renews it asks for the same again.

    Raises:
      ConfigError: It is none of a site or coordinator.
    """
    return Request(*read_party(certificate), hosts_of(certificate))


def checked(request: Request) -> Request:
    """The same request, if a study could have such a party.

    Raises:
      ConfigError: The name is none, a site wants hosts, or a coordinator has none.
    """
    if not is_name(request.name):
        raise ConfigError(
            f"name {request.name!r}: expected 1 to 63 lower-case letters, digits and dashes, "
            "beginning with a letter or digit"
        )
    if request.role == "site" and request.hosts:
        raise ConfigError("a site only calls and is never called: leave --host out")
    if request.role == "coordinator" and not request.hosts:
        raise ConfigError("the sites call a coordinator: give each of its names with --host")
    return request
