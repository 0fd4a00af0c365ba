"""``fl-client check`` for a model that is made up.

``python -m our_rounds.check NUM_PARAMS`` and then the arguments of ``fl-client``.
"""

from __future__ import annotations

import sys
from typing import Any

from our_rounds.made_up import network_of

import client.check
from client import cli
from common.models.flat import FlatNetwork
from common.study import Study


def pretend(num_params: int) -> None:
    """A model of any size."""

    def build_network(study: Study, *_: Any) -> FlatNetwork:
        return network_of(num_params, study)

    client.check.build_network = build_network


if __name__ == "__main__":
    params, *arguments = sys.argv[1:]
    pretend(int(params))
    sys.argv = ["fl-client", *arguments]
    cli.main()
