"""What sites push is counted, and what nobody fetches goes."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node

from server.superlink.listener import SITE
from server.superlink.object_store import FlatStore
from server.superlink.shelf import Shelf
from server.superlink.uploads import PUSH_MESSAGES, PUSH_OBJECT, Uploads

RUN, NODE = 3, 7
MOST = 1000  # bytes of one answer


class Stored:
    """In Flower's place: stores what it is given."""

    def __init__(self, folder: Path) -> None:
        self.store = store_in(folder)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if scope["path"] == PUSH_MESSAGES:
            (tree,) = PushMessagesRequest.FromString(body).message_object_trees
            self.store.preregister(RUN, tree)
        else:
            request = PushObjectRequest.FromString(body)
            self.store.put(request.object_id, request.object_content)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def num_bytes(self) -> int:
        return sum(self.store.shelf.num_bytes(each) or 0 for each in self.store.store)


def store_in(folder: Path) -> FlatStore:
    shelf = Shelf(folder / "objects")
    shelf.clear()
    return FlatStore(shelf)


@pytest.fixture
def flower(tmp_path: Path) -> Stored:
    return Stored(tmp_path)


@pytest.fixture
def uploads(flower: Stored) -> Uploads:
    return Uploads(flower, flower.store, MOST)


def post(uploads: Uploads, path: str, request: Any, site: str = "site-1") -> int:
    """The HTTP status."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": request.SerializeToString()}

    async def send(event: Any) -> None:
        sent.append(event)

    scope = {"type": "http", "path": path, SITE: site}
    asyncio.run(uploads(scope, receive, send))
    return int(sent[0]["status"])


def content(word: str, num_bytes: int = 300) -> bytes:
    body = word.encode().ljust(num_bytes, b".")
    return b"ArrayChunk  %d\x00" % len(body) + body


def id_of(word: str) -> str:
    return hashlib.sha256(content(word)).hexdigest()


def announce(uploads: Uploads, answer: str, *parts: str, site: str = "site-1") -> int:
    tree = ObjectTree(object_id=id_of(answer))
    tree.children.extend(ObjectTree(object_id=id_of(part)) for part in parts)
    head = Metadata(
        message_id=id_of(answer), src_node_id=NODE, reply_to_message_id=id_of("a question")
    )
    request = PushMessagesRequest(
        node=Node(node_id=NODE),
        messages_list=[Message(metadata=head)],
        message_object_trees=[tree],
    )
    return post(uploads, PUSH_MESSAGES, request, site)


def push(uploads: Uploads, word: str, site: str = "site-1") -> int:
    request = PushObjectRequest(object_id=id_of(word), object_content=content(word))
    return post(uploads, PUSH_OBJECT, request, site)


def test_a_third_answer_takes_the_place_of_the_oldest(flower: Stored, uploads: Uploads) -> None:
    for number in range(10):
        assert announce(uploads, f"answer {number}", f"part {number}") == 200
        assert push(uploads, f"answer {number}") == 200
        assert push(uploads, f"part {number}") == 200
    kept = {id_of(f"{what} {number}") for what in ("answer", "part") for number in (8, 9)}
    assert set(flower.store.store) == kept


def test_sites_do_not_share_an_account(flower: Stored, uploads: Uploads) -> None:
    for site in ("site-1", "site-2", "site-3"):
        assert announce(uploads, site, "a part", site=site) == 200
        assert push(uploads, site, site=site) == 200
    assert len(flower.store) == 4


def test_an_answer_that_grows_too_large_is_deleted_whole(flower: Stored, uploads: Uploads) -> None:
    assert announce(uploads, "answer", "one", "two", "three") == 200
    statuses = [push(uploads, word) for word in ("one", "two", "three", "answer")]
    assert statuses == [200, 200, 200, 413]
    assert len(flower.store) == 0
    assert push(uploads, "answer") == 410


def test_an_object_pushed_again_counts_once(uploads: Uploads) -> None:
    assert announce(uploads, "answer", "one") == 200
    assert [push(uploads, "one") for _ in range(5)] == [200] * 5


def test_an_answer_announced_again_keeps_its_objects_and_its_account(
    flower: Stored, uploads: Uploads
) -> None:
    """A connection that broke is taken up again; a hostile site names other objects every time."""
    assert announce(uploads, "answer", "one", "two", "three") == 200
    assert [push(uploads, word) for word in ("one", "two", "three")] == [200] * 3
    for number in range(5):
        assert announce(uploads, "answer", f"another {number}") == 200
        assert push(uploads, f"another {number}") == 410
    assert len(flower.store) == 4
    assert push(uploads, "answer") == 413


def test_an_answer_cannot_hold_another_beyond_its_time(flower: Stored, uploads: Uploads) -> None:
    assert announce(uploads, "answer 0", "part 0") == 200
    assert push(uploads, "part 0") == 200
    assert announce(uploads, "answer 1", "answer 0") == 400
    flower.store.delete(id_of("answer 0"))  # it was fetched
    assert len(flower.store) == 0


def test_what_was_fetched_is_pushed_no_more(flower: Stored, uploads: Uploads) -> None:
    assert announce(uploads, "answer", "one") == 200
    flower.store.delete(id_of("answer"))
    assert push(uploads, "one") == 410
    assert announce(uploads, "answer", "one") == 200  # Flower decides whether it is still due


def test_an_object_that_two_answers_share_stays_until_both_are_gone(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for answer in ("one", "two"):
        children = [ObjectTree(object_id=id_of("shared"))]
        store.preregister(RUN, ObjectTree(object_id=id_of(answer), children=children))
    store.put(id_of("shared"), content("shared"))
    store.delete(id_of("shared"))  # which a site may ask for
    store.delete(id_of("one"))
    assert store.get(id_of("shared"))
    assert store.shelf.num_bytes(id_of("shared")) == len(content("shared"))
    store.delete(id_of("two"))
    assert store.shelf.num_bytes(id_of("shared")) is None
    assert len(store) == 0
