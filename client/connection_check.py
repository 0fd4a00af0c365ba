"""Can the coordinator be reached, is it the right one, and does it agree with this site?"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version

from client.approvals import Approvals
from client.config import SiteConfig
from client.finding import Finding, fault, ok, warning
from client.health import Address, Health, ask, connect
from common.errors import ConfigError, FederationError, PolicyError, VersionMismatch
from common.manifest import code_digest
from common.study import Study

MAX_AHEAD_S, MAX_BEHIND_S = 5.0, 305.0  # Flower refuses a call with a time outside


def check_connection(
    config: SiteConfig,
    study: Study | None,
    *,
    may_identify: bool,
    clock: Callable[[], float] = time.time,
) -> Iterator[Finding]:
    """Call the coordinator once and hold what it says against this site.

    Args:
      config: With ``coordinator`` and ``[certificates]``.
      study: What this site would take part in.
      may_identify: Whether the certificate was found good; without it only the port is tried.
      clock: Seconds since 1970.
    """
    try:
        address = Address.parse(str(config.coordinator))
        line = connect(address)
    except ConfigError as error:
        yield fault(error)
        return
    with line:
        yield ok(f"coordinator {address}: the port is open")
        yield from _proxy(address)
        if not may_identify:
            yield warning(f"coordinator {address}: not asked; first correct the certificate")
            return
        try:
            said = ask(line, address, config, clock)
        except FederationError as error:
            yield fault(error)
            return
    yield ok(f"coordinator {address}: its certificate is of this CA, and it lets this site in")
    yield _check_clock(said.ahead_s)
    yield _check_version(said)
    yield from _check_key(said, study)
    yield _check_announced(said.study, study, config)


def _check_clock(ahead_s: float) -> Finding:
    side = "ahead of" if ahead_s > 0 else "behind"
    bounds = f"{MAX_AHEAD_S:g} s ahead to {MAX_BEHIND_S:g} s behind is accepted"
    said = f"clock: {abs(ahead_s):.1f} s {side} the coordinator's; {bounds}"
    if -MAX_BEHIND_S <= ahead_s <= MAX_AHEAD_S:
        return ok(said)
    return fault(ConfigError(f"{said}; set it by a time server: timedatectl set-ntp true"))


def _check_version(said: Health) -> Finding:
    own = version("consilium")
    if said.version != own:
        return fault(
            VersionMismatch(
                f"version: the coordinator runs {said.version}, this site {own}; install the same"
            )
        )
    if said.code != code_digest():
        return fault(
            VersionMismatch(
                f"version: both say {own}, the code differs ({said.code[:12]}... there, "
                f"{code_digest()[:12]}... here); install it anew from the same release"
            )
        )
    return ok(f"version: {own} on both sides, code {said.code[:12]}...")


def _check_key(said: Health, study: Study | None) -> Iterator[Finding]:
    if study is None or study.coordinator is None:
        return
    if said.key != study.coordinator.key:
        yield fault(
            PolicyError(
                f"coordinator: its key is {said.key[:12]}..., study {study.name} was made for "
                f"{study.coordinator.key[:12]}...; ask both by telephone which is right"
            )
        )


def _check_announced(digest: str, study: Study | None, config: SiteConfig) -> Finding:
    """The study that the coordinator runs, against what this site has."""
    announced = f"the coordinator announces study {digest[:12]}..."
    approvals = Approvals(config.state_dir)
    if study is not None and digest == study.digest():
        return ok(f"{announced}, which is {study.name}")
    if any(line["digest"] == digest for line in approvals.lines()):
        return warning(f"{announced}, approved here; checked is another: give --study")
    if study is None and not approvals.lines():
        return warning(f"{announced}; nothing is approved here yet: fl-client approve FILE")
    return fault(
        PolicyError(
            f"{announced}, which is not approved here; ask which study is meant, read it, then "
            "fl-client approve FILE"
        )
    )


def _proxy(address: Address) -> Iterator[Finding]:
    proxy = urllib.request.getproxies().get("https")
    if proxy and not urllib.request.proxy_bypass(address.host):
        yield warning(
            "HTTPS_PROXY is set: fl-client goes through that proxy, this check called directly; "
            "name the coordinator in NO_PROXY if no proxy is needed"
        )
