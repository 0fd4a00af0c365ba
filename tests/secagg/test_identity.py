"""Whose certificate, key or revocation list is believed, and what is refused as none."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import cryptography_vectors
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from common.authority import Authority
from common.errors import ConfigError, RemoteProtocolError
from common.identity import (
    Identity,
    check_certificate,
    check_signature,
    fingerprint,
    read_certificate,
    read_certified,
    read_party,
    read_revocation_list,
    revocation_number,
)

DER, PEM = serialization.Encoding.DER, serialization.Encoding.PEM
DAY, SECOND = timedelta(days=1), timedelta(seconds=1)
NAME, ROLE = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME
P256, EC_KEY = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06072a8648ce3d0201")

# What garbage makes the parser say before it is refused.
noisy = pytest.mark.filterwarnings(
    "ignore:Parsed a serial number which wasn't positive", "ignore:Attribute's length must be"
)

Attribute = tuple[x509.ObjectIdentifier, str]


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


class Maker:
    """Makes certificates and lists, also those that a good authority would not."""

    def __init__(self, authority: Authority, now: datetime) -> None:
        self.authority, self.now = authority, now
        self.stranger = Authority.create("another consortium", now, days=1000)
        self.namesake = Authority.create("consortium", now, days=1000)
        self.member = new_key()

    def certificate(
        self, *subject: Attribute, key: Any = None, issuer: str = "consortium", signer: Any = None
    ) -> bytes:
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(NAME, issuer)]),
            subject_name=x509.Name(
                [
                    x509.NameAttribute(kind, value)
                    for kind, value in subject or ((NAME, "site-9"), (ROLE, "site"))
                ]
            ),
            public_key=(key or new_key()).public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=self.now - DAY,
            not_valid_after=self.now + DAY,
        )
        return builder.sign(signer or self.authority.key, hashes.SHA256()).public_bytes(DER)

    def patched(self, old: bytes, new: bytes, **made: Any) -> bytes:
        """A certificate with one stretch of its bytes replaced."""
        content = self.certificate(**made)
        assert content.count(old) == 1
        return content.replace(old, new)

    def revocation_list(self, issuer: str = "consortium", signer: Any = None) -> bytes:
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=x509.Name([x509.NameAttribute(NAME, issuer)]),
            last_update=self.now - DAY,
            next_update=self.now + DAY,
        )
        return builder.sign(signer or self.authority.key, hashes.SHA256()).public_bytes(DER)


Made = Callable[[Maker], bytes]


@pytest.fixture(scope="session")
def maker(authority: Authority, now: datetime) -> Maker:
    return Maker(authority, now)


@pytest.fixture(scope="session")
def nobody_revoked(authority: Authority, now: datetime) -> x509.CertificateRevocationList:
    return x509.load_der_x509_crl(authority.revocation_list([], now, days=30))


def no_point(make: Maker) -> bytes:
    encoded = make.member.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    return make.patched(encoded, b"\x04" + b"\x55" * 64, key=make.member)


BAD_FORM: dict[str, Made] = {
    "nothing": lambda _: b"",
    "text": lambda _: b"certificate",
    "zeros": lambda _: bytes(500),
    "a certificate cut in the middle": lambda make: make.certificate()[:150],
    "a certificate without its last byte": lambda make: make.certificate()[:-1],
    "a certificate and one byte": lambda make: make.certificate() + b"\0",
    "a certificate in PEM": lambda make: make.authority.certificate.public_bytes(PEM),
    "a revocation list": lambda make: make.revocation_list(),
    "the authority's own certificate": lambda make: make.authority.certificate.public_bytes(DER),
    "a certificate of version 7": lambda make: make.patched(
        bytes.fromhex("a003020102"), bytes.fromhex("a003020106")
    ),
    "a key on a curve that nobody knows": lambda make: make.patched(P256, P256[:-1] + b"\x55"),
    "a key of a kind that nobody knows": lambda make: make.patched(EC_KEY, EC_KEY[:-1] + b"\x55"),
    "a key that is no point of the curve": no_point,
    "a key on P-384": lambda make: make.certificate(key=ec.generate_private_key(ec.SECP384R1())),
    "a key on secp256k1": lambda make: make.certificate(
        key=ec.generate_private_key(ec.SECP256K1())
    ),
    "an Ed25519 key": lambda make: make.certificate(key=ed25519.Ed25519PrivateKey.generate()),
    "an RSA key": lambda make: make.certificate(key=rsa.generate_private_key(65537, 2048)),
    "no name": lambda make: make.certificate((ROLE, "site")),
    "two names": lambda make: make.certificate((NAME, "a"), (NAME, "b"), (ROLE, "site")),
    "no role": lambda make: make.certificate((NAME, "a")),
    "two roles": lambda make: make.certificate((NAME, "a"), (ROLE, "site"), (ROLE, "coordinator")),
    "a role that does not exist": lambda make: make.certificate((NAME, "a"), (ROLE, "auditor")),
    "a role in capitals": lambda make: make.certificate((NAME, "a"), (ROLE, "SITE")),
    "a role in another attribute": lambda make: make.certificate(
        (NAME, "a"), (NameOID.ORGANIZATION_NAME, "site")
    ),
}


@pytest.mark.parametrize("made", BAD_FORM.values(), ids=BAD_FORM)
def test_what_is_no_certificate_of_a_site_or_coordinator_is_refused(
    maker: Maker, nobody_revoked: x509.CertificateRevocationList, made: Made
) -> None:
    content, ca = made(maker), maker.authority.certificate
    for read in (
        read_certified,
        lambda content: check_certificate(content, ca, nobody_revoked, maker.now),
    ):
        with pytest.raises(RemoteProtocolError, match="none of a site or coordinator") as error:
            read(content)
        assert error.value.rule == "R3"


NOT_ISSUED: dict[str, Made] = {
    "another authority": lambda make: make.certificate(
        issuer="another consortium", signer=make.stranger.key
    ),
    "an authority of the same name": lambda make: make.certificate(signer=make.namesake.key),
    "the right key under another name": lambda make: make.certificate(issuer="another consortium"),
    "its own owner": lambda make: make.certificate(
        key=make.member, signer=make.member, issuer="site-9"
    ),
    "its own owner in the authority's name": lambda make: make.certificate(
        key=make.member, signer=make.member
    ),
    "a member": lambda make: make.certificate(signer=make.member, issuer="site-9"),
    "nobody: the signature was altered": lambda make: _flipped(make.certificate(), -1),
    "nobody: the name was altered": lambda make: make.patched(b"site-9", b"site-8"),
    "nobody: the role was altered": lambda make: make.certificate(
        (NAME, "abc"), (ROLE, "coordinator")
    ).replace(b"abc", b"abd"),
    "a signature of a kind that nobody knows": lambda make: make.certificate().replace(
        bytes.fromhex("2a8648ce3d040302"), bytes.fromhex("2a8648ce3d040355")
    ),
}


def _flipped(content: bytes, place: int) -> bytes:
    altered = bytearray(content)
    altered[place] ^= 1
    return bytes(altered)


@pytest.mark.parametrize("made", NOT_ISSUED.values(), ids=NOT_ISSUED)
def test_a_certificate_that_was_issued_by_somebody_else_is_refused(
    maker: Maker, nobody_revoked: x509.CertificateRevocationList, made: Made
) -> None:
    content = made(maker)
    read_certified(content)  # its form is good
    with pytest.raises(RemoteProtocolError, match="not issued by this site's CA") as error:
        check_certificate(content, maker.authority.certificate, nobody_revoked, maker.now)
    assert error.value.rule == "R3"


@pytest.mark.parametrize("role", ["site", "coordinator"])
def test_a_good_certificate_says_who_somebody_is(
    maker: Maker, nobody_revoked: x509.CertificateRevocationList, role: str
) -> None:
    content = maker.certificate((NAME, "st-olav"), (ROLE, role), key=maker.member)
    certified = check_certificate(content, maker.authority.certificate, nobody_revoked, maker.now)
    assert (certified.name, certified.role) == ("st-olav", role)
    assert certified.key == maker.member.public_key()
    assert certified.fingerprint == fingerprint(maker.member.public_key())
    assert certified.serial_number == x509.load_der_x509_certificate(content).serial_number


@pytest.mark.parametrize(
    ("after", "is_good"),
    [
        pytest.param(-DAY - SECOND, False, id="a second before it begins"),
        pytest.param(-DAY, True, id="when it begins"),
        pytest.param(DAY, True, id="when it ends"),
        pytest.param(DAY + SECOND, False, id="a second after it ended"),
        pytest.param(400 * DAY, False, id="long expired"),
    ],
)
def test_a_certificate_is_good_in_its_time_only(
    maker: Maker,
    nobody_revoked: x509.CertificateRevocationList,
    after: timedelta,
    is_good: bool,
) -> None:
    content, then = maker.certificate(), maker.now + after
    if is_good:
        check_certificate(content, maker.authority.certificate, nobody_revoked, then)
        return
    with pytest.raises(RemoteProtocolError, match="certificate of site-9 is valid from") as error:
        check_certificate(content, maker.authority.certificate, nobody_revoked, then)
    assert error.value.rule == "R3"


def test_whoever_ended_with_the_authority_is_not_told_to_renew(now: datetime) -> None:
    authority = Authority.create("short-lived", now, days=1)
    content = authority.issue("site-9", "site", new_key().public_key(), now, days=1)
    nobody = x509.load_der_x509_crl(authority.revocation_list([], now, days=100))
    with pytest.raises(RemoteProtocolError, match="of this site's CA is valid from"):
        check_certificate(content.public_bytes(DER), authority.certificate, nobody, now + 2 * DAY)


def test_nothing_is_believed_of_an_authority_that_expired(now: datetime) -> None:
    authority = Authority.create("short-lived", now, days=1)
    certificate = authority.issue("site-9", "site", new_key().public_key(), now, days=100)
    nobody = x509.load_der_x509_crl(authority.revocation_list([], now, days=100))
    content = certificate.public_bytes(DER)
    check_certificate(content, authority.certificate, nobody, now + DAY)
    with pytest.raises(RemoteProtocolError, match="of this site's CA is valid from"):
        check_certificate(content, authority.certificate, nobody, now + 2 * DAY)


def test_a_revoked_certificate_is_refused_and_a_renewed_one_of_the_same_key_is_not(
    maker: Maker,
) -> None:
    ca, now = maker.authority.certificate, maker.now
    revoked, renewed = (maker.certificate(key=maker.member) for _ in range(2))
    serial = x509.load_der_x509_certificate(revoked).serial_number
    listed = x509.load_der_x509_crl(maker.authority.revocation_list([serial, 77], now, days=1))
    with pytest.raises(RemoteProtocolError, match="site-9 was revoked") as error:
        check_certificate(revoked, ca, listed, now)
    assert error.value.rule == "R3"
    certified = check_certificate(renewed, ca, listed, now)
    assert certified.fingerprint == read_certified(revoked).fingerprint


NO_LISTS: dict[str, tuple[Made, str]] = {
    "nothing": (lambda _: b"", "no revocation list"),
    "text": (lambda _: b"list", "no revocation list"),
    "a certificate": (lambda make: make.certificate(), "no revocation list"),
    "a list cut in the middle": (lambda make: make.revocation_list()[:90], "no revocation list"),
    "a list and one byte": (lambda make: make.revocation_list() + b"\0", "no revocation list"),
    "a list of version 7": (
        lambda make: make.revocation_list().replace(
            bytes.fromhex("020101300a"), bytes.fromhex("020106300a"), 1
        ),
        "no revocation list",
    ),
    "a list of another authority": (
        lambda make: make.revocation_list("another consortium", make.stranger.key),
        "not signed by this site's CA",
    ),
    "a list of another authority of the same name": (
        lambda make: make.revocation_list(signer=make.namesake.key),
        "not signed by this site's CA",
    ),
    "a list of the right key under another name": (
        lambda make: make.revocation_list("another consortium"),
        "not signed by this site's CA",
    ),
    "a list that a member signed": (
        lambda make: make.revocation_list(signer=make.member),
        "not signed by this site's CA",
    ),
    "a list with an altered signature": (
        lambda make: _flipped(make.revocation_list(), -1),
        "not signed by this site's CA",
    ),
}


@pytest.mark.parametrize(("made", "words"), NO_LISTS.values(), ids=NO_LISTS)
def test_what_is_not_the_authoritys_list_is_refused(maker: Maker, made: Made, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words) as error:
        read_revocation_list(made(maker), maker.authority.certificate, maker.now)
    assert error.value.rule == "R3"


@pytest.mark.parametrize(
    ("after", "is_good"),
    [
        pytest.param(-DAY - SECOND, False, id="a second before it begins"),
        pytest.param(-DAY, True, id="when it begins"),
        pytest.param(DAY, True, id="when it ends"),
        pytest.param(DAY + SECOND, False, id="a second stale"),
    ],
)
def test_a_list_that_is_stale_or_of_the_future_is_refused(
    maker: Maker, after: timedelta, is_good: bool
) -> None:
    content, then = maker.revocation_list(), maker.now + after
    if is_good:
        assert len(read_revocation_list(content, maker.authority.certificate, then)) == 0
        return
    with pytest.raises(RemoteProtocolError, match="fetch a fresh one") as error:
        read_revocation_list(content, maker.authority.certificate, then)
    assert error.value.rule == "R3"


def test_a_list_without_a_number_counts_as_number_zero(maker: Maker) -> None:
    assert revocation_number(x509.load_der_x509_crl(maker.revocation_list())) == 0


@pytest.mark.parametrize("number", [1, 2, 255, 256, 2**40])
def test_the_number_of_a_list_is_read(maker: Maker, number: int) -> None:
    content = maker.authority.revocation_list([5], maker.now, days=1, number=number)
    assert revocation_number(x509.load_der_x509_crl(content)) == number


def test_a_number_that_cannot_be_read_is_refused(maker: Maker) -> None:
    content = maker.authority.revocation_list([], maker.now, days=1, number=77)
    encoded = bytes.fromhex("0603551d140403" + "02014d")  # the extension, then INTEGER 77
    assert content.count(encoded) == 1
    text = x509.load_der_x509_crl(content.replace(encoded, encoded[:-3] + bytes.fromhex("0c014d")))
    with pytest.raises(RemoteProtocolError, match="number that cannot be read") as error:
        revocation_number(text)
    assert error.value.rule == "R3"


@pytest.mark.parametrize("role", ["site", "coordinator"])
def test_a_request_and_a_certificate_state_the_same_party(maker: Maker, role: str) -> None:
    subject = x509.Name([x509.NameAttribute(NAME, "st-olav"), x509.NameAttribute(ROLE, role)])
    request = x509.CertificateSigningRequestBuilder(subject).sign(maker.member, hashes.SHA256())
    content = maker.certificate((NAME, "st-olav"), (ROLE, role), key=maker.member)
    expected = ("st-olav", role, maker.member.public_key())
    assert read_party(request) == read_party(x509.load_der_x509_certificate(content)) == expected


@pytest.mark.parametrize("title", ["no name", "two roles", "a role in capitals", "an RSA key"])
def test_a_party_that_is_none_is_a_mistake_in_a_file(maker: Maker, title: str) -> None:
    with pytest.raises(ConfigError, match=r"once|'SITE'|P-256"):
        read_party(x509.load_der_x509_certificate(BAD_FORM[title](maker)))


def alterations(content: bytes) -> Iterator[bytes]:
    for place in range(len(content)):
        for by in (0x01, 0x02, 0x20, 0x80, 0xFF):
            altered = bytearray(content)
            altered[place] ^= by
            yield bytes(altered)


@noisy
def test_an_altered_certificate_is_refused_unless_what_was_signed_is_untouched(
    maker: Maker, nobody_revoked: x509.CertificateRevocationList
) -> None:
    content = maker.certificate()
    signed = x509.load_der_x509_certificate(content).tbs_certificate_bytes
    for one in alterations(content):
        try:
            check_certificate(one, maker.authority.certificate, nobody_revoked, maker.now)
        except RemoteProtocolError:
            continue
        # The signature's own bytes have a filler that means nothing.
        assert x509.load_der_x509_certificate(one).tbs_certificate_bytes == signed


@noisy
def test_an_altered_revocation_list_is_refused_unless_what_was_signed_is_untouched(
    maker: Maker,
) -> None:
    content = maker.authority.revocation_list([5, 6], maker.now, days=3)
    signed = x509.load_der_x509_crl(content).tbs_certlist_bytes
    for one in alterations(content):
        try:
            read_revocation_list(one, maker.authority.certificate, maker.now)
        except RemoteProtocolError:
            continue
        assert x509.load_der_x509_crl(one).tbs_certlist_bytes == signed


@noisy
def test_the_strangest_published_certificates_and_lists_are_refused(maker: Maker) -> None:
    folder = Path(cryptography_vectors.__file__).parent / "x509"
    kinds, contents = {".pem", ".der", ".crt", ".crl"}, []
    for file in sorted(one for one in folder.rglob("*") if one.suffix in kinds):
        blocks = re.findall(rb"-----BEGIN [^-]+-----([^-]+)-----END", file.read_bytes())
        contents += [base64.b64decode(block) for block in blocks] or [file.read_bytes()]
    assert len(contents) > 700
    for content in contents:
        with pytest.raises(RemoteProtocolError):
            read_certified(content)
        with pytest.raises(RemoteProtocolError):
            read_revocation_list(content, maker.authority.certificate, maker.now)


def test_a_fingerprint_is_the_digest_of_the_encoded_public_key() -> None:
    # The key 1 has the curve's base point as its public key (SEC 2, section 2.4.2).
    encoded = (
        "3059301306072a8648ce3d020106082a8648ce3d03010703420004"
        "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
        "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
    )
    key = ec.derive_private_key(1, ec.SECP256R1())
    expected = hashlib.sha256(bytes.fromhex(encoded)).hexdigest()
    assert fingerprint(key.public_key()) == expected
    assert Identity("one", key, b"").fingerprint == expected


def test_a_signature_is_good_for_its_key_and_content_alone(maker: Maker) -> None:
    signature = Identity("a", maker.member, b"").sign(b"content")
    public, other = maker.member.public_key(), new_key().public_key()
    assert check_signature(public, signature, b"content")
    bad = [
        check_signature(public, signature, b"content'"),
        check_signature(other, signature, b"content"),
        check_signature(public, b"", b"content"),
        check_signature(public, b"signature", b"content"),
        check_signature(public, signature[:-1], b"content"),
        check_signature(public, signature + b"\0", b"content"),
        check_signature(public, bytes.fromhex("3006020100020100"), b"content"),
    ]
    assert bad == [False] * len(bad)


Files = tuple[Path, Path]  # of a certificate and its key


def written(folder: Path, certificate: bytes, key: Any, is_encrypted: bool = False) -> Files:
    """A certificate and a key as PEM files, whatever they are."""
    parsed = x509.load_der_x509_certificate(certificate)
    (folder / "certificate.pem").write_bytes(parsed.public_bytes(PEM))
    encryption: Any = serialization.NoEncryption()
    if is_encrypted:
        encryption = serialization.BestAvailableEncryption(b"password")
    content = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption)
    (folder / "key.pem").write_bytes(content)
    return folder / "certificate.pem", folder / "key.pem"


def test_a_site_is_loaded_from_its_two_files(tmp_path: Path, maker: Maker) -> None:
    content = maker.certificate(key=maker.member)
    identity = Identity.load(*written(tmp_path, content, maker.member))
    assert (identity.name, identity.certificate) == ("site-9", content)
    assert identity.fingerprint == fingerprint(maker.member.public_key())
    assert check_signature(maker.member.public_key(), identity.sign(b"x"), b"x")


def altered(which: str, content: bytes | None) -> Callable[[Path, Maker], Files]:
    """Good files, then one of them with other content, or none."""

    def make(folder: Path, maker: Maker) -> Files:
        files = written(folder, maker.certificate(key=maker.member), maker.member)
        file = files[which == "key.pem"]
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        return files

    return make


def of_key(key: Any, **made: Any) -> Callable[[Path, Maker], Files]:
    """A good certificate, and this key."""
    return lambda folder, maker: written(
        folder, maker.certificate(key=maker.member), key(maker), **made
    )


def of_certificate(*subject: Attribute, key: Any = new_key) -> Callable[[Path, Maker], Files]:
    """A strange certificate, and the key that belongs to it."""

    def make(folder: Path, maker: Maker) -> Files:
        private = key()
        return written(folder, maker.certificate(*subject, key=private), private)

    return make


BAD_FILES: dict[str, tuple[Callable[[Path, Maker], Files], str]] = {
    "there is no certificate": (altered("certificate.pem", None), "certificate.pem"),
    "the certificate is empty": (altered("certificate.pem", b""), "certificate.pem"),
    "the certificate is text": (altered("certificate.pem", b"hello"), "certificate.pem"),
    "the certificate is a folder": (
        lambda folder, maker: (folder, written(folder, maker.certificate(), maker.member)[1]), "",
    ),
    "there is no key": (altered("key.pem", None), "key.pem"),
    "the key is empty": (altered("key.pem", b""), "key.pem"),
    "the key is text": (altered("key.pem", b"hello"), "key.pem"),
    "the key is encrypted": (of_key(lambda maker: maker.member, is_encrypted=True), "key.pem"),
    "the key is another one": (of_key(lambda _: new_key()), "key.pem"),
    "the key is an RSA key": (
        of_key(lambda _: rsa.generate_private_key(65537, 2048)), "key.pem",
    ),
    "the key is on another curve": (
        of_key(lambda _: ec.generate_private_key(ec.SECP384R1())), "key.pem",
    ),
    "both are of another curve": (
        of_certificate(key=lambda: ec.generate_private_key(ec.SECP384R1())), "certificate.pem",
    ),
    "the certificate has no name": (of_certificate((ROLE, "site")), "certificate.pem"),
    "the certificate has two names": (
        of_certificate((NAME, "a"), (NAME, "b"), (ROLE, "site")), "certificate.pem",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "file"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, maker: Maker, make: Callable[[Path, Maker], Files], file: str
) -> None:
    certificate, key = make(tmp_path, maker)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / file))):
        Identity.load(certificate, key)


def test_a_certificate_is_read_from_its_file(tmp_path: Path, maker: Maker) -> None:
    content = maker.certificate()
    certificate, _ = written(tmp_path, content, maker.member)
    assert read_certificate(certificate).public_bytes(DER) == content
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "none.pem"))):
        read_certificate(tmp_path / "none.pem")
