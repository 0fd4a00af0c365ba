"""The warm site process: one connection, one loop, the installed code, nothing pushed.

The only file at a site that knows Flower's insides. It calls the Fleet API itself instead of
starting Flower's SuperNode, which fetches the coordinator's code and starts a process per message.
Only outbound connections are made. Whatever happens to the connection, it is tried again for ever.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Self

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.contact import Contact, growing
from client.finding import one_line
from client.place import TIMEOUT_S, Place, open_line
from client.transfer import PASSING, Meter, NotKept, persistently, send
from common.errors import FederationError
from common.identity import Identity
from common.memory import on_disk
from common.objects import num_bytes_together, put_together

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0  # between two questions "anything for me?"
HEARTBEAT_S = 20.0  # Flower counts a silent site as gone after twice 30 s
MISSED_S = 5.0  # until another one, where one did not arrive
REDIRECTS = range(300, 400)  # never followed: they would choose whom this machine calls
MAX_OBJECTS = 4096  # of one message; 2 GiB are some 430 pieces of 5 MB
MAX_MESSAGE_BYTES = 2 << 30  # as common.wire.MAX_ARRAY_BYTES: half a billion weights
CERTAIN = (400, 410, 413)  # nobody waits for this, or never will for its like
MOST_REFUSED = 3
LEASE_HELD = 412  # the coordinator still counts on this site's process of before
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.01, 0.5

Reply = Callable[[Message], Message]
log = logging.getLogger("consilium.site")


class Disconnected(Exception):  # noqa: N818 - a state, not a defect
    """The connection ended; the message says what is known about why."""


class Withdrawn(Disconnected):
    """The coordinator seems to want no answer to this message any more."""

    def __init__(self, text: str, *, is_certain: bool = False) -> None:
        """Say what happened, and whether the coordinator said that nobody waits."""
        super().__init__(text)
        self.is_certain = is_certain


class Connection:
    """One connection to the coordinator, from its activation to its end."""

    def __init__(self, place: Place) -> None:
        """Read this site's files; nobody is called yet.

        Raises:
          Disconnected: They cannot be used now; a new certificate may be on its way.
        """
        self._place = place
        self._stamp = place.stamp()
        with _as_disconnected():
            identity = place.identity()
            self._client = _fleet_client(place, identity)
        self._public_key = public_key_to_bytes(identity.key.public_key())
        self._node = Node()
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        """Activate this site's node.

        Raises:
          Disconnected: With what went wrong, in a sentence.
        """
        try:
            with _as_disconnected():
                self._node = Node(node_id=self._activate())
        except Disconnected:
            self._client.close()
            raise
        self._keep_node()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave in order where that is possible."""
        self._stopped.set()
        with contextlib.suppress(Disconnected), _as_disconnected():
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    @property
    def is_outdated(self) -> bool:
        """Whether the certificate was renewed since this connection began."""
        return self._place.has_newer_than(self._stamp)

    def pull(self) -> Message | None:
        """The next message for this site, whole; None when there is none.

        Raises:
          Disconnected: The coordinator cannot be reached, or does not know this site.
        """
        with _as_disconnected():
            found = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not found.messages_list:
                return None
            head = message_from_proto(found.messages_list[0])
            ids = [node.object_id for node in iterate_object_tree(found.message_object_trees[0])]
            if len(ids) > MAX_OBJECTS:
                raise Disconnected(
                    f"a message of {len(ids)} objects, at most {MAX_OBJECTS} are taken"
                )
            return self._taken(head.metadata.run_id, head.metadata.message_id, ids)

    def _taken(self, run_id: int, whole: str, ids: list[str]) -> Message:
        """A message put together from its objects."""
        fetch = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id)
        with Meter("fetching", "fetched") as meter:
            meter.expect(len(ids))
            contents = pull_objects(
                ids,
                partial(self._fetched, fetch, meter),
                initial_backoff=FIRST_BACKOFF_S,
                backoff_cap=LONGEST_BACKOFF_S,
            )
        done = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=whole
        )
        persistently(partial(self._client.ConfirmMessageReceived, done), self._stopped)
        if num_bytes_together(contents) > MAX_MESSAGE_BYTES:
            raise Disconnected(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        message = put_together(whole, contents, partial(on_disk, self._place.node_file.parent))
        if not isinstance(message, Message):
            raise Disconnected("what came is no message of Flower's")
        message.metadata.__dict__["_message_id"] = whole
        return message

    def _fetched(self, fetch: Callable[[str], bytes], meter: Meter, object_id: str) -> bytes:
        content = persistently(partial(fetch, object_id), self._stopped)
        if meter.moved(len(content)) > MAX_MESSAGE_BYTES:  # all objects so far
            raise Disconnected(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        return content

    def push(self, reply: Message) -> None:
        """Send a reply: of its objects those that the coordinator lacks.

        Raises:
          Disconnected: It did not arrive whole.
        """
        with _as_disconnected(), no_object_id_recompute():
            send(_Outgoing(self._client, self._node, reply), self._stopped)

    def _activate(self) -> int:
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        try:
            return self._client.ActivateNode(request).node_id
        except httpx.HTTPStatusError as error:
            node_id = self._last_node()
            if error.response.status_code != LEASE_HELD or node_id is None:
                raise  # without its node id, the lease of a killed process has to end by itself
        # A process of this site was killed a moment ago and still counts as connected. Leaving in
        # its place makes the coordinator send again what that process had taken.
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        return self._client.ActivateNode(request).node_id

    def _last_node(self) -> int | None:
        try:
            return int(self._place.node_file.read_text())
        except (OSError, ValueError):
            return None

    def _keep_node(self) -> None:
        try:
            self._place.node_file.write_text(f"{self._node.node_id}\n")
        except OSError as error:
            # It only spares a killed process the minute until the coordinator has forgotten it.
            log.warning("%s: %s", self._place.node_file, error.strerror or type(error).__name__)

    def _send_heartbeats(self) -> None:
        beat = SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        pause_s = HEARTBEAT_S
        while not self._stopped.wait(pause_s):
            pause_s = HEARTBEAT_S
            try:
                with _as_disconnected():
                    self._client.SendNodeHeartbeat(beat)
            except Disconnected as error:
                pause_s = min(HEARTBEAT_S, MISSED_S)
                if not self._stopped.is_set():
                    log.warning("a sign of life did not arrive: %s", error)


class _Outgoing:
    """A reply on its way; see ``client.transfer.Outgoing``."""

    def __init__(self, client: FleetHttpClient, node: Node, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self._client, self._node, self._run_id = client, node, reply.metadata.run_id
        self._objects = get_all_nested_objects(reply)
        self._request = PushMessagesRequest(
            node=node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[0.0],
        )

    def announce(self) -> dict[str, int]:
        answer = self._client.PushMessages(self._request)
        self._push = make_push_object_fn_protobuf(
            self._client.PushObject, self._node, self._run_id, answer.session_id
        )
        lacking = set(answer.objects_to_push)
        objects = self._objects.items()
        return {name: _num_bytes(each) for name, each in objects if name in lacking}

    def send(self, object_id: str) -> None:
        try:
            self._push(object_id, self._objects[object_id].deflate())
        except ObjectPushError:
            raise NotKept from None


def _num_bytes(each: object) -> int:
    """Of a piece of an array; all others are small."""
    return each.data.nbytes if isinstance(each, ArrayChunk) else 0


def _fleet_client(place: Place, identity: Identity) -> FleetHttpClient:
    """Flower's calls over a line of our own: Flower's follows redirects and unpacks what comes."""
    line = open_line(place)
    client = FleetHttpClient(
        f"https://{place.address}",
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(identity.key, identity.key.public_key()),
            _LetGo(),
        ],
        verify=place.tls(),
        timeout=TIMEOUT_S,
    )
    client._client.close()  # noqa: SLF001 - the contract test looks for it
    client._client = line  # noqa: SLF001
    return client


class _LetGo:
    """Frees every answer at once: httpx's answers hold themselves until somebody collects them."""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        response = call_next(context)
        response.stream = httpx.ByteStream(b"")
        return response


def serve(
    place: Place,
    reply: Reply,
    stopped: threading.Event,
    pause_s: Callable[[], float] = lambda: 0.0,
) -> None:
    """Answer the coordinator's messages until ``stopped`` is set; connect again for ever.

    Args:
      place: Where the coordinator is.
      reply: Answers one message; it never raises.
      stopped: Set it to end, after the message that is being answered.
      pause_s: Asked after every answer: how long to wait before the next message is taken.
    """
    contact, unsent = Contact(place.address), Unsent()
    while not stopped.is_set():
        try:
            with Connection(place) as connection:
                contact.made()
                _answer_all(connection, reply, unsent, stopped, pause_s)
            continue
        except Disconnected as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - nothing that a peer does may end a site
            reason = f"a defect ({type(error).__name__})"  # its text may be the peer's
        stopped.wait(contact.lost(reason))


@dataclass
class Unsent:
    """The reply that the connection broke under; the next connection sends it first."""

    reply: Message | None = None
    num_refused: int = 0  # in a row, for a reason that nobody knows

    def send(self, connection: Connection, done: str = "") -> None:
        """Send what waits, if anything does; ``done`` is for the log."""
        if self.reply is None:
            return
        try:
            connection.push(self.reply)
            self.num_refused = 0
            if done:
                log.info(done)
        except Withdrawn as error:
            # Were somebody waiting all the same, the next connection would make them ask again:
            # a few times, since every answer takes the line's time.
            self.num_refused += not error.is_certain
            if not error.is_certain and self.num_refused < MOST_REFUSED:
                self.reply = None
                raise
            log.info("nobody waits any more for what this site answered")
        self.reply = None


def _answer_all(
    connection: Connection,
    reply: Reply,
    unsent: Unsent,
    stopped: threading.Event,
    pause_s: Callable[[], float],
) -> None:
    unsent.send(connection, "the answer that the connection broke under has arrived")
    pauses = growing(FIRST_PAUSE_S, LONGEST_PAUSE_S)
    while not stopped.is_set():
        message = connection.pull()
        if message is not None:
            unsent.reply = reply(message)
            del message  # its model: the answer may be as large
            unsent.send(connection)
            stopped.wait(pause_s())
            pauses = growing(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        elif connection.is_outdated:
            log.info("the certificate was renewed: connecting with the new one")
            return
        else:
            stopped.wait(next(pauses))


@contextlib.contextmanager
def _as_disconnected() -> Iterator[None]:
    """Whatever goes wrong on the way becomes one sentence, without a word of the peer's."""
    try:
        yield
    except Disconnected:
        raise
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in PASSING or status in REDIRECTS:
            raise Disconnected(_meaning(status)) from None
        raise Withdrawn(_meaning(status), is_certain=status in CERTAIN) from None
    except (httpx.NetworkError, httpx.TimeoutException, httpx.ProxyError) as error:
        text = one_line(str(error)) or type(error).__name__  # of this machine or its proxy
        raise Disconnected(f"cannot be reached ({text})") from None
    except ObjectPullError:
        raise Withdrawn("a message was withdrawn while it was on its way") from None
    except NotKept:
        raise Disconnected("the coordinator does not keep what arrives") from None
    except FederationError as error:
        raise Disconnected(one_line(str(error))) from None
    except Exception as error:  # noqa: BLE001 - httpx's, protobuf's, Flower's: any of them
        raise Disconnected(f"an answer that cannot be used ({type(error).__name__})") from None


def _meaning(status: int) -> str:
    if status in REDIRECTS:
        return f"HTTP status {status}: it sends this site elsewhere, which is not followed"
    meanings = {
        401: "the coordinator does not know this node: a new start of it, or a clock that is wrong "
        "(more than 5 s ahead); fl-client check tells",
        403: "the coordinator refuses this site's certificate (not a member of the study, ended, "
        "or revoked); fl-client check tells",
        404: "this is no coordinator of Consilium",
        LEASE_HELD: "the coordinator still counts on a process of this site that was killed",
    }
    return meanings.get(status, f"the coordinator answered with HTTP status {status}")
