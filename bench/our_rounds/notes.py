"""When a program did what, noted from outside: the program itself knows nothing of it.

All times are on the monotonic clock, which the processes of one machine share.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

Ids = list[str]  # of the messages that a call was about


@dataclass(frozen=True)
class Event:
    """One call."""

    what: str  # name of the function
    began: float
    ended: float
    ids: Ids


def no_ids(*_: Any) -> Ids:
    """A call that is about no message."""
    return []


class Notebook:
    """A file with a line for every watched call, in the order in which the calls end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def watch(self, owner: Any, name: str, ids: Callable[..., Ids | None] = no_ids) -> None:
        """Note every call of a function from now on.

        Args:
          owner: The class or module that has the function.
          name: Of the function.
          ids: From the result and the arguments; None where a call is not worth a line.
        """
        call: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            result = call(*args, **kwargs)
            ended = time.monotonic()
            about = ids(result, *args)
            if about is not None:
                self._file.write(json.dumps([name, began, ended, about]) + "\n")
            return result

        setattr(owner, name, watched)

    def watch_each(self, owner: Any, name: str, ids: Callable[[Any], Ids]) -> None:
        """Note how long every result of a generator takes, and finding that there is none left."""
        generator: Callable[..., Iterator[Any]] = getattr(owner, name)

        @functools.wraps(generator)
        def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
            results = generator(*args, **kwargs)
            while True:
                began = time.monotonic()
                come = list(islice(results, 1))
                about = [each for result in come for each in ids(result)]
                self._file.write(json.dumps([name, began, time.monotonic(), about]) + "\n")
                if not come:
                    return
                yield come.pop()

        setattr(owner, name, watched)


def read_notes(path: Path) -> list[Event]:
    """What a notebook holds."""
    return [Event(*json.loads(line)) for line in path.read_text().splitlines()]
