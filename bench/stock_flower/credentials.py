"""Certificates and keys of a stock Flower deployment, as its documentation asks for them."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CA, CERTIFICATE, KEY = "ca.pem", "server.pem", "server.key"


def write_certificates(folder: Path, host: str) -> None:
    """A CA, and a certificate for the SuperLink at an IP address."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = distinguished("bench CA"), distinguished("SuperLink")
    ca = unsigned(ca_name, ca_name, ca_key.public_key(), is_ca=True)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
    server = unsigned(name, ca_name, key.public_key(), is_ca=False)
    server = server.add_extension(address, critical=False)
    for file, builder in ((CA, ca), (CERTIFICATE, server)):
        signed = builder.sign(ca_key, hashes.SHA256())
        (folder / file).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    write_private(folder / KEY, key, serialization.PrivateFormat.PKCS8)


def write_node_key(private: Path, public: Path) -> None:
    """What a SuperNode signs with and what is registered, in the format of OpenSSH."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_private(private, key, serialization.PrivateFormat.OpenSSH)
    encoding, kind = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(encoding, kind))


def write_private(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    """Readable by this user alone."""
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def distinguished(common_name: str) -> x509.Name:
    """A name in a certificate."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, is_ca: bool
) -> x509.CertificateBuilder:
    """A certificate for a day."""
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - dt.timedelta(minutes=5),
        not_valid_after=now + dt.timedelta(days=1),
    )
    constraints = x509.BasicConstraints(ca=is_ca, path_length=None)
    return builder.add_extension(constraints, critical=True)
