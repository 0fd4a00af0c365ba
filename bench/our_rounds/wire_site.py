"""The ``fl-client`` of ``our_rounds.site`` whose calls of the coordinator are counted besides.

``python -m our_rounds.wire_site NUM_PARAMS NOTES`` and then the arguments of ``fl-client``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from our_rounds.calls import count_calls
from our_rounds.site import number_of, pretend, pretend_training

from client import cli

if __name__ == "__main__":
    params, notes, *arguments = sys.argv[1:]
    pretend(int(params))
    pretend_training(int(params), number_of(Path(notes)))
    count_calls(Path(notes))
    sys.argv = ["fl-client", *arguments]
    cli.main()
