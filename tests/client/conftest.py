"""Members of a study that have keys and a journal, but no images."""

from pathlib import Path

import pytest
from one_site import SITE
from protocol import Bare, Cast


@pytest.fixture
def cast(tmp_path: Path) -> Cast:
    """Four members, three of which recover a secret."""
    return Cast.bare(tmp_path, 4)


@pytest.fixture
def site(cast: Cast) -> Bare:
    member = cast.members[SITE]
    assert isinstance(member, Bare)
    return member
