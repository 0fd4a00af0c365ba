"""A signature holds for one message of one kind, as it was signed, by whoever signed it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RemoteProtocolError
from common.identity import Identity
from common.messages import (
    KINDS,
    Encapsulated,
    Purpose,
    RoundTask,
    Signed,
    Survivors,
    Vote,
    signed_content,
)
from common.record import from_table
from common.signing import check_signed, sign

STORED = json.loads((Path(__file__).parent.parent / "vectors/masked_sum_v1.json").read_text())
TYPES: dict[str, Any] = {**KINDS, "Encapsulated": Encapsulated}


def message_of(kind: str) -> Signed:
    """The vector's message of this kind, not signed yet."""
    table = {**STORED["messages"][kind]["fields"], "signature": "", "model": None}
    message = from_table(table, TYPES[kind])
    if kind == "RoundTask":
        return dataclasses.replace(
            message, purpose=Purpose.TRAIN, model=np.arange(3, dtype=np.float32)
        )
    return message


MESSAGES = {kind: message_of(kind) for kind in STORED["messages"]}


def changes_of(value: Any) -> list[Any]:
    """Other values of the same type."""
    if isinstance(value, Purpose):
        return [Purpose.TEST]
    if isinstance(value, int):
        return [value + 1, -value - 1]
    if isinstance(value, str | bytes):
        return [value + value[:1], value[:-1], value[:0]]
    longer = [(*value, *value[-1:]), value[:-1], value[::-1]]
    return [other for other in longer if other != value]


CHANGES = [
    pytest.param(kind, field.name, value, id=f"{kind}.{field.name} to {str(value)[:20]}")
    for kind, message in MESSAGES.items()
    for field in dataclasses.fields(message)
    if field.name not in ("signature", "model")
    for value in changes_of(getattr(message, field.name))
]


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_message_is_believed_of_its_sender_alone(members: Sequence[Identity], kind: str) -> None:
    signed = sign(MESSAGES[kind], members[0])
    check_signed(signed, members[0].key.public_key(), sender="site-0", rule="R3")
    assert dataclasses.replace(signed, signature=b"") == dataclasses.replace(
        MESSAGES[kind], signature=b"", **({"model": signed.model} if kind == "RoundTask" else {})
    )
    with pytest.raises(RemoteProtocolError, match=f"{kind}: the signature of site-1") as error:
        check_signed(signed, members[1].key.public_key(), sender="site-1", rule="R12")
    assert error.value.rule == "R12"


@pytest.mark.parametrize(("kind", "field", "value"), CHANGES)
def test_no_field_of_a_signed_message_can_be_changed(
    members: Sequence[Identity], kind: str, field: str, value: Any
) -> None:
    forged = dataclasses.replace(sign(MESSAGES[kind], members[0]), **{field: value})
    with pytest.raises(RemoteProtocolError, match="is not good") as error:
        check_signed(forged, members[0].key.public_key(), sender="site-0", rule="R7")
    assert error.value.rule == "R7"


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize(
    "signature", [b"", b"signature", bytes(72), b"\x30\x06\x02\x01\x00\x02\x01\x00"]
)
def test_what_is_no_signature_is_refused(
    members: Sequence[Identity], kind: str, signature: bytes
) -> None:
    forged = dataclasses.replace(MESSAGES[kind], signature=signature)
    with pytest.raises(RemoteProtocolError, match="is not good"):
        check_signed(forged, members[0].key.public_key(), sender="site-0", rule="R3")


def test_kinds_with_the_same_fields_sign_different_bytes() -> None:
    contents = [signed_content(message) for message in MESSAGES.values()]
    assert len(set(contents)) == len(MESSAGES) == 10
    view = MESSAGES["Survivors"]
    values = [getattr(view, field.name) for field in dataclasses.fields(view)][:4]
    twin = dataclasses.make_dataclass(
        "Twin", ["run", "sum_number", "survivors", "headers", "signature"], frozen=True
    )
    assert signed_content(twin(*values, b"")) != signed_content(Survivors(*values))


def test_the_model_is_signed_by_its_digest_alone() -> None:
    task = MESSAGES["RoundTask"]
    assert isinstance(task, RoundTask)
    other = dataclasses.replace(task, model=task.model + 1)
    assert signed_content(other) == signed_content(task)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"sum_number": 2**63}, id="a number beyond 63 bits"),
        pytest.param({"sum_number": -(2**63) - 1}, id="a number below them"),
        pytest.param({"site": 2**200}, id="a very large number"),
        pytest.param({"run": "\ud800"}, id="text that is no Unicode"),
    ],
)
def test_what_cannot_be_signed_is_refused_like_a_bad_signature(
    members: Sequence[Identity], changed: dict[str, Any]
) -> None:
    vote = dataclasses.replace(sign(MESSAGES["Vote"], members[0]), **changed)
    with pytest.raises(RemoteProtocolError) as error:
        check_signed(vote, members[0].key.public_key(), sender="site-0", rule="R12")
    assert error.value.rule == "R12"


votes = st.builds(
    Vote,
    run=st.text(max_size=5),
    sum_number=st.integers(-(2**63), 2**63 - 1),
    site=st.integers(-(2**63), 2**63 - 1),
    view=st.binary(max_size=5),
)


@given(votes, votes)
def test_different_messages_never_sign_the_same_bytes(one: Vote, other: Vote) -> None:
    assert (signed_content(one) == signed_content(other)) == (one == other)
