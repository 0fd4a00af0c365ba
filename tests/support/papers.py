"""Certificates and revocation lists that nobody may accept, odd enough to be parsed first."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from common.authority import Authority
from common.identity import Identity


def odd_certificates(authority: Authority, identity: Identity, now: datetime) -> dict[str, bytes]:
    """Certificates of one party that nobody may accept, by what is wrong with them."""
    role = "coordinator" if identity.name == "coordinator" else "site"
    key = identity.key.public_key()
    stranger = Authority.create("another CA", now, days=9)
    namesake = Authority.create("SIMULATION, protects nobody", now, days=9)
    fresh = ec.generate_private_key(ec.SECP256R1()).public_key()
    issue = authority.issue
    other_role = "site" if role == "coordinator" else "coordinator"
    certificates = {
        "of another CA": stranger.issue(identity.name, role, key, now, days=9),
        "of a CA with the same name": namesake.issue(identity.name, role, key, now, days=9),
        "expired": issue(identity.name, role, key, now - timedelta(days=9), days=1),
        "not valid yet": issue(identity.name, role, key, now + timedelta(days=3), days=9),
        "of another role": issue(identity.name, other_role, key, now, days=9),
        "of another name": issue("site-9", "site", key, now, days=9),
        "without a name": issue(" ", "site", key, now, days=9),
        "of a fresh key": issue(identity.name, role, fresh, now, days=9),
        "on another curve": _issued(authority, ec.generate_private_key(ec.SECP384R1()), now),
        "with an RSA key": _issued(authority, rsa.generate_private_key(65537, 2048), now),
        "with an Ed25519 key": _issued(authority, ed25519.Ed25519PrivateKey.generate(), now),
        "of nobody": _issued(authority, identity.key, now, names=()),
        "of two": _issued(authority, identity.key, now, names=("site-1", "site-2")),
        "of the CA itself": authority.certificate,
    }
    encoded = {
        title: one.public_bytes(serialization.Encoding.DER) for title, one in certificates.items()
    }
    return encoded | _rewritten(identity.certificate)


def odd_lists(authority: Authority, revoked: Sequence[int], now: datetime) -> dict[str, bytes]:
    """Revocation lists that nobody may accept."""
    past, soon = now - timedelta(days=9), now + timedelta(days=3)
    good = authority.revocation_list([], now, days=9)
    return {
        "stale": authority.revocation_list([], past, days=1),
        "not valid yet": authority.revocation_list([], soon, days=9),
        "that revokes everybody": authority.revocation_list(revoked, now, days=9),
        "of another CA": Authority.create("x", now, days=9).revocation_list([], now, days=9),
        "of a CA with the same name": Authority.create(
            "SIMULATION, protects nobody", now, days=9
        ).revocation_list([], now, days=9),
        "that is a certificate": authority.certificate.public_bytes(serialization.Encoding.DER),
        **_rewritten(good),
    }


def _issued(
    authority: Authority, key: Any, now: datetime, *, names: Sequence[str] = ("site-2",)
) -> x509.Certificate:
    unit = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "site")]
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]
    builder = x509.CertificateBuilder(
        issuer_name=authority.certificate.subject,
        subject_name=x509.Name(subject + unit),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=1),
        not_valid_after=now + timedelta(days=9),
    )
    return builder.sign(authority.key, hashes.SHA256())


REPLACED = {  # DER, in hexadecimal
    "an unknown signature algorithm": ("06082a8648ce3d040302", "06082a8648ce3d04037f"),
    "ECDSA with SHA-384": ("06082a8648ce3d040302", "06082a8648ce3d040303"),
    "ECDSA with SHA-224": ("06082a8648ce3d040302", "06082a8648ce3d040301"),
    "MD4 for a signature": ("06082a8648ce3d040302", "06082a864886f70d0204"),
    "an unknown kind of key": ("06072a8648ce3d0201", "06072a8648ce3d027f"),
    "an unknown curve": ("06082a8648ce3d030107", "06082a8648ce3d03017f"),
    "a version of the future": ("a003020102", "a003020106"),
    "a list's version of the future": ("020101300a", "020105300a"),
    "an unknown attribute for the name": ("0603550403", "060355047f"),
    "bytes for a name": ("06035504030c", "060355040304"),
    "half characters for a name": ("06035504030c", "06035504031e"),
    "another kind of time": ("170d", "180d"),
    "an unknown extension": ("0603551d13", "0603551d7f"),
}


def _rewritten(content: bytes) -> dict[str, bytes]:
    """The same DER with one thing replaced wherever it stands; lengths stay right."""
    return {
        f"with {title}": content.replace(bytes.fromhex(before), bytes.fromhex(after))
        for title, (before, after) in REPLACED.items()
        if bytes.fromhex(before) in content
    }
