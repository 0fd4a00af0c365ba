"""The consortium's certificate authority: issues certificates and the list of revoked ones.

What certificates and lists carry follows RFC 5280, so that OpenSSL's strict verification accepts
them: one certificate serves TLS, Flower's node authentication and signed messages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.hosts import alternative_names
from common.identity import Identity, Role, read_certificate

CERTIFICATE, KEY, REVOKED = "ca.pem", "ca.key", "revoked.crl"  # in the authority's folder
_BACKDATED = timedelta(minutes=5)  # clocks of hospitals differ a little
# A site only calls; the coordinator is called by every site.
_PURPOSES = {
    "site": [ExtendedKeyUsageOID.CLIENT_AUTH],
    "coordinator": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
}


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
        ends = now + timedelta(days=days)
        builder = (
            _builder(subject, subject, key.public_key(), now, ends)
            .add_extension(constraints, critical=True)
            .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
        )
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
        (folder / CERTIFICATE).write_bytes(pem(self.certificate))

    def issue(
        self,
        name: str,
        role: Role,
        key: ec.EllipticCurvePublicKey,
        now: datetime,
        *,
        days: int,
        hosts: Sequence[str] = (),
    ) -> x509.Certificate:
        """Certify that a key belongs to a site or coordinator.

        Args:
          name: Whom the key belongs to.
          role: What the owner may do.
          key: On the curve P-256.
          now: When the certificate begins, five minutes of grace aside.
          days: How long it is good; never longer than the authority's own certificate.
          hosts: DNS names and IP addresses under which a coordinator is called.

        Raises:
          ConfigError: A host is neither, or the authority's own certificate has ended.
        """
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, name),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            ]
        )
        builder = (
            _builder(subject, self.certificate.subject, key, now, self._end(now, days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_PURPOSES[role]), critical=False)
            .add_extension(self._key_identifier(), critical=False)
        )
        if hosts:
            builder = builder.add_extension(alternative_names(hosts), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def revocation_list(
        self,
        revoked: Sequence[int],
        now: datetime,
        *,
        days: int,
        number: int = 1,
        since: Mapping[int, datetime] | None = None,
    ) -> bytes:
        """The signed list of revoked serial numbers, DER.

        Args:
          revoked: Serial numbers.
          now: When the list begins, five minutes of grace aside.
          days: How long it is good.
          number: Of the list; whoever saw a higher one refuses this one.
          since: When each was revoked, where that was before now.
        """
        began = now - _BACKDATED
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=self.certificate.subject,
            last_update=began,
            next_update=now + timedelta(days=days),
        )
        builder = builder.add_extension(self._key_identifier(), critical=False)
        builder = builder.add_extension(x509.CRLNumber(number), critical=False)
        for serial_number in revoked:
            date = (since or {}).get(serial_number, began)
            entry = x509.RevokedCertificateBuilder(serial_number, date)
            builder = builder.add_revoked_certificate(entry.build())
        signed = builder.sign(self.key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.DER)

    def enrol(
        self,
        name: str,
        role: Role,
        folder: Path,
        now: datetime,
        *,
        days: int,
        hosts: Sequence[str] = (),
    ) -> Identity:
        """Make a key and a certificate for it: ``<folder>/certificate.pem`` and ``key.pem``."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.issue(name, role, key.public_key(), now, days=days, hosts=hosts)
        folder.mkdir(parents=True, exist_ok=True)
        write_key(folder / "key.pem", key)
        (folder / "certificate.pem").write_bytes(pem(certificate))
        return Identity(name, key, certificate.public_bytes(serialization.Encoding.DER))

    def _end(self, now: datetime, days: int) -> datetime:
        """When a certificate ends: nothing outlives the authority that vouches for it."""
        own = self.certificate.not_valid_after_utc
        if own <= now:
            raise ConfigError(f"the CA's own certificate ended on {own:%Y-%m-%d}; make a new CA")
        return min(now + timedelta(days=days), own)

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


def write_key(path: Path, key: ec.EllipticCurvePrivateKey, *, overwrite: bool = True) -> None:
    """A private key as PEM, readable by this user alone.

    Raises:
      FileExistsError: There is a file already, and it may not be overwritten.
    """
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    existing = os.O_TRUNC if overwrite else os.O_EXCL
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | existing, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # a file that was there keeps its mode otherwise
        file.write(content)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    ends: datetime,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _BACKDATED,
        not_valid_after=ends,
    )
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(*uses: str) -> x509.KeyUsage:
    """These uses of a key and no others."""
    known = [
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ]
    return x509.KeyUsage(**{use: use in uses for use in known})


def pem(certificate: x509.Certificate) -> bytes:
    """As files hold it."""
    return certificate.public_bytes(serialization.Encoding.PEM)
