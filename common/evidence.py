"""What was refused, and the message that was refused: signed messages convict their sender.

One JSON line each, appended and flushed to disk. The file has a bound, so that nobody can fill a
disk by sending nonsense.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from common.disk import append
from common.errors import FederationError
from common.messages import Message
from common.record import as_table

FILE = "evidence.jsonl"
MAX_BYTES = 64 << 20
MAX_BYTES_PER_SENDER = 8 << 20  # in one process: a sender must not crowd out what others did


class Evidence:
    """One party's record of what it refused."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._written: Counter[str] = Counter()

    def keep(
        self, message: Message, error: FederationError, *, now: datetime, by: str = ""
    ) -> None:
        """Append a refusal; on disk when this returns.

        Args:
          message: What was refused, with its signature.
          error: Why.
          now: When.
          by: The site that sent it, where the transport tells.
        """
        self._append(as_table(message), error, now, by)

    def keep_header(
        self, site: int, header: bytes, error: FederationError, *, now: datetime, by: str
    ) -> None:
        """The same for the signed header of an upload whose body was added and dropped."""
        self._append({"kind": "Header", "site": site, "header": header.hex()}, error, now, by)

    def _append(
        self, message: dict[str, Any], error: FederationError, now: datetime, by: str
    ) -> None:
        line = {
            "time": now.isoformat(timespec="seconds"),
            "rule": error.rule,
            "reason": str(error),
            "from": by,
            "message": message,
        }
        content = json.dumps(line).encode() + b"\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            os.fchmod(file.fileno(), 0o600)
            self._written[by] += len(content)
            if (
                file.tell() + len(content) <= MAX_BYTES
                and self._written[by] <= MAX_BYTES_PER_SENDER
            ):
                append(file, content)
