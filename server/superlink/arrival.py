"""An answer on its way from the SuperLink: its objects as they come, and what they make."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Self

from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from common.objects import num_bytes_together, put_together

STALLED_S = 180.0  # without progress; so long may one object take at the door

Fetch = Callable[[str], bytes | None]


class Unusable(Exception):  # noqa: N818 - what a site did, not a defect
    """There is no answer in what a site sends; the text has no word of the site's."""


class Stalled(Exception):  # noqa: N818 - maybe nobody's fault
    """It does not come whole; the same question may bring it another time."""


@dataclass
class Arrival:
    """Holds what came so far.

    Its metadata are those that the SuperLink has checked. What the site put into the message itself
    may say that it answers another site's question.
    """

    metadata: Metadata
    objects: list[str]
    ends: float  # nobody waits any more
    came: dict[str, bytes] = field(default_factory=dict)
    awaited: str = ""  # the object that was not there when it was asked for last
    most: int = 0  # objects that were here together
    moved: float = field(default_factory=time.monotonic)  # when something new came

    @classmethod
    def of(cls, metadata: Metadata, tree: ObjectTree, ends: float) -> Self:
        """An answer that was announced."""
        return cls(metadata, [node.object_id for node in iterate_object_tree(tree)], ends)

    @property
    def message_id(self) -> str:
        """Id of the answer."""
        return self.metadata.message_id

    @property
    def node(self) -> int:
        """Whose answer it is."""
        return self.metadata.src_node_id

    def idle_s(self) -> float:
        """Since when nothing new came."""
        return time.monotonic() - self.moved

    def num_bytes(self) -> int:
        """How much came."""
        return sum(map(len, self.came.values()))

    def start_again(self) -> None:
        """Give the memory back; nothing was deleted at the SuperLink."""
        self.came.clear()

    def advance(self, fetch: Fetch, pool: Executor, max_bytes: int) -> Message | None:
        """Fetch what has come by now; the message, once it is whole.

        Raises:
          Stalled: It does not come whole.
          Unusable: It is no message.
        """
        while missing := [each for each in self.objects if each not in self.came]:
            # They are pushed about in order: it is enough to ask for the one that was not there.
            self.awaited = self.awaited if self.awaited in missing else missing[0]
            first = fetch(self.awaited)
            if first is None:
                break
            others = [each for each in missing if each != self.awaited]
            found = zip(others, pool.map(fetch, others), strict=True)
            self.came[self.awaited] = first
            self.came |= {each: content for each, content in found if content is not None}
        if not missing:
            return self._put_together(max_bytes)
        if len(self.came) > self.most:
            self.most, self.moved = len(self.came), time.monotonic()
        if self.idle_s() > STALLED_S or time.monotonic() > self.ends:
            raise Stalled(f"{len(missing)} of {len(self.objects)} objects never came")
        return None

    def _put_together(self, max_bytes: int) -> Message:
        try:
            num_bytes = num_bytes_together(self.came)
            is_small = num_bytes <= max_bytes
            message = put_together(self.message_id, self.came) if is_small else None
        except Exception as error:  # noqa: BLE001 - whatever a site's bytes do to Flower
            raise Unusable(f"it is no message ({type(error).__name__})") from None
        if not is_small:
            raise Unusable(f"its arrays would have {num_bytes} bytes, {max_bytes} at most can be")
        if not isinstance(message, Message):
            raise Unusable("it is no message")
        if message.has_error():  # no site answers so, and the code of its error means nothing
            return make_message(self.metadata, error=Error(ErrorCode.UNKNOWN))
        return make_message(self.metadata, content=message.content)
