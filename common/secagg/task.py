"""What every key, share and vote of a sum is bound to."""

from __future__ import annotations

import hashlib

from common.messages import RoundTask
from common.secagg.encoding import digest, encode


def digest_of_task(task: RoundTask) -> bytes:
    """What a header, every key of a sum and every vote are bound to; 32 bytes.

    The relayed ciphertexts and the revocation list are not part of it: they change while a task
    that is asked again stays the same.
    """
    exponents = [exponent.to_bytes(8, "big", signed=True) for exponent in task.exponents]
    content = hashlib.sha256(
        encode(task.model_digest, task.round_number, exponents, task.purpose.value)
    ).digest()
    return digest("task", bytes.fromhex(task.run), task.sum_number, content)
