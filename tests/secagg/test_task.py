"""What the digest of a task holds everybody to, and what may change while a task is repeated."""

import dataclasses
import hashlib

import numpy as np
import pytest

from common.messages import Purpose, RoundTask
from common.secagg.encoding import digest, encode
from common.secagg.task import digest_of_task

TASK = RoundTask(
    run="ab" * 32,
    sum_number=3,
    round_number=2,
    purpose=Purpose.TRAIN,
    exponents=(-22, 0, 5),
    model_digest="cd" * 32,
    ciphertexts=(b"ct",),
    ciphertext_signatures=(b"sig",),
    revoked=b"crl",
    model=np.zeros(3, np.float32),
    signature=b"signature",
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "ac" * 32),
        ("sum_number", 4),
        ("round_number", 3),
        ("purpose", Purpose.VALIDATE),
        ("exponents", (-22, 0, 6)),
        ("exponents", (-22, 0)),
        ("exponents", (22, 0, 5)),
        ("exponents", (0, -22, 5)),
        ("model_digest", "ce" * 32),
    ],
)
def test_sites_that_were_given_different_tasks_have_different_digests(
    field: str, value: object
) -> None:
    assert digest_of_task(dataclasses.replace(TASK, **{field: value})) != digest_of_task(TASK)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ciphertexts", ()),
        ("ciphertext_signatures", ()),
        ("revoked", b"a later list"),
        ("signature", b""),
        ("model", np.ones(3, np.float32)),  # its digest stands for it
    ],
)
def test_a_task_that_is_asked_again_keeps_its_digest(field: str, value: object) -> None:
    assert digest_of_task(dataclasses.replace(TASK, **{field: value})) == digest_of_task(TASK)


def test_the_digest_is_bound_to_run_and_sum_and_labelled() -> None:
    exponents = [number.to_bytes(8, "big", signed=True) for number in (-22, 0, 5)]
    content = hashlib.sha256(encode("cd" * 32, 2, exponents, "train")).digest()
    assert digest_of_task(TASK) == digest("task", bytes.fromhex("ab" * 32), 3, content)
