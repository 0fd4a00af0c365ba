"""One call of the coordinator's ``/health``, step by step, so that the step that fails has a name.

TLS is the one of a run: the same certificate, the same CA, version 1.3.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from client.config import SiteConfig
from client.place import Place
from common.errors import ConfigError, RemoteProtocolError
from common.identity import read_certified

TIMEOUT_S = 10.0  # of each step
MAX_ANSWER_BYTES = 1 << 16
MAX_CHARS = 64  # of what the coordinator says of itself
HTTP_OK, HTTP_FORBIDDEN = 200, 403
# OpenSSL's numbers of what is wrong with a certificate (X509_V_ERR_...)
NOT_YET, EXPIRED, OTHER_PURPOSE, OTHER_HOST = {9}, {10}, {26}, {62, 64}


@dataclass(frozen=True)
class Address:
    """Where the coordinator listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From ``host:port``; an IPv6 address stands in brackets.

        Raises:
          ConfigError: It is not that.
        """
        host, _, port = text.rpartition(":")
        if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigError(f'coordinator {text!r}: expected "host:port"; correct site.toml')
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Health:
    """What the coordinator said, and when by this site's clock."""

    version: str
    code: str
    study: str  # digest
    ahead_s: float  # this site's clock less the coordinator's
    key: str  # fingerprint of its certificate's key


def connect(address: Address) -> socket.socket:
    """A connection without TLS.

    Raises:
      ConfigError: With the step that failed.
    """
    try:
        return socket.create_connection((address.host, address.port), TIMEOUT_S)
    except socket.gaierror as error:
        reason = f"the name cannot be resolved ({error.strerror}); correct coordinator, or ask DNS"
    except ConnectionRefusedError:
        reason = (
            "nobody listens there (port closed); start fl-server, ask the coordinator, or correct "
            "coordinator in site.toml"
        )
    except TimeoutError:
        reason = (
            f"no answer within {TIMEOUT_S:g} s: the host is off or a firewall drops the call; let "
            "this machine call out to that port"
        )
    except OSError as error:
        reason = f"{error.strerror or error}; check this machine's network and route to that host"
    raise ConfigError(f"coordinator {address}: {reason}") from None


def ask(
    line: socket.socket, address: Address, config: SiteConfig, clock: Callable[[], float]
) -> Health:
    """What ``/health`` answers to this site's certificate.

    Raises:
      ConfigError: TLS fails on either side, or the coordinator refuses; with what is known why.
    """
    try:
        place = Place.of(config)
        with place.tls().wrap_socket(line, server_hostname=address.host) as secure:
            shown = secure.getpeercert(binary_form=True) or b""
            place.check_coordinator(shown)
            began = clock()
            status, content = _get(secure, address)
            middle = (began + clock()) / 2
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"coordinator {address}: {_why_distrusted(error)}") from None
    except ssl.SSLError as error:
        raise ConfigError(
            f"coordinator {address}: TLS refused ({error.reason or error}); this is not its port, "
            "or it does not accept this certificate: ask which CA it has"
        ) from None
    except RemoteProtocolError as error:
        raise ConfigError(
            f"coordinator {address}: {error}; do not go on before its operator has explained it"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f"coordinator {address}: hung up without an answer ({type(error).__name__}); ask its "
            "operator for the log, with the time of this check"
        ) from None
    about = _parse(status, content, address)
    return Health(
        version=_shortened(about, "version"),
        code=_shortened(about, "code"),
        study=_shortened(about, "study"),
        ahead_s=middle - float(about["time"]),
        key=read_certified(shown).fingerprint,
    )


def _get(secure: ssl.SSLSocket, address: Address) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address.host, address.port)
    connection.sock = secure
    connection.request("GET", "/health")
    with connection.getresponse() as response:
        return response.status, response.read(MAX_ANSWER_BYTES)


def _parse(status: int, content: bytes, address: Address) -> dict[str, Any]:
    if status == HTTP_FORBIDDEN:
        raise ConfigError(
            f"coordinator {address}: refuses this site's certificate (HTTP 403): not a member of "
            "its study, revoked, or ended; send its operator the output of fl-certs show"
        )
    try:
        about = json.loads(content) if status == HTTP_OK else None
        if isinstance(about, dict) and float(about["time"]):
            return about
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"coordinator {address}: HTTP status {status}, and not what a coordinator of Consilium "
        "says; correct coordinator in site.toml"
    )


def _why_distrusted(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code in OTHER_HOST:
        return (
            "its certificate is for another host; correct coordinator in site.toml, or let its "
            "operator request one with --host"
        )
    if code in NOT_YET | EXPIRED:
        return f"{error.verify_message}; set this machine's clock, or let its operator renew"
    if code in OTHER_PURPOSE:
        return "shows a site's certificate; ask its operator for the coordinator's own"
    return (
        f"its certificate is not of the CA in certificates.ca ({error.verify_message}); compare "
        "ca.pem with its operator; do not go on before they are equal"
    )


def _shortened(about: dict[str, Any], key: str) -> str:
    return str(about.get(key, "nothing"))[:MAX_CHARS]
