"""Every call that a program makes of the SuperLink, counted from outside."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from flwr.supercore.protobuf.client import ProtobufClient

SUFFIX = ".calls"  # of the file beside a program's notes


class Call(NamedTuple):
    """A question and its answer, without what HTTP puts before them."""

    at: float  # its end, on the monotonic clock
    name: str
    up: int  # bytes
    down: int


def count_calls(notes: Path) -> None:
    """Write a line for every call from now on."""
    file = notes.with_suffix(SUFFIX).open("a", buffering=1)
    call = ProtobufClient._unary_unary  # noqa: SLF001 - there is no other place that all pass

    def counted(self: ProtobufClient, *, path: str, request: Any, **others: Any) -> Any:
        answer = call(self, path=path, request=request, **others)
        sizes = (request.ByteSize(), answer.ByteSize())
        file.write(json.dumps([time.monotonic(), path.rpartition("/")[2], *sizes]) + "\n")
        return answer

    ProtobufClient._unary_unary = counted  # noqa: SLF001


def read_calls(notes: Path, since: float, until: float) -> list[Call]:
    """What a program called in a stretch of time."""
    lines = notes.with_suffix(SUFFIX).read_text().splitlines()
    calls = (Call(*json.loads(line)) for line in lines)
    return [call for call in calls if since <= call.at < until]
