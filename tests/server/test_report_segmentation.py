"""The report of a run that marks pixels: figures from counts, and pictures of simulated sites."""

import hashlib
import itertools
import re

import numpy as np
import pytest
from federation import federate, tiny_study
from finished import Run, decoded
from sealed import seal_again

from common.audit import AuditLog
from common.errors import FederationError
from common.tasks.losses import OUTSIDE
from server.exchange import utc_now
from server.report import digests_of, verify, write_report
from server.reporting.overlays import (
    EXAMPLE,
    LONGEST_SIDE,
    MEANINGS,
    OUTLINE,
    Agreement,
    coloured,
    compare,
    outlined,
    png,
)
from server.reporting.study import studied
from server.run_dir import AUDIT, RunDir

ORGANS = ("background", "lung", "heart")
TRAINING = {"learning_rate": 0.01, "batch_size": 4, "local_steps": 1}
SEGMENTATION = {
    "num_rounds": 1,
    "task": {"kind": "segmentation", "classes": ORGANS},
    "model": {"name": "unet", "channels": [4, 8]},
    "training": TRAINING,
}


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A real federation of five sites over phantoms."""
    path = tmp_path_factory.mktemp("runs") / "run"
    federate(tiny_study(5, **SEGMENTATION), path)
    return Run(path)


@pytest.fixture
def run(finished, tmp_path) -> Run:
    """The same run, free to be changed."""
    return finished.copied_to(tmp_path / "run")


# Figures


def test_every_final_figure_is_shown_with_four_decimals(finished):
    text, final = finished.text, RunDir(finished.path).summary()["metrics"]["final"]
    for name in ("dice", "iou", "sensitivity", "precision", "hd95", "loss"):
        assert f"{final[name]:.4f}" in text
    assert finished.page.count(" on validation by round; ") == 6


def test_figures_of_classes_and_their_means_come_from_the_summed_pixels(run):
    run.count(num_images=12, right=(50, 30, 0), predicted=(60, 40, 0), actual=(55, 40, 5))
    text = re.sub(r" \d\.\d+ to \d\.\d+", "", run.text)  # intervals
    assert "lung 0.7500 0.6000 0.7500 0.7500 not defined 40 40" in text
    assert "heart 0.0000 0.0000 0.0000 not defined not defined 5 0" in text
    assert "background (not in the means) 0.8696 0.7692 0.9091 0.8333 not defined 55 60" in text
    assert re.search(r"Dice 0\.3750 .* IoU \(intersection over union\) 0\.3000", text)
    assert re.search(
        r"Sensitivity \(recall\) 0\.3750 .* \(positive predictive value\) 0\.7500", text
    )
    assert "divide by zero pixels" in text
    lung = run.facts["test"]["by_class"][1]
    assert lung["pixels"] == {"true": 40, "by_model": 40, "both": 30}


@pytest.mark.parametrize(
    ("figure", "value"), [("dice", 0.9), ("dice_by_class", {"lung": 1.0}), ("precision", None)]
)
def test_a_summary_that_disagrees_with_the_pixels_is_refused(figure, value, run):
    run_dir = RunDir(run.path)
    summary = run_dir.summary()
    summary["metrics"]["final"][figure] = value
    run_dir.save_summary(summary)
    AuditLog(run_dir.path / AUDIT, utc_now).append("started")
    seal_again(run.path)
    for act in (write_report, verify):
        with pytest.raises(FederationError, match=rf"{figure} \(test\) is .* counts/test\.npy"):
            act(run.path)


def test_few_test_images_are_warned_of_however_many_their_pixels(run):
    pixels = {"right": (10**7,) * 3, "predicted": (10**7,) * 3, "actual": (10**7,) * 3}
    run.count(num_images=9, **pixels)
    assert run.facts["weak_support"] == {"images": 9}
    assert "Few test images: 9, from at most as many patients" in run.text.replace(" :", ":")
    run.count(num_images=10, **pixels)
    assert run.facts["weak_support"] == {}
    assert "Few test images" not in run.text


def test_a_run_without_test_images_says_that_nothing_is_known(run):
    run.count(num_images=0, right=(0,) * 3, predicted=(0,) * 3, actual=(0,) * 3)
    assert "No test images: " in run.text
    assert "Dice not defined" in run.text


def test_the_words_fit_what_the_study_asks_for(finished):
    text = finished.text
    assert "learned to mark lung and heart in images" in text.replace("  ", " ")
    assert "over the pixels of all test images together" in text
    assert "inside the valid region" in text
    assert "Mean over the 2 classes but “background”." in text
    assert "ROC" not in text
    assert "AUROC" not in text


def test_names_of_classes_are_text_and_never_markup(tmp_path):
    task = {"kind": "segmentation", "classes": ["<b>no</b>", "lung", "heart"]}
    federate(tiny_study(4, **SEGMENTATION | {"task": task}), tmp_path / "run")
    page = Run(tmp_path / "run").page
    assert "<b>" not in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page


# Pictures


def test_the_file_shown_is_the_one_that_the_site_kept(finished):
    first = finished.facts["examples"][0]
    content = (finished.path / "sites/site-1/example.npz").read_bytes()
    assert first["file"] == "sites/site-1/example.npz"
    assert first["sha256"] == hashlib.sha256(content).hexdigest()


def test_four_sites_are_shown_in_the_order_of_the_study(finished):
    examples = finished.facts["examples"]
    assert [example["site"] for example in examples] == [f"site-{k}" for k in range(1, 5)]
    assert len(finished.pictures) == 12
    assert "of 5 sites, up to four that kept an image are shown" in finished.text
    assert "chosen before the model was asked" in finished.text
    assert "in a deployment they stay at the site" in finished.text


def test_a_site_that_kept_no_image_is_left_out(run):
    (run.path / "sites" / "site-2" / EXAMPLE).unlink()
    assert [e["site"] for e in run.facts["examples"]] == ["site-1", "site-3", "site-4", "site-5"]
    for site in (1, 3, 4, 5):
        (run.path / "sites" / f"site-{site}" / EXAMPLE).unlink()
    assert run.facts["examples"] == []
    assert "Examples" not in run.text


def test_dice_of_an_image_counts_its_valid_pixels_alone(run):
    mask = [[0, 1, 1, 1], [0, 2, 2, 0], [OUTSIDE, OUTSIDE, OUTSIDE, OUTSIDE]]
    predicted = [[1, 1, 1, 2], [0, 2, 0, 0], [1, 1, 2, 2]]
    run.keep("site-1", np.full((3, 4), 128), mask, predicted)
    example = run.facts["examples"][0]
    # lung: 2 in both, 3 + 3 in either; heart: 1 in both, 2 + 2 in either
    assert example["dice"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert example["pixels"] == {"found": 3, "missed": 1, "extra": 1, "confused": 1, "outside": 4}
    assert "0.5833 . Pixels: 3 found, 1 missed, 1 extra, 1 confused" in run.text


def test_colours_stand_where_truth_and_model_agree_and_differ(run):
    mask = [[0, 1], [1, 2], [0, OUTSIDE]]
    predicted = [[0, 1], [0, 1], [2, 0]]
    run.keep("site-1", np.full((3, 2), 100), mask, predicted)
    picture = run.pictures[2]
    side = LONGEST_SIDE // 3
    assert picture.shape == (3 * side, 2 * side, 3)
    wanted = [
        ["BACKGROUND", "FOUND"],
        ["MISSED", "CONFUSED"],
        ["EXTRA", "OUTSIDE"],
    ]
    for row, column in itertools.product(range(3), range(2)):
        kind = Agreement[wanted[row][column]]
        colour, opacity, _ = MEANINGS.get(kind, ("#000000", 0, ""))
        shown = picture[row * side + side // 2, column * side + side // 2]
        np.testing.assert_allclose(shown, (1 - opacity) * 100 + opacity * rgb(colour), atol=3)


def test_the_truth_is_outlined_and_not_filled_and_what_the_model_says_is_not_drawn():
    mask = np.zeros((48, 48), np.uint8)
    mask[10:30, 10:30] = 1
    mask[40:, :] = OUTSIDE
    drawn = outlined(np.full((48, 48), 60, np.uint8), mask)  # every pixel ten times as large
    on_border = (abs(drawn - rgb(OUTLINE)) < 30).all(axis=2)
    assert on_border[100, 150]
    assert on_border[299, 299]
    assert (drawn[200, 200] == 60).all()  # inside
    assert (drawn[95, 150] == 60).all()  # outside
    assert (drawn[400:] == 60).all()  # nobody knows the class
    assert on_border.any(axis=1).sum() == 200


def test_a_border_between_two_classes_is_drawn_once():
    mask = np.ones((480, 480), np.uint8)
    mask[:, 240:] = 2
    drawn = outlined(np.zeros((480, 480), np.uint8), mask)
    assert (drawn.any(axis=2).sum(axis=1) == 1).all()


def test_the_legend_has_what_is_shown_and_nothing_else(run):
    blank = np.zeros((4, 4))
    for k in range(1, 5):
        run.keep(f"site-{k}", blank, blank, blank)
    (run.path / "sites" / "site-5" / EXAMPLE).unlink()
    assert not [words for _, _, words in MEANINGS.values() if words in run.text]
    run.keep("site-3", blank, blank, blank + 1)
    assert [w for _, _, w in MEANINGS.values() if w in run.text] == ["extra: only by the model"]


def test_large_noisy_images_stay_small_files():
    rng = np.random.default_rng(1)
    image, mask, predicted = rng.integers(0, 256, (3, 1100, 900)).astype(np.uint8)
    agreement = compare(mask % 4, predicted % 4)
    for pixels in (image, outlined(image, mask % 4), coloured(image, agreement)):
        uri = png(pixels)
        assert len(uri) * 3 / 4 < 300_000
        assert decoded(uri).size == (393, LONGEST_SIDE)


def test_equal_runs_give_equal_pictures(finished, run):
    assert [(e["sha256"], e["dice"]) for e in finished.facts["examples"]] == [
        (e["sha256"], e["dice"]) for e in run.facts["examples"]
    ]
    assert finished.page == run.page


def test_the_page_loads_nothing(finished):
    page = finished.page
    assert not re.findall(r"<(?:script|link|iframe)\b", page)
    assert not re.findall(r"""(?:src|href)=["'](?!data:image/png;base64,|#)""", page)
    assert "img-src data:;" in page


