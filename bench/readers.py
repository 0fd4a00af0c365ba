"""Reading a data set and drawing batches from it, beside MONAI's CacheDataset and DataLoader.

Both read the same files to the same tensors (grey values over 255, or a window to 0 and 1), keep
them in memory, and give shuffled batches. ``first`` is from nothing to the last batch of the first
pass; ``later`` one pass more. Memory is the peak of a process that trains on data far larger than
it may take: 20,000 images of 224 x 224, 60 volumes of 256 x 256 x 128 with masks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, set_track_meta
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    Orientationd,
    RandSpatialCropd,
    Resized,
    ScaleIntensityRanged,
)
from PIL import Image

from client.config import FolderData, NiftiData
from client.dataset import SiteData, load_site_data
from client.train import batches, train
from common.config import validate
from common.models.build import build_network
from common.study import Study
from common.tasks import task_of

HERE = Path(__file__).resolve()
CLASSES = ("no lesion", "lesion")
REPEATS = 3
IMAGES, SIDE, INPUT, BATCH = 2_000, 224, 96, 32
VOLUMES, PATCH = 12, 48
MOST_MB = 3_000  # that a site may take, whatever the data are
ALL_TRAIN = {"splits": {"validation": 0.0, "test": 0.0}}
MEMORY_IMAGES, MEMORY_VOLUMES = 20_000, 60


def rows() -> list[dict[str, Any]]:
    """Throughput of pictures and of volumes, and peak memory of large data sets."""
    made = []
    with tempfile.TemporaryDirectory(dir=HERE.parent) as folder:
        for kind, num in (("images", IMAGES), ("volumes", VOLUMES)):
            root = Path(folder) / kind
            write(kind, root, num)
            seen = [asked("speed", kind, root, who) for _ in range(REPEATS) for who in WHO]
            for phase in ("first", "later"):
                taken = {
                    who: statistics.median(row[phase] for row in seen if row["who"] == who)
                    for who in WHO
                }
                made.append(speed_row(kind, phase, num, taken))
    for kind, num in (("images", MEMORY_IMAGES), ("volumes", MEMORY_VOLUMES)):
        with tempfile.TemporaryDirectory(dir=HERE.parent) as folder:
            root = Path(folder) / kind
            write(kind, root, num)
            peak = asked("memory", kind, root, "ours")["peak"]
            print(f"{kind}: {peak:.0f} MB", file=sys.stderr, flush=True)
            made.append(
                {
                    "case": f"a site trains on {num:,} {kind}, memory",
                    "unit": "MB",
                    "ours": peak,
                    "peers": {},
                    "limit": {"promised": MOST_MB},
                    "better": "lower",
                    "settings": {"num": num},
                }
            )
    return made


def speed_row(kind: str, phase: str, num: int, taken: dict[str, float]) -> dict[str, Any]:
    """One line of the results."""
    print(f"{kind}, {phase} pass: {taken}", file=sys.stderr, flush=True)
    return {
        "case": f"{num:,} {kind}, {phase} pass",
        "unit": "s",
        "ours": taken["ours"],
        "peers": {"MONAI CacheDataset, DataLoader": taken["MONAI"]},
        "limit": None,
        "better": "lower",
        "settings": {"batch": BATCH if kind == "images" else 2, "threads": 2},
    }


def asked(what: str, kind: str, root: Path, who: str) -> dict[str, Any]:
    """What a process of its own finds out."""
    command = [sys.executable, str(HERE), what, kind, str(root), who]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)  # noqa: S603
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(kind: str, root: Path, num: int) -> None:
    """Files as a hospital may have them; no two alike."""
    rng = np.random.default_rng(0)
    for number in range(num):
        if kind == "images":
            pixels = rng.integers(0, 256, (SIDE // 8, SIDE // 8), dtype=np.uint8)
            path = root / CLASSES[number % 2] / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(path, compress_level=1)
            continue
        coarse = rng.integers(0, 1000, (32, 32, 16), dtype=np.int16)
        volume = coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2)
        for part, values in (("images", volume), ("masks", (volume > 500).astype(np.uint8))):  # noqa: PLR2004
            (root / part).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / part / f"c{number:02d}.nii")


def study_of(kind: str, side: int, steps: int) -> Study:
    """Who reads the files, and what they become."""
    flat = kind == "images"
    table = {
        "name": "bench",
        "num_rounds": 1,
        "task": {"kind": "classification", "classes": list(CLASSES)}
        if flat
        else {"kind": "segmentation", "classes": ["background", "organ"]},
        "model": {"name": "cnn"} if flat else {"name": "unet", "channels": [8, 16]},
        "input": {"size": [side, side]}
        if flat
        else {"size": [side] * 3, "patches": True, "intensity": "window", "window": [0, 1000]},
        "training": {
            "learning_rate": 0.1,
            "batch_size": BATCH if flat else 2,
            "local_steps": steps,
        },
        "privacy": {"mode": "none"},
    }
    return validate(table, Study, source=Path("bench.toml"))


def site_data(kind: str, root: Path, study: Study, **how: Any) -> SiteData:
    """A site's images, prepared."""
    if kind == "images":
        return load_site_data(
            FolderData(name="bench", format="folder", root=root, **how), study, folder=root
        )
    data = NiftiData(name="bench", format="nifti", layout="pairs", root=root, **how)
    return load_site_data(data, study, folder=root)


