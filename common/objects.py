"""Flower's objects before they are put together: how large they would become."""

from __future__ import annotations

import json
from collections.abc import Mapping

from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
)


def num_bytes_together(contents: Mapping[str, bytes]) -> int:
    """Bytes of all arrays of a message, put together: one may name a piece a million times.

    Args:
      contents: Object by id, as a peer sent them.

    Raises:
      Exception: Whatever a peer's bytes do to Flower: they are no message.
    """
    total = 0
    for content in contents.values():
        kind, pieces, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            for index in json.loads(get_object_body(content, Array))["arraychunk_ids"]:
                total += len(contents[pieces[index]])
    return total
