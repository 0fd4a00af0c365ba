"""Published vectors, the protocol a second time, a CA and sites that it certified."""

import runpy
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.authority import Authority
from common.identity import Identity, Role

NOW = datetime(2031, 5, 17, 12, tzinfo=UTC)  # nothing here reads a clock

Record = dict[str, str]
Issue = Callable[[str, Role], Identity]


@pytest.fixture(scope="session")
def plain() -> SimpleNamespace:
    """tests/secagg/plain_protocol.py."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_protocol.py")))


@pytest.fixture(scope="session")
def published() -> Callable[[str], list[Record]]:
    """Reads a file of the package cryptography_vectors: records of lower-case names and values."""

    def read(path: str) -> list[Record]:
        records: list[Record] = []
        with cryptography_vectors.open_vector_file(path, "r") as file:
            for line in file:
                name, equals, value = (part.strip() for part in line.partition("="))
                if equals and not name.startswith("#"):
                    if name.lower() == "count":
                        records.append({})
                    records[-1][name.lower()] = value
        assert records
        return records

    return read


@pytest.fixture(scope="session")
def now() -> datetime:
    return NOW


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create("consortium", NOW - timedelta(days=10), days=1000)


@pytest.fixture(scope="session")
def issue(authority: Authority) -> Issue:
    """Somebody whom the authority certified."""

    def certified(name: str, role: Role = "site") -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = authority.issue(name, role, key.public_key(), NOW, days=100)
        return Identity(name, key, certificate.public_bytes(serialization.Encoding.DER))

    return certified


@pytest.fixture(scope="session")
def members(issue: Issue) -> Sequence[Identity]:
    return [issue(f"site-{k}", "site") for k in range(5)]