def test_in_a_deployed_run_no_folder_of_a_site_is_read(run):
    run.deploy()
    for site in (run.path / "sites").iterdir():  # whoever reads this fails
        (site / EXAMPLE).write_bytes(b"not to be read")
    assert run.facts["examples"] == []
    assert "<img" not in run.page
    assert "Examples" not in run.text
    assert "Deployed:" in run.text.replace(" :", ":")


@pytest.mark.parametrize(
    "arrays",
    [
        {"mask": np.zeros((4, 4))},
        {"image": np.zeros((4, 4)), "mask": np.zeros((4, 4)), "predicted": np.zeros((4, 5))},
        {"image": np.zeros((4, 4)), "mask": np.zeros((4, 4)), "predicted": np.full((4, 4), 3)},
        {"image": np.zeros((4, 4)), "mask": np.full((4, 4), 7), "predicted": np.zeros((4, 4))},
        {"image": np.zeros(4), "mask": np.zeros(4), "predicted": np.zeros(4)},
        {},
    ],
    ids=["arrays missing", "other shapes", "no class", "no true class", "no image", "no npz"],
)
def test_a_file_that_no_site_wrote_is_named(arrays, run):
    path = run.path / "sites" / "site-3" / EXAMPLE
    if arrays:
        np.savez(path, **{name: array.astype(np.uint8) for name, array in arrays.items()})
    else:
        path.write_bytes(b"PK")
    with pytest.raises(FederationError, match=r"^sites/site-3/example\.npz is not an example"):
        write_report(run.path)


