"""The ``fl-server`` of ``our_rounds.coordinator`` whose calls of the SuperLink are counted besides.

``python -m our_rounds.wire_coordinator NUM_PARAMS NOTES`` and then the arguments of ``fl-server``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from our_rounds.calls import count_calls
from our_rounds.coordinator import pretend, watch
from our_rounds.notes import Notebook

from server import cli

if __name__ == "__main__":
    params, notes, *arguments = sys.argv[1:]
    pretend(int(params))
    watch(Notebook(Path(notes)))
    count_calls(Path(notes))
    sys.argv = ["fl-server", *arguments]
    cli.main()
