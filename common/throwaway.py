"""Certificates for a simulation: a CA that lives in the run folder and protects nobody.

A simulation runs exactly the code of a deployment, so its sites and its coordinator have keys and
certificates too. They lie in the run folder; no hospital would ever pin this CA.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from common.authority import CERTIFICATE as CA_CERTIFICATE
from common.authority import REVOKED, Authority
from common.identity import Identity, read_certificate
from common.roster import CoordinatorCredentials, Credentials, Trust

CA, COORDINATOR, SITES = "ca", "coordinator", "sites"  # in a run folder
DAYS = 3650  # a simulation may be resumed whenever
NAME = "SIMULATION, protects nobody"


def issue_identities(run_dir: Path, names: Sequence[str]) -> None:
    """Give the coordinator and every site of a simulated run a key; those that have one keep it."""
    folder = run_dir / CA
    if (folder / REVOKED).exists():
        return
    now = datetime.now(UTC)
    authority = Authority.create(NAME, now, days=DAYS)
    authority.save(folder)
    authority.enrol(COORDINATOR, "coordinator", folder / COORDINATOR, now, days=DAYS)
    for name in names:
        authority.enrol(name, "site", run_dir / SITES / name, now, days=DAYS)
    (folder / REVOKED).write_bytes(authority.revocation_list([], now, days=DAYS))


def site_credentials(run_dir: Path, name: str, names: Sequence[str]) -> Credentials:
    """What a simulated site has and believes."""
    return Credentials(_identity(run_dir / SITES / name), _trust(run_dir, names))


def coordinator_credentials(run_dir: Path, names: Sequence[str]) -> CoordinatorCredentials:
    """The same for the coordinator of a simulation."""
    folder = run_dir / CA
    return CoordinatorCredentials(
        _identity(folder / COORDINATOR), _trust(run_dir, names), folder / REVOKED
    )


def _identity(folder: Path) -> Identity:
    return Identity.load(folder / "certificate.pem", folder / "key.pem")


def _trust(run_dir: Path, names: Sequence[str]) -> Trust:
    """What the people of a simulated study approved: the keys that were made for it."""
    return Trust(
        ca=read_certificate(run_dir / CA / CA_CERTIFICATE),
        members={name: _identity(run_dir / SITES / name).fingerprint for name in names},
        coordinator=_identity(run_dir / CA / COORDINATOR).fingerprint,
    )
