"""Who calls at the coordinator's public door in tests: sockets of their own, byte for byte."""

from __future__ import annotations

import socket
import ssl
import time
from base64 import b64encode, encodebytes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from deployment import Consortium, found
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.place import Place
from client.runtime import Connection
from common.authority import CERTIFICATE, REVOKED, Authority
from common.config import load
from common.identity import Identity
from common.study import Study
from server.superlink.launcher import Listening, new_secret

PULL = "/v1/fleet/pull-messages"
HOST = "127.0.0.1"
STUDY = Path(__file__).parents[2] / "studies" / "demo-seeded.toml"
PHANTOMS = {
    "name": "phantoms",
    "format": "phantom",
    "num_patients": 60,
    "images_per_patient": 3,
    "declared_patients": 50,
}
SECRET = new_secret()
MEMBERS = ("site-1", "site-2", "site-3")
BAD, GOOD = "site-1", "site-2"
DAYS = 30
MAX_UPLOAD_BYTES = 16 << 20
SERVED_WITHIN_S = 5.0  # a fraction of a second, but for whatever else this machine does


@dataclass(frozen=True)
class Answer:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Caller:
    """Shows a certificate, if it has one, and says whatever it likes."""

    port: int
    ca: Path  # of the coordinator's certificate
    certificate: Path | None = None
    key: Path | None = None
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3

    @property
    def identity(self) -> Identity:
        assert self.certificate is not None
        assert self.key is not None
        return Identity.load(self.certificate, self.key)

    @contextmanager
    def connected(self, timeout_s: float = 10) -> Iterator[Line]:
        with self.connect(timeout_s) as connection:
            yield Line(connection)

    def connect(self, timeout_s: float = 10) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.maximum_version = self.newest
        context.load_verify_locations(self.ca)
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        plain = socket.create_connection((HOST, self.port), timeout_s)
        try:
            return context.wrap_socket(plain, server_hostname=HOST)
        except OSError:
            plain.close()
            raise

    def ask(self, request: bytes) -> Answer:
        """One request over a connection of its own."""
        with self.connected() as line:
            return line.ask(request)

    def is_answered(self) -> bool:
        """Whether anything comes back when it asks; TLS 1.3 tells a client late that it is out."""
        try:
            with self.connected() as line:
                line.ask(request("/health", method="GET"))
        except (ConnectionError, ssl.SSLError):
            return False
        return True

    def reason_at(self, server: ssl.SSLContext) -> str:
        """Why a server with this context ends the handshake, in OpenSSL's words."""
        with socket.create_server((HOST, 0)) as listening, ThreadPoolExecutor(1) as pool:
            reason = pool.submit(_reason, listening, server)
            caller = replace(self, port=listening.getsockname()[1])
            assert not caller.is_answered()
            return reason.result(10)


def _reason(listening: socket.socket, server: ssl.SSLContext) -> str:
    plain, _ = listening.accept()
    with plain:
        try:
            server.wrap_socket(plain, server_side=True).close()
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        except ssl.SSLError as error:
            return error.reason
    return "none: the handshake was completed"


