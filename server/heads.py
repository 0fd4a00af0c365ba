"""What each site last stated about its own books; it comes back to the site with every manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.audit import GENESIS
from common.disk import replace_file
from common.manifest import KeyedMember
from common.statement import Statement

HEADS = "heads.json"


class Heads:
    """Heads of the sites' audit logs and ledgers, by the sites' key; kept from run to run."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / HEADS
        content = self._path.read_text() if self._path.exists() else "{}"
        self._heads: dict[str, dict[str, str]] = json.loads(content)

    def member(self, name: str, key: str) -> KeyedMember:
        """A member as the next manifest names it."""
        known = self._heads.get(key, {})
        return KeyedMember(
            name=name,
            key=key,
            audit=known.get("audit", GENESIS),
            ledger=known.get("ledger", GENESIS),
        )

    def keep(self, statements: Iterable[Statement], keys: Mapping[str, str]) -> None:
        """Remember the heads of statements whose signatures were checked."""
        said = {keys[one.site]: {"audit": one.audit, "ledger": one.ledger} for one in statements}
        if said:
            self._heads |= said
            replace_file(self._path, (json.dumps(self._heads, indent=1) + "\n").encode())