def ours(kind: str, root: Path, num: int) -> Iterator[None]:
    """Pass after pass."""
    steps = num // (BATCH if kind == "images" else 2)
    study = study_of(kind, INPUT if kind == "images" else PATCH, steps)
    data, rng = site_data(kind, root, study, **ALL_TRAIN).train, torch.Generator().manual_seed(0)
    while True:
        for pixels, _ in batches(data, study.training, rng):
            assert pixels.dtype == torch.float32  # noqa: S101 - somebody looks at it
        yield


def monai(kind: str, root: Path, num: int) -> Iterator[None]:
    """The same with MONAI alone."""
    set_track_meta(kind != "images")
    if kind == "images":
        files = [{"image": str(p), "label": p.parent.name} for p in sorted(root.rglob("*.png"))]
        steps: list[Any] = [
            LoadImaged("image", reader="PILReader", image_only=True),
            EnsureChannelFirstd("image", channel_dim="no_channel"),
            ScaleIntensityRanged("image", 0, 255, 0, 1),
            Resized("image", (INPUT, INPUT), mode="area"),
            EnsureTyped("image", track_meta=False),
        ]
    else:
        names = [f"c{number:02d}.nii" for number in range(num)]
        files = [
            {part[:-1]: str(root / part / name) for part in ("images", "masks")} for name in names
        ]
        steps = [
            LoadImaged(("image", "mask"), image_only=True),
            EnsureChannelFirstd(("image", "mask")),
            Orientationd(("image", "mask"), axcodes="SPL", labels=None),
            ScaleIntensityRanged("image", 0, 1000, 0, 1, clip=True),
            EnsureTyped(("image", "mask"), track_meta=False),
            RandSpatialCropd(("image", "mask"), (PATCH,) * 3, random_size=False),
        ]
    cached = CacheDataset(files, Compose(steps), num_workers=2, progress=False)
    loader = DataLoader(cached, batch_size=BATCH if kind == "images" else 2, shuffle=True)
    while True:
        for batch in loader:
            assert len(batch["image"])  # noqa: S101 - somebody looks at it
        yield


WHO = {"ours": ours, "MONAI": monai}


def speed(kind: str, root: Path, who: str) -> dict[str, Any]:
    """Seconds of the first pass and of a later one."""
    num = len(list((root / CLASSES[0]).iterdir())) * 2 if kind == "images" else VOLUMES
    began = time.perf_counter()
    passes = WHO[who](kind, root, num)
    next(passes)
    first = time.perf_counter()
    next(passes)
    return {"who": who, "first": first - began, "later": time.perf_counter() - first}


def memory(kind: str, root: Path) -> dict[str, Any]:
    """Megabytes at most while a site reads and trains."""
    study = study_of(kind, SIDE if kind == "images" else PATCH, 30)
    data = site_data(kind, root, study)
    network, task = build_network(study), task_of(study)
    rng = torch.Generator().manual_seed(0)
    how: dict[str, Any] = {"network": network, "task": task, "rate": 0.1, "rng": rng}
    train(network.vector(), data.train, study.training, **how)
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return {"peak": next(int(e.split()[1]) / 1e3 for e in lines if e.startswith("VmHWM"))}


if __name__ == "__main__":
    what_text, kind_text, root_text, who_text = sys.argv[1:]
    torch.set_num_threads(2)
    if what_text == "memory":
        print(json.dumps(memory(kind_text, Path(root_text))))
    else:
        print(json.dumps(speed(kind_text, Path(root_text), who_text)))
