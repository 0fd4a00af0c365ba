"""The addresses under which a coordinator is called: what its certificate is good for."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Sequence

from cryptography import x509

from common.errors import ConfigError
from common.identity import Paper

# RFC 1123: no wildcard, no underscore, and no last label of digits alone, which would be an address
# with a mistake in it.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*(?!\d+\Z){_LABEL}\Z")
# What reading the extensions of a stranger's request may raise.
_UNREADABLE = (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)


def alternative_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    """The extension that names these hosts, each once.

    Raises:
      ConfigError: A host is neither a DNS name nor an IP address.
    """
    return x509.SubjectAlternativeName([_general_name(host) for host in normal(hosts)])


def normal(hosts: Sequence[str]) -> tuple[str, ...]:
    """Hosts in the one form in which they are compared, each once.

    Raises:
      ConfigError: A host is neither a DNS name nor an IP address.
    """
    return tuple(dict.fromkeys(str(_general_name(host).value) for host in hosts))


def hosts_of(paper: Paper) -> tuple[str, ...]:
    """The hosts that a request or a certificate names.

    Raises:
      ConfigError: It names what is no host (a wildcard, an address of electronic mail), or its
        extensions cannot be read.
    """
    try:
        names = paper.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    except _UNREADABLE:
        raise ConfigError("its extensions cannot be read; make it with fl-certs request") from None
    if not all(isinstance(name, x509.DNSName | x509.IPAddress) for name in names):
        raise ConfigError("a host is a DNS name or an IP address; ask for nothing else")
    return normal([str(name.value) for name in names])


def _general_name(host: str) -> x509.DNSName | x509.IPAddress:
    if "%" not in host:  # a scope (fe80::1%eth0) is one machine's own; no certificate carries it
        with contextlib.suppress(ValueError):
            return x509.IPAddress(ipaddress.ip_address(host))
    if _DNS_NAME.match(host.lower()):
        return x509.DNSName(host.lower())
    raise ConfigError(
        f"host {host!r}: expected a DNS name or an IP address, without port or wildcard"
    )
