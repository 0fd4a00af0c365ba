"""A hospital behind a slow link: what ``check`` says of a round, and what a round then takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from slow_line import why_not

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from slow_link import PROMISED, measured

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "this machine has what it takes"),
]


def test_the_estimate_of_a_round_is_within_a_fifth_of_what_it_takes() -> None:
    """Both ways: at 16 bits an update takes half of what the model takes."""
    try:
        found = measured(num_params=1_000_000, ring_bits=16, num_rounds=2)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine permits no slow line: {error.stderr.strip()}")
    assert len(found.happened) == 2
    assert abs(found.error) <= PROMISED, found
    # The line is the reason: a round takes no less than its bytes need at 10 Mbit/s.
    assert min(one.total for one in found.happened) > 8 * found.traffic.down / 10e6
    assert found.estimated.down > 1.3 * found.estimated.up
