"""The revocation list that is in force at the door."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest
from cryptography import x509

from common.authority import CERTIFICATE, REVOKED, Authority
from common.errors import RemoteProtocolError
from common.identity import Identity
from server.superlink.doorkeeper import Doorkeeper

STAMPS = count(10**18, 10**9)  # ns


@pytest.mark.parametrize("number", [1, 0], ids=["older", "without a number"])
def test_an_older_list_lets_nobody_in_whom_a_newer_one_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    authority = Authority.create("Test consortium", datetime.now(UTC), days=30)
    authority.save(tmp_path)
    bad, good = (enrolled(authority, name, tmp_path) for name in ("site-1", "site-2"))
    put(authority, tmp_path, 1)
    members = {"site-1": bad.fingerprint, "site-2": good.fingerprint}
    keeper = Doorkeeper(tmp_path / CERTIFICATE, tmp_path / REVOKED, members)
    assert keeper.admit(bad.certificate).name == "site-1"
    put(authority, tmp_path, 2, bad)
    for each in (2, number):
        put(authority, tmp_path, each, *([bad] if each == 2 else []))
        with pytest.raises(RemoteProtocolError, match="revoked"):
            keeper.admit(bad.certificate)
        assert keeper.admit(good.certificate).name == "site-2"
    assert f"went back from list 2 to {number}; list 2 stays in force" in caplog.text
    put(authority, tmp_path, 3)
    assert keeper.admit(bad.certificate).name == "site-1"


def test_a_newer_list_that_has_ended_is_no_longer_in_force(tmp_path: Path) -> None:
    """Whom a newer one would name is unknown: nobody comes in."""
    now = datetime.now(UTC)
    authority = Authority.create("Test consortium", now - timedelta(days=20), days=30)
    authority.save(tmp_path)
    site = enrolled(authority, "site-1", tmp_path)
    put(authority, tmp_path, 2, days=2 / 86_400)
    keeper = Doorkeeper(tmp_path / CERTIFICATE, tmp_path / REVOKED, {"site-1": site.fingerprint})
    assert keeper.admit(site.certificate).name == "site-1"
    time.sleep(2.1)
    put(authority, tmp_path, 1)
    with pytest.raises(RemoteProtocolError, match="not valid now"):
        keeper.admit(site.certificate)


def enrolled(authority: Authority, name: str, folder: Path) -> Identity:
    return authority.enrol(name, "site", folder / name, datetime.now(UTC), days=5)


def put(
    authority: Authority, folder: Path, number: int, *revoked: Identity, days: float = 10
) -> None:
    """A list, with a time of its own however fast the next one follows."""
    serials = [x509.load_der_x509_certificate(each.certificate).serial_number for each in revoked]
    content = authority.revocation_list(serials, datetime.now(UTC), days=days, number=number)
    (folder / REVOKED).write_bytes(content)
    stamp = next(STAMPS)
    os.utime(folder / REVOKED, ns=(stamp, stamp))
