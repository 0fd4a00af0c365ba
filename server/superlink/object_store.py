"""Where the SuperLink keeps what messages consist of, so that no site can spoil another's.

Flower's store believes whoever names an object first: an id gets the children of the first tree it
stands in, long before its content shows which ones it has. A site that put false children under an
id that others use, too (an empty record, the next broadcast of a model), silenced all of them.
"""

from __future__ import annotations

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore


class FlatStore(InMemoryObjectStore):
    """Trees of two levels: a message, and under it every object that it consists of.

    Guarantees:
      An object is nothing but its bytes, whose hash is its id: there is nothing else that two sites
      could say differently of it. What a message consists of is asked of the message alone, and a
      message's id is known to nobody before it is sent. Whoever receives a message puts it together
      by what the objects themselves say.
    """

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


def _flat(root: str, parts: list[str]) -> ObjectTree:
    leaves = [ObjectTree(object_id=part) for part in dict.fromkeys(parts) if part != root]
    return ObjectTree(object_id=root, children=leaves)
