"""Messages <-> Flower records; size, type and range checks on arrival.

An array becomes one Flower array of its raw little-endian bytes (many small arrays cost seconds),
the rest one configuration record. What arrives is data of known types and lengths or it is refused:
nothing is unpickled, nothing is executed.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, get_type_hints

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from common.errors import RemoteProtocolError
from common.messages import KINDS, Message

MAX_TEXT = 1 << 20  # characters
MAX_LIST = 1 << 16  # entries
MAX_ARRAY_BYTES = 1 << 31
STYPE = "raw"


def pack(message: Message) -> RecordDict:
    """Put a message into Flower's records."""
    (packed,) = pack_all([message])
    return packed


def pack_all(messages: Iterable[Message]) -> list[RecordDict]:
    """Put messages into records; they share what they have in common, and nothing is copied.

    Their arrays must not change until the records are gone.
    """
    made: dict[int, Array] = {}
    return [_pack(message, made) for message in messages]


def _pack(message: Message, made: dict[int, Array]) -> RecordDict:
    arrays: dict[str, Array] = {}
    values: dict[str, Any] = {"kind": type(message).__name__}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if isinstance(value, np.ndarray):
            if id(value) not in made:
                made[id(value)] = _packed(value)
            arrays[field.name] = made[id(value)]
        else:
            values[field.name] = list(value) if isinstance(value, tuple) else _plain(value)
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array  # Flower's constructor would copy what it has hashed already
    return RecordDict({"message": ConfigRecord(values), "arrays": record})


def _packed(value: NDArray[Any]) -> Array:
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).view(np.uint8)
    little.flags.writeable = False
    array = Array(dtype=value.dtype.name, shape=value.shape, stype=STYPE, data=b"")
    # Flower asks for bytes and takes whatever has a buffer: this one is the array's own memory.
    array.data = typing.cast("bytes", little)
    return array


def unpack(records: RecordDict) -> Message:
    """Read a message out of Flower's records.

    Raises:
      RemoteProtocolError: The records do not hold exactly one well-formed message.
    """
    values, arrays = _parts(records)
    name = values.pop("kind", None)
    if not isinstance(name, str) or name not in KINDS:
        raise RemoteProtocolError("a message of an unknown kind arrived; check both versions")
    kind = KINDS[name]
    hints = get_type_hints(kind)
    if set(values) | set(arrays) != set(hints) or len(values) + len(arrays) != len(hints):
        raise RemoteProtocolError(f"{name}: its fields are not those of this version")
    fields: dict[str, Any] = {
        field: _array(arrays[field], hint, f"{name}.{field}")
        if field in arrays
        else _value(values[field], hint, f"{name}.{field}")
        for field, hint in hints.items()
    }
    return kind(**fields)


def _parts(records: RecordDict) -> tuple[dict[str, Any], dict[str, Array]]:
    values, arrays = records.get("message"), records.get("arrays")
    if set(records) != {"message", "arrays"}:
        raise RemoteProtocolError("a message with unknown parts arrived; check both versions")
    if not isinstance(values, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise RemoteProtocolError("a message with parts of the wrong type arrived")
    return dict(values), dict(arrays)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


def _value(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or len(value) > MAX_LIST:
            raise RemoteProtocolError(f"{where}: expected a list of at most {MAX_LIST}")
        (item, _) = typing.get_args(hint)
        return tuple(_value(entry, item, where) for entry in value)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        if not isinstance(value, str) or value not in set(hint):
            raise RemoteProtocolError(f"{where}: not one of {', '.join(hint)}")
        return hint(value)
    if type(value) is not hint or (isinstance(value, str | bytes) and len(value) > MAX_TEXT):
        raise RemoteProtocolError(f"{where}: expected {hint.__name__} of at most {MAX_TEXT}")
    if isinstance(value, str) and not _is_unicode(value):
        raise RemoteProtocolError(f"{where}: not Unicode text")
    return value


def _is_unicode(text: str) -> bool:
    """Python's strings may hold half of a surrogate pair; nothing that is encoded does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _array(array: Array, hint: Any, where: str) -> NDArray[Any]:
    """A read-only view of the bytes that arrived; flat arrays of the expected type only."""
    wanted = _dtype(hint)
    num_bytes = len(array.data)
    if wanted is None or array.stype != STYPE or array.dtype != wanted.name:
        raise RemoteProtocolError(f"{where}: not an array of the expected type")
    if num_bytes > MAX_ARRAY_BYTES or tuple(array.shape) != (num_bytes // wanted.itemsize,):
        raise RemoteProtocolError(f"{where}: shape {array.shape} and {num_bytes} bytes disagree")
    if num_bytes % wanted.itemsize:
        raise RemoteProtocolError(f"{where}: {num_bytes} bytes are no whole number of entries")
    return np.frombuffer(array.data, wanted.newbyteorder("<"))


def _dtype(hint: Any) -> np.dtype[Any] | None:
    """The element type of ``NDArray[np.float32]``; None for anything that is not an array."""
    if typing.get_origin(hint) is not np.ndarray:
        return None
    (_, dtype) = typing.get_args(hint)
    element: np.dtype[Any] = np.dtype(typing.get_args(dtype)[0])
    return element
