"""The order of messages at a site: the table, pair by pair, and nothing else."""

import numpy as np
import pytest

from common.errors import RemoteProtocolError
from common.messages import (
    FromCoordinator,
    Invitation,
    Purpose,
    Roster,
    RoundTask,
    Survivors,
    Unmask,
)
from common.secagg.phases import NEXT, Phase

MESSAGES: dict[str, FromCoordinator] = {
    "Invitation": Invitation("{}", b"", b""),
    "Roster": Roster("", (), (), (), (), (), b""),
    "RoundTask": RoundTask("", 0, 1, Purpose.TRAIN, (), "", (), (), b"", np.empty(0, np.float32)),
    "Survivors": Survivors("", 0, (), ()),
    "Unmask": Unmask("", 0, (), (), (), (), (), (), ()),
}

# Rows: where a site stands. Columns: what comes. A dash is refused.
TABLE = """
         Invitation Roster RoundTask Survivors Unmask
new      keys       -      -         -         -
keys     keys       ready  -         -         -
ready    keys       -      masked    -         -
masked   keys       -      masked    voted     ready
voted    keys       -      masked    -         ready
"""
_, HEAD, *ROWS = TABLE.splitlines()
CASES = [
    pytest.param(phase, kind, after, id=f"{kind} at {phase}")
    for phase, *row in (line.split() for line in ROWS)
    for kind, after in zip(HEAD.split(), row, strict=True)
]


@pytest.mark.parametrize(("phase", "kind", "after"), CASES)
def test_a_message_moves_a_site_on_or_is_refused(phase: str, kind: str, after: str) -> None:
    message = MESSAGES[kind]
    if after != "-":
        assert Phase(phase).after(message) == Phase(after)
        return
    with pytest.raises(RemoteProtocolError, match=f"^{kind} came where .* may come") as error:
        Phase(phase).after(message)
    assert error.value.rule == ("R14" if kind in ("Survivors", "Unmask") else "R7")
    for allowed in NEXT[Phase(phase)]:
        assert allowed.__name__ in str(error.value)


def test_every_phase_and_every_message_of_the_coordinator_is_in_the_table() -> None:
    cases = {(case.values[0], case.values[1]) for case in CASES}
    assert cases == {(phase.value, kind) for phase in Phase for kind in MESSAGES}
    assert set(MESSAGES) == {kind.__name__ for kind in FromCoordinator.__args__}
