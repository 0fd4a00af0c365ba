"""The grid that reaches the sites through Flower's SuperLink, and what of it may fail.

What a site sends is its own affair until it is put together: an answer that never comes whole, that
is no message, or that would grow when it is unpacked costs that site its turn and nobody else's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from flwr.app import Error, Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectResponse,
)
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from server.superlink.arrival import Arrival, Stalled, Unusable
from server.superlink.shelf import SHELVED, Shelf

HEARTBEAT_S = 20.0  # the coordinator's token lives 60 s without one
RETRY_S = 2  # the SuperLink is on this machine: silent for so long, it is dead
TIMEOUT_S = 30.0  # of one operation on a socket
CAME_TO_NOTHING = ErrorCode.MESSAGE_UNAVAILABLE

Client = TypeVar("Client", bound=ProtobufClient)
log = logging.getLogger("consilium.superlink")


class SuperLinkDied(Exception):  # noqa: N818 - what happened to it
    """Flower's SuperLink does not answer any more; it can be started again."""


@dataclass(frozen=True)
class Connected:
    """A site's connection."""

    node_id: int
    since: str  # when it was made, by the SuperLink's clock


def direct(client: Client) -> Client:
    """A client of Flower's that shows its secrets to nobody but whom it calls.

    Flower's own goes through the proxy that the environment names, and follows redirects.
    """
    client.close()
    client._client = httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)  # noqa: SLF001
    return client


