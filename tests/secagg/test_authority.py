"""What the consortium's authority issues, and how it keeps its key."""

from __future__ import annotations

import stat
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.authority import CERTIFICATE, KEY, Authority, write_key
from common.errors import ConfigError
from common.identity import Identity, check_certificate, read_revocation_list

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
