"""Objects in files: whole or not there, nobody else's, and none in memory."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException
from flwr.app import Array
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from small_disk import small_disk

from server.superlink.calls import PART_BYTES, Calls, Sent
from server.superlink.object_store import ON_SHELF, FlatStore
from server.superlink.shelf import PIECE_BYTES, Shelf

RUN = 3
CONTENT = Array("uint8", (0,), "raw", b"").deflate()  # of an object of Flower's
OBJECT = hashlib.sha256(CONTENT).hexdigest()
MESSAGE = "ab" * 32


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    made = Shelf(tmp_path / "objects")
    made.clear()
    return made


@pytest.fixture
def store(shelf: Shelf) -> FlatStore:
    return FlatStore(shelf)


def files(shelf: Shelf) -> list[Path]:
    return list(shelf._folder.iterdir())


def content_of(shelf: Shelf, object_id: str) -> bytes:
    return shelf.open(object_id)[:]


def announce(store: FlatStore) -> None:
    store.preregister(RUN, ObjectTree(object_id=MESSAGE, children=[ObjectTree(object_id=OBJECT)]))


def test_what_was_put_is_there_and_what_was_deleted_is_not(shelf: Shelf) -> None:
    assert shelf.num_bytes(OBJECT) is None
    with pytest.raises(FileNotFoundError):
        shelf.open(OBJECT)
    shelf.put(OBJECT, CONTENT)
    shelf.put(OBJECT, CONTENT)  # two sites may send the same
    assert shelf.num_bytes(OBJECT) == len(CONTENT)
    assert content_of(shelf, OBJECT) == CONTENT
    opened = shelf.open(OBJECT)
    shelf.delete(OBJECT)
    shelf.delete(OBJECT)
    assert files(shelf) == []
    assert opened[:] == CONTENT  # whoever reads it reads on


def test_nobody_else_may_look_at_the_shelf(shelf: Shelf) -> None:
    shelf.put(OBJECT, CONTENT)
    for path in (shelf._folder, *files(shelf)):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_what_a_killed_process_left_is_gone_at_the_next_start(shelf: Shelf) -> None:
    shelf.put(OBJECT, CONTENT)
    (shelf._folder / "half").write_bytes(b"written")
    shelf.clear()
    assert files(shelf) == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "A" * 64, "a" * 63, "", "a" * 64 + "\n"])
def test_an_object_has_the_name_of_a_hash(shelf: Shelf, name: str) -> None:
    for use in (shelf.open, shelf.delete, shelf.num_bytes, lambda key: shelf.put(key, b"x")):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            use(name)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        shelf = Shelf(disk.folder)
        disk.fill(leave=8 << 10)
        with pytest.raises(OSError, match="No space left"):
            shelf.put(OBJECT, bytes(32 << 10))
        assert shelf.num_bytes(OBJECT) is None
        assert [path.name for path in files(shelf)] == ["ballast"]
        disk.empty()
        shelf.put(OBJECT, bytes(32 << 10))


def test_the_store_holds_no_bytes(store: FlatStore) -> None:
    announce(store)
    assert store.get(OBJECT) == b""  # announced, and on its way
    store.put(OBJECT, CONTENT)
    assert store.get(OBJECT) == ON_SHELF
    assert content_of(store.shelf, OBJECT) == CONTENT
    assert not any(entry.content for entry in store.store.values())
    store.delete(MESSAGE)
    assert store.get(OBJECT) is None
    assert files(store.shelf) == []


def test_only_what_its_id_stands_for_is_received(store: FlatStore) -> None:
    announce(store)
    for content in (b"", ON_SHELF, CONTENT + b"more"):
        with pytest.raises(ValueError, match="does not match content hash"):
            store.receive(OBJECT, content)
    assert files(store.shelf) == []


def test_what_was_not_received_cannot_be_put(store: FlatStore) -> None:
    announce(store)
    with pytest.raises(ValueError, match="not received"):
        store.put(OBJECT, ON_SHELF)
    assert store.get(OBJECT) == b""


def test_what_nobody_announced_does_not_stay(store: FlatStore) -> None:
    store.receive(OBJECT, CONTENT)
    with pytest.raises(Exception, match="not pre-registered"):
        store.put(OBJECT, ON_SHELF)
    assert files(store.shelf) == []
    store.receive(OBJECT, CONTENT)  # and Flower refused it
    store.drop_unwanted(OBJECT)
    assert files(store.shelf) == []


def test_whoever_sends_to_a_full_disk_is_told_to_try_again(
    store: FlatStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "objects")

    monkeypatch.setattr(Shelf, "put", full)
    calls = Calls(app=None, state=None, store=store)  # type: ignore[arg-type]
    with pytest.raises(HTTPException) as refused:
        asyncio.run(calls._has_received(OBJECT, CONTENT))
    assert refused.value.status_code == 503
    assert "cannot be kept" in caplog.text
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("num_bytes", [1, 100, PART_BYTES - 9, PART_BYTES, 3 * PART_BYTES + 5])
def test_an_object_is_sent_piece_by_piece_as_flower_would_send_it(
    shelf: Shelf, num_bytes: int
) -> None:
    content = os.urandom(num_bytes)
    shelf.put(OBJECT, content)
    events: list[dict[str, Any]] = []

    async def send(event: Any) -> None:
        events.append(event)

    store = FlatStore(shelf)
    calls = Calls(app=None, state=None, store=store)  # type: ignore[arg-type]
    response = calls._from_shelf(OBJECT)
    assert isinstance(response, Sent)
    asyncio.run(response({}, lambda: None, send))  # type: ignore[arg-type, return-value]
    start, *bodies = events
    body = b"".join(event["body"] for event in bodies)
    assert dict(start["headers"])[b"content-length"] == b"%d" % len(body)
    assert [event.get("more_body", False) for event in bodies] == [True] * (len(bodies) - 1) + [
        False
    ]
    assert all(len(event["body"]) <= PART_BYTES for event in bodies)
    expected = PullObjectResponse(object_found=True, object_available=True, object_content=content)
    assert PullObjectResponse.FromString(body) == expected


def test_an_object_that_was_deleted_meanwhile_is_not_found(store: FlatStore) -> None:
    calls = Calls(app=None, state=None, store=store)  # type: ignore[arg-type]
    answer = calls._from_shelf(OBJECT)
    assert PullObjectResponse.FromString(answer.body) == PullObjectResponse(object_found=False)


def test_a_full_disk_is_seen_before_a_piece_comes(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 * PIECE_BYTES) as disk:
        shelf = Shelf(disk.folder / "objects")
        shelf.clear()
        shelf.check_room()
        disk.fill(PIECE_BYTES // 2)
        with pytest.raises(OSError, match="objects") as caught:
            shelf.check_room()
        assert caught.value.errno == errno.ENOSPC
        disk.empty()
        shelf.check_room()
