"""An answer on its way from the SuperLink: its objects as they come, and what they make."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, cast

from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from common.objects import num_bytes_together, put_together
from server.superlink.shelf import Shelf

STALLED_S = 180.0  # without progress; so long may one object take at the door
ASK_S = 1.0  # without progress, until the SuperLink is asked whether it still waits

IsKept = Callable[[str], bool]


class Unusable(Exception):  # noqa: N818 - what a site did, not a defect
    """There is no answer in what a site sends; the text has no word of the site's."""


class Stalled(Exception):  # noqa: N818 - maybe nobody's fault
    """It does not come whole; the same question may bring it another time."""


@dataclass
class Arrival:
    """Knows what came so far; it lies on the shelf until all of it is there.

    Its metadata are those that the SuperLink has checked. What the site put into the message itself
    may say that it answers another site's question.
    """

    metadata: Metadata
    objects: list[str]
    ends: float  # nobody waits any more
    came: dict[str, int] = field(default_factory=dict)  # bytes by object
    moved: float = field(default_factory=time.monotonic)  # when something new came
    asked: float = 0.0  # when it was asked for what is missing

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
        return sum(self.came.values())

    def advance(self, shelf: Shelf, is_kept: IsKept, max_bytes: int) -> Message | None:
        """Look what has come by now; the message, once it is whole.

        Args:
          shelf: Where it comes to.
          is_kept: Whether the SuperLink waits for an object of it; asked now and then.
          max_bytes: Of what it may become.

        Raises:
          Stalled: It does not come whole.
          Unusable: It is no message.
        """
        now = time.monotonic()
        missing = []
        for each in self.objects:
            if each in self.came:
                continue
            if (num_bytes := shelf.num_bytes(each)) is None:
                missing.append(each)
            else:
                self.came[each], self.moved = num_bytes, now
        if not missing:
            return self._put_together(shelf, max_bytes)
        if self.idle_s() > STALLED_S or now > self.ends:
            raise Stalled(f"{len(missing)} of {len(self.objects)} objects never came")
        if now > max(self.asked, self.moved) + ASK_S:
            self.asked = now
            if not is_kept(missing[0]):
                raise Stalled("it was withdrawn, or was too large")
        return None

    def _put_together(self, shelf: Shelf, max_bytes: int) -> Message:
        try:
            # Flower asks for bytes; what of a file is looked at is in memory while it is.
            contents = {each: cast("bytes", shelf.open(each)) for each in self.objects}
            num_bytes = num_bytes_together(contents)
            is_small = num_bytes <= max_bytes
            message = put_together(self.message_id, contents) if is_small else None
        except FileNotFoundError:
            raise Stalled("it was withdrawn while it was read") from None
        except Exception as error:  # noqa: BLE001 - whatever a site's bytes do to Flower
            raise Unusable(f"it is no message ({type(error).__name__})") from None
        if not is_small:
            raise Unusable(f"its arrays would have {num_bytes} bytes, {max_bytes} at most can be")
        if not isinstance(message, Message):
            raise Unusable("it is no message")
        if message.has_error():  # no site answers so, and the code of its error means nothing
            return make_message(self.metadata, error=Error(ErrorCode.UNKNOWN))
        return make_message(self.metadata, content=message.content)
