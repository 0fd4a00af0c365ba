"""From phantoms to figures: segmentation studies, the example a site keeps, and the baselines."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from federation import Watcher, answers_of
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn

from client.blind import blind_answer, blind_counts
from client.dataset import SiteData
from client.evaluate import evaluate
from client.examples import keep_example
from client.images import Images, Scans
from client.round import local_update
from client.simulated import alone, pooled, simulated_site, site_over, source_of
from common.config import load, validate
from common.messages import Purpose, RoundTask, digest_of_model
from common.models.build import build_network
from common.models.flat import FlatNetwork
from common.simulation import EXAMPLE, Simulation
from common.study import Segmentation, Study, TrainingLoss
from common.tasks import SegmentationTask, task_of
from common.tasks.losses import OUTSIDE
from common.throwaway import coordinator_credentials
from server.coordinator import run
from server.network import LoopbackNetwork
from server.run_dir import RunDir

ROOT = Path(__file__).parents[2]

Arrays = dict[str, NDArray[np.uint8]]


class Bright(nn.Module):
    """Says that everything brighter than one half is the second class."""

    def __init__(self, num_dims: int) -> None:
        super().__init__()
        kind = nn.Conv2d if num_dims == 2 else nn.Conv3d
        self.decide = kind(1, 1, kernel_size=1)
        nn.init.constant_(self.decide.weight, 2.0)
        nn.init.constant_(self.decide.bias, -1.0)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.decide(images)
        return outputs


def kept(samples: Images | Scans, folder: Path, num_dims: int = 2) -> Arrays:
    network = FlatNetwork(Bright(num_dims), torch.device("cpu"))
    config = Segmentation(kind="segmentation", classes=("dark", "bright"))
    task = SegmentationTask(config, TrainingLoss(), (16,) * num_dims)
    model = network.vector()
    network.values.zero_()  # the answer is that of the model, whatever was loaded before
    keep_example(model, samples, folder, network=network, task=task)
    with np.load(folder / EXAMPLE) as arrays:
        return dict(arrays)


def samples_of(*sizes: tuple[int, ...], as_scans: bool = False) -> Images | Scans:
    """Grey noise with masks of noise; each image has its own range of grey values."""
    rng = torch.Generator().manual_seed(6)
    pixels = [torch.rand(1, *size, generator=rng) * (k + 1) for k, size in enumerate(sizes)]
    masks = [torch.randint(2, size, generator=rng).to(torch.uint8) for size in sizes]
    for mask in masks:
        mask[..., -3:] = OUTSIDE
    patients = tuple("abcdefgh"[: len(sizes)])
    if as_scans:
        return Scans(tuple(pixels), tuple(masks), patients, (16,) * len(sizes[0]))
    return Images(torch.stack(pixels), torch.stack(masks), patients)


def test_the_example_is_the_sites_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        kept(samples_of((16, 20)), tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / EXAMPLE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("as_scans", [False, True], ids=["images", "scans"])
def test_the_example_is_the_first_image_with_its_mask_and_the_models_answer(
    as_scans: bool, tmp_path: Path
) -> None:
    size = (37, 22) if as_scans else (16, 20)
    samples = samples_of(size, size, as_scans=as_scans)
    found = kept(samples, tmp_path)
    assert set(found) == {"image", "mask", "predicted"}
    assert {(array.shape, array.dtype.name) for array in found.values()} == {(size, "uint8")}
    first = samples.pixels[0][0].numpy()
    assert np.array_equal(found["mask"], samples.targets[0])
    assert np.array_equal(found["predicted"], (first > 0.5).astype(np.uint8))
    grey = 255 * (first - first.min()) / (first.max() - first.min())
    assert np.abs(found["image"] - grey).max() <= 1
    assert (found["image"].min(), found["image"].max()) == (0, 255)


@pytest.mark.parametrize("as_scans", [False, True], ids=["images", "scans"])
def test_of_a_volume_the_slice_with_most_foreground_is_kept(as_scans: bool, tmp_path: Path) -> None:
    samples = samples_of((18, 16, 16), (18, 16, 16), as_scans=as_scans)
    mask = samples.targets[0]
    mask[:] = 0
    mask[4, :5, :5] = 1
    mask[11, :6, :6] = 1
    mask[15] = OUTSIDE  # known to nobody, and so no foreground
    found = kept(samples, tmp_path, num_dims=3)
    assert np.array_equal(found["mask"], mask[11])
    plane = samples.pixels[0][0, 11].numpy()
    assert np.array_equal(found["predicted"], (plane > 0.5).astype(np.uint8))
    assert found["image"].shape == (16, 16)
    assert np.corrcoef(found["image"].ravel(), plane.ravel())[0, 1] > 0.999


def test_a_constant_image_is_kept_without_a_division_by_zero(tmp_path: Path) -> None:
    samples = Images(torch.full((1, 1, 16, 16), 7.0), torch.zeros(1, 16, 16).byte(), ("a",))
    assert not kept(samples, tmp_path)["image"].any()


EMPTY = {
    "images": Images(torch.empty(0, 1, 16, 16), torch.empty(0), ()),
    "scans": Scans((), (), (), (16, 16)),
}


@pytest.mark.parametrize("title", EMPTY)
def test_without_a_test_image_no_example_is_written(title: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kept(EMPTY[title], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_example_takes_the_place_of_the_first(tmp_path: Path) -> None:
    kept(samples_of((16, 16)), tmp_path)
    second = kept(samples_of((16, 24)), tmp_path)
    assert second["image"].shape == (16, 24)
    assert [entry.name for entry in tmp_path.iterdir()] == [EXAMPLE]


def test_keeping_an_example_leaves_gradients_on_for_training(tmp_path: Path) -> None:
    kept(samples_of((40, 40), as_scans=True), tmp_path)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


# Whole federations

TISSUES = ["background", "lung", "heart"]
PHANTOMS = {
    "name": "phantoms", "format": "phantom", "num_patients": 10, "images_per_patient": 1,
    "splits": {"validation": 0.2, "test": 0.3},
}  # fmt: skip
TABLE: dict[str, Any] = {
    "name": "organs",
    "num_rounds": 2,
    "task": {"kind": "segmentation", "classes": TISSUES},
    "model": {"name": "unet", "channels": [4, 8], "residual_units": 0},
    "input": {"size": [32, 32], "intensity": "image"},
    "training": {"learning_rate": 0.02, "optimizer": "adam", "batch_size": 4, "local_steps": 8,
                 "loss": {"kind": "dice-cross-entropy"}},
    "privacy": {"mode": "none"},
}  # fmt: skip


def organs(**changes: Any) -> Study:
    study = validate({**TABLE, **changes}, Study, source=Path("organs.toml"))
    return study.with_members(("site-1", "site-2", "site-3"))


def federated(study: Study, folder: Path, **phantoms: Any) -> dict[str, Any]:
    simulation = Simulation(num_sites=3, data={**PHANTOMS, **phantoms})
    record = RunDir.open(folder, study, simulation, resume=False)
    sites = [simulated_site(study, simulation, k, run_dir=folder) for k in range(3)]
    network = LoopbackNetwork(answers_of({site.name: site for site in sites}))
    credentials = coordinator_credentials(folder, study.site_names)
    return run(study, network, record, Watcher(), credentials)


def examples_in(folder: Path) -> dict[str, Arrays]:
    found = {}
    for path in sorted(folder.glob(f"sites/*/{EXAMPLE}")):
        with np.load(path) as arrays:
            found[path.parent.name] = dict(arrays)
    return found


def test_a_segmentation_study_ends_with_figures_and_an_example_at_every_site(
    tmp_path: Path,
) -> None:
    study = organs()
    summary = federated(study, tmp_path)
    final = summary["metrics"]["final"]
    for figure in ("dice", "iou", "sensitivity", "precision"):
        assert 0 < final[figure] < 1
    assert set(final["dice_by_class"]) == set(TISSUES)
    assert final["dice"] == pytest.approx(
        np.mean([final["dice_by_class"][tissue] for tissue in TISSUES[1:]])
    )
    losses = [figures["loss"] for figures in summary["metrics"]["by_round"]]
    assert losses[0] > losses[1]
    found = examples_in(tmp_path)
    assert set(found) == {"site-1", "site-2", "site-3"}
    model = load_file(tmp_path / "final.safetensors")
    network, task = build_network(study), task_of(study)
    assert isinstance(task, SegmentationTask)
    network.load(np.concatenate([model[name].reshape(-1) for name in network.schema.names]))
    for index, arrays in enumerate(found.values()):
        assert {array.shape for array in arrays.values()} == {(32, 32)}
        assert set(np.unique(arrays["mask"])) <= {0, 1, 2}
        simulation = Simulation(num_sites=3, data=PHANTOMS)
        test = source_of(study, simulation, index).load().test
        assert np.array_equal(arrays["mask"], test.targets[0])
        with torch.no_grad():
            predicted = task.decide(network(test.pixels[:1]))[0]
        assert np.mean(arrays["predicted"] == predicted.numpy()) > 0.999
    assert final["num_examples"] == sum(
        len(source_of(study, Simulation(num_sites=3, data=PHANTOMS), k).load().test)
        for k in range(3)
    )


def test_the_examples_of_a_run_are_not_among_its_results(tmp_path: Path) -> None:
    federated(organs(num_rounds=1), tmp_path)
    assert (tmp_path / "sites" / "site-1" / EXAMPLE).exists()
    assert EXAMPLE not in (tmp_path / "SHA256SUMS").read_text()


def test_volumes_are_segmented_by_a_federation_too(tmp_path: Path) -> None:
    training = {**TABLE["training"], "local_steps": 2, "batch_size": 2}
    study = organs(num_rounds=1, input={"size": [32] * 3, "intensity": "image"}, training=training)
    splits = {"validation": 0.2, "test": 0.45}
    summary = federated(study, tmp_path, num_patients=4, splits=splits)
    assert summary["metrics"]["final"]["num_examples"] >= 2
    assert 0 <= summary["metrics"]["final"]["dice"] < 1
    found = examples_in(tmp_path)
    assert found
    for arrays in found.values():
        assert {array.shape for array in arrays.values()} == {(32, 32)}
        assert {"image", "mask", "predicted"} == set(arrays)
        assert np.isin(arrays["mask"], (1, 2)).mean() > 0.15  # through the middle of the lungs


def test_patches_are_segmented_by_a_federation_too(tmp_path: Path) -> None:
    changes = {"size": [32, 32], "patches": True, "intensity": "image"}
    summary = federated(organs(num_rounds=1, input=changes), tmp_path)
    assert 0 < summary["metrics"]["final"]["dice"] < 1
    assert set(examples_in(tmp_path)) == {"site-1", "site-2", "site-3"}


def test_a_classification_study_keeps_no_example(tmp_path: Path) -> None:
    task = {"kind": "classification", "classes": ["no lesion", "lesion"]}
    training = {"learning_rate": 0.1, "batch_size": 8, "local_steps": 1}
    model = {"name": "cnn", "width": 4}
    federated(organs(num_rounds=1, task=task, training=training, model=model), tmp_path)
    assert not examples_in(tmp_path)


# One site alone, and all images in one place


def loaded(study: Study, trained_on: int | None) -> tuple[SiteData, list[SiteData]]:
    simulation = Simulation(num_sites=3, data=PHANTOMS)
    sources = [source_of(study, simulation, index) for index in range(3)]
    return pooled(sources, trained_on).load(), [source.load() for source in sources]


PATCHES = {"input": {"size": [32, 32], "patches": True, "intensity": "image"}}
by_kind = pytest.mark.parametrize("changes", [{}, PATCHES], ids=["images", "scans"])


def same(one: Any, parts: list[Any]) -> bool:
    """Whether one split holds exactly the images and targets of these, one after the other."""
    pixels = [each for part in parts for each in part.pixels]
    targets = [each for part in parts for each in part.targets]
    return len(one) == len(pixels) and all(
        torch.equal(a, b) and torch.equal(c, d)
        for a, b, c, d in zip(one.pixels, pixels, one.targets, targets, strict=True)
    )


@by_kind
def test_pooled_data_is_that_of_all_sites(changes: dict[str, Any]) -> None:
    whole, parts = loaded(organs(**changes), None)
    for split in ("train", "validation", "test"):
        assert same(getattr(whole, split), [getattr(part, split) for part in parts])
    assert isinstance(whole.train, Scans if changes else Images)


@pytest.mark.parametrize("site", [0, 2])
@by_kind
def test_one_site_trains_on_its_own_images_and_is_tested_on_every_sites(
    changes: dict[str, Any], site: int
) -> None:
    alone, parts = loaded(organs(**changes), site)
    assert same(alone.train, [parts[site].train])
    assert same(alone.validation, [parts[site].validation])
    assert same(alone.test, [part.test for part in parts])


@by_kind
def test_equal_ids_at_two_sites_are_two_patients(changes: dict[str, Any]) -> None:
    whole, parts = loaded(organs(**changes), None)
    ids = [patient for part in parts for patient in part.train.patients]
    assert len(set(ids)) < len(ids)  # every site's phantoms are numbered from 0
    assert whole.train.num_patients == len(ids)
    assert whole.num_patients == 30


def test_a_patients_images_stay_together_when_sites_are_pooled() -> None:
    simulation = Simulation(num_sites=3, data={**PHANTOMS, "images_per_patient": 3})
    source = pooled([source_of(organs(), simulation, index) for index in range(3)], None)
    train = source.load().train
    assert len(train) == 3 * train.num_patients
    assert len(set(train.patients[:3])) == 1


@pytest.mark.parametrize("trained_on", [None, 1])
def test_a_pooled_source_declares_the_patients_it_trains_on(trained_on: int | None) -> None:
    study, simulation = organs(), Simulation(num_sites=3, data=PHANTOMS)
    source = pooled([source_of(study, simulation, index) for index in range(3)], trained_on)
    assert source.num_units == source.load().train.num_patients


def test_sites_that_each_keep_to_the_weight_cap_can_be_pooled(tmp_path: Path) -> None:
    study, simulation = (
        organs(aggregation={"weight_cap": 10}),
        Simulation(num_sites=3, data=PHANTOMS),
    )
    sources = [source_of(study, simulation, index) for index in range(3)]
    assert max(source.num_units for source in sources) <= 10
    source = pooled(sources, None)
    only = alone(study, "pooled", source)
    assert site_over(source, "pooled", only, run_dir=tmp_path, device="cpu")


def test_a_split_that_is_empty_at_some_sites_is_pooled_from_the_others() -> None:
    simulation = Simulation(num_sites=3, data={**PHANTOMS, "splits": {"test": 0.12}})
    sources = [source_of(organs(), simulation, index) for index in range(3)]
    sizes = [len(source.load().test) for source in sources]
    emptied = [sources[0], without_test(sources[1]), sources[2]]
    assert len(pooled(emptied, None).load().test) == sizes[0] + sizes[2]
    none = pooled([without_test(source) for source in sources], None).load()
    assert len(none.test) == 0


def without_test(source: Any) -> Any:
    """The same source with no image in its test split."""
    data = source.load()
    empty = Images(torch.empty(0, 1, 32, 32), torch.empty(0), ())
    rest = SiteData(data.train, data.validation, empty, num_skipped=0, contents=data.contents)
    return replace(source, load=lambda: rest)


def training_task(number: int, model: NDArray[np.float32]) -> RoundTask:
    """What training reads of a task is its numbers and the model."""
    digest = digest_of_model(model)
    return RoundTask("", number, number, Purpose.TRAIN, (), digest, (), (), b"", model)


Baseline = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def baseline(tmp_path: Path) -> Baseline:
    """Run ``scripts/baseline`` on three sites of tiny phantoms."""
    (tmp_path / "organs.toml").write_text(tomli_w.dumps(TABLE))
    (tmp_path / "organs.site.toml").write_text(tomli_w.dumps({"data": PHANTOMS}))

    def start(*arguments: str, folder: str = "run") -> subprocess.CompletedProcess[str]:
        command = [ROOT / "scripts" / "baseline", "--study", tmp_path / "organs.toml"]
        command += ["--sites", "3", "--run-dir", tmp_path / folder, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    return start


def test_a_baseline_that_never_looks_is_tested_on_the_same_images(
    baseline: Baseline, tmp_path: Path
) -> None:
    ended = baseline("--blind")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["baseline.json"]
    record = json.loads((tmp_path / "run" / "baseline.json").read_text())
    assert record["blind"]
    study, simulation = organs(), Simulation(num_sites=3, data=PHANTOMS)
    data = pooled([source_of(study, simulation, k) for k in range(3)], None).load()
    assert record["num_train"] == len(data.train)
    told, test, task = blind_answer(study, data.train), data.test, task_of(study)
    final, by_site = record["metrics"]["final"], record["by_site"]
    assert final == json.loads(json.dumps(task.figures(blind_counts(told, test, task))))
    assert not torch.equal(told, blind_answer(study, test))
    assert final["num_examples"] == sum(each["num_examples"] for each in by_site.values())
    assert 0 < final["dice"] < 1
    assert f"dice {final['dice']:.4f}" in ended.stdout


@pytest.mark.parametrize(("site", "name"), [(0, "pooled"), (2, "site-2")])
def test_a_baseline_trains_where_it_is_told_and_is_tested_on_every_sites_images(
    site: int, name: str, baseline: Baseline, tmp_path: Path
) -> None:
    ended = baseline("--site", str(site))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads((tmp_path / "run" / "baseline.json").read_text())
    content = (tmp_path / "run" / "final.safetensors").read_bytes()
    assert record["final_model_sha256"] == hashlib.sha256(content).hexdigest()

    study = organs().with_members((name,))
    sources = [source_of(study, Simulation(num_sites=3, data=PHANTOMS), k) for k in range(3)]
    source = pooled(sources, site - 1 if site else None)
    alone = site_over(source, name, study, run_dir=tmp_path / "again", device="cpu")
    first = alone.network.vector()
    planned = load(tmp_path / "run" / "study.toml", Study)
    assert record["study"] == {"name": "organs", "digest": planned.digest()}
    assert planned.site_names == ("site-1", "site-2", "site-3")
    assert load(tmp_path / "run" / "simulation.toml", Simulation).data["format"] == "phantom"
    assert record["trained_on"] == name
    assert record["num_train"] == len(alone.data.train)
    assert record["privacy"] == {}
    assert record["returned_round"] == len(record["metrics"]["by_round"]) == 2

    tensors = load_file(tmp_path / "run" / "final.safetensors")
    model = np.concatenate([tensors[key].reshape(-1) for key in alone.network.schema.names])
    figures = {
        part: alone.task.figures(evaluate(model, samples, network=alone.network, task=alone.task))
        for part, samples in (("validation", alone.data.validation), ("test", alone.data.test))
    }
    for given, found in (
        (record["metrics"]["final"], figures["test"]),
        (record["metrics"]["by_round"][-1], figures["validation"]),
    ):
        assert given.pop("dice_by_class") == pytest.approx(found.pop("dice_by_class"), rel=1e-3)
        assert given.pop("intervals") == found.pop("intervals") == {}
        assert given == pytest.approx(found, rel=1e-3)
    assert figures["test"]["num_examples"] == sum(len(each.load().test) for each in sources)
    by_hand = first
    for number in (1, 2):
        by_hand = by_hand + local_update(training_task(number, by_hand), alone, {}).values
    assert np.allclose(model, by_hand, atol=1e-5)
    assert np.abs(model - first).max() > 1e-2
    said = ended.stdout.splitlines()
    assert sum(line.startswith("round ") for line in said) == 2
    assert f"test ({figures['test']['num_examples']} images of all sites)" in said[-2]


REFUSED = {
    "a site beyond the last": (("--site", "9"), "--site 9: 1 to 3, or 0 for the pooled images"),
    "a site below 0": (("--site", "-1"), "--site -1: 1 to 3"),
    "a wrong value": (("--set", "training.batch_size=0"), "training.batch_size"),
}


@pytest.mark.parametrize("title", REFUSED)
def test_a_baseline_that_cannot_be_is_refused(
    title: str, baseline: Baseline, tmp_path: Path
) -> None:
    arguments, sentence = REFUSED[title]
    ended = baseline(*arguments)
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_baseline_leaves_a_folder_in_use_alone(baseline: Baseline, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("keep")
    ended = baseline()
    assert ended.returncode == 2
    assert "run is not empty; choose another --run-dir" in ended.stderr
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["notes.txt"]
