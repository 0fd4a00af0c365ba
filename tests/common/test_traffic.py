"""What a round moves, beside the messages that it consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import answers_of, federate, open_sites, tiny_study

from common.messages import Message, Purpose, RoundTask, Shares, Unmask, Upload
from common.models.build import build_network
from common.traffic import traffic_of
from server.network import LoopbackNetwork

SMALL = 700  # bytes: names, numbers, digests, a list of who was revoked, a signature


class Weighed(LoopbackNetwork):
    """Keeps what one site got and gave."""

    def ask(self, messages: Mapping[str, Message], *arguments: Any) -> Iterator[tuple[str, Any]]:
        for site, reply in super().ask(messages, *arguments):
            if site == "site-1":
                self.said += [messages[site], reply]
            yield site, reply

    def weigh(self, kind: type[Any]) -> int:
        """Bytes of the first message of a kind that trains."""
        return next(num_bytes(each) for each in self.said if isinstance(each, kind))

    said: list[Any]


def num_bytes(message: Any) -> int:
    return sum(size(getattr(message, field.name)) for field in dataclasses.fields(message))


def size(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(map(size, value))
    return len(value) if isinstance(value, str | bytes) else 8


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
@pytest.mark.parametrize("num_sites", [3, 9])
def test_a_round_moves_what_its_messages_hold(
    tmp_path: Path, num_sites: int, ring_bits: int
) -> None:
    study = tiny_study(num_sites, num_rounds=1, aggregation={"ring_bits": ring_bits})
    network = Weighed(answers_of(open_sites(study, tmp_path)))
    network.said = []
    federate(study, tmp_path / "run", network=network, sites_in=tmp_path)
    expected = traffic_of(study, build_network(study).schema)
    tasks = [each for each in network.said if isinstance(each, RoundTask)]
    assert tasks[0].purpose is Purpose.TRAIN
    # The first task also passes on what sites have encapsulated for one another.
    first = size(tasks[0].ciphertexts) + size(tasks[0].ciphertext_signatures)
    down = network.weigh(RoundTask) - first + network.weigh(Unmask)
    assert expected.down - 10 * num_sites <= down <= expected.down + 2 * SMALL
    assert expected.up - 10 * num_sites <= network.weigh(Upload) <= expected.up + SMALL
    assert network.weigh(Shares) < SMALL


def test_other_ring_bits_change_the_body_alone() -> None:
    study = tiny_study(aggregation={"ring_bits": 32})
    schema = build_network(study).schema
    whole, half = traffic_of(study, schema), traffic_of(study, schema, 16)
    assert whole.body == 4 * schema.num_params
    assert dataclasses.replace(half, body=whole.body) == whole
    assert half.up == whole.up - whole.body // 2


def test_without_members_what_depends_on_their_number_is_left_out() -> None:
    study = tiny_study()
    alone = study.model_copy(update={"members": ()})
    traffic = traffic_of(alone, build_network(alone).schema)
    assert (traffic.relayed, traffic.shares) == (0, 0)
