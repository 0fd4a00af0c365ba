"""Reports of a run that looked for boxes: figures of the sums, and an example of each site."""

from __future__ import annotations

import numpy as np
import pytest
from federation import federate, tiny_study
from finished import Run

from common.errors import FederationError
from common.tasks import DetectionTask, task_of
from common.tasks.scores import NUM_BINS
from server.report import write_report
from server.reporting.boxed import drawn
from server.reporting.overlays import EXAMPLE
from server.run_dir import RunDir

DETECTION = {
    "num_rounds": 1,
    "task": {"kind": "detection", "classes": ["lesion"], "max_boxes": 8},
    "model": {"name": "center-unet", "channels": [4, 8]},
    "training": {
        "learning_rate": 0.01,
        "batch_size": 4,
        "local_steps": 1,
        "loss": {"kind": "focal"},
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A real federation of five sites over phantoms."""
    path = tmp_path_factory.mktemp("runs") / "run"
    federate(tiny_study(5, **DETECTION), path)
    return Run(path)


@pytest.fixture
def run(finished, tmp_path) -> Run:
    """The same run, free to be changed."""
    return finished.copied_to(tmp_path / "run")


def test_every_final_figure_is_shown(finished):
    text, final = finished.text, RunDir(finished.path).summary()["metrics"]["final"]
    for name in ("map50", "froc", "recall", "loss"):
        assert f"{final[name]:.4f}" in text
    assert "learned to find lesion in images, and to draw a box around each" in text
    assert finished.page.count(" on validation by round; ") == 5
    assert finished.page.count("<svg") == 5 + 2 + 1  # figures, two curves, seconds


def test_findings_above_the_threshold_are_counted_by_class(run):
    run_dir = RunDir(run.path)
    task = task_of(run_dir.study())
    assert isinstance(task, DetectionTask)
    counts = np.zeros(task.num_counts, np.int64)
    view, shown = task.view(counts), task.first_shown
    view.num_examples[0], view.boxes[0] = 20, 50
    view.scores[0, 1, shown], view.scores[0, 0, NUM_BINS - 1] = 30, 10
    view.scores[0, 1, shown - 1], view.scores[0, 0, shown - 1] = 7, 70
    run.count_again(counts)
    entry = run.facts["test"]["by_class"][0]
    assert entry["boxes"] == {"true": 50, "found": 30, "wrong": 10}
    assert (entry["recall"], entry["precision"]) == (0.6, 0.75)
    assert "Few boxes" not in run.text


def test_few_boxes_are_warned_of(run):
    run_dir = RunDir(run.path)
    task = task_of(run_dir.study())
    counts = np.zeros(task.num_counts, np.int64)
    task.view(counts).num_examples[0], task.view(counts).boxes[0] = 400, 29
    run.count_again(counts)
    assert "Few boxes in the test images: 29 of lesion" in run.text


def test_each_site_has_its_example_and_the_report_says_what_was_found(finished):
    pictures = finished.pictures
    assert len(pictures) == 3 * 4
    facts = finished.facts["examples"]
    assert [each["site"] for each in facts] == [f"site-{k}" for k in range(1, 5)]
    for each in facts:
        with np.load(finished.path / each["file"]) as kept:
            boxes, found = each["boxes"], len(kept["found"])
            assert boxes["found"] + boxes["missed"] == len(kept["boxes"])
            assert boxes["found"] + boxes["extra"] == found


def test_boxes_are_drawn_where_they_are_in_their_colours():
    image = np.full((40, 60), 100, np.uint8)
    box = np.array([[10, 5, 30, 25, 0]], np.float32)
    picture = drawn(image, [("#ffb000", box)])
    assert picture.shape == (320, 480, 3)
    assert picture[5 * 8, 20 * 8].tolist() == [255, 176, 0]
    assert picture[15 * 8, 10 * 8].tolist() == [255, 176, 0]
    assert picture[15 * 8, 20 * 8].tolist() == [100, 100, 100]


def test_found_missed_and_extra_boxes_are_told_apart(run):
    image = np.zeros((32, 32), np.uint8)
    boxes = np.array([[2, 2, 12, 12, 0], [20, 20, 30, 30, 0]], np.float32)
    found = np.array([[2, 2, 12, 11, 0], [3, 2, 12, 12, 0], [18, 2, 28, 8, 0]], np.float32)
    path = run.path / "sites" / "site-1" / EXAMPLE
    np.savez(path, image=image, boxes=boxes, found=found)
    facts = run.facts["examples"][0]
    assert facts["boxes"] == {"missed": 1, "found": 1, "extra": 2}
    assert "Boxes: 1 found, 1 missed, 2 extra" in run.text


@pytest.mark.parametrize(
    "change",
    [
        {"image": np.zeros((4, 4))},
        {"image": np.zeros((4, 4, 2), np.uint8)},
        {"boxes": np.zeros((1, 4), np.float32)},
        {"found": np.array([[0, 0, 1, 1, 7]], np.float32)},
        {"found": np.array([[0, 0, np.nan, 1, 0]], np.float32)},
    ],
    ids=["no bytes", "two colours", "four numbers", "no class", "no side"],
)
def test_a_file_that_no_site_wrote_is_named(change, run):
    sound = {"image": np.zeros((4, 4), np.uint8)}
    sound |= {name: np.zeros((0, 5), np.float32) for name in ("boxes", "found")}
    np.savez(run.path / "sites" / "site-3" / EXAMPLE, **(sound | change))
    with pytest.raises(FederationError, match=r"^sites/site-3/example\.npz is not an example"):
        write_report(run.path)
