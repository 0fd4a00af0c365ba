"""The consortium's certificate authority: issues certificates and the list of revoked ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.identity import Identity, Role, read_certificate

CERTIFICATE, KEY, REVOKED = "ca.pem", "ca.key", "revoked.crl"  # in the authority's folder
_BACKDATED = timedelta(minutes=5)  # clocks of hospitals differ a little


@dataclass(frozen=True)
class Authority:
    """Secret. Whoever holds this can make anybody a member."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, name: str, now: datetime, *, days: int) -> Authority:
        """A new authority with a fresh key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        builder = _builder(subject, subject, key.public_key(), now, days)
        builder = builder.add_extension(constraints, critical=True)
        return cls(key, builder.sign(key, hashes.SHA256()))

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """From the folder that ``save`` wrote.

        Raises:
          ConfigError: A file is missing or damaged.
        """
        certificate = read_certificate(folder / CERTIFICATE)
        return cls(Identity.load(folder / CERTIFICATE, folder / KEY).key, certificate)

    def save(self, folder: Path) -> None:
        """Write certificate and key; the key for this user alone."""
        folder.mkdir(parents=True, exist_ok=True)
        write_key(folder / KEY, self.key)
        (folder / CERTIFICATE).write_bytes(_pem(self.certificate))

    def issue(
        self, name: str, role: Role, key: ec.EllipticCurvePublicKey, now: datetime, *, days: int
    ) -> x509.Certificate:
        """Certify that a key belongs to a site or coordinator."""
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, name),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            ]
        )
        builder = _builder(subject, self.certificate.subject, key, now, days)
        constraints = x509.BasicConstraints(ca=False, path_length=None)
        return builder.add_extension(constraints, critical=True).sign(self.key, hashes.SHA256())

    def revocation_list(self, revoked: Sequence[int], now: datetime, *, days: int) -> bytes:
        """The signed list of revoked serial numbers, DER; it is good for ``days``."""
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=self.certificate.subject,
            last_update=now - _BACKDATED,
            next_update=now + timedelta(days=days),
        )
        for serial_number in revoked:
            entry = x509.RevokedCertificateBuilder(serial_number, now - _BACKDATED)
            builder = builder.add_revoked_certificate(entry.build())
        signed = builder.sign(self.key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.DER)

    def enrol(self, name: str, role: Role, folder: Path, now: datetime, *, days: int) -> Identity:
        """Make a key and a certificate for it: ``<folder>/certificate.pem`` and ``key.pem``."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.issue(name, role, key.public_key(), now, days=days)
        folder.mkdir(parents=True, exist_ok=True)
        write_key(folder / "key.pem", key)
        (folder / "certificate.pem").write_bytes(_pem(certificate))
        return Identity(name, key, certificate.public_bytes(serialization.Encoding.DER))


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """A private key as PEM, readable by this user alone."""
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # a file that was there keeps its mode otherwise
        file.write(content)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    days: int,
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _BACKDATED,
        not_valid_after=now + timedelta(days=days),
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
