"""The ``fl-client`` of ``our_rounds.site`` whose calls of the coordinator are counted besides.

``python -m our_rounds.wire_site NUM_PARAMS NOTES`` and then the arguments of ``fl-client``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from flwr.supernode.fleet_http_client import FleetHttpClient
from our_rounds.site import number_of, pretend, pretend_training

from client import cli

CALLS = ".calls"  # the suffix of the file


def count_calls(path: Path) -> None:
    """A line for every call: when it ended, its name, the bytes of question and answer."""
    file = path.open("a", buffering=1)
    call = FleetHttpClient._unary_unary  # noqa: SLF001 - there is no other place that all pass

    def counted(self: FleetHttpClient, *, path: str, request: Any, **others: Any) -> Any:
        answer = call(self, path=path, request=request, **others)
        name = path.rpartition("/")[2]
        sizes = [request.ByteSize(), answer.ByteSize()]
        file.write(json.dumps([time.monotonic(), name, *sizes]) + "\n")
        return answer

    FleetHttpClient._unary_unary = counted  # noqa: SLF001


if __name__ == "__main__":
    params, notes, *arguments = sys.argv[1:]
    pretend(int(params))
    pretend_training(int(params), number_of(Path(notes)))
    count_calls(Path(notes).with_suffix(CALLS))
    sys.argv = ["fl-client", *arguments]
    cli.main()