class Line:
    """An open connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def send(self, content: bytes) -> None:
        self._connection.sendall(content)

    def ask(self, request: bytes) -> Answer:
        self.send(request)
        return self.answer()

    def answer(self) -> Answer:
        """The next response; its body has the length that its head says."""
        while b"\r\n\r\n" not in self._rest:
            self._rest += self._more()
        head, self._rest = self._rest.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join(iter(self._piece, b""))
        else:
            body = self._take(int(headers.get("content-length", "0")))
        return Answer(int(first.split()[1]), headers, body)

    def is_closed(self) -> bool:
        """Whether the other side hung up; waits for it, and nothing may be left to read."""
        try:
            return not self._rest and self._connection.recv(1) == b""
        except (ConnectionError, ssl.SSLEOFError):
            return True

    def _piece(self) -> bytes:
        while b"\r\n" not in self._rest:
            self._rest += self._more()
        length, self._rest = self._rest.split(b"\r\n", 1)
        return self._take(int(length, 16) + 2)[:-2]

    def _take(self, length: int) -> bytes:
        while len(self._rest) < length:
            self._rest += self._more()
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def _more(self) -> bytes:
        content = self._connection.recv(1 << 16)
        if not content:
            raise ConnectionError(f"hung up after {self._rest!r}")
        return content


def site_of(consortium: Consortium, name: str) -> Caller:
    """A site with the kit that the consortium gave it; also one that is no member of the study."""
    home = consortium.folder / "sites" / name
    return Caller(
        consortium.port,
        consortium.folder / "ca" / CERTIFICATE,
        home / "certificate.pem",
        home / "key.pem",
    )


def with_certificate(caller: Caller, certificate: Path, key: Path | None = None) -> Caller:
    return replace(caller, certificate=certificate, key=key or caller.key)


def place_of(caller: Caller, node_file: Path) -> Place:
    """Where the real client connects with this caller's kit."""
    assert caller.certificate is not None
    assert caller.key is not None
    return Place(f"{HOST}:{caller.port}", caller.ca, caller.certificate, caller.key, node_file)


def node_headers(identity: Identity) -> dict[str, str]:
    """Flower's node authentication: a signed time."""
    time = datetime.now(UTC).isoformat()
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(identity.key.public_key())).decode(),
        "flwr-timestamp": time,
        "flwr-signature": b64encode(identity.sign(time.encode())).decode(),
    }


def request(
    path: str,
    body: bytes = b"",
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> bytes:
    """An HTTP request with its length, unless ``headers`` say something else of it."""
    fields = {
        "host": HOST,
        "content-type": "application/protobuf",
        "content-length": str(len(body)),
        **(headers or {}),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def pull_request(identity: Identity, node: int, *, path: str = PULL) -> bytes:
    """What a site asks all day: anything for me?"""
    body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString()
    return request(path, body, headers=node_headers(identity))


def forged_key(certificate: Path, own: ec.EllipticCurvePrivateKey) -> bytes:
    """A key file that says it belongs to a certificate; what it signs is signed with ``own``.

    The public half that a key file carries is not recomputed by OpenSSL: the client notices
    nothing, and the handshake goes as far as the server.
    """
    content = own.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    theirs = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    assert isinstance(theirs, ec.EllipticCurvePublicKey)
    swapped = content.replace(_point(own.public_key()), _point(theirs))
    text = encodebytes(swapped).decode().strip()
    return f"-----BEGIN EC PRIVATE KEY-----\n{text}\n-----END EC PRIVATE KEY-----\n".encode()


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )


def found_with_stranger(folder: Path) -> Consortium:
    """Three members, and ``stranger``: certified by the same CA, in another study."""
    made = found(folder, STUDY, MEMBERS, data=PHANTOMS, overrides={"num_rounds": 2})
    home = folder / "sites" / "stranger"
    authority_of(made).enrol("stranger", "site", home, datetime.now(UTC), days=DAYS)
    return made


def is_served(caller: Caller, node_file: Path) -> None:
    """The real client connects, asks and leaves, all of it soon."""
    started = time.monotonic()
    with Connection(place_of(caller, node_file)) as connection:
        assert connection.pull() is None
    assert time.monotonic() - started < SERVED_WITHIN_S


def told_of(consortium: Consortium) -> Listening:
    """What the SuperLink of a consortium is told."""
    study, own, ca = (
        load(consortium.study, Study),
        consortium.folder / "coordinator",
        consortium.folder / "ca",
    )
    return Listening(
        host=HOST,
        port=consortium.port,
        ca=str(ca / CERTIFICATE),
        certificate=str(own / "certificate.pem"),
        key=str(own / "key.pem"),
        revocation_list=str(ca / REVOKED),
        members={member.name: member.key or "" for member in study.members},
        about={"version": "test"},
        health="",
        secret=SECRET,
        max_upload_bytes=MAX_UPLOAD_BYTES,
    )


def authority_of(consortium: Consortium) -> Authority:
    return Authority.load(consortium.folder / "ca")


def serial_number(caller: Caller) -> int:
    return x509.load_der_x509_certificate(caller.identity.certificate).serial_number
