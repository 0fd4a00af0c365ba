"""Federated statistics: right sums, asked once, before training, and only where people approved."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from cells import CLASSES, write_smears
from federation import Watcher, answers_of, federate, open_sites, tiny_study
from numpy.typing import NDArray

from client.config import Data, DataTable
from client.dataset import load_site_data
from client.readers.volume import Header
from client.splits import dealt_cases
from client.statistics import amount_by_class, count_images
from common.config import validate
from common.errors import ConfigError, FederationError, RemoteProtocolError
from common.messages import Message, Purpose, Reason, Refusal, RoundTask
from common.study import Study
from common.tasks.statistics import MILLIMETRES, PIXELS, StatisticsTask, class_of
from server import coordinator
from server.network import LoopbackNetwork
from server.progress import print_summary, statistics_lines
from server.report import verify, write_report
from server.run_dir import FINAL, STATISTICS, RunDir
from server.state import State, statistics_task

ASKED = {"statistics": {"intensity": [0, 255], "num_bins": 128}}
WIDTH = 255 / 128


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics") / "run"
    federate(tiny_study(**ASKED), folder)
    return folder


def training_pixels(folder: Path) -> list[NDArray[Any]]:
    """Grey values of all training images of all sites, as their files have them."""
    sites = open_sites(tiny_study(**ASKED), folder)
    images = []
    for site in sites.values():
        data, study, dealt = site.count.args  # type: ignore[attr-defined]
        images += [case.load() for case in dealt_cases(data, study, dealt)["train"]]
    return images


def test_the_sums_are_those_of_all_images_in_one_place(finished: Path, tmp_path: Path) -> None:
    figures = json.loads((finished / "statistics.json").read_text())
    images = training_pixels(tmp_path)
    values = np.concatenate([image.ravel() for image in images]).astype(float)
    assert figures["images"]["train"] == len(images)
    (grey,) = figures["grey"]
    assert sum(grey["counts"]) == values.size
    assert (grey["below"], grey["above"]) == (0, 0)
    assert grey["mean"] == pytest.approx(values.mean(), abs=WIDTH)
    assert grey["std"] == pytest.approx(values.std(), abs=WIDTH)
    for percentile, value in grey["percentiles"].items():
        expected = np.percentile(values, float(percentile))
        assert value == pytest.approx(expected, abs=WIDTH), percentile
    assert [side["50"] for side in figures["side"]] == [32, 32]
    assert figures["no_spacing"] == len(images)
    suggested = figures["suggested"]
    low, high = suggested["window"]
    assert low <= grey["percentiles"]["0.5"] < low + WIDTH
    assert high - WIDTH < grey["percentiles"]["99.5"] <= high
    inside = np.clip((values - low) / (high - low), 0, 1)
    assert suggested["mean"] == pytest.approx(inside.mean(), abs=0.01)
    assert suggested["std"] == pytest.approx(inside.std(), abs=0.01)


def test_classes_and_patients_are_counted_over_all_sites(finished: Path, tmp_path: Path) -> None:
    figures = RunDir(finished).statistics()
    assert figures is not None
    sites = open_sites(tiny_study(**ASKED), tmp_path).values()
    for split in ("train", "validation", "test"):
        parts = [getattr(site.data, split) for site in sites]
        key = "val" if split == "validation" else split
        assert figures["images"][key] == sum(map(len, parts))
        assert figures["patients"][key] == sum(part.num_patients for part in parts)
    labels = np.concatenate([np.asarray(site.data.train.targets) for site in sites])
    by_class = [entry["images"] for entry in figures["classes"]]
    assert by_class == np.bincount(labels, minlength=2).tolist()
    assert figures["classes"][1]["share_of_images"] == pytest.approx(labels.mean())


def test_the_coordinator_sees_one_sum_and_it_comes_first(finished: Path) -> None:
    run_dir = RunDir(finished)
    (line,) = [one for one in run_dir.evaluations() if one["counts"] == STATISTICS]
    assert (line["sum"], line["survivors"]) == (0, [f"site-{k}" for k in (1, 2, 3, 4)])
    assert [one["sum"] for one in run_dir.rounds()] == [1, 2, 3]


# A study that only counts

COUNTS = {**ASKED, "num_rounds": 0}


def test_a_study_without_rounds_counts_and_leaves_no_model(tmp_path: Path) -> None:
    watcher = Watcher()
    summary = federate(tiny_study(**COUNTS), tmp_path / "run", watcher=watcher)
    run_dir = RunDir(tmp_path / "run")
    assert (summary["num_rounds"], summary["metrics"]["final"]) == (0, None)
    assert watcher.lines == []
    assert len(watcher.uploads) == 4
    assert not (run_dir.path / FINAL).exists()
    text = re.sub(r"\s+", " ", write_report(run_dir.path).read_text())
    assert "Nothing was trained. The sites counted what their images are like" in text
    assert "Results on the test" not in text
    assert "Rounds taken part" not in text
    verified = verify(run_dir.path)
    assert verified.num_statements == 0
    print_summary(summary, run_dir.path)


@pytest.mark.parametrize("purpose", [Purpose.TRAIN, Purpose.VALIDATE, Purpose.TEST])
def test_its_sites_answer_nothing_else(
    purpose: Purpose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(state: State, run: str) -> RoundTask:
        number = int(purpose == Purpose.TRAIN)
        task = statistics_task(state, run)
        return dataclasses.replace(task, purpose=purpose, round_number=number)

    monkeypatch.setattr(coordinator, "statistics_task", other)
    sites = open_sites(tiny_study(**COUNTS), tmp_path)
    network = LoopbackNetwork(answers_of(sites))
    with pytest.raises(RemoteProtocolError, match=r"not one of|nothing but statistics"):
        federate(tiny_study(**COUNTS), tmp_path / "run", network=network, sites_in=tmp_path)
    assert all(site.ledger.charges() == [] for site in sites.values())


def test_a_study_without_rounds_and_without_a_question_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_rounds: 0 rounds ask for nothing but \[statistics"):
        tiny_study(num_rounds=0)


# Order, and how often


def test_images_are_counted_after_the_debit(tmp_path: Path) -> None:
    sites = open_sites(tiny_study(**ASKED), tmp_path)
    site = sites["site-1"]
    seen: list[int] = []

    def count() -> Any:
        seen.append(len(site.ledger.charges()))
        return site.count()

    watched = {**sites, "site-1": dataclasses.replace(site, count=count)}
    federate(
        tiny_study(**ASKED),
        tmp_path / "run",
        network=LoopbackNetwork(answers_of(watched)),
        sites_in=tmp_path,
    )
    assert seen == [1]


def test_a_site_counts_nothing_that_its_study_does_not_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "training_task", statistics_task)
    sites = open_sites(tiny_study(), tmp_path)
    opened: list[str] = []
    unopened = {
        name: dataclasses.replace(site, count=partial(opened.append, name))
        for name, site in sites.items()
    }
    network = LoopbackNetwork(answers_of(unopened))
    with pytest.raises(RemoteProtocolError, match="which the study does not ask for") as refused:
        federate(tiny_study(), tmp_path / "run", network=network, sites_in=tmp_path)
    assert refused.value.rule == "R4"
    assert opened == []
    assert sites["site-1"].ledger.charges() == []


def test_a_site_counts_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second sum, over other sites, would show the difference."""
    monkeypatch.setattr(coordinator, "training_task", statistics_task)
    with pytest.raises(RemoteProtocolError, match="statistics of this study before") as refused:
        federate(tiny_study(**ASKED), tmp_path / "run")
    assert refused.value.rule == "R4"