class CoordinatorGrid(HttpGrid):
    """Flower's grid, polled as fast as answers come; a dead SuperLink is an error, not a wait.

    Args:
      address: Of the admin listener.
      token: Of Flower's run.
      interceptors: What every call shows.
      shelf: Where the SuperLink keeps what messages consist of.
      max_upload_bytes: Of one answer, put together.
    """

    def __init__(
        self,
        address: str,
        token: str,
        interceptors: Sequence[Any],
        shelf: Shelf,
        max_upload_bytes: int,
    ) -> None:
        super().__init__(address, insecure=True, token=token)
        self._shown = [*interceptors, RuntimeTokenHttpInterceptor(token)]
        self._shelf = shelf
        self._max_bytes = max_upload_bytes
        self._ends: dict[str, float] = {}  # by question: when nobody waits for its answer any more
        self._arriving: dict[str, Arrival] = {}  # by question
        self._pool = ThreadPoolExecutor(1)
        self.set_run(run_from_proto(self._runtime_client.PullTaskInput(PullTaskInputRequest()).run))
        self._stopped = threading.Event()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See ``HttpGrid``.

        Raises:
          SuperLinkDied: It is gone, and every message with it.
        """
        messages = list(messages)
        with is_alive():
            self._forget_what_ended()
            ids = list(super().push_messages(messages))
        now = time.monotonic()
        pairs = zip(ids, messages, strict=True)
        self._ends |= {sent: now + message.metadata.ttl for sent, message in pairs}
        return ids

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:  # noqa: ARG002
        """As ``HttpGrid`` does; but objects go to the shelf, one at a time."""
        objects: dict[str, InflatableObject] = {}
        request = PushAppMessagesRequest()
        for message in messages:
            request.messages_list.append(message_to_proto(remove_content_from_message(message)))
            request.message_object_trees.append(get_object_tree(message))
            objects |= get_all_nested_objects(message)
        announced = self._runtime_client.PushMessages(request)
        for object_id in announced.objects_to_push:
            self._shelf.put(object_id, objects[object_id].deflate())
        parts = [ObjectTree(object_id=each) for each in announced.objects_to_push]
        answer = self._runtime_client._unary_unary(  # noqa: SLF001 - a call of ours: calls.shelved
            path=SHELVED,
            rpc_method="/flwr.proto.Runtime/PushObject",
            request=ObjectTree(object_id=announced.session_id, children=parts),
            response_type=PushObjectResponse,
        )
        if not answer.stored:
            raise SuperLinkDied("Flower's SuperLink does not keep what it is given")
        return list(announced.message_ids)

    def connected(self) -> dict[str, Connected]:
        """The sites that are connected, by name.

        Raises:
          SuperLinkDied: It is gone, and every message with it.
        """
        with is_alive():
            nodes = self.get_nodes()
        return {node.name: Connected(node.node_id, node.last_activated_at) for node in nodes}

    def check_room(self) -> None:
        """See whether a site's answer could be kept; without room all would wait for the deadline.

        Raises:
          OSError: The disk is full.
        """
        self._shelf.check_room()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that are whole by now; it waits for none. Others come with the next call.

        Each is put together when it is asked for, so that only one needs to be in memory. One that
        cannot be used is an error message from its site; one that does not come whole has the code
        ``CAME_TO_NOTHING``.

        Raises:
          SuperLinkDied: It is gone, and every message with it.
        """
        with is_alive():
            self._look_for([each for each in message_ids if each not in self._arriving])
            yield from self._whole()

    def idle_s(self, question: str) -> float | None:
        """Since when nothing new came of the answer to a question; None before it is announced."""
        arrival = self._arriving.get(question)
        return None if arrival is None else arrival.idle_s()

    def num_bytes(self) -> dict[str, int]:
        """How much came of each answer that is on its way, by question."""
        return {question: arrival.num_bytes() for question, arrival in self._arriving.items()}

    def forget(self, questions: Iterable[str]) -> None:
        """Take questions back; an answer to one is refused from now on.

        Raises:
          SuperLinkDied: It is gone, and every message with it.
        """
        with is_alive():
            for question in questions:
                self._ends.pop(question, None)
                self._delete(question)
                if arrival := self._arriving.pop(question, None):
                    self._delete(arrival.message_id)

    def abandon(self) -> None:
        """Let go of a SuperLink that died."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.close()

    def finish(self) -> None:
        """End Flower's run, so that sites stop waiting for it."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            self._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed"))
        self.close()

    def _look_for(self, questions: Sequence[str]) -> None:
        """Note what is announced as an answer to these; its objects may still be on their way."""
        if not questions:
            return
        request = PullAppMessagesRequest(message_ids=questions)
        found = self._runtime_client.PullMessages(request)
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            question = head.metadata.reply_to_message_id
            ends = self._ends.pop(question, 0.0)
            self._arriving[question] = Arrival.of(metadata_from_proto(head.metadata), tree, ends)
            self._pool.submit(self._delete, question)  # a site may never have confirmed it

    def _whole(self) -> Iterator[Message]:
        """Look at every answer in turn: one that is slow holds up no other."""
        for question, arrival in list(self._arriving.items()):
            if question not in self._arriving:
                continue  # it was forgotten since
            try:
                message = arrival.advance(self._shelf, self._is_kept, self._max_bytes)
            except (Stalled, Unusable) as error:
                log.error("an answer of node %d: %s", arrival.node, error)  # noqa: TRY400
                code = CAME_TO_NOTHING if isinstance(error, Stalled) else ErrorCode.UNKNOWN
                message = make_message(arrival.metadata, error=Error(code))
            if message is not None:
                del self._arriving[question]
                self._delete(arrival.message_id)
                yield message
                del message  # the next answer is put together where this one was

    def _is_kept(self, object_id: str) -> bool:
        """Whether the SuperLink has an object, or waits for it still."""
        request = PullObjectRequest(node=self.node, run_id=self.run.run_id, object_id=object_id)
        return bool(self._runtime_client.PullObject(request).object_found)

    def _forget_what_ended(self) -> None:
        """Delete questions that were not answered: a site that never fetches one fills no store."""
        now = time.monotonic()
        for question in [each for each, ends in self._ends.items() if ends < now]:
            del self._ends[question]
            self._delete(question)

    def _delete(self, message_id: str) -> None:
        request = ConfirmMessageReceivedRequest(
            node=self.node, run_id=self.run.run_id, message_object_id=message_id
        )
        self._runtime_client.ConfirmMessageReceived(request)

    def _connect(self) -> None:
        self._client = direct(
            RuntimeHttpClient(
                f"http://{self._addr}",
                interceptors=self._shown,
                retry_invoker=RetryInvoker(
                    lambda: exponential(base_delay=0.05, max_delay=1),
                    httpx.TransportError,
                    max_tries=None,
                    max_time=RETRY_S,
                ),
            )
        )

    def _disconnect(self) -> None:
        """As ``HttpGrid`` does, without a line on the screen."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _send_heartbeats(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                self._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: closed meanwhile
                if not self._stopped.is_set():
                    log.warning("no heartbeat reached the SuperLink: %s", type(error).__name__)


@contextlib.contextmanager
def is_alive() -> Iterator[None]:
    """A call of the SuperLink that fails means that it died.

    Raises:
      SuperLinkDied: It failed.
    """
    try:
        yield
    except (httpx.TransportError, httpx.HTTPStatusError) as error:
        raise SuperLinkDied(
            f"Flower's SuperLink does not answer ({type(error).__name__}): see superlink.log in "
            "the run folder; fl-server --resume goes on from the last round"
        ) from None
