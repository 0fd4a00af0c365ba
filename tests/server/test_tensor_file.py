"""Arrays straight to disk: the library's own bytes, and no copy in memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from common.errors import ConfigError
from server.tensor_file import read_tensors, write_tensors

RNG = np.random.default_rng(1)
CASES: dict[str, tuple[dict[str, Any], dict[str, str] | None]] = {
    "a model": (
        {
            "layer.weight": RNG.random((3, 4), np.float32),
            "layer.bias": RNG.random(3, np.float32),
            "a": np.array(RNG.random(), np.float32),
        },
        None,
    ),
    "a masked sum, whose entries are of two widths": (
        {
            "values": np.arange(5, dtype=np.uint32),
            "tail": np.arange(7, dtype=np.uint64),
            "a": np.ones(3, np.float32),
        },
        {"collected": json.dumps({"missing": {"st-olav": "silent"}})},
    ),
    "no arrays, and text that has to be escaped": ({}, {"state": '"é\u2028\n\\\x01\x7f/'}),
    "nothing": ({}, None),
    "an empty array and a strange name": ({'é"\n': np.empty((0, 5), np.float32)}, None),
    "parts of a larger array": ({"column": RNG.random((4, 3), np.float32)[:, 1]}, None),
}


@pytest.mark.parametrize("title", CASES)
def test_the_file_is_the_librarys_byte_for_byte(title: str, tmp_path: Path) -> None:
    tensors, metadata = CASES[title]
    file = tmp_path / "some.safetensors"
    write_tensors(file, tensors, metadata=metadata)
    dense = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    assert file.read_bytes() == save(dense, metadata=metadata)
    for name, tensor in load_file(file).items():
        assert np.array_equal(tensor, tensors[name])


def test_a_model_is_written_from_where_it_lies(tmp_path: Path) -> None:
    model = {"model": np.ones(4 << 20, np.float32)}
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "model.safetensors", model)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < model["model"].nbytes / 16


def test_what_cannot_be_written_leaves_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"model": np.ones(3, np.float32)})
    before = file.read_bytes()
    with pytest.raises(KeyError, match="float16"):
        write_tensors(file, {"model": np.ones(3, np.float16)})
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("title", CASES)
def test_what_was_written_is_read_to_its_place(title: str, tmp_path: Path) -> None:
    tensors, metadata = CASES[title]
    file = tmp_path / "some.safetensors"
    write_tensors(file, tensors, metadata=metadata)
    into = {name: np.zeros(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    read_tensors(file, into)
    for name, tensor in tensors.items():
        assert np.array_equal(into[name], tensor)


def test_a_model_is_read_without_a_copy(tmp_path: Path) -> None:
    model = np.arange(4 << 20, dtype=np.float32)
    write_tensors(tmp_path / "model.safetensors", {"a": model[:7], "b": model[7:]})
    into = np.empty_like(model)
    tracemalloc.start()
    try:
        read_tensors(tmp_path / "model.safetensors", {"b": into[7:], "a": into[:7]})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(into, model)
    assert most < model.nbytes / 16


DAMAGED: dict[str, Any] = {
    "empty": lambda _: b"",
    "cut in its head": lambda content: content[:20],
    "cut in its entries": lambda content: content[:-1],
    "a head without an end": lambda content: b"\xff" * 8 + content[8:],
    "another name": lambda content: content.replace(b"model", b"modem"),
    "another type": lambda content: content.replace(b"F32", b"F64"),
    "another shape": lambda content: content.replace(b"[3]", b"[4]"),
    "no JSON": lambda content: content.replace(b"{", b"["),
}


@pytest.mark.parametrize("title", DAMAGED)
def test_a_damaged_file_is_named(title: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"model": np.ones(3, np.float32)})
    file.write_bytes(DAMAGED[title](file.read_bytes()))
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        read_tensors(file, {"model": np.zeros(3, np.float32)})