def test_another_model_does_not_make_a_site_count_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a second run, over other sites, would show what the missing one counted."""
    study = tiny_study(**ASKED)
    sites = open_sites(study, tmp_path)
    network = LoopbackNetwork(answers_of(sites))
    federate(study, tmp_path / "one", network=network, sites_in=tmp_path)

    def changed(state: State, run: str) -> RoundTask:
        return statistics_task(dataclasses.replace(state, model=state.model + 1), run)

    monkeypatch.setattr(coordinator, "statistics_task", changed)
    with pytest.raises(RemoteProtocolError, match="statistics of this study before") as refused:
        federate(study, tmp_path / "two", network=network, sites_in=tmp_path)
    assert refused.value.rule == "R4"


def test_who_left_while_images_were_counted_is_not_waited_for_in_round_one(
    tmp_path: Path,
) -> None:
    study = tiny_study(**ASKED)
    answers = answers_of(open_sites(study, tmp_path))

    def spent(message: Message) -> Message:
        if isinstance(message, RoundTask) and message.purpose == Purpose.STATISTICS:
            return Refusal(run=message.run, reason=Reason.BUDGET)
        return answers["site-4"](message)

    watcher = Watcher()
    network = LoopbackNetwork({**answers, "site-4": spent})
    federate(study, tmp_path / "run", network=network, watcher=watcher, sites_in=tmp_path)
    assert watcher.epochs == [["site-1", "site-2", "site-3"]]
    figures = RunDir(tmp_path / "run").statistics()
    assert figures is not None
    assert figures["images"]["train"] < 4 * 16


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"privacy": {"epsilon": 8.0, "delta": 1e-5, "example_clip_norm": 1.0}},
            "exact sums, which the noise of [privacy] does not cover",
        ),
        ({"statistics": {}}, "[low, high] of the files' grey values"),
        ({"statistics": {"intensity": [9, 3]}}, "the lowest grey value of intensity"),
        (
            {"input": {"size": [32, 32], "intensity": "image", "spacing": [1, 1]}},
            "statistics are of the files as they are",
        ),
        ({"statistics": {"intensity": [0, 9], "num_bins": 1}}, "greater than or equal to 4"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_next_move(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text.replace("[", r"\[").replace("]", r"\]")):
        tiny_study(**{**ASKED, **changes})


def test_statistics_change_the_digest_and_leaving_them_out_does_not() -> None:
    assert tiny_study(**ASKED).digest() != tiny_study().digest()
    assert "statistics" not in tiny_study().as_table()


def test_a_report_shows_them_and_verify_computes_them_again(tmp_path: Path, finished: Path) -> None:
    page = write_report(finished).read_text()
    assert "images are like</h2>" in page
    assert "Grey values of all training images" in page
    assert "intensity = &#34;window&#34;" in page
    assert "Counts of what the training images are like" in page
    verify(finished)
    path = finished / "statistics.json"
    before = path.read_text()
    figures = json.loads(before)
    figures["images"]["train"] += 1
    path.write_text(json.dumps(figures))
    try:
        with pytest.raises(FederationError, match=r"statistics\.json"):
            verify(finished)
    finally:
        path.write_text(before)


def test_a_study_that_asks_for_nothing_has_no_such_section(tmp_path: Path) -> None:
    federate(tiny_study(), tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    assert "are like" not in page
    assert not (tmp_path / "run/statistics.json").exists()


# Other tasks


def of(task: dict[str, Any], model: dict[str, Any], size: list[int], **changes: Any) -> Study:
    table: dict[str, Any] = {
        "name": "asks",
        "num_rounds": 1,
        "task": task,
        "model": model,
        "input": {"size": size, "intensity": "image"},
        "statistics": {"intensity": [0, 255]},
        "training": {"learning_rate": 0.1, "batch_size": 2, "local_steps": 1},
        "privacy": {"mode": "none"},
        **changes,
    }
    if task["kind"] == "detection":
        table["training"]["loss"] = {"kind": "focal"}
    return validate(table, Study, source=Path("asks.toml"))


def set_of(kind: str, root: Path, **more: Any) -> Data:
    table = {"name": "set", "format": kind, "root": str(root), **more}
    return validate({"data": table}, DataTable, source=root / "site.toml").data


def test_pixels_of_classes_and_spacing_of_volumes(tmp_path: Path) -> None:
    spacings = [(0.5, 0.5, 2.0)] * 3 + [(1.0, 1.0, 4.0)]
    for number, spacing in enumerate(spacings):
        volume = np.full((16, 20, 12), 10 * number, np.int16)
        mask = np.zeros(volume.shape, np.uint8)
        mask[:4] = 1
        affine = np.diag([*spacing, 1.0])
        for folder, values in (("images", volume), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(values, affine)
            nibabel.save(image, tmp_path / folder / f"p{number}.nii.gz")
    study = of(
        {"kind": "segmentation", "classes": ["background", "lesion"]},
        {"name": "unet", "channels": [4, 8]},
        [8, 16, 16],
    )
    data = set_of("nifti", tmp_path, layout="pairs", splits={"test": 0.0, "validation": 0.0})
    counted = count_images(data, study)
    figures = StatisticsTask(study).figures(counted.counts)
    num = figures["images"]["train"]
    assert num + figures["images"]["val"] == 4
    background, lesion = figures["classes"]
    assert (lesion["images"], lesion["pixels"]) == (num, num * 4 * 20 * 12)
    assert lesion["share_of_pixels"] == pytest.approx(0.25)
    assert background["pixels"] == num * 12 * 20 * 12
    assert figures["no_spacing"] == 0
    # The axes are depth, height and width, whatever the file has; powers of two are exact.
    assert [axis["5"] for axis in figures["spacing"]] == [2.0, 0.5, 0.5]
    assert [axis["50"] for axis in figures["side"]] == [12, 20, 16]


def test_boxes_of_classes(tmp_path: Path) -> None:
    write_smears(tmp_path, 8)
    study = of(
        {"kind": "detection", "classes": list(CLASSES), "max_boxes": 6},
        {"name": "center-unet", "channels": [8, 16]},
        [96, 64],
        input={"size": [96, 64], "channels": 3, "intensity": "dtype"},
    )
    data = set_of("voc", tmp_path)
    figures = StatisticsTask(study).figures(count_images(data, study).counts)
    train = load_site_data(data, study).train
    boxes = np.asarray(train.targets).reshape(-1, 5)
    expected = [int((boxes[:, 4] == k).sum()) for k in range(2)]
    assert [entry["boxes"] for entry in figures["classes"]] == expected
    assert sum(expected) > 0
    assert len(figures["grey"]) == 3


@pytest.mark.parametrize(
    ("length", "lengths", "back"),
    [(1.0, MILLIMETRES, 1.0), (0.5, MILLIMETRES, 0.5), (512, PIXELS, 512), (1e-9, PIXELS, 1.0)],
)
def test_powers_of_two_are_exact_and_extremes_stay_in_the_outer_classes(
    length: float, lengths: tuple[float, float], back: float
) -> None:
    assert lengths[0] * 2 ** (class_of(length, lengths) / 32) == back


@pytest.mark.parametrize("length", np.geomspace(0.02, 100, 17))
def test_a_length_is_right_to_one_per_cent(length: float) -> None:
    found = MILLIMETRES[0] * 2 ** (class_of(length, MILLIMETRES) / 32)
    assert found == pytest.approx(length, rel=0.011)


def counted_greys(values: NDArray[Any], **changes: Any) -> dict[str, Any]:
    """Figures of one image with these grey values."""
    study = tiny_study(**{**ASKED, **changes})
    task = StatisticsTask(study)
    counts = np.zeros(task.num_counts, np.int64)
    parts = task.views(counts)
    parts["images"][0] = 1
    parts["grey"] += task.grey_counts(values)
    return task.figures(counts)


def test_a_window_that_is_suggested_is_one_that_a_study_takes() -> None:
    pedestal = np.arange(30_010, 30_041)
    figures = counted_greys(pedestal, statistics={"intensity": [29_900, 30_100], "num_bins": 1024})
    low, high = figures["suggested"]["window"]
    assert 30_009 < low < 30_011
    assert 30_039 < high < 30_041
    tiny_study(input={"size": [32, 32], **figures["suggested"]})


@pytest.mark.parametrize("values", [np.full(100, 7), np.arange(-500, 500)], ids=["flat", "outside"])
def test_where_nobody_knows_enough_no_window_is_suggested(values: NDArray[Any]) -> None:
    figures = counted_greys(values)
    assert "window" not in figures["suggested"]
    assert any("no window" in line for line in statistics_lines(figures))


def test_values_that_a_file_has_scaled_are_not_scaled_again() -> None:
    figures = counted_greys(
        np.linspace(0, 1, 1000),
        input={"size": [32, 32], "intensity": "file-window"},
        statistics={"intensity": [0, 1]},
    )
    assert figures["suggested"].keys() == {"mean", "std"}
    assert figures["suggested"]["mean"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("spacing", [(0.0, 0.0), (np.nan, 1.0), (np.inf, 1.0), (1.0,), None])
def test_a_spacing_that_cannot_be_is_none(
    spacing: tuple[float, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(**ASKED)
    site = open_sites(study, tmp_path)["site-1"]
    data, _, dealt = site.count.args  # type: ignore[attr-defined]
    cases = dealt_cases(data, study, dealt)
    header = None if spacing is None else Header(spacing)
    strange = {
        k: [dataclasses.replace(c, look=lambda: header) for c in v] for k, v in cases.items()
    }
    monkeypatch.setattr("client.statistics.dealt_cases", lambda *_: strange)
    figures = StatisticsTask(study).figures(count_images(data, study, dealt).counts)
    assert figures["no_spacing"] == figures["images"]["train"] > 0


@pytest.mark.parametrize(
    ("missing", "empty"), [("indicator", {"age": 3, "sex": 1}), ("refuse", None)]
)
def test_empty_cells_are_those_that_training_calls_empty(
    missing: str, empty: dict[str, int] | None, tmp_path: Path
) -> None:
    age, sex = ("NA", "-") if empty else ("70", "f")
    rows = [
        "patient,label,age,sex,split",
        f"p0,0,{age},f,train",
        f"p1,1,{age.replace('NA', '?')},{sex},train",
        f"p2,0,{age.replace('NA', '')},m,train",
        "p3,1,71,f,train",
        f"p4,1,{age},f,val",
    ]
    (tmp_path / "records.csv").write_text("\n".join(rows))
    study = validate(
        {
            "name": "asks",
            "num_rounds": 1,
            "task": {"kind": "classification", "classes": ["0", "1"]},
            "model": {"name": "logistic"},
            "table": {
                "missing": missing,
                "columns": [
                    {"name": "age", "kind": "number"},
                    {"name": "sex", "kind": "category", "values": ["f", "m"]},
                ],
            },
            "statistics": {},
            "training": {"learning_rate": 0.1, "batch_size": 2, "local_steps": 1},
            "privacy": {"mode": "none"},
        },
        Study,
        source=Path("asks.toml"),
    )
    data = set_of(
        "csv",
        tmp_path,
        table="records.csv",
        patient="patient",
        target="label",
        split="split",
    )
    figures = StatisticsTask(study).figures(count_images(data, study).counts)
    assert figures["images"] == {"train": 4, "val": 1, "test": 0}
    assert figures.get("empty_cells") == empty


def test_labels_of_an_image_with_several() -> None:
    study = of(
        {"kind": "classification", "labels": "multilabel", "classes": ["a", "b", "c"]},
        {"name": "cnn", "width": 4},
        [32, 32],
    )
    assert amount_by_class(np.array([1, 0, 1]), study).tolist() == [1, 0, 1]
