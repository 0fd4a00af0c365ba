"""Malformed messages: honest ones, changed at random in one to three places.

Changes know what they change: a header, a manifest, a certificate, a list, an array. Everything
follows from a seed. resign.py has the signatures that make a changed message look good.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import RemoteProtocolError
from common.messages import (
    KINDS,
    Message,
)
from common.secagg.encoding import decode, encode
from common.wire import STYPE

T = TypeVar("T")

INTEGERS = (0, -1, 1, 2, 7, 255, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 2**200, -(2**200))
LISTS_OF_INTEGERS = ("survivors", "voters", "complaints", "exponents")
TEXTS = (
    "",
    "0",
    "\x00",
    "site-2",
    "train",
    "é\u202e💥",
    "\ud800",
    "a" * 5000,
    "0" * 64,
    "{}",
    "[]",
)


class Draw:
    """Choices that follow from a seed, and not from the lengths of what they are made among."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)  # noqa: S311 - not a secret

    def below(self, bound: int) -> int:
        return int(self._random.random() * bound)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def bytes(self, length: int) -> bytes:
        return self._random.randbytes(length)


@dataclass(frozen=True)
class Damaged:
    """An array as Flower carries it, with whatever type and shape somebody claims."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


@dataclass
class Forgery:
    """A message that need not be one: any kind, any fields."""

    kind: str
    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    is_signed: bool = False

    @classmethod
    def of(cls, message: Message) -> Forgery:
        return cls(
            type(message).__name__,
            {each.name: getattr(message, each.name) for each in fields(message)},
        )

    def message(self) -> Any:
        """As a message, where its fields are those of its kind; their types are not checked."""
        kind = KINDS.get(self.kind)
        if kind is None or {each.name for each in fields(kind)} != set(self.values):
            return None
        return kind(**self.values)

    def records(self) -> RecordDict | None:
        """As it travels; None where Flower itself cannot carry it."""
        plain: dict[str, Any] = {"kind": self.kind}
        arrays: dict[str, Array] = {}
        try:
            for name, value in self.values.items():
                if isinstance(value, np.ndarray):
                    data = np.ascontiguousarray(value).tobytes()
                    arrays[name] = Array(value.dtype.name, value.shape, STYPE, data)
                elif isinstance(value, Damaged):
                    arrays[name] = Array(value.dtype, value.shape, value.stype, value.data)
                elif isinstance(value, StrEnum):
                    plain[name] = value.value
                else:
                    plain[name] = list(value) if isinstance(value, tuple) else value
            return RecordDict({"message": ConfigRecord(plain), "arrays": ArrayRecord(arrays)})
        except TypeError:
            return None


# Values


def changed_bytes(draw: Draw, content: bytes) -> bytes:
    """The same bytes with one thing wrong."""
    at = draw.below(len(content) + 1)
    middle = len(content) // 2
    options: list[Callable[[], bytes]] = [
        lambda: _flipped(content, at, 1 << draw.below(8)),
        lambda: _flipped(content, at, 0xFF),
        lambda: content[:at] + draw.bytes(1 + draw.below(8)) + content[at:],
        lambda: content[:at] + content[at + 1 + draw.below(8) :],
        lambda: content[:at],
        lambda: content + draw.bytes(1),
        lambda: content + bytes(1 + draw.below(40)),
        lambda: b"",
        lambda: bytes(len(content)),
        lambda: b"\xff" * len(content),
        lambda: draw.bytes(len(content)),
        lambda: content[middle:] + content[:middle],
        lambda: content + content,
        lambda: content[::-1],
    ]
    return draw.pick(options)()


def _flipped(content: bytes, at: int, bits: int) -> bytes:
    if not content:
        return b"\x00"
    at %= len(content)
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


def changed_integer(draw: Draw, value: int) -> int:
    return draw.pick((*INTEGERS, value + 1, value - 1, -value, value ^ (1 << draw.below(62))))


def changed_text(draw: Draw, text: str) -> str:
    """Another text; one that holds JSON is changed as JSON in most cases."""
    if text.startswith("{") and draw.chance(0.8):
        return changed_json(draw, text)
    at = draw.below(len(text) + 1)
    return draw.pick(
        (
            *TEXTS,
            text[:at],
            text[:at] + "0" + text[at + 1 :],
            text[:at] + draw.pick(TEXTS) + text[at:],
            text.upper(),
            text + " ",
            text[::-1],
            text + text,
        )
    )


def changed_json(draw: Draw, text: str) -> str:
    """JSON with one value replaced, missing, added or moved; or no longer JSON at all."""
    if draw.chance(0.15):
        return changed_json_text(draw, text)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return text[: draw.below(len(text))]
    if not isinstance(table, dict) or not table:
        return "{}"
    places = list(_places(table))
    container, key = draw.pick(places)
    how = draw.below(10)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[str(draw.pick(TEXTS)).encode("utf-8", "replace").decode()] = container[key]
    elif how == 2:
        other, its_key = draw.pick(places)
        container[key], other[its_key] = other[its_key], container[key]
    elif how == 3 and isinstance(container, list):
        container.append(container[key])
    elif how == 4 and isinstance(container[key], str):
        container[key] = changed_text(draw, container[key])
    elif isinstance(container[key], int) and draw.chance(0.5):
        container[key] = changed_integer(draw, container[key])
    else:
        container[key] = draw.pick(_wild_json(container[key]))
    return json.dumps(table, separators=(",", ":"))


def changed_json_text(draw: Draw, text: str) -> str:
    at = draw.below(len(text))
    number = draw.pick(("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 5000, "-0", "1.0"))
    colons = [k for k, letter in enumerate(text) if letter == ":"]
    colon = draw.pick(colons) if colons else 0
    end = min((k for k in (text.find(",", colon), text.find("}", colon)) if k > 0), default=colon)
    return draw.pick(
        (
            text[:at],
            text[:at] + text[at + 1 :],
            text[: colon + 1] + number + text[end:],
            text[: colon + 1] + "[" * 2000 + "]" * 2000 + text[end:],
            text[: colon + 1] + '"\\ud800"' + text[end:],
            text + text,
            text + "\x00",
            "\ufeff" + text,
            "[" * 100_000,
            text.replace("{", '{"run":"0",', 1),
            "[" + text + "]",
        )
    )


def _places(table: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(table) if isinstance(table, dict) else range(len(table))
    for key in keys:
        yield table, key
        if isinstance(table[key], dict | list):
            yield from _places(table[key])


def _wild_json(value: Any) -> tuple[Any, ...]:
    nested: Any = value
    for _ in range(300):
        nested = [nested]
    return (
        *INTEGERS,
        10**4299,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "0" * 32,
        "f" * 64,
        str(value),
        None,
        True,
        [],
        {},
        [value],
        {"name": value},
        nested,
    )


def changed_array(draw: Draw, array: np.ndarray) -> Any:
    """Other entries, another length, another type; or an array that contradicts itself."""
    size, name = array.size, array.dtype.name
    data = array.tobytes()
    entry = draw.below(max(size, 1))
    values: list[Callable[[], Any]] = [
        lambda: (
            np.frombuffer(_flipped(data, draw.below(len(data) + 1), 0x10), array.dtype)
            if data
            else np.ones(1, array.dtype)
        ),
        lambda: array[:entry],
        lambda: np.concatenate([array, array[: 1 + entry]]),
        lambda: np.empty(0, array.dtype),
        lambda: array.astype(np.float64),
        lambda: array.astype(np.int64, casting="unsafe"),
        lambda: array.reshape(1, -1),
        lambda: _with_entry(array, entry, draw.pick((np.nan, np.inf, 3.4e38, 1e-45, -0.0, 200))),
        lambda: Damaged(name, (size + 1,), STYPE, data),
        lambda: Damaged(name, (-size,), STYPE, data),
        lambda: Damaged(name, (2**62, 4), STYPE, data),
        lambda: Damaged(name, (), STYPE, data),
        lambda: Damaged(name, (size,), "numpy.ndarray", data),
        lambda: Damaged(
            draw.pick(("object", ">f4", "", "float16", "V4", "x")), (size,), STYPE, data
        ),
        lambda: Damaged(name, (size,), STYPE, data[:-1]),
        lambda: Damaged(name, (len(data[:-1]) // array.itemsize,), STYPE, data[:-1]),
        lambda: Damaged(name, (size,), STYPE, b""),
    ]
    return draw.pick(values)()


def _with_entry(array: np.ndarray, at: int, value: float) -> np.ndarray:
    if array.dtype.kind != "f" or not array.size:
        value = 200 if array.dtype == np.uint8 else 0
    changed = array.copy() if array.size else np.zeros(1, array.dtype)
    changed[at] = value
    return changed


def changed_list(draw: Draw, entries: tuple[Any, ...], pool: Sequence[Any]) -> tuple[Any, ...]:
    """Dropped, doubled, moved, added entries."""
    at, other = draw.below(len(entries)) if entries else 0, draw.below(max(len(entries), 1))
    more = draw.pick(pool) if pool else (entries[at] if entries else b"")
    swapped = list(entries)
    if entries:
        swapped[at], swapped[other] = swapped[other], swapped[at]
    return draw.pick(
        (
            entries[:at] + entries[at + 1 :],
            entries[: at + 1] + entries[at:],
            tuple(swapped),
            entries[::-1],
            (),
            entries * 2,
            (*entries, more),
            (more, *entries),
            (*entries[:at], more, *entries[at + 1 :]),
            entries[:at],
            entries * 300,
        )
    )


def other_type(draw: Draw, value: Any) -> Any:
    """A value of a type that has no business there."""
    plain = value if isinstance(value, int | str | bytes) else 0
    return draw.pick(
        (
            1.0,
            float("nan"),
            True,
            False,
            0,
            2**63,
            "",
            "text",
            b"",
            b"bytes",
            (),
            (0,),
            ("a",),
            (b"a", b"b"),
            (True,),
            (1.5,),
            (plain,),
            np.zeros(3, np.float32),
            np.zeros(3, np.uint8),
            str(plain),
        )
    )


# Forging


@dataclass(frozen=True)
class Material:
    """What a forger has: honest messages of everybody, and odd pieces by the field they fit."""

    messages: Sequence[Message]
    odd: Mapping[str, Sequence[bytes]]  # by name of a field

    def pool(self, name: str) -> list[Any]:
        """Values that a field of this name has anywhere."""
        found = [getattr(one, name) for one in self.messages if hasattr(one, name)]
        return [*found, *self.odd.get(name, ())]


class Forger:
    """Changes messages."""

    def __init__(self, material: Material) -> None:
        self._material = material
        names = {each.name for one in material.messages for each in fields(one)}
        self._pools = {name: material.pool(name) for name in names}
        self._all = [
            entry
            for pool in self._pools.values()
            for value in pool
            for entry in (value if isinstance(value, tuple) else (value,))
            if isinstance(entry, bytes)
        ]

    def change(self, draw: Draw, message: Message) -> Forgery:
        """A forgery with one to three changes."""
        forged = Forgery.of(message)
        for _ in range(1 + (draw.below(3) if draw.chance(0.3) else 0)):
            self._change_once(draw, forged)
        return forged

    def _change_once(self, draw: Draw, forged: Forgery) -> None:
        values = forged.values
        if not values:
            forged.notes.append("extra field")
            values["run"] = "0"
            return
        name = draw.pick(list(values))
        how = draw.below(100)
        if how < 62:
            values[name] = self._changed(draw, name, values[name])
            forged.notes.append(f"changed {name}")
        elif how < 78:
            pool = self._pools.get(name) or [b""]
            values[name] = draw.pick(pool)
            forged.notes.append(f"{name} of another message")
        elif how < 86:
            other = draw.pick(list(values))
            values[name], values[other] = values[other], values[name]
            forged.notes.append(f"swapped {name} and {other}")
        elif how < 92:
            values[name] = other_type(draw, values[name])
            forged.notes.append(f"{name} of type {type(values[name]).__name__}")
        elif how < 94:
            del values[name]
            forged.notes.append(f"no {name}")
        elif how < 96:
            values[draw.pick(("extra", "signature", "run", ""))] = values[name]
            forged.notes.append("extra field")
        else:
            forged.kind = draw.pick((*KINDS, "", "Encapsulated", "RoundTask ", "message"))
            forged.notes.append(f"kind {forged.kind}")

    def _changed(self, draw: Draw, name: str, value: Any) -> Any:
        match value:
            case tuple():
                return self._changed_list(draw, name, value)
            case bytes():
                return self._changed_content(draw, name, value)
            case StrEnum():
                return draw.pick((*type(value), *TEXTS, value.upper()))
        for kind, change in CHANGES.items():
            if isinstance(value, kind):
                return change(draw, value)
        return other_type(draw, value)

    def _changed_list(self, draw: Draw, name: str, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        if entries and draw.chance(0.5):
            at = draw.below(len(entries))
            entry = self._changed(draw, name, entries[at])
            return (*entries[:at], entry, *entries[at + 1 :])
        known = [one for one in self._pools.get(name, ()) if isinstance(one, tuple)]
        pool: list[Any] = [entry for one in known for entry in one]
        if name in LISTS_OF_INTEGERS:
            pool += INTEGERS
        return changed_list(draw, entries, pool)

    def _changed_content(self, draw: Draw, name: str, content: bytes) -> bytes:
        if name in ("header", "headers") and draw.chance(0.7):
            return changed_parts(draw, content)
        odd = self._material.odd.get({"certificates": "certificate"}.get(name, name))
        if odd and draw.chance(0.6):
            return draw.pick(odd)
        if draw.chance(0.1):
            return draw.pick(self._all)
        return changed_bytes(draw, content)


def changed_parts(draw: Draw, content: bytes) -> bytes:
    """An encoded list, such as a header, with one part changed; lengths stay consistent."""
    try:
        parts = decode(content)
    except RemoteProtocolError:
        return changed_bytes(draw, content)
    if not parts:
        return encode(draw.bytes(draw.below(40)))
    at, how = draw.below(len(parts)), draw.below(8)
    if how == 0:
        del parts[at]
    elif how == 1:
        parts.insert(at, parts[at])
    elif how == 2:
        other = draw.below(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    elif how == 3 and len(parts[at]) == 8:
        parts[at] = draw.pick([value for value in INTEGERS if 0 <= value < 2**64]).to_bytes(8)
    else:
        parts[at] = changed_bytes(draw, parts[at])
    return encode(*parts)


CHANGES: dict[type, Callable[[Draw, Any], Any]] = {
    str: changed_text,
    int: changed_integer,
    np.ndarray: changed_array,
}


def damaged_records(draw: Draw, records: RecordDict) -> RecordDict:
    """Records that hold more, less or other parts than a message."""
    message, arrays = records["message"], records["arrays"]
    number = MetricRecord({"a": 1})
    parts: list[Mapping[str, Any]] = [
        {"message": message},
        {"arrays": arrays},
        {},
        {"message": arrays, "arrays": message},
        {"message": message, "arrays": arrays, "more": ConfigRecord({"a": 1})},
        {"message": message, "arrays": number},
        {"message": number, "arrays": arrays},
        {"Message": message, "arrays": arrays},
        {"message": ConfigRecord({}), "arrays": arrays},
        {"message": ConfigRecord({"kind": draw.pick((1, b"Upload", ["Upload"], "", True))})},
        {"message": message, "arrays": ArrayRecord({})},
        {"message": message, "arrays": ArrayRecord({"kind": Array("uint8", (0,), STYPE, b"")})},
    ]
    return RecordDict(dict(draw.pick(parts)))
