"""``CoordinatorConfig``: what the coordinator's own machine needs to know; nothing of the study."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from common.config import Frozen, RelativePath


class Certificates(Frozen):
    """The coordinator's certificate and key, and what the consortium CA publishes."""

    ca: RelativePath
    cert: RelativePath
    key: RelativePath
    revoked: RelativePath  # the CA's revocation list, read anew for every message


class CoordinatorConfig(Frozen):
    """A whole ``coordinator.toml``; ``common.config.load(path, CoordinatorConfig)`` reads one."""

    listen: Annotated[str, Field(min_length=3)] = "0.0.0.0:9443"  # TLS asks who calls
    state_dir: RelativePath  # what it remembers from run to run
    health: str = ""  # host:port of Flower's gRPC health service, without TLS: keep it on loopback
    wait_s: Annotated[float, Field(gt=0)] = 600.0
    """The run starts when every member is connected, or after this with those who are."""
    certificates: Certificates

    @field_validator("listen", "health")
    @classmethod
    def _check_address(cls, text: str) -> str:
        host, _, port = text.rpartition(":")
        if not text:
            return text
        if not host or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004
            raise ValueError("Input should be host:port, for example 0.0.0.0:9443")
        return text

    @property
    def host(self) -> str:
        """Where to listen; brackets of an IPv6 address are taken off."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Where to listen; 0 for any free port."""
        return int(self.listen.rpartition(":")[2])
