"""Images beside memory are the same images, and a model trained on them is the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_disk import small_disk

from client import store
from client.config import NpzData
from client.dataset import SiteData, load_site_data
from client.evaluate import predictions
from client.images import Images, Scans
from client.store import Store
from client.train import train
from common.errors import ConfigError
from common.models.build import build_network
from common.study import Study
from common.tasks import task_of


@pytest.mark.parametrize("most", [0, 40, 1 << 30])
def test_what_is_added_comes_back_in_order(tmp_path: Path, most: int) -> None:
    parts = [torch.arange(6.0).view(2, 3), torch.arange(9.0).view(3, 3), torch.full((1, 3), 7.0)]
    one, other = Store(tmp_path, most), Store(tmp_path, most)
    for part in parts:
        one.add(part)
        other.add(part)
    tensors, reading = one.tensors()
    assert all(torch.equal(a, b) for a, b in zip(tensors, parts, strict=True))
    joined, again = other.joined()
    assert torch.equal(joined, torch.cat(parts))
    assert (reading is None) == (again is None) == (most > 100)
    assert list(tmp_path.iterdir()) == []  # a file that nobody else can open


def test_without_a_folder_everything_is_in_memory() -> None:
    kept = Store(None, 0)
    kept.add(torch.ones(5))
    assert kept.joined()[1] is None


def test_a_full_disk_is_said_with_what_helps(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        kept = Store(disk.folder, 0)
        with pytest.raises(ConfigError, match=r"no room for the prepared images .* larger disk"):
            kept.add(torch.ones(1 << 20))


def test_pages_go_when_enough_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go: list[int] = []
    monkeypatch.setattr(store, "let_go", lambda mapped: let_go.append(len(mapped)))
    monkeypatch.setattr(store, "LOOKED_AT", 4000)
    kept = Store(tmp_path, 0)
    kept.add(torch.ones(100, 5))
    pixels, reading = kept.joined()
    assert reading is not None
    images = Images(pixels, torch.zeros(100), tuple(map(str, range(100))), (reading,))
    for _ in range(7):
        images.part(slice(0, 50))  # 1,000 bytes of pixels, 200 of targets
    assert let_go == [2000]


@pytest.fixture
def load(tmp_path: Path, rng: np.random.Generator) -> Callable[[Study, bool], SiteData]:
    """A site's data, in memory or beside it."""
    arrays: dict[str, Any] = {}
    for split, num in (("train", 20), ("val", 6), ("test", 6)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (num, 40, 36), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (num, 1), dtype=np.uint8)
    np.savez(tmp_path / "scans.npz", **arrays)
    data = NpzData(name="scans", format="npz", root=tmp_path / "scans.npz")

    def make(study: Study, in_file: bool) -> SiteData:
        return load_site_data(data, study, folder=tmp_path if in_file else None)

    return make


def test_a_model_trained_beside_memory_is_the_same_model(
    make_study: Callable[..., Study],
    load: Callable[[Study, bool], SiteData],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "MAX_IN_MEMORY", 0)
    study = make_study()
    network, task, made = build_network(study), task_of(study), []
    for in_file in (False, True):
        data = load(study, in_file)
        assert bool(data.train.reading) == in_file
        rng = torch.Generator().manual_seed(5)
        start = build_network(study).vector()
        how = {"network": network, "task": task, "rate": 0.1, "rng": rng}
        update = train(start, data.train, study.training, **how).values
        outputs = [out for out, _ in predictions(data.validation, network)]
        made.append((update, torch.cat(outputs)))
    assert np.array_equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


def test_scans_beside_memory_give_the_same_patches(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    pixels = tuple(torch.randn((1, 12 + k, 10), generator=rng) for k in range(4))
    masks = tuple((each[0] > 0).to(torch.uint8) for each in pixels)
    in_memory = Scans(pixels, masks, ("a", "b", "c", "d"), (8, 8))
    stores = Store(tmp_path, 0), Store(tmp_path, 0)
    for image, mask in zip(pixels, masks, strict=True):
        stores[0].add(image)
        stores[1].add(mask)
    (one, first), (other, second) = (kept.tensors() for kept in stores)
    assert first is not None
    assert second is not None
    beside = Scans(tuple(one), tuple(other), in_memory.patients, (8, 8), (first, second))
    rows = torch.tensor([3, 0, 2, 2])
    drawn = [each.draw(rows, torch.Generator().manual_seed(2)) for each in (in_memory, beside)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(in_memory.whole(), beside.whole(), strict=True)
    )
