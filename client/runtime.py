"""The warm site process: one connection, one loop, the installed code, nothing pushed.

The only file at a site that knows Flower's insides. It calls the Fleet API itself instead of
starting Flower's SuperNode, which fetches the coordinator's code and starts a process per message.
Only outbound connections are made. Whatever happens to the connection, it is tried again for ever.
"""

from __future__ import annotations

import contextlib
import logging
import random
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
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
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.config import SiteConfig, deployed
from common.identity import Identity

NODE_ID = "node-id"  # in the state folder
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0  # between two questions "anything for me?"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0  # between two attempts to connect
HEARTBEAT_S = 20.0  # Flower counts a silent site as gone after twice 30 s
TIMEOUT_S = 30.0  # of one operation on a socket
PASSING = (408, 429, 502, 503, 504)  # HTTP statuses after which the same may be tried again
LEASE_HELD = 412  # the coordinator still counts on this site's process of before
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.01, 0.5

Reply = Callable[[Message], Message]
log = logging.getLogger("consilium.site")


class Disconnected(Exception):  # noqa: N818 - a state, not a defect
    """The connection ended; the message says what is known about why."""


class Withdrawn(Disconnected):
    """The coordinator wants no answer to this message any more: its run of Flower's is over."""


@dataclass(frozen=True)
class Place:
    """Where the coordinator is, how it is known, and who calls."""

    address: str  # host:port
    ca: Path
    certificate: Path
    key: Path
    node_file: Path  # node id of the last connection: a killed process takes it up again

    @classmethod
    def of(cls, config: SiteConfig) -> Self:
        """As the site file says.

        Raises:
          ConfigError: It lacks what a deployment needs.
        """
        files = deployed(config)
        return cls(
            address=config.coordinator or "",  # deployed() has looked
            ca=files.ca,
            certificate=files.cert,
            key=files.key,
            node_file=config.state_dir / NODE_ID,
        )

    def identity(self) -> Identity:
        """Read anew for every connection: a renewed certificate needs no restart."""
        return Identity.load(self.certificate, self.key)

    def tls(self) -> ssl.SSLContext:
        """TLS 1.3; the coordinator shows a certificate of this CA, and this site its own."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(self.ca)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def stamp(self) -> int:
        """Changes when the certificate is renewed."""
        return self.certificate.stat().st_mtime_ns


class Connection:
    """One connection to the coordinator, from its activation to its end."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stamp = place.stamp()
        identity = place.identity()
        self._public_key = public_key_to_bytes(identity.key.public_key())
        self._client = FleetHttpClient(
            f"https://{place.address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(identity.key, identity.key.public_key()),
            ],
            verify=place.tls(),
            timeout=TIMEOUT_S,
        )
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
        self._place.node_file.write_text(f"{self._node.node_id}\n")
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave in order where that is possible."""
        self._stopped.set()
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    @property
    def is_outdated(self) -> bool:
        """Whether the certificate was renewed since this connection began."""
        return self._place.stamp() != self._stamp

    def pull(self) -> Message | None:
        """The next message for this site, whole; None when there is none.

        Raises:
          Disconnected: The coordinator cannot be reached, or does not know this site.
        """
        with _as_disconnected():
            found = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not found.messages_list:
                return None
            head, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
            run_id, whole = head.metadata.run_id, head.metadata.message_id
            contents = pull_objects(
                [node.object_id for node in iterate_object_tree(tree)],
                make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id),
                initial_backoff=FIRST_BACKOFF_S,
                backoff_cap=LONGEST_BACKOFF_S,
            )
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=self._node, run_id=run_id, message_object_id=whole
                )
            )
        message = inflate_object_from_contents(whole, contents)
        if not isinstance(message, Message):
            raise Disconnected("what came is no message of Flower's")
        message.metadata.__dict__["_message_id"] = whole
        return message

    def push(self, reply: Message) -> None:
        """Send a reply, objects and all.

        Raises:
          Disconnected: It did not arrive whole.
        """
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            with _as_disconnected():
                answer = self._client.PushMessages(
                    PushMessagesRequest(
                        node=self._node,
                        messages_list=[message_to_proto(remove_content_from_message(reply))],
                        message_object_trees=[tree],
                        clientapp_runtime_list=[0.0],
                    )
                )
                push_objects(
                    objects,
                    make_push_object_fn_protobuf(
                        self._client.PushObject,
                        self._node,
                        reply.metadata.run_id,
                        answer.session_id,
                    ),
                    object_ids_to_push=set(answer.objects_to_push),
                )

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

    def _heartbeat(self, node: Node) -> None:
        self._client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        )

    def _send_heartbeats(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            with contextlib.suppress(httpx.HTTPError, RuntimeError):
                self._heartbeat(self._node)


def serve(place: Place, reply: Reply, stopped: threading.Event) -> None:
    """Answer the coordinator's messages until ``stopped`` is set; connect again for ever.

    Args:
      place: Where the coordinator is.
      reply: Answers one message; it never raises.
      stopped: Set it to end, after the message that is being answered.
    """
    waits, told, unsent = _growing(FIRST_WAIT_S, LONGEST_WAIT_S), "", Unsent()
    while not stopped.is_set():
        try:
            with Connection(place) as connection:
                log.info("connected to %s", place.address)
                waits, told = _growing(FIRST_WAIT_S, LONGEST_WAIT_S), ""
                _answer_all(connection, reply, unsent, stopped)
        except Disconnected as error:
            if str(error) != told:  # once, not every five seconds of a night
                log.warning("%s: %s; trying again for ever", place.address, error)
                told = str(error)
            stopped.wait(next(waits))


@dataclass
class Unsent:
    """The reply that the connection broke under; the next connection sends it first."""

    reply: Message | None = None

    def send(self, connection: Connection) -> None:
        """Send what waits, if anything does."""
        if self.reply is not None:
            with contextlib.suppress(Withdrawn):
                connection.push(self.reply)
            self.reply = None


def _answer_all(
    connection: Connection, reply: Reply, unsent: Unsent, stopped: threading.Event
) -> None:
    unsent.send(connection)
    pauses = _growing(FIRST_PAUSE_S, LONGEST_PAUSE_S)
    while not stopped.is_set():
        message = connection.pull()
        if message is not None:
            unsent.reply = reply(message)
            unsent.send(connection)
            pauses = _growing(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        elif connection.is_outdated:
            log.info("the certificate was renewed: connecting with the new one")
            return
        else:
            stopped.wait(next(pauses))


def _growing(first: float, longest: float) -> Iterator[float]:
    """Pauses that grow by half, with some chance in them: sites must not ask in step."""
    pause = first
    while True:
        yield pause * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
        pause = min(longest, pause * 1.5)


@contextlib.contextmanager
def _as_disconnected() -> Iterator[None]:
    """Whatever goes wrong on the way becomes one sentence."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        kind = Disconnected if error.response.status_code in PASSING else Withdrawn
        raise kind(_meaning(error.response.status_code)) from None
    except httpx.TransportError as error:
        raise Disconnected(f"cannot be reached ({error or type(error).__name__})") from None
    except (ObjectPullError, ObjectPushError):
        raise Withdrawn("a message was withdrawn while it was on its way") from None
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise Disconnected(f"an answer that cannot be used ({type(error).__name__})") from None


def _meaning(status: int) -> str:
    meanings = {
        401: "the coordinator does not know this node: a new start of it, or a clock that is wrong "
        "(more than 5 s ahead); fl-client check tells",
        403: "the coordinator refuses this site's certificate (not a member of the study, ended, "
        "or revoked); fl-client check tells",
        404: "this is no coordinator of Consilium",
        LEASE_HELD: "the coordinator still counts on a process of this site that was killed",
    }
    return meanings.get(status, f"the coordinator answered with HTTP status {status}")
