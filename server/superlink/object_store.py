"""Where the SuperLink keeps what messages consist of, so that no site can spoil another's.

Flower's store believes whoever names an object first: an id gets the children of the first tree it
stands in, long before its content shows which ones it has. A site that put false children under an
id that others use, too (an empty record, the next broadcast of a model), silenced all of them.
Flower's store also has everything in memory; here the objects lie on a shelf.
"""

from __future__ import annotations

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from server.superlink.shelf import Shelf

ON_SHELF = b"on the shelf"  # stands for an object's bytes in Flower's calls; no object is like it


class FlatStore(InMemoryObjectStore):
    """Trees of two levels: a message, and under it every object that it consists of.

    Guarantees:
      An object is nothing but its bytes, whose hash is its id: there is nothing else that two sites
      could say differently of it. What a message consists of is asked of the message alone, and a
      message's id is known to nobody before it is sent. Whoever receives a message puts it together
      by what the objects themselves say.
    """

    def __init__(self, shelf: Shelf) -> None:
        """Begin with what lies on a shelf: nothing."""
        super().__init__()
        self.shelf = shelf

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Note the objects of a message; those that are missing are returned.

        A message that is known keeps the objects it was announced with: others would be held by
        nothing, and would stay for ever.
        """
        with self.lock_store:  # at once, or an object could vanish before its message is noted
            known = self.store.get(object_tree.object_id)
            parts = (
                known.child_object_ids
                if known
                else [node.object_id for node in iterate_object_tree(object_tree)]
            )
            return super().preregister(run_id, _flat(object_tree.object_id, parts))

    def get_object_tree(self, object_id: str) -> ObjectTree:
        """The objects of a message; what stands under those is none of its business."""
        with self.lock_store:
            known = self.store.get(object_id)
            if known is None:
                return super().get_object_tree(object_id)  # which raises
            return _flat(object_id, known.child_object_ids)

    def is_message(self, object_id: str) -> bool:
        """Whether this is a message that is kept, not a part of one."""
        with self.lock_store:
            known = self.store.get(object_id)
            return known is not None and known.ref_count == 0

    def receive(self, object_id: str, content: bytes) -> None:
        """Lay an object on the shelf; ``put`` says then whether it is wanted.

        It may take as long as a disk needs, and nobody has to wait for it.

        Raises:
          ValueError: Its bytes are not those that its id stands for.
          UnexpectedObjectContentError: It is no object of Flower's.
          OSError: The disk is full.
        """
        if get_object_id(content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content)
        self.shelf.put(object_id, content)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Take in an object, or what stands for one that was received before."""
        if object_content != ON_SHELF:
            self.receive(object_id, object_content)
        with self.lock_store:
            known = self.store.get(object_id)
            if known is None:
                self.shelf.delete(object_id)
                raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
            if self.shelf.num_bytes(object_id) is None:
                raise ValueError(f"Object with ID '{object_id}' was not received.")
            known.is_available = True

    def get(self, object_id: str) -> bytes | None:
        """What stands for an object: whoever sends it reads it from the shelf."""
        with self.lock_store:
            known = self.store.get(object_id)
            if known is None:
                return None
            return ON_SHELF if known.is_available else b""

    def delete(self, object_id: str) -> None:
        """Forget a message, and those of its objects that no other one has."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                self.shelf.delete(object_id)

    def drop_unwanted(self, object_id: str) -> None:
        """Take from the shelf what was received and then not put."""
        with self.lock_store:
            if object_id not in self.store:
                self.shelf.delete(object_id)


def _flat(root: str, parts: list[str]) -> ObjectTree:
    leaves = [ObjectTree(object_id=part) for part in dict.fromkeys(parts) if part != root]
    return ObjectTree(object_id=root, children=leaves)
