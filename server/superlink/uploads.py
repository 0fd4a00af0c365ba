"""What a site may push: answers of its own, of bounded size, two at a time.

Flower checks who pushes, and not whom a message says it is from: a member that learned another
one's node id could send it instructions, or answer in its place. Nor does it bound what it keeps:
objects of answers that nobody fetches stay until the run ends.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from server.superlink.asgi import App, Receive, Scope, Send, after, reply
from server.superlink.calls import FLEET, PARSED, taken_out
from server.superlink.listener import SITE
from server.superlink.object_store import FlatStore

PUSH_MESSAGES, PUSH_OBJECT = FLEET + "push-messages", FLEET + "push-object"
MAX_ANSWERS = 2  # one that the coordinator fetches, and one whose question it has given up on
MAX_ANNOUNCED_BYTES = 1 << 18  # an answer without its objects: ids of 64 letters
SMALL_OBJECTS = 64  # of an answer, besides the pieces of its arrays
BYTES_PER_OBJECT = 1 << 20  # Flower's pieces are of 5 MB
ID = re.compile(r"[0-9a-f]{64}")  # Flower's own check lets in what int() does

log = logging.getLogger("consilium.listener")


class Refused(Exception):  # noqa: N818 - what the site did, not a defect
    """A request goes no further."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """An answer that a site is pushing, or that waits for the coordinator."""

    message_id: str
    parts: frozenset[str]  # ids of what it consists of
    num_bytes: dict[str, int] = field(default_factory=dict)  # of what came of it


class Uploads:
    """An ASGI app before Flower's that keeps account of what every site has pushed.

    Args:
      app: Flower's. The listener before this one gives every body in one piece, and the site.
      store: Flower's; what has left it needs no account.
      max_upload_bytes: Of one answer. What a site pushed takes up twice as much at most.
    """

    def __init__(self, app: App, store: FlatStore, max_upload_bytes: int) -> None:
        self._app = app
        self._store = store
        self._max_bytes = max_upload_bytes
        self._max_objects = SMALL_OBJECTS + max_upload_bytes // BYTES_PER_OBJECT
        self._answers: defaultdict[str, list[Answer]] = defaultdict(list)
        self._announcing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] not in (PUSH_MESSAGES, PUSH_OBJECT):
            await self._app(scope, receive, send)
            return
        site, event = scope[SITE], await receive()
        try:
            if scope["path"] == PUSH_OBJECT:
                request = _parsed(PushObjectRequest, event["body"])
                content = taken_out(request)
                self._take(site, request.object_id, len(content))
                await self._app({**scope, PARSED: (request, content)}, after(event, receive), send)
                return
            answer = self._checked(event["body"])
            async with self._announcing[site]:  # until Flower knows it, it is in no store
                self._make_room(site, answer)
                await self._app(scope, after(event, receive), send)
        except Refused as refused:
            log.warning("refused of %s: %s", site, refused)
            await reply(send, refused.status, str(refused))

    def _checked(self, body: bytes) -> Answer:
        answer = answer_of(body, self._max_objects)
        if any(map(self._store.is_message, answer.parts)):
            raise Refused(400, "a message within a message")  # it would outlive its own account
        return answer

    def _make_room(self, site: str, answer: Answer) -> None:
        """Note an answer; the site's oldest ones, which nobody fetched, go."""
        kept = [each for each in self._answers[site] if each.message_id in self._store]
        if all(each.message_id != answer.message_id for each in kept):
            for oldest in kept[: 1 - MAX_ANSWERS]:
                self._store.delete(oldest.message_id)
            kept = [*kept[1 - MAX_ANSWERS :], answer]
        self._answers[site] = kept

    def _take(self, site: str, name: str, num_bytes: int) -> None:
        """Note an object of an answer, before it is stored."""
        found = [a for a in self._answers[site] if name in a.parts or name == a.message_id]
        if not found or found[-1].message_id not in self._store:
            raise Refused(410, "nobody waits for this")
        answer = found[-1]
        answer.num_bytes[name] = num_bytes
        if sum(answer.num_bytes.values()) > self._max_bytes:
            self._store.delete(answer.message_id)
            raise Refused(413, f"an answer of more than {self._max_bytes} bytes")


def let_answers_go_on(state: Any, store: FlatStore) -> None:
    """Let a site announce an answer again, and tell it what of it is missing still.

    Flower deletes a question once the coordinator has fetched the head of its answer. When that
    answer is announced again after the line broke, Flower finds no question to it, and says that
    nothing of it is missing: the site believes that all has arrived, and the coordinator waits.
    """
    first_time = state.store_message_and_object_tree

    def announced(message: Any, tree: Any, session_id: str) -> tuple[bool, list[str]]:
        if message.metadata.reply_to_message_id and store.is_message(tree.object_id):
            return True, state.preregister_object_tree(tree, session_id)
        stored: tuple[bool, list[str]] = first_time(message, tree, session_id)
        return stored

    state.store_message_and_object_tree = announced


def answer_of(body: bytes, max_objects: int) -> Answer:
    """The one answer that a request announces.

    Raises:
      Refused: It announces anything else.
    """
    if len(body) > MAX_ANNOUNCED_BYTES:
        raise Refused(413, "too much for an answer without its objects")
    request = _parsed(PushMessagesRequest, body)
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise Refused(400, "not one answer")
    head, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    if head.src_node_id != request.node.node_id or not ID.fullmatch(head.reply_to_message_id):
        raise Refused(400, "not an answer of this site")
    objects = frozenset(node.object_id for node in iterate_object_tree(tree))
    if len(objects) > max_objects:
        raise Refused(413, f"an answer of more than {max_objects} objects")
    if tree.object_id != head.message_id or not all(map(ID.fullmatch, objects)):
        raise Refused(400, "an answer whose objects are not its own")
    return Answer(head.message_id, objects - {head.message_id})


def _parsed(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError:
        raise Refused(400, "no request of Flower's") from None