def test_verify_leaves_the_sites_alone(run):
    assert run.page
    (run.path / "sites" / "site-1" / EXAMPLE).write_bytes(b"")
    assert verify(run.path).num_files == len(digests_of(RunDir(run.path)))


# Machado et al. (2009), A Physiologically-based Model for Simulation of Color Vision Deficiency:
# linear RGB as a reader without red (protanopia) or green cones (deuteranopia) sees it.
READERS = {
    "all cones": np.eye(3),
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE Lab under D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.clip(to_xyz @ linear, 0.008856, None) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("grey", [40, 110, 200])
def test_colours_are_told_apart_with_and_without_red_or_green_cones(reader, grey):
    shown = [np.full(3, grey)]
    for kind, (colour, opacity, _) in MEANINGS.items():
        if kind != Agreement.OUTSIDE:
            shown.append((1 - opacity) * grey + opacity * rgb(colour))
    linear = [((colour / 255 + 0.055) / 1.055) ** 2.4 for colour in shown]
    seen = [lab(np.clip(np.array(READERS[reader]) @ colour, 0, 1)) for colour in linear]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


# What was studied


def rows_of(num_rounds=3, **changes) -> dict[str, str]:
    study = tiny_study(4, **SEGMENTATION | {"num_rounds": num_rounds} | changes)
    return dict(studied(study, num_params=12_345, num_rounds=num_rounds))


def test_a_plain_study_has_no_row_for_what_it_does_not_use():
    rows = ("Model", "Input", "Training in a round", "Loss", "Rounds", "Next model")
    assert tuple(rows_of()) == rows


@pytest.mark.parametrize(
    ("changes", "row", "words"),
    [
        ({}, "Model", "U-Net, normalised by groups, 2 levels of 4 and 8 feature maps; 12\u202f345"),
        (
            {"model": {"name": "attention-unet", "channels": [4, 8, 16], "dropout": 0.1}},
            "Model",
            "attention gates, normalised by groups, 3 levels of 4, 8 and 16 feature maps, dropout",
        ),
        (
            {"model": {"name": "unet", "channels": [4, 8], "frozen": ["model.0", "model.1"]}},
            "Frozen",
            "begin with “model.0” and “model.1” kept their initial values",
        ),
        (
            {"input": {"size": [32, 64]}},
            "Input",
            "32 \N{MULTIPLICATION SIGN} 64 pixels, greyscale;",
        ),
        (
            {"input": {"size": [16, 32, 32]}},
            "Input",
            "16 \N{MULTIPLICATION SIGN} 32 \N{MULTIPLICATION SIGN} 32 voxels",
        ),
        ({"input": {"size": [32, 32], "colour": "green"}}, "Input", "the green channel of a"),
        (
            {"input": {"size": [32, 32], "channels": 3}},
            "Input",
            "32 \N{MULTIPLICATION SIGN} 32 pixels, colour;",
        ),
        (
            {"input": {"size": [32, 32], "mean": 0.4, "std": 0.2}},
            "Input",
            "(value \N{MINUS SIGN} 0.4) / 0.2",
        ),
        ({"input": {"size": [32, 32], "patches": True}}, "Patches", "at random places"),
        ({"training": {"schedule": "linear"}}, "Training in a round", "in a straight line over"),
        ({"training": {"schedule": "cosine"}}, "Training in a round", "along a cosine over"),
        ({"training": {"warmup_rounds": 1}}, "Training in a round", "lower in the first round"),
        ({"training": {"warmup_rounds": 2}}, "Training in a round", "over the first 2 rounds"),
        ({"training": {"mixed_precision": True}}, "Training in a round", "mixed precision"),
        ({"training": {"proximal": 0.01}}, "Proximal term", "(FedProx), by 0.01 times"),
        (
            {"training": {"augmentation": {"flip": 0.5, "quarter_turns": True}}},
            "Random changes",
            ": flip, quarter turns",
        ),
        ({"training": {"loss": {"kind": "dice"}}}, "Loss", "Soft Dice loss: "),
        (
            {"training": {"loss": {"kind": "dice", "dice_over": "batch"}}},
            "Loss",
            "all images of a batch together",
        ),
        (
            {"training": {"loss": {"kind": "dice-cross-entropy", "class_weights": [0.5, 1, 2]}}},
            "Loss",
            "Soft Dice loss plus class-weighted cross-entropy: ",
        ),
        (
            {"training": {"loss": {"kind": "focal", "class_weights": [0.5, 1, 2]}}},
            "Loss",
            "classes weigh 0.5 (background), 1 (lung) and 2 (heart)",
        ),
        (
            {"server_optimizer": {"name": "fedavg", "ema": 0.9}},
            "Returned model",
            "average of the models after each",
        ),
        (
            {"training": {"early_stopping": {"figure": "iou", "patience": 1}}},
            "Rounds",
            "validation IoU had not improved for 1 round",
        ),
    ],
)
def test_a_setting_is_said_in_words(changes, row, words):
    if "training" in changes:
        changes = {"training": TRAINING | changes["training"]}
    plain, rows = rows_of(), rows_of(**changes)
    assert words in rows[row]
    assert not changes or words not in plain.get(row, "")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("cnn", "Small convolutional network"),
        ("resnet18", "ResNet-18"),
        ("densenet121", "DenseNet-121"),
        ("efficientnet-b0", "EfficientNet-B0"),
    ],
)
def test_every_network_for_whole_images_is_named(model, words):
    study = tiny_study(4, model={"name": model})
    rows = dict(studied(study, num_params=1, num_rounds=1))
    assert rows["Model"] == f"{words}, normalised by groups; 1 parameter"
    assert "No correction" in rows["Class balance"]
