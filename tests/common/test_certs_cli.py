"""The certificate ceremony: what its commands make, what they refuse, and what TLS makes of it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typer.testing import CliRunner

from common import certs_cli
from common.authority import Authority, write_key
from common.certs_cli import app
from common.errors import ConfigError, FederationError
from common.identity import (
    Identity,
    check_certificate,
    fingerprint,
    read_certificate,
    read_revocation_list,
    revocation_number,
)

PEM = serialization.Encoding.PEM
README = Path(__file__).parents[2] / "certs" / "README.md"
HOST = "127.0.0.1"
BASH, GIT = str(shutil.which("bash")), str(shutil.which("git"))
NOW = datetime(2031, 5, 17, 12, tzinfo=UTC)  # for tests that choose the time


def certs(*words: Any, exit_code: int = 0) -> str:
    """What ``fl-certs`` prints; what it refuses with is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, FederationError):
        raise result.exception
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result.output


class Place:
    """A folder in which the ceremony is held: ``ca``, and one folder per party."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ca = folder, folder / "ca"
        certs("ca", "--out", self.ca, "--name", "Consortium")

    def member(self, name: str, *hosts: str, folder: str = "") -> Path:
        """Somebody who was certified; a coordinator has hosts."""
        kit = self.request(name, *hosts, folder=folder)
        certs("sign", "--ca", self.ca, kit / "request.pem")
        return kit

    def request(self, name: str, *hosts: str, folder: str = "") -> Path:
        kit = self.folder / (folder or name)
        role = ["--role", "coordinator"] if hosts else []
        certs("request", "--name", name, "--out", kit, *role, *(f"--host={one}" for one in hosts))
        return kit

    def listed(self) -> x509.CertificateRevocationList:
        return x509.load_der_x509_crl((self.ca / "revoked.crl").read_bytes())

    def accepts(self, certificate: Path) -> None:
        """What sites and coordinator ask before they believe a signed message."""
        ca, now = read_certificate(self.ca / "ca.pem"), datetime.now(UTC)
        listed = read_revocation_list((self.ca / "revoked.crl").read_bytes(), ca, now)
        content = read_certificate(certificate).public_bytes(serialization.Encoding.DER)
        check_certificate(content, ca, listed, now)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    """Sets what time the commands think it is."""
    return lambda now: monkeypatch.setattr(certs_cli, "_now", lambda: now)


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def identity(kit: Path) -> Identity:
    return Identity.load(kit / "certificate.pem", kit / "key.pem")


# TLS


def context(kit: Path, ca: Path, *, is_server: bool = False) -> ssl.SSLContext:
    """Strict TLS 1.3 with the CA's certificate and list, as strictly as OpenSSL can be told."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    made.load_cert_chain(kit / "certificate.pem", kit / "key.pem")
    made.load_verify_locations(ca / "ca.pem")
    listed = x509.load_der_x509_crl((ca / "revoked.crl").read_bytes())
    (kit / "list.pem").write_bytes(listed.public_bytes(PEM))
    made.load_verify_locations(kit / "list.pem")
    return made


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str = HOST) -> list[str]:
    """A handshake and one word each way over memory; the names in the certificates seen."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    site = client.wrap_bio(down, up, server_hostname=host)
    hub = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (site, hub):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    site.write(b"round?")
    hub.write(b"round 1")
    assert (hub.read(), site.read(), site.version()) == (b"round?", b"round 1", "TLSv1.3")
    return [
        dict(one[0] for one in side.getpeercert()["subject"])["commonName"] for side in (site, hub)
    ]


def test_a_site_and_a_coordinator_that_were_certified_shake_hands_under_strict_verification(
    place: Place,
) -> None:
    site, hub = place.member("st-olav"), place.member("hub", HOST, "localhost", "::1")
    for host in (HOST, "localhost", "::1"):
        server = context(hub, place.ca, is_server=True)
        assert shake_hands(context(site, place.ca), server, host) == ["hub", "st-olav"]


def test_the_same_handshake_over_a_socket(place: Place) -> None:
    site, hub = place.member("st-olav"), place.member("hub", HOST)
    seen: list[str] = []
    server = context(hub, place.ca, is_server=True)
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            with server.wrap_socket(listener.accept()[0], server_side=True) as peer:
                seen.append(str(peer.getpeercert()["subject"]))
                peer.sendall(b"welcome")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with (
            socket.create_connection(listener.getsockname(), timeout=20) as plain,
            context(site, place.ca).wrap_socket(plain, server_hostname=HOST) as connection,
        ):
            assert connection.recv(100) == b"welcome"
        thread.join(timeout=20)
    assert len(seen) == 1
    assert "st-olav" in seen[0]


def enrol(place: Place, authority: Authority, *, at: datetime, days: int) -> Path:
    """A site called ``other`` that an authority certified at some time."""
    authority.enrol("other", "site", place.folder / "other", at, days=days)
    return place.folder / "other"


def expired(place: Place) -> Path:
    long_ago = datetime.now(UTC) - timedelta(days=40)
    return enrol(place, Authority.load(place.ca), at=long_ago, days=10)


def of_the_future(place: Place) -> Path:
    return enrol(place, Authority.load(place.ca), at=datetime.now(UTC) + timedelta(days=9), days=10)


def of_another_ca(place: Place) -> Path:
    now = datetime.now(UTC)
    return enrol(place, Authority.create("Others", now, days=90), at=now, days=10)


def of_a_ca_of_the_same_name(place: Place) -> Path:
    now = datetime.now(UTC)
    return enrol(place, Authority.create("Consortium", now, days=90), at=now, days=10)


def revoked(place: Place) -> Path:
    kit = place.member("other")
    certs("revoke", "--ca", place.ca, "other")
    return kit


def revoked_and_renewed_before(place: Place) -> Path:
    kit = place.member("other")
    certs("renew", "--ca", place.ca, kit / "certificate.pem")
    certs("revoke", "--ca", place.ca, "other")
    return kit


REFUSED = {
    "expired": (expired, "certificate has expired"),
    "not valid yet": (of_the_future, "not yet valid"),
    "of another CA": (of_another_ca, "unable to get local issuer certificate"),
    "of a CA of the same name": (of_a_ca_of_the_same_name, "unable to get local issuer|signature"),
    "revoked": (revoked, "certificate revoked"),
    "revoked after it was renewed": (revoked_and_renewed_before, "certificate revoked"),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_a_coordinator_refuses_a_certificate_that_is(
    place: Place, make: Callable[[Place], Path], why: str
) -> None:
    kit, hub = make(place), place.member("hub", HOST)
    server = context(hub, place.ca, is_server=True)
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        shake_hands(context(kit, place.ca), server)


def test_a_site_refuses_a_coordinator_that_was_revoked(place: Place) -> None:
    site, hub = place.member("st-olav"), place.member("hub", HOST)
    certs("revoke", "--ca", place.ca, "hub")
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        shake_hands(context(site, place.ca), context(hub, place.ca, is_server=True))


def test_a_site_cannot_play_the_coordinator(place: Place) -> None:
    one, other = place.member("one"), place.member("other")
    client = context(one, place.ca)
    client.check_hostname = False  # not the name alone: the purpose is refused
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(client, context(other, place.ca, is_server=True))


def test_a_coordinator_is_believed_at_its_own_hosts_only(place: Place) -> None:
    site, hub = place.member("st-olav"), place.member("hub", "fl.example.org")
    server = context(hub, place.ca, is_server=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(context(site, place.ca), server, "fl.example.com")


def test_without_the_list_nobody_is_let_in(place: Place) -> None:
    site, hub = place.member("st-olav"), place.member("hub", HOST)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    server.load_cert_chain(hub / "certificate.pem", hub / "key.pem")
    server.load_verify_locations(place.ca / "ca.pem")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get certificate CRL"):
        shake_hands(context(site, place.ca), server)


# ca


def test_a_new_ca_has_a_private_key_and_an_empty_first_list(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "ca"
    printed = certs("ca", "--out", folder, "--name", "Consortium", "--days", 400)
    ca = read_certificate(folder / "ca.pem")
    assert ca.subject.rfc4514_string() == "CN=Consortium"
    assert abs(ca.not_valid_after_utc - datetime.now(UTC) - timedelta(days=400)).seconds < 60
    assert mode_of(folder / "ca.key") == 0o600
    assert fingerprint(ca.public_key()) in printed  # type: ignore[arg-type]
    listed = read_revocation_list((folder / "revoked.crl").read_bytes(), ca, datetime.now(UTC))
    assert (len(listed), revocation_number(listed)) == (0, 1)


@pytest.mark.parametrize("left", ["ca.pem", "ca.key", "revoked.crl", "issued"])
def test_a_ca_is_not_overwritten_nor_what_is_left_of_one(tmp_path: Path, left: str) -> None:
    certs("ca", "--out", tmp_path)
    for file in list(tmp_path.iterdir()):
        if file.name != left:
            file.rmdir() if file.is_dir() else file.unlink()
    before = left == "issued" or (tmp_path / left).read_bytes()
    with pytest.raises(ConfigError, match=f"{left} exists"):
        certs("ca", "--out", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [left]
    assert left == "issued" or (tmp_path / left).read_bytes() == before


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "two\nlines"])
def test_a_consortium_has_a_name_that_prints(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        certs("ca", "--out", tmp_path / "ca", "--name", name)
    assert not (tmp_path / "ca").exists()


# request


def test_a_request_names_the_party_and_its_key_stays_private(tmp_path: Path) -> None:
    printed = certs(
        "request", "--name", "hub", "--out", tmp_path, "--role", "coordinator",
        "--host", "FL.example.org", "--host", HOST, "--host", "::1", "--host", HOST,
    )  # fmt: skip
    request = x509.load_pem_x509_csr((tmp_path / "request.pem").read_bytes())
    assert request.subject.rfc4514_string() == "OU=coordinator,CN=hub"
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["fl.example.org", HOST, "::1"]
    assert fingerprint(request.public_key()) in printed  # type: ignore[arg-type]
    assert mode_of(tmp_path / "key.pem") == 0o600
    assert b"PRIVATE" not in (tmp_path / "request.pem").read_bytes()


def test_a_key_is_private_from_its_first_moment_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        certs("request", "--name", "a", "--out", tmp_path / "a")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a" / "key.pem") == 0o600


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    certs("request", "--name", "st-olav", "--out", tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"key\.pem exists.*fl-certs renew keeps the key"):
        certs("request", "--name", "st-olav", "--out", tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


BAD_PARTIES = {
    "a name in capitals": (["--name", "St-Olav"], "name 'St-Olav'"),
    "a name with a slash": (["--name", "../ca"], "name"),
    "a name that begins with a dash": (["--name=-a"], "name"),
    "an empty name": (["--name", ""], "name"),
    "a name of 64 letters": (["--name", "a" * 64], "name"),
    "a name that ends its line": (["--name", "a\n"], "name"),
    "a coordinator without a host": (["--name", "hub", "--role", "coordinator"], "--host"),
    "a site with a host": (["--name", "a", "--host", HOST], "leave --host out"),
    **{
        f"the host {host!r}": (
            ["--name", "hub", "--role", "coordinator", f"--host={host}"],
            "expected a DNS name or an IP address",
        )
        for host in (
            "fl.example.org:9092", "https://fl.example.org", "*.example.org", "", " ", "a_b.org",
            "256.1.1.1", "127.0.0.1/8", "fe80::1%eth0", "a..b", ".org", "a.", "-a.org",
            "a" * 64 + ".org", "a." * 127 + "bc", "a\n", "b\u00fccher.de",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("words", "why"), BAD_PARTIES.values(), ids=BAD_PARTIES)
def test_no_key_is_made_for_what_nobody_would_sign(
    tmp_path: Path, words: list[str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        certs("request", "--out", tmp_path / "kit", *words)
    assert not (tmp_path / "kit").exists()


def test_a_role_is_one_of_two(tmp_path: Path) -> None:
    certs("request", "--name", "a", "--role", "auditor", "--out", tmp_path / "a", exit_code=2)
    assert not (tmp_path / "a").exists()


# sign


def test_what_is_signed_is_what_was_asked_for(place: Place) -> None:
    kit = place.request("hub", "fl.example.org", HOST)
    printed = certs("sign", "--ca", place.ca, kit / "request.pem", "--days", 100)
    issued = read_certificate(kit / "certificate.pem")
    assert issued.subject.rfc4514_string() == "OU=coordinator,CN=hub"
    usage = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["fl.example.org", HOST]
    assert abs(issued.not_valid_after_utc - datetime.now(UTC) - timedelta(days=100)).seconds < 60
    key = identity(kit).fingerprint
    assert f'[coordinator]\nkey = "{key}"\n' in printed
    assert all(word in printed for word in ("hub", "coordinator", "fl.example.org, 127.0.0.1"))
    (copy,) = (place.ca / "issued").iterdir()
    assert copy.name == f"hub-{issued.serial_number:x}.pem"
    assert copy.read_bytes() == (kit / "certificate.pem").read_bytes()
    place.accepts(kit / "certificate.pem")


def test_a_site_may_only_call_and_its_lines_for_the_study_are_printed(place: Place) -> None:
    kit = place.request("st-olav")
    printed = certs("sign", "--ca", place.ca, kit / "request.pem")
    issued = read_certificate(kit / "certificate.pem")
    usage = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.CLIENT_AUTH}
    key = identity(kit).fingerprint
    assert f'[[members]]\nname = "st-olav"\nkey = "{key}"\n' in printed
    assert "Compare the fingerprint" in printed


def test_a_certificate_never_outlives_its_ca(place: Place) -> None:
    kit = place.request("st-olav")
    certs("sign", "--ca", place.ca, kit / "request.pem", "--days", 36_500)
    ends = read_certificate(kit / "certificate.pem").not_valid_after_utc
    assert ends == read_certificate(place.ca / "ca.pem").not_valid_after_utc


def test_nothing_is_signed_by_a_ca_that_ended(
    tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(NOW)
    certs("ca", "--out", tmp_path / "ca", "--days", 10)
    certs("request", "--name", "a", "--out", tmp_path / "a")
    clock(NOW + timedelta(days=11))
    with pytest.raises(ConfigError, match="ended on 2031-05-27; make a new CA"):
        certs("sign", "--ca", tmp_path / "ca", tmp_path / "a" / "request.pem")


def test_a_fingerprint_is_compared_as_it_was_heard(place: Place) -> None:
    kit = place.request("st-olav")
    request = x509.load_pem_x509_csr((kit / "request.pem").read_bytes())
    digits = fingerprint(request.public_key())  # type: ignore[arg-type]
    grouped = " ".join(digits[k : k + 4] for k in range(0, 64, 4)).upper()
    sign = ("sign", "--ca", place.ca, kit / "request.pem", "--fingerprint")
    for wrong in (digits[:-1] + ("0" if digits[-1] != "0" else "1"), "0" * 64):
        with pytest.raises(ConfigError, match="differs; do not sign"):
            certs(*sign, wrong)
    for garbled in (digits[:-1], digits + "0", "g" + digits[1:], "hello"):
        with pytest.raises(ConfigError, match="expected 64 hexadecimal digits"):
            certs(*sign, garbled)
    assert not list((place.ca / "issued").iterdir())
    assert "Compare" not in certs(*sign, grouped)
    assert identity(kit).fingerprint == digits


def requested(*names: tuple[Any, str], key: Any = None, hosts: Any = None) -> bytes:
    """A request as a stranger would make it."""
    private = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(kind, value) for kind, value in names])
    builder = x509.CertificateSigningRequestBuilder(subject)
    if hosts is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return builder.sign(private, hashes.SHA256()).public_bytes(PEM)


CN, OU = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME
SITE = ((CN, "a"), (OU, "site"))
HUB = ((CN, "a"), (OU, "coordinator"))


def tampered() -> bytes:
    """A request whose name was changed after it was signed."""
    parsed = x509.load_pem_x509_csr(requested((CN, "st-olav"), (OU, "site")))
    content = parsed.public_bytes(serialization.Encoding.DER).replace(b"st-olav", b"st-olaf")
    return x509.load_der_x509_csr(content).public_bytes(PEM)


BAD_REQUESTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not a request"),
    "text": (lambda: b"please sign", "not a request"),
    "altered": (tampered, "altered on its way"),
    "no name": (lambda: requested((OU, "site")), "names its owner once"),
    "two names": (lambda: requested((CN, "a"), (CN, "b"), (OU, "site")), "names its owner once"),
    "no role": (lambda: requested((CN, "a")), "its role once"),
    "two roles": (
        lambda: requested((CN, "a"), (OU, "site"), (OU, "coordinator")), "its role once",
    ),
    "another role": (lambda: requested((CN, "a"), (OU, "auditor")), "role is 'auditor'"),
    "a name that is a path": (lambda: requested((CN, "../../x"), (OU, "site")), "expected 1 to 63"),
    "a name of two lines": (lambda: requested((CN, "a\nb"), (OU, "site")), "expected 1 to 63"),
    "a key on P-384": (
        lambda: requested(*SITE, key=ec.generate_private_key(ec.SECP384R1())), "P-256",
    ),
    "an RSA key": (lambda: requested(*SITE, key=rsa.generate_private_key(65537, 2048)), "P-256"),
    "a site with a host": (lambda: requested(*SITE, hosts=[x509.DNSName("a.org")]), "leave --host"),
    "a coordinator without a host": (lambda: requested(*HUB), "give each"),
    "a wildcard": (lambda: requested(*HUB, hosts=[x509.DNSName("*.org")]), r"'\*\.org'"),
    "an address of mail": (
        lambda: requested(*HUB, hosts=[x509.RFC822Name("a@b.org")]), "ask for nothing else",
    ),
    "a host and a link": (
        lambda: requested(
            *HUB, hosts=[x509.DNSName("b.org"), x509.UniformResourceIdentifier("https://b.org")]
        ),
        "ask for nothing else",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "why"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_request_that_nobody_should_get_is_not_signed(
    place: Place, make: Callable[[], bytes], why: str
) -> None:
    file = place.folder / "request.pem"
    file.write_bytes(make())
    with pytest.raises(ConfigError, match=why) as error:
        certs("sign", "--ca", place.ca, file)
    assert str(error.value).startswith(str(file))
    assert not list((place.ca / "issued").iterdir())


def test_a_request_cannot_ask_to_be_an_authority(place: Place) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(kind, value) for kind, value in SITE])
    greedy = (
        x509.CertificateSigningRequestBuilder(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (place.folder / "request.pem").write_bytes(greedy.public_bytes(PEM))
    certs("sign", "--ca", place.ca, place.folder / "request.pem")
    issued = read_certificate(place.folder / "certificate.pem")
    assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_name_belongs_to_one_key_until_it_is_revoked(place: Place) -> None:
    first = place.member("st-olav")
    second = place.request("st-olav", folder="new")
    with pytest.raises(ConfigError, match="st-olav is certified with another key"):
        certs("sign", "--ca", place.ca, second / "request.pem")
    certs("revoke", "--ca", place.ca, "st-olav")
    certs("sign", "--ca", place.ca, second / "request.pem")
    place.accepts(second / "certificate.pem")
    with pytest.raises(FederationError, match="st-olav was revoked"):
        place.accepts(first / "certificate.pem")


def test_a_revoked_key_is_never_certified_again(place: Place) -> None:
    kit = place.member("st-olav")
    certs("revoke", "--ca", place.ca, "st-olav")
    with pytest.raises(ConfigError, match=r"key \w{64} of st-olav was revoked"):
        certs("sign", "--ca", place.ca, kit / "request.pem")
    renamed = place.folder / "renamed.pem"
    key = serialization.load_pem_private_key((kit / "key.pem").read_bytes(), None)
    renamed.write_bytes(requested((CN, "other"), (OU, "site"), key=key))
    with pytest.raises(ConfigError, match="of other was revoked"):
        certs("sign", "--ca", place.ca, renamed)


def test_a_key_belongs_to_one_name_and_a_name_has_one_role(place: Place) -> None:
    kit = place.member("st-olav")
    key = serialization.load_pem_private_key((kit / "key.pem").read_bytes(), None)
    file = place.folder / "request.pem"
    file.write_bytes(requested((CN, "second-seat"), (OU, "site"), key=key))
    with pytest.raises(ConfigError, match="its key is st-olav's"):
        certs("sign", "--ca", place.ca, file)
    hosts = [x509.DNSName("a.org")]
    file.write_bytes(requested((CN, "st-olav"), (OU, "coordinator"), key=key, hosts=hosts))
    with pytest.raises(ConfigError, match="st-olav is certified as a site"):
        certs("sign", "--ca", place.ca, file)


@pytest.mark.parametrize(
    "out", ["kit/key.pem", "kit/notes.txt", "other/certificate.pem", "ca/x.pem"]
)
def test_a_certificate_is_written_over_nothing_but_an_older_one_of_its_owner(
    place: Place, out: str
) -> None:
    kit, _ = place.request("st-olav", folder="kit"), place.member("other")
    (kit / "notes.txt").write_text("do not lose")
    file = place.folder / out
    before = file.read_bytes() if file.exists() else None
    with pytest.raises(ConfigError, match="choose another --out"):
        certs("sign", "--ca", place.ca, kit / "request.pem", "--out", file)
    assert (file.read_bytes() if file.exists() else None) == before
    certs("sign", "--ca", place.ca, kit / "request.pem", "--out", place.folder / "new" / "x.pem")
    certs("sign", "--ca", place.ca, kit / "request.pem", "--out", place.folder / "new" / "x.pem")
    place.accepts(place.folder / "new" / "x.pem")


# renew


def test_a_renewal_keeps_key_name_role_and_hosts(place: Place) -> None:
    kit = place.member("hub", HOST, "fl.example.org")
    before, key = identity(kit), (kit / "key.pem").read_bytes()
    out = place.folder / "renewed.pem"
    printed = certs("renew", "--ca", place.ca, "hub", "--out", out, "--days", 900)
    assert before.fingerprint in printed
    shutil.copy(out, kit / "certificate.pem")
    after = identity(kit)  # which checks that key and certificate belong together
    assert (after.name, after.fingerprint) == ("hub", before.fingerprint)
    assert after.certificate != before.certificate
    assert (kit / "key.pem").read_bytes() == key
    issued = read_certificate(out)
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == [HOST, "fl.example.org"]
    assert (issued.not_valid_after_utc - datetime.now(UTC)).days in (899, 900)
    assert len(list((place.ca / "issued").iterdir())) == 2
    place.accepts(out)
    client = context(place.member("st-olav"), place.ca)
    assert shake_hands(client, context(kit, place.ca, is_server=True)) == ["hub", "st-olav"]


def test_a_renewal_of_a_file_takes_its_place(place: Place) -> None:
    kit = place.member("st-olav")
    before = identity(kit)
    certs("renew", "--ca", place.ca, kit / "certificate.pem")
    assert identity(kit).fingerprint == before.fingerprint
    assert identity(kit).certificate != before.certificate


def test_a_renewal_by_name_is_written_here(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.member("st-olav")
    monkeypatch.chdir(place.folder)
    certs("renew", "--ca", "ca", "st-olav")
    place.accepts(place.folder / "st-olav.pem")


def test_an_expired_certificate_is_renewed_all_the_same(
    tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(NOW - timedelta(days=20))
    place = Place(tmp_path)
    kit = place.request("a")
    certs("sign", "--ca", place.ca, kit / "request.pem", "--days", 10)
    clock(NOW)
    certs("renew", "--ca", place.ca, kit / "certificate.pem")
    assert read_certificate(kit / "certificate.pem").not_valid_after_utc > NOW


def test_who_cannot_be_renewed_is_told_why(place: Place) -> None:
    kit, other = place.member("st-olav"), Place(place.folder / "elsewhere")
    stranger = other.member("stranger")
    place.member("ahus")
    for who, why in (
        ("nobody", "known: ahus, st-olav"),
        (stranger / "certificate.pem", "not issued by this CA"),
        (kit / "key.pem", "not a certificate"),
        (place.ca / "ca.pem", "its role once"),
        (kit / "none.pem", "No such file"),
    ):
        with pytest.raises(ConfigError, match=why):
            certs("renew", "--ca", place.ca, who)
    certs("revoke", "--ca", place.ca, "st-olav")
    for who in ("st-olav", kit / "certificate.pem"):
        with pytest.raises(ConfigError, match="was revoked; a new key is needed"):
            certs("renew", "--ca", place.ca, who)


def test_a_copy_of_the_ca_is_not_overwritten_by_a_renewal(place: Place) -> None:
    place.member("st-olav")
    (copy,) = (place.ca / "issued").iterdir()
    content = copy.read_bytes()
    with pytest.raises(ConfigError, match="the CA's own folder"):
        certs("renew", "--ca", place.ca, copy)
    assert copy.read_bytes() == content


# revoke


def test_the_numbers_of_the_lists_grow_and_nobody_comes_off(place: Place) -> None:
    for name in ("a", "b", "c"):
        place.member(name)
    seen = [(revocation_number(place.listed()), len(place.listed()))]
    for names in (["a"], [], ["b", "c"], ["a"], []):
        printed = certs("revoke", "--ca", place.ca, *names)
        seen.append((revocation_number(place.listed()), len(place.listed())))
        assert f"number {seen[-1][0]}, valid until" in printed
        assert "Copy it to the coordinator" in printed
    assert seen == [(1, 0), (2, 1), (3, 1), (4, 3), (5, 3), (6, 3)]
    assert re.findall(r"revoked +(\w+), serial", printed) == ["a", "b", "c"]


def test_a_fresh_list_remembers_since_when_somebody_is_revoked(
    tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(NOW)
    place = Place(tmp_path)
    place.member("a")
    certs("revoke", "--ca", place.ca, "a")
    clock(NOW + timedelta(days=21))
    certs("revoke", "--ca", place.ca, "--days", 5)
    (entry,) = place.listed()
    assert entry.revocation_date_utc == NOW
    assert place.listed().next_update_utc == NOW + timedelta(days=26)


def test_a_list_that_ended_is_made_fresh(tmp_path: Path, clock: Callable[[datetime], None]) -> None:
    clock(NOW - timedelta(days=100))
    place = Place(tmp_path)
    place.member("a")
    certs("revoke", "--ca", place.ca, "a")
    clock(NOW)
    certs("revoke", "--ca", place.ca)
    assert len(place.listed()) == 1
    assert place.listed().next_update_utc == NOW + timedelta(days=30)


def test_all_certificates_of_a_key_are_revoked_whichever_is_named(place: Place) -> None:
    kit = place.member("st-olav")
    first = shutil.copy(kit / "certificate.pem", place.folder / "first.pem")
    certs("renew", "--ca", place.ca, kit / "certificate.pem")
    certs("revoke", "--ca", place.ca, first)
    assert len(place.listed()) == 2
    with pytest.raises(FederationError, match="was revoked"):
        place.accepts(kit / "certificate.pem")


def test_an_old_certificate_of_a_revoked_key_does_not_revoke_the_new_key(place: Place) -> None:
    old = place.member("st-olav")
    certs("revoke", "--ca", place.ca, "st-olav")
    new = place.member("st-olav", folder="new")
    certs("revoke", "--ca", place.ca, old / "certificate.pem")
    place.accepts(new / "certificate.pem")
    certs("revoke", "--ca", place.ca, "st-olav")
    with pytest.raises(FederationError, match="was revoked"):
        place.accepts(new / "certificate.pem")


def test_a_certificate_of_which_no_copy_was_kept_is_revoked_by_its_file(place: Place) -> None:
    kit = place.member("st-olav")
    shutil.rmtree(place.ca / "issued")  # as after a backup was put back
    with pytest.raises(ConfigError, match="known: nobody"):
        certs("revoke", "--ca", place.ca, "st-olav")
    assert "st-olav, serial" in certs("revoke", "--ca", place.ca, kit / "certificate.pem")
    with pytest.raises(FederationError, match="was revoked"):
        place.accepts(kit / "certificate.pem")


def test_an_unknown_name_changes_nothing(place: Place) -> None:
    place.member("ahus")
    place.member("st-olav")
    before = (place.ca / "revoked.crl").read_bytes()
    with pytest.raises(ConfigError, match=r"st-olaf: .* known: ahus, st-olav"):
        certs("revoke", "--ca", place.ca, "ahus", "st-olaf")
    assert (place.ca / "revoked.crl").read_bytes() == before


@pytest.mark.parametrize("damage", ["gone", "empty", "foreign"])
def test_without_its_last_list_a_ca_neither_signs_nor_revokes(place: Place, damage: str) -> None:
    kit = place.member("st-olav")
    (place.ca / "revoked.crl").unlink()
    if damage == "empty":
        (place.ca / "revoked.crl").touch()
    if damage == "foreign":
        other = Place(place.folder / "elsewhere")
        shutil.copy(other.ca / "revoked.crl", place.ca)
    for words in (["sign", kit / "request.pem"], ["renew", "st-olav"], ["revoke", "st-olav"]):
        command, *rest = words
        with pytest.raises(ConfigError, match=r"revoked\.crl: .*copy the coordinator's"):
            certs(command, "--ca", place.ca, *rest)


def test_a_list_that_cannot_be_written_leaves_the_old_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.member("st-olav")
    before = (place.ca / "revoked.crl").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        certs("revoke", "--ca", place.ca, "st-olav")
    assert (place.ca / "revoked.crl").read_bytes() == before
    assert not [file for file in place.ca.iterdir() if file.name.startswith(".")]


def test_two_commands_at_once_lose_no_revocation(place: Place) -> None:
    names = [f"site-{k}" for k in range(4)]
    for name in names:
        place.member(name)
    command = [Path(sys.executable).with_name("fl-certs"), "revoke", "--ca", place.ca]
    started = [
        subprocess.Popen([*command, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in names
    ]
    assert [one.wait(timeout=60) for one in started] == [0] * 4
    assert (len(place.listed()), revocation_number(place.listed())) == (4, 5)


def test_a_key_of_another_owner_is_not_taken_for_the_cas(place: Place) -> None:
    write_key(place.ca / "ca.key", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConfigError, match=r"ca\.key is not the key of"):
        certs("revoke", "--ca", place.ca)


# show


def test_everything_in_a_folder_is_shown(place: Place) -> None:
    site, hub = place.member("st-olav"), place.member("hub", HOST)
    certs("revoke", "--ca", place.ca, "hub")
    printed = certs("show", place.folder)
    for kit in (site, hub):
        assert printed.count(identity(kit).fingerprint) == 4  # request, key, certificate, copy
    for words in ("certificate of a CA", "request for a certificate", "private key", "hosts  "):
        assert words in printed
    assert "revocation list number 2" in printed
    assert re.search(r"revoked +hub, serial [0-9a-f]+", printed)
    assert "WARNING" not in printed


def test_with_the_ca_is_said_who_was_revoked(place: Place) -> None:
    site, other = place.member("st-olav"), place.member("other")
    stranger = Place(place.folder / "elsewhere").member("stranger")
    certs("revoke", "--ca", place.ca, "other")
    show = ("show", "--ca", place.ca)
    assert "not revoked (list 2, valid until" in certs(*show, site / "certificate.pem")
    assert "REVOKED on" in certs(*show, other / "certificate.pem")
    assert "NOT OF THIS CA" in certs(*show, stranger / "certificate.pem")
    assert "revoked" not in certs("show", other / "certificate.pem").lower()


def test_a_hospital_needs_no_key_of_the_ca_to_look(place: Place) -> None:
    kit = place.member("st-olav")
    shutil.copy(place.ca / "ca.pem", kit)
    shutil.copy(place.ca / "revoked.crl", kit)
    assert "not revoked (list 1" in certs("show", "--ca", kit, kit)


@pytest.mark.parametrize(
    ("days", "said", "exit_code"),
    [
        (0, None, 0),
        (699, None, 0),
        (700, "expires in 30 days: fl-certs renew --ca CA st-olav", 0),
        (718, "expires in 12 days: fl-certs renew --ca CA st-olav", 0),
        (729, "expires in 1 day: fl-certs renew --ca CA st-olav", 0),
        (731, "EXPIRED on 2033-05-16 12:00: fl-certs renew --ca CA st-olav", 1),
        (-1, "NOT VALID YET", 0),
    ],
)
def test_a_certificate_warns_thirty_days_ahead(
    tmp_path: Path,
    clock: Callable[[datetime], None],
    days: int,
    said: str | None,
    exit_code: int,
) -> None:
    clock(NOW)
    place = Place(tmp_path)
    kit = place.member("st-olav")
    clock(NOW + timedelta(days=days))
    printed = certs("show", kit / "certificate.pem", exit_code=exit_code)
    assert said is None or said in printed
    assert ("fl-certs" in printed) == (said is not None and "renew" in said)


@pytest.mark.parametrize(
    ("days", "said", "exit_code"),
    [
        (22, None, 0),
        (24, "expires in 6 days: fl-certs revoke --ca CA", 0),
        (31, "EXPIRED on 2031-06-16 12:00: fl-certs revoke --ca CA", 1),
    ],
)
def test_a_list_warns_seven_days_ahead(
    tmp_path: Path,
    clock: Callable[[datetime], None],
    days: int,
    said: str | None,
    exit_code: int,
) -> None:
    clock(NOW)
    place = Place(tmp_path)
    clock(NOW + timedelta(days=days))
    printed = certs("show", place.ca / "revoked.crl", exit_code=exit_code)
    assert said in printed if said else "fl-certs" not in printed


def test_a_list_that_ended_says_of_nobody_that_all_is_well(
    tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(NOW)
    place = Place(tmp_path)
    kit = place.member("st-olav")
    clock(NOW + timedelta(days=40))
    printed = certs("show", "--ca", place.ca, kit / "certificate.pem", exit_code=1)
    assert "not on list 1, which EXPIRED" in printed
    assert "not revoked" not in printed


def test_what_was_renewed_or_revoked_may_end_in_peace(
    tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(NOW)
    place = Place(tmp_path)
    kit, _ = place.member("st-olav"), place.member("gone")
    certs("revoke", "--ca", place.ca, "gone")
    old = shutil.copy(kit / "certificate.pem", tmp_path / "old.pem")
    clock(NOW + timedelta(days=720))
    certs("renew", "--ca", place.ca, kit / "certificate.pem")
    certs("revoke", "--ca", place.ca)
    clock(NOW + timedelta(days=740))
    printed = certs("show", "--ca", place.ca, place.ca)
    assert "renewed: another certificate of this key is valid until" in printed
    assert "EXPIRED" not in printed
    assert "EXPIRED" in certs("show", old, exit_code=1)  # alone, nothing is known of the renewal


def test_a_key_that_others_may_read_is_pointed_out(place: Place) -> None:
    key = place.request("st-olav") / "key.pem"
    assert "WARNING" not in certs("show", key)
    for mode in (0o640, 0o644, 0o604, 0o700):
        key.chmod(mode)
        assert f"mode {mode:04o}, a key's is 0600: chmod 600 {key}" in certs("show", key)


def test_what_cannot_be_shown_is_named(place: Place) -> None:
    kit = place.request("st-olav")
    (place.folder / "notes.pem").write_text("hello")
    (place.folder / "empty").mkdir()
    rsa_key = rsa.generate_private_key(65537, 2048).private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (place.folder / "rsa.pem").write_bytes(rsa_key)
    (place.folder / "cut.pem").write_bytes((kit / "key.pem").read_bytes()[:100])
    for name in ("notes.pem", "rsa.pem", "cut.pem", "none.pem", "empty"):
        with pytest.raises(ConfigError, match=re.escape(str(place.folder / name))):
            certs("show", place.folder / name)


# The entry point and the ceremony as it is written down


def test_a_refusal_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("fl-certs")
    command = [program, "sign", "--ca", tmp_path, tmp_path / "none.pem"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"ConfigError: {tmp_path / 'none.pem'}: No such file")
    assert ended.stderr.count("\n") == 1


def commands_of_the_readme() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_ceremony_runs_as_it_is_written_down(tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    blocks = commands_of_the_readme()
    told = ""
    for block in blocks:
        heard = ""
        if "$heard" in block:
            (request,) = re.findall(r"\S+/request\.pem", block)
            parsed = x509.load_pem_x509_csr((tmp_path / request).read_bytes())
            heard = fingerprint(parsed.public_key())  # type: ignore[arg-type]
            assert f"fingerprint  {heard}" in told  # it was read from the owner's screen
        ended = subprocess.run(
            [BASH, "-euo", "pipefail", "-c", block], input=heard + "\n", cwd=tmp_path,
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, (block, ended.stderr)
        told += ended.stdout
    used = set(re.findall(r"^fl-certs (\w+)", "\n".join(blocks), flags=re.MULTILINE))
    assert used == {"ca", "request", "sign", "renew", "revoke", "show"}
    ca, now = read_certificate(tmp_path / "ca" / "ca.pem"), datetime.now(UTC)
    listed = read_revocation_list((tmp_path / "hub" / "revoked.crl").read_bytes(), ca, now)
    assert (len(listed), revocation_number(listed)) == (2, 3)
    for kit, is_believed in (("hub", True), ("st-olav-2", True), ("st-olav", False)):
        content = identity(tmp_path / kit).certificate
        if is_believed:
            check_certificate(content, ca, listed, now)
        else:
            with pytest.raises(FederationError, match="was revoked"):
                check_certificate(content, ca, listed, now)


def test_the_files_of_the_ceremony_stay_out_of_the_repository(tmp_path: Path) -> None:
    shutil.copy(README.parent / ".gitignore", tmp_path)
    shutil.copy(README, tmp_path)
    certs("ca", "--out", tmp_path / "ca")
    certs("request", "--name", "a", "--out", tmp_path / "a")
    subprocess.run([GIT, "init", "-q", tmp_path], check=True)
    listing = [GIT, "-C", tmp_path, "status", "--porcelain", "--untracked-files=all"]
    seen = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert seen.splitlines() == ["?? .gitignore", "?? README.md"]
