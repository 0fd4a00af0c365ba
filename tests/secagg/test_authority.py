"""What the consortium's authority issues, and how it keeps its key."""

from __future__ import annotations

import stat
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.authority import CERTIFICATE, KEY, Authority, write_key
from common.errors import ConfigError
from common.identity import (
    Identity,
    Role,
    check_certificate,
    read_revocation_list,
    revocation_number,
)

DER = serialization.Encoding.DER


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_who_is_enrolled_is_believed_by_whoever_pins_the_authority(
    tmp_path: Path, authority: Authority, now: datetime
) -> None:
    enrolled = authority.enrol("st-olav", "site", tmp_path / "st-olav", now, days=10)
    listed = read_revocation_list(
        authority.revocation_list([], now, days=5), authority.certificate, now
    )
    certified = check_certificate(enrolled.certificate, authority.certificate, listed, now)
    assert (certified.name, certified.role) == ("st-olav", "site")
    assert certified.fingerprint == enrolled.fingerprint
    folder = tmp_path / "st-olav"
    loaded = Identity.load(folder / "certificate.pem", folder / "key.pem")
    assert (loaded.name, loaded.certificate) == (enrolled.name, enrolled.certificate)
    assert loaded.fingerprint == enrolled.fingerprint
    assert mode_of(folder / "key.pem") == 0o600


def test_what_is_issued_is_no_authority_and_the_authority_signs_members_only(
    authority: Authority, now: datetime
) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    issued = [authority.issue("a", "site", key, now, days=10) for _ in range(2)]
    assert issued[0].serial_number != issued[1].serial_number
    constraints = [
        one.extensions.get_extension_for_class(x509.BasicConstraints)
        for one in (authority.certificate, issued[0])
    ]
    assert all(one.critical for one in constraints)
    assert [(one.value.ca, one.value.path_length) for one in constraints] == [
        (True, 0),
        (False, None),
    ]


def uses(certificate: x509.Certificate) -> set[str]:
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    named = {name.removeprefix("_") for name, is_set in vars(usage.value).items() if is_set}
    return named - {"encipher_only", "decipher_only"}


@pytest.mark.parametrize(
    ("role", "purposes"),
    [
        ("site", {ExtendedKeyUsageOID.CLIENT_AUTH}),
        ("coordinator", {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}),
    ],
)
def test_a_certificate_says_what_its_key_is_for_and_whose_key_signed_it(
    authority: Authority, now: datetime, role: Role, purposes: set[x509.ObjectIdentifier]
) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    issued = authority.issue("a", role, key, now, days=10)
    extensions, ca = issued.extensions, authority.certificate.extensions
    assert set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == purposes
    assert uses(issued) == {"digital_signature"}
    assert uses(authority.certificate) == {"key_cert_sign", "crl_sign"}
    signer = ca.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    named = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    own = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert named.key_identifier == signer
    assert own == x509.SubjectKeyIdentifier.from_public_key(key)


def test_hosts_stand_in_a_certificate_once_each_and_only_where_there_are_some(
    tmp_path: Path, authority: Authority, now: datetime
) -> None:
    hosts = ["Fl.example.org", "127.0.0.1", "::1", "127.0.0.1", "fl.example.org"]
    enrolled = authority.enrol("hub", "coordinator", tmp_path, now, days=9, hosts=hosts)
    issued = x509.load_der_x509_certificate(enrolled.certificate)
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["127.0.0.1", "::1"]
    without = authority.issue("a", "site", enrolled.key.public_key(), now, days=9)
    with pytest.raises(x509.ExtensionNotFound):
        without.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    with pytest.raises(ConfigError, match="expected a DNS name or an IP address"):
        authority.issue("a", "coordinator", without.public_key(), now, days=9, hosts=["a:1"])


def test_no_certificate_outlives_its_authority(now: datetime) -> None:
    authority = Authority.create("short-lived", now, days=10)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    ends = [
        authority.issue("a", "site", key, now, days=days).not_valid_after_utc - now
        for days in (9, 10, 11, 100_000)
    ]
    assert ends == [timedelta(days=days) for days in (9, 10, 10, 10)]
    with pytest.raises(ConfigError, match="make a new CA"):
        authority.issue("a", "site", key, now + timedelta(days=10), days=1)


def test_a_clock_that_is_five_minutes_late_is_no_reason_to_refuse(
    authority: Authority, now: datetime
) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    content = authority.issue("a", "site", key, now, days=1).public_bytes(DER)
    late = now - timedelta(minutes=5)
    fresh = authority.revocation_list([], now, days=1)
    listed = read_revocation_list(fresh, authority.certificate, late)
    assert check_certificate(content, authority.certificate, listed, late).name == "a"


def test_the_list_holds_exactly_who_was_revoked(authority: Authority, now: datetime) -> None:
    content = authority.revocation_list([12, 345], now, days=1)
    listed = read_revocation_list(content, authority.certificate, now)
    assert {entry.serial_number for entry in listed} == {12, 345}


def test_a_list_has_its_number_and_remembers_since_when(
    authority: Authority, now: datetime
) -> None:
    first = x509.load_der_x509_crl(authority.revocation_list([], now, days=1))
    since = {12: now - timedelta(days=40)}
    content = authority.revocation_list([12, 345], now, days=1, number=8, since=since)
    listed = read_revocation_list(content, authority.certificate, now)
    assert (revocation_number(first), revocation_number(listed)) == (1, 8)
    dates = {entry.serial_number: entry.revocation_date_utc for entry in listed}
    assert dates == {12: now - timedelta(days=40), 345: now - timedelta(minutes=5)}


def test_an_authority_is_loaded_as_it_was_saved(
    tmp_path: Path, authority: Authority, now: datetime
) -> None:
    authority.save(tmp_path / "ca")
    loaded = Authority.load(tmp_path / "ca")
    assert loaded.certificate == authority.certificate
    assert loaded.key.private_numbers() == authority.key.private_numbers()
    assert mode_of(tmp_path / "ca" / KEY) == 0o600
    fresh = loaded.revocation_list([], now, days=1)
    assert read_revocation_list(fresh, authority.certificate, now) is not None


@pytest.mark.parametrize("file", [CERTIFICATE, KEY])
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_damaged_authority_names_the_file(
    tmp_path: Path, authority: Authority, file: str, content: bytes | None
) -> None:
    authority.save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=file):
        Authority.load(tmp_path)


def test_a_key_is_readable_by_its_user_alone_even_where_a_file_was_before(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    file.write_text("an older file, longer than any key " * 100)
    file.chmod(0o644)
    key = ec.generate_private_key(ec.SECP256R1())
    write_key(file, key)
    assert mode_of(file) == 0o600
    loaded = serialization.load_pem_private_key(file.read_bytes(), password=None)
    assert loaded.private_numbers() == key.private_numbers()  # type: ignore[union-attr]


def test_a_key_that_may_not_be_overwritten_is_not(tmp_path: Path) -> None:
    file, key = tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1())
    write_key(file, key, overwrite=False)
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        write_key(file, ec.generate_private_key(ec.SECP256R1()), overwrite=False)
    assert (file.read_bytes(), mode_of(file)) == (before, 0o600)
