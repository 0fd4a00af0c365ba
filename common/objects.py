"""Flower's objects, put together: how large a message would become, and the message itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from numpy.typing import NDArray

from common.memory import in_memory

Gather = Callable[[int, Iterable[memoryview]], NDArray[np.uint8]]  # so many bytes, from parts


def num_bytes_together(contents: Mapping[str, bytes]) -> int:
    """Bytes of all arrays of a message, put together: one may name a piece a million times.

    Args:
      contents: Object by id, as a peer sent them.

    Raises:
      Exception: Whatever a peer's bytes do to Flower: they are no message.
    """
    return sum(
        len(contents[piece])
        for content in contents.values()
        if _kind_of(content) == Array.__qualname__
        for piece in _pieces(content)
    )


def put_together(
    whole: str, contents: dict[str, bytes], gather: Gather = in_memory
) -> InflatableObject:
    """What the objects make, as Flower would make it; they are used up on the way.

    Flower's own way has every array in memory three times before it is done; here it is there once,
    for its pieces go as they are copied.

    Args:
      whole: Id of the object that consists of the others.
      contents: Object by id, as a peer sent them; their arrays are no larger than memory allows.
      gather: Makes an array of its parts.

    Raises:
      Exception: Whatever a peer's bytes do to Flower: they are no message.
    """
    kinds = {key: _kind_of(content) for key, content in contents.items()}
    arrays = [key for key, kind in kinds.items() if kind == Array.__qualname__]
    uses = Counter(piece for key in arrays for piece in _pieces(contents[key]))
    made: dict[str, InflatableObject] = {
        key: _array(contents[key], contents, uses, gather) for key in arrays
    }
    for key, kind in kinds.items():
        if kind == ArrayRecord.__qualname__:
            made[key] = _record(contents[key], made)
    return inflate_object_from_contents(whole, contents, objects=made)


def _array(content: bytes, contents: dict[str, bytes], uses: Counter[str], gather: Gather) -> Array:
    """An array from its pieces, which go where nobody needs them again."""
    about, pieces = _about(content), _pieces(content)
    _check_all_used(content, pieces)
    num_bytes = sum(len(_body(contents[piece])) for piece in pieces)
    data = gather(num_bytes, _used_up(pieces, contents, uses))
    data.flags.writeable = False
    array = Array(about["dtype"], tuple(about["shape"]), about["stype"], b"")
    array.data = cast("bytes", data)
    return array


def _used_up(
    pieces: list[str], contents: dict[str, bytes], uses: Counter[str]
) -> Iterator[memoryview]:
    """What is in the pieces, in order; one that nobody needs again is forgotten."""
    for piece in pieces:
        yield _body(contents[piece])
        uses[piece] -= 1
        if not uses[piece]:
            del contents[piece]


def _record(content: bytes, made: Mapping[str, InflatableObject]) -> ArrayRecord:
    names: dict[str, str] = json.loads(get_object_body(content, ArrayRecord))
    _check_all_used(content, names.values())
    record = ArrayRecord()
    for name, key in names.items():
        array = made[key]
        if not isinstance(array, Array):
            raise TypeError(f"{type(array).__name__} where an array belongs")
        record[name] = array
    return record


def _kind_of(content: bytes) -> str:
    kind, _, _ = get_object_head_values_from_object_content(content)
    return kind


def _about(content: bytes) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(get_object_body(content, Array))
    return about


def _pieces(content: bytes) -> list[str]:
    """Ids of an array's pieces in order; one may come more than once."""
    _, ids, _ = get_object_head_values_from_object_content(content)
    return [ids[index] for index in _about(content)["arraychunk_ids"]]


def _check_all_used(content: bytes, ids: Iterable[str]) -> None:
    _, named, _ = get_object_head_values_from_object_content(content)
    if set(named) != set(ids):
        raise ValueError("an object names others than it consists of")


def _body(content: bytes) -> memoryview:
    """What is in a piece, where it lies."""
    if _kind_of(content) != ArrayChunk.__qualname__:
        raise TypeError("something else where a piece of an array belongs")
    return memoryview(content)[content.find(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]
