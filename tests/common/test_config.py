"""A wrong file is refused at once, by key, without its values: before torch, before any data."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from client.config import SiteConfig
from common.config import Frozen, load, parse_assignment, parse_message, validate
from common.errors import ConfigError, RemoteProtocolError
from common.simulation import plan_simulation
from common.study import Study

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
GONE = None  # TOML has no null: takes a key out of the file
PATIENT = "Kari-Nordmann-010203"  # a value that must not reach a log

SITE = {
    "name": "st-olav",
    "state_dir": "state",
    "data": {"name": "chest", "format": "npz", "root": "images"},
}
FOLDER = {"data.format": "folder"}
PHANTOM = {"data.format": "phantom", "data.root": GONE}
THREE_CLASSES = {"task.labels": "multiclass", "task.classes": ["a", "b", "c"]}
RESNET = {"model": {"name": "resnet18"}}
UNET = {"name": "unet"}  # three halvings as given: sides are multiples of 8
SEGMENTATION = {"task": {"kind": "segmentation", "classes": ["background", "lesion"]},
                "model": UNET}  # fmt: skip
TABLE = {"columns": [{"name": "age", "kind": "number"}]}
MULTIMODAL = {"name": "multimodal", "image": {"name": "cnn"}}
DETECTION = {"task": {"kind": "detection", "classes": ["cell", "platelet"]},
             "model": {"name": "center-unet"}, "training.loss.kind": "focal"}  # fmt: skip
PATCHES = {"input.patches": True, "training.local_epochs": GONE, "training.local_steps": 2}
PRIVATE = {"privacy": {"noise_multiplier": 1.0, "delta": 1e-5, "example_clip_norm": 0.5}}
STOPPING = {"training.early_stopping": {"patience": 2}}


@dataclass(frozen=True)
class Case:
    """One mistake: what is written into a good file, and the key the message must name."""

    title: str
    edits: Mapping[str, Any]
    key: str
    says: str = ""  # part of the sentence after the key
    secret: str | None = None  # what must not be repeated; by default the text of the first edit
    kind: type[Frozen] = Study

    def __str__(self) -> str:
        return self.title


@dataclass(frozen=True)
class SiteCase(Case):
    kind: type[Frozen] = field(default=SiteConfig)


STUDY_CASES = [
    Case("name is missing", {"name": GONE}, "name", "Field required"),
    Case("name is a number", {"name": 98765}, "name", "valid string"),
    Case("name with capitals and blanks", {"name": "Lung X-rays"}, "name", "match pattern"),
    Case("name is empty", {"name": ""}, "name", "match pattern"),
    Case("name ends in a line break", {"name": "lungs\n"}, "name", "match pattern"),
    Case("name walks up the folders", {"name": "../../secret"}, "name", "match pattern"),
    Case("name is too long", {"name": "x" * 64}, "name", "match pattern"),
    Case("seed in quotes", {"seed": "98765"}, "seed", "valid integer"),
    Case("seed is negative", {"seed": -98765}, "seed", "greater than or equal to 0"),
    Case("seed is beyond 63 bits", {"seed": 2**63}, "seed", "less than", ""),
    Case("number of rounds is missing", {"num_rounds": GONE}, "num_rounds", "Field required"),
    Case("number of rounds is -1", {"num_rounds": -1}, "num_rounds", "greater than"),
    Case("number of rounds is 0", {"num_rounds": 0}, "num_rounds", "nothing but [statistics]"),
    Case("number of rounds is a fraction", {"num_rounds": 7.25}, "num_rounds", "valid integer"),
    Case("number of rounds is NaN", {"num_rounds": math.nan}, "num_rounds", "valid integer"),
    Case("number of rounds is true", {"num_rounds": True}, "num_rounds", "valid integer"),
    Case("number of threads is 0", {"torch_threads": 0}, "torch_threads", "greater than"),
    Case("unknown key", {"colour": PATIENT}, "colour", "Extra inputs are not permitted"),
    Case("misspelt key", {"num_round": 987}, "num_round", "did you mean 'num_rounds'?"),
    Case(
        "misspelt key in a section",
        {"training.learning_rat": 0.987},
        "training.learning_rat",
        "did you mean 'learning_rate'?",
    ),
    Case("unknown section", {"secagg": {"password": PATIENT}}, "secagg", "not permitted", PATIENT),
    Case("misspelt section", {"trainign": {"x": PATIENT}}, "trainign", "'training'", PATIENT),
    Case("a section is missing", {"privacy": GONE}, "privacy", "Field required"),
    Case("a section is a value", {"model": PATIENT}, "model", "object"),
    Case("a section is a list of sections", {"input": [{"size": [32, 32]}]}, "input", "object"),
    Case("unknown task", {"task.kind": "segmentation3d"}, "task.kind", "'classification'"),
    Case("unknown kind of labels", {"task.labels": "two-class"}, "task.labels", "'binary'"),
    Case("no classes", {"task.classes": []}, "task.classes", "at least 1"),
    Case("classes are one text", {"task.classes": "lesion"}, "task.classes", "array"),
    Case("a class is a number", {"task.classes": ["a", 98765]}, "task.classes.1", "", "98765"),
    Case("binary with three classes", {"task.classes": ["a", "b", "c"]}, "task", "exactly two"),
    Case("multiclass with two classes", {"task.labels": "multiclass"}, "task", "three", ""),
    Case(
        "classes repeat a name",
        {**THREE_CLASSES, "task.classes": ["a", PATIENT, PATIENT]},
        "task",
        "repeats a name",
        PATIENT,
    ),
    Case("model without a name", {"model.name": GONE}, "model.name", "Field required"),
    Case("unknown model", {"model.name": "resnet50"}, "model.name", "'cnn', 'resnet18'"),
    Case("width above 512", {"model.width": 9876}, "model.width", "equal to 512"),
    Case("width does not fit the groups", {"model.width": 13}, "model.width", "multiple of 4"),
    Case("unknown activation", {"model.activation": "swish"}, "model.activation", "'relu'"),
    Case("dropout of 1", {"model.dropout": 1.0}, "model.dropout", "less than 1"),
    Case("dropout is NaN", {"model.dropout": math.nan}, "model.dropout", "finite"),
    Case("a cnn key for a ResNet", {**RESNET, "model.width": 8}, "model.width", "not permitted"),
    Case("four image sides", {"input.size": [32] * 4}, "input.size", "at most 3"),
    Case("a volume for a cnn", {"input.size": [132, 132, 132]}, "input.size", "two dimensions"),
    Case("one image side", {"input.size": [128]}, "input.size", "an image has two sides"),
    Case("two channels", {"input.channels": 2}, "input.channels", "1 or 3"),
    Case("unknown intensity", {"input.intensity": "hounsfield"}, "input.intensity", "'dtype'"),
    Case("std of 0", {"input.std": 0.0}, "input.std", "greater than 0"),
    Case("mean is infinite", {"input.mean": math.inf}, "input.mean", "finite"),
    Case(
        "images too small for a ResNet",
        {**RESNET, "input.size": [8, 32]},
        "input.size",
        "resnet18 needs at least 16 pixels",
    ),
    Case("unknown optimizer", {"training.optimizer": "lion"}, "training.optimizer", "'sgd'"),
    Case("no learning rate", {"training.learning_rate": GONE}, "training.learning_rate", "requi"),
    Case("learning rate 0", {"training.learning_rate": 0.0}, "training.learning_rate", "than 0"),
    Case(
        "learning rate is NaN",
        {"training.learning_rate": math.nan},
        "training.learning_rate",
        "finite number",
    ),
    Case(
        "learning rate in quotes",
        {"training.learning_rate": "0.0987"},
        "training.learning_rate",
        "valid number",
    ),
    Case("batch of 0", {"training.batch_size": 0}, "training.batch_size", "greater than"),
    Case(
        "batch as a list", {"training.batch_size": [987]}, "training.batch_size", "integer", "987"
    ),
    Case("both epochs and steps", {"training.local_steps": 987}, "training", "exactly one of"),
    Case("neither epochs nor steps", {"training.local_epochs": GONE}, "training", "exactly one"),
    Case("momentum for Adam", {"training.optimizer": "adam", "training.momentum": 0.9},
         "training", "momentum belongs to sgd", ""),
    Case("a chance above 1", {"training.augmentation.flip": 1.25},
         "training.augmentation.flip", "less than or equal to 1"),
    Case("negative noise", {"training.augmentation.noise": -0.125},
         "training.augmentation.noise", "greater than or equal to 0"),
    Case("early stopping by a figure the task does not have",
         {"training.early_stopping": {"patience": 2, "figure": "dice"}},
         "training.early_stopping.figure", "this task has loss, auroc", "dice"),
    Case("early stopping without patience", {"training.early_stopping.figure": "loss"},
         "training.early_stopping.patience", "Field required"),
    Case("unknown server optimizer", {"server_optimizer.name": "fedsomething"},
         "server_optimizer.name", "'fedavg'"),
    Case("privacy by another name", {"privacy.mode": "differential"}, "privacy.mode", "'none'"),
    Case("epsilon without a privacy plan", {"privacy.epsilon": 3.5}, "privacy.epsilon", "permit"),
    Case("a ring of 20 bits", {"aggregation.ring_bits": 20}, "aggregation.ring_bits", "16, 24"),
    Case("weight cap of 0", {"aggregation.weight_cap": 0}, "aggregation.weight_cap", "greater"),
    Case("a cohort of two", {"cohort.min_sites": 2}, "cohort.min_sites", "equal to 3"),
    Case("a cohort above 255", {"cohort.min_sites": 987}, "cohort.min_sites", "equal to 255"),
    Case("a deadline of 0 s", {"deadlines.upload_s": 0}, "deadlines.upload_s", "greater than 0"),
    Case("a deadline without end", {"deadlines.upload_s": math.inf}, "deadlines.upload_s",
         "finite"),
    Case("two members of one name", {"members": [{"name": "oslo-1"}] * 3}, "members",
         "same name", "oslo-1"),
    Case("fewer members than the cohort needs", {"members": [{"name": "oslo-1"}]}, "members",
         "cohort.min_sites is 3", "oslo-1"),
    Case("members are plain names", {"members": ["oslo-1"]}, "members.0", "object", "oslo-1"),
    Case("a member's name with a dot", {"members": [{"name": "a"}, {"name": PATIENT}]},
         "members.1.name", "match pattern", PATIENT),
    # What an image is asked, and which network can answer.
    Case("segmentation with one class", {**SEGMENTATION, "task.classes": ["lesion"]}, "task",
         "background and at least one class", "lesion"),
    Case("segmentation of two classes of one name",
         {**SEGMENTATION, "task.classes": [PATIENT, PATIENT]}, "task", "repeats a name", PATIENT),
    Case("labels for a segmentation", {**SEGMENTATION, "task.labels": "binary"}, "task.labels",
         "not permitted", ""),
    *(Case(f"a {name} for a segmentation",
           {**SEGMENTATION, "model": {"name": name}}, "model.name",
           f"{name} answers for a whole image; this task is segmentation", "")
      for name in ("cnn", "resnet18", "densenet121", "efficientnet-b0")),
    *(Case(f"a {name} for a classification", {"model": {"name": name}}, "model.name",
           f"{name} answers for every pixel; this task is classification", "")
      for name in ("unet", "attention-unet", "segresnet")),
    *(Case(f"a {name} for a detection", {**DETECTION, "model": {"name": name}}, "model.name",
           f"{name} answers for {what}; this task is detection", "")
      for name, what in (("cnn", "a whole image"), ("unet", "every pixel"))),
    Case("a detector for a classification", {"model": {"name": "center-unet"}}, "model.name",
         "center-unet finds boxes; this task is classification"),
    Case("a detector of volumes", {**DETECTION, "input.size": [32, 32, 32]}, "input.size",
         "center-unet takes images of two dimensions"),
    Case("a detector and a side that does not halve", {**DETECTION, "input.size": [40, 32]},
         "input.size", "center-unet needs sides that are multiples of 16"),
    Case("a loss that finds no centres", {**DETECTION, "training.loss.kind": "cross-entropy"},
         "training.loss.kind", "detection takes focal"),
    Case("turned boxes", {**DETECTION, "training.augmentation.rotate_degrees": 5},
         "training.augmentation.rotate_degrees", "no box along the edges"),
    Case("patches to detect in", {**DETECTION, **PATCHES}, "input.patches",
         "detection looks at whole images"),
    Case("two classes of boxes of one name", {**DETECTION, "task.classes": [PATIENT, PATIENT]},
         "task", "repeats a name", PATIENT),
    Case("a threshold that nothing passes", {**DETECTION, "task.threshold": 1}, "task.threshold",
         "less than 1"),
    Case("a table that nobody reads", {"table": TABLE}, "table",
         "cnn sees images alone; use multimodal, mlp or logistic"),
    Case("columns that are not given", {"model": {"name": "mlp"}, "input.size": []}, "table",
         "mlp reads clinical columns"),
    Case("images that nobody sees", {"model": {"name": "logistic"}, "table": TABLE}, "input",
         "logistic sees no images; leave [input] out"),
    Case("no image beside a table",
         {"model": MULTIMODAL, "table": TABLE, "input.size": []}, "input",
         "multimodal looks at images too"),
    Case("an image too small beside a table", {"model": {**MULTIMODAL, "image": {"name":
         "densenet121"}}, "table": TABLE, "input.size": [16, 16]}, "input.size",
         "densenet121 needs at least 32"),
    Case("no images for a network that needs them", {"input.size": []}, "input",
         "cnn looks at images: give [input]"),
    Case("two columns of one name", {"model": MULTIMODAL, "table.columns": 2 * TABLE["columns"]},
         "table", "two columns have one name"),
    Case("a range that is empty", {"model": MULTIMODAL, "table.columns": [
         {"name": "age", "kind": "number", "low": 9, "high": 8}]}, "table.columns.0",
         "low must be below high"),
    Case("layers frozen where nobody looks",
         {"model": {**MULTIMODAL, "image": {"name": "cnn", "frozen": ["head"]}}, "table": TABLE},
         "model.image.frozen", "name them in model.frozen"),
    Case("one value twice", {"model": MULTIMODAL, "table.columns": [
         {"name": "sex", "kind": "category", "values": [PATIENT, PATIENT]}]},
         "table.columns.0", "values repeats one", PATIENT),
    Case("changes of images that are not there", {"model": {"name": "logistic"}, "table": TABLE,
         "input.size": [], "training.augmentation.flip": 0.5}, "training.augmentation",
         "changes images, and there are none"),
    Case("control variates under privacy", {**PRIVATE, "training.control_variates": True},
         "training.control_variates", "mean gradient besides, which the noise does not cover"),
    Case("control variates and momentum",
         {"training.control_variates": True, "training.momentum": 0.9},
         "training.control_variates", "use plain sgd, without momentum"),
    Case("control variates and another rule",
         {"training.control_variates": True, "server_optimizer": {"name": "fedadam"}},
         "server_optimizer.name", "control variates go with fedavg"),
    Case("control variates and a pull", {"training.control_variates": True,
         "training.proximal": 0.1}, "training.proximal", "correct drift already"),
    Case("local layers and an average", {"training.local_normalisation": True,
         "server_optimizer": {"name": "fedavg", "ema": 0.5}}, "server_optimizer.ema",
         "one model, not an average"),
    Case("local layers and early stopping", {**STOPPING, "training.local_normalisation": True},
         "training.early_stopping", "keeps what belongs to the last round's model alone"),
    Case("a SegResNet and a side that does not halve",
         {**SEGMENTATION, "model": {"name": "segresnet"}, "input.size": [36, 32]}, "input.size",
         "segresnet needs sides that are multiples of 8"),
    Case("a window of no width", {"input.intensity": "window", "input.window": [40, 40]}, "input",
         "the lowest value that is kept must be below the highest"),
    Case("a window that nobody uses", {"input.window": [0, 40]}, "input",
         'belongs to intensity = "window"'),
    Case("a spacing for another number of sides", {"input.spacing": [1, 1, 1]}, "input",
         "spacing and size must have as many values"),
    Case("a U-Net and a side that does not halve three times",
         {**SEGMENTATION, "input.size": [32, 36]}, "input.size", "unet needs sides that are mult"),
    Case("a deeper U-Net than the side halves",
         {**SEGMENTATION, "model.channels": [4, 4, 4, 4, 4, 4, 4]}, "input.size",
         "multiples of 64"),
    Case("a volume of which one side does not halve",
         {**SEGMENTATION, "input.size": [12, 16, 16]}, "input.size", "multiples of 8"),
    Case("an attention U-Net and a side that does not halve",
         {**SEGMENTATION, "model": {"name": "attention-unet", "channels": [8, 8]},
          "input.size": [31, 32]}, "input.size", "attention-unet needs sides that are multiples"),
    Case("a U-Net of one level", {**SEGMENTATION, "model.channels": [16]}, "model.channels",
         "at least 2"),
    Case("a U-Net of eight levels", {**SEGMENTATION, "model.channels": [4] * 8}, "model.channels",
         "at most 7"),
    Case("a U-Net's level of five maps", {**SEGMENTATION, "model.channels": [16, 32, 5]},
         "model.channels.2", "multiple of 4"),
    Case("attention gates with residual units",
         {**SEGMENTATION, "model": {"name": "attention-unet", "residual_units": 987}},
         "model.residual_units", "not permitted", "987"),
    Case("images too small for a DenseNet",
         {"model": {"name": "densenet121"}, "input.size": [31, 64]}, "input.size",
         "densenet121 needs at least 32 pixels"),
    Case("images too small for an EfficientNet",
         {"model": {"name": "efficientnet-b0"}, "input.size": [64, 15]}, "input.size",
         "efficientnet-b0 needs at least"),
    Case("a volume too flat for a ResNet", {**RESNET, "input.size": [8, 32, 32]}, "input.size",
         "resnet18 needs at least 16 pixels"),
    Case("frozen parameters as one text", {"model.frozen": PATIENT}, "model.frozen", "array"),
    # How images become input.
    Case("patches for a label", PATCHES, "input.patches", "classification looks at whole images"),
    Case("patches in epochs", {**SEGMENTATION, "input.patches": True}, "training.local_epochs",
         "give local_steps", ""),
    Case("one colour of three channels", {"input.channels": 3, "input.colour": "green"},
         "input.colour", "set input.channels = 1", "green"),
    Case("an unknown colour", {"input.colour": "infrared"}, "input.colour", "'luminance'"),
    # What training lowers.
    Case("unknown loss", {"training.loss.kind": "tversky"}, "training.loss.kind",
         "'cross-entropy'"),
    *(Case(f"{kind} for a label", {"training.loss.kind": kind}, "training.loss.kind",
           "compares masks; this task is classification", "")
      for kind in ("dice", "dice-cross-entropy")),
    Case("a weight for each of three classes, of two",
         {"training.loss.class_weights": [1.5, 2.5, 9.75]}, "training.loss.class_weights",
         "3 given, the task has 2", "9.75"),
    Case("too few weights for a segmentation",
         {**SEGMENTATION, "task.classes": ["a", "b", "c"],
          "training.loss.class_weights": [1.5, 9.75]},
         "training.loss.class_weights", "2 given, the task has 3", "9.75"),
    Case("one weight for two classes", {"training.loss.class_weights": [9.75]},
         "training.loss.class_weights", "1 given, the task has 2", "9.75"),
    Case("weights for Dice alone",
         {**SEGMENTATION, "training.loss": {"kind": "dice", "class_weights": [1.5, 9.75]}},
         "training.loss.class_weights", "dice takes none", "9.75"),
    Case("a class of weight 0", {"training.loss.class_weights": [1.5, 0.0]},
         "training.loss.class_weights.1", "greater than 0"),
    Case("focal loss that forgets no easy example", {"training.loss.focal_gamma": 0.9875},
         "training.loss.focal_gamma", "greater than or equal to 1"),
    Case("Dice over something else", {"training.loss.dice_over": "volume"},
         "training.loss.dice_over", "'image' or 'batch'"),
    # How long, and which model is returned.
    Case("early stopping by AUROC of a segmentation",
         {**SEGMENTATION, "training.early_stopping": {"patience": 2, "figure": "auroc"}},
         "training.early_stopping.figure", "this task has loss, dice, iou", "auroc"),
    Case("early stopping and an average of models",
         {**STOPPING, "server_optimizer": {"name": "fedavg", "ema": 0.9875}},
         "server_optimizer.ema", "early stopping a single one", "0.9875"),
    Case("an average that never forgets", {"server_optimizer": {"name": "fedavgm", "ema": 1.0}},
         "server_optimizer.ema", "less than 1", ""),
    Case("logit adjustment of a segmentation",
         {**SEGMENTATION, "training.logit_adjustment": True}, "training.logit_adjustment",
         "labels of whole images", ""),
    Case("warm-up over all rounds", {"training.warmup_rounds": 2}, "training.warmup_rounds",
         "the study has 2 rounds in all"),
    Case("warm-up over more than all rounds", {"training.warmup_rounds": 987},
         "training.warmup_rounds", "the study has 2 rounds in all"),
    Case("negative warm-up", {"training.warmup_rounds": -987}, "training.warmup_rounds",
         "greater than or equal to 0"),
    Case("a pull the wrong way", {"training.proximal": -0.125}, "training.proximal",
         "greater than or equal to 0"),
    # What would release more about a patient than the noise covers.
    Case("privacy and Dice over the batch",
         {**SEGMENTATION, **PRIVATE, "training.loss": {"kind": "dice", "dice_over": "batch"}},
         "training.loss.dice_over", "one patient's gradient depend on another's", ""),
    Case("privacy and Dice over the batch beside cross-entropy",
         {**SEGMENTATION, **PRIVATE,
          "training.loss": {"kind": "dice-cross-entropy", "dice_over": "batch"}},
         "training.loss.dice_over", "set it to image", ""),
    Case("privacy in half precision", {**PRIVATE, "training.mixed_precision": True},
         "training.mixed_precision", "clip norm is measured on", ""),
    Case("privacy and logit adjustment", {**PRIVATE, "training.logit_adjustment": True},
         "training.logit_adjustment", "class shares, which are private", ""),
    Case("privacy and early stopping", {**PRIVATE, **STOPPING}, "training.early_stopping",
         "not noised", ""),
    Case("privacy by both epsilon and noise", {**PRIVATE, "privacy.epsilon": 3.5}, "privacy",
         "exactly one of epsilon", "3.5"),
    Case("privacy by neither epsilon nor noise", {**PRIVATE, "privacy.noise_multiplier": GONE},
         "privacy", "exactly one of epsilon", ""),
    Case("several images of a unit that is one image",
         {**PRIVATE, "privacy.unit": "image", "privacy.max_images_per_patient": 987}, "privacy",
         "leave out max_images_per_patient", "987"),
]  # fmt: skip

# Values that stand just on the right side of the conflicts above.
GOOD_STUDIES = {
    "a segmentation": SEGMENTATION,
    "a segmentation of four classes with a weight each":
        {**SEGMENTATION, "task.classes": list("abcd"),
         "training.loss": {"kind": "dice-cross-entropy", "class_weights": [1.0, 2.0, 3.0, 4.0]}},
    "a label with a weight per class": {"training.loss.class_weights": [1.0, 2.0]},
    "a focal loss of labels": {"training.loss.kind": "focal", "training.loss.focal_gamma": 1.0},
    "a focal loss of pixels": {**SEGMENTATION, "training.loss.kind": "focal"},
    "the smallest image of a U-Net": {**SEGMENTATION, "input.size": [8, 8]},
    "a volume": {**SEGMENTATION, "input.size": [8, 16, 24]},
    "an attention U-Net of two levels":
        {**SEGMENTATION, "model": {"name": "attention-unet", "channels": [8, 8]},
         "input.size": [30, 32]},
    "a U-Net as deep as the side halves": {**SEGMENTATION, "model.channels": [4, 4, 4, 4, 4, 8]},
    "patches in steps": {**SEGMENTATION, **PATCHES},
    "the green of colour files": {"input.colour": "green"},
    "three channels": {"input.channels": 3},
    "a ResNet of volumes": {**RESNET, "input.size": [16, 16, 16]},
    "the smallest image of a DenseNet":
        {"model": {"name": "densenet121"}, "input.size": [32, 32]},
    "an EfficientNet": {"model": {"name": "efficientnet-b0"}},
    "early stopping by Dice":
        {**SEGMENTATION, "training.early_stopping": {"patience": 2, "figure": "dice"}},
    "an average of models": {"server_optimizer": {"name": "fedyogi", "ema": 0.875}},
    "early stopping without an average": {**STOPPING, "server_optimizer": {"name": "fedavgm"}},
    "warm-up over all rounds but one": {"training.warmup_rounds": 1},
    "logit adjustment of labels": {"training.logit_adjustment": True},
    "half precision": {"training.mixed_precision": True},
    "Dice over the batch, without privacy":
        {**SEGMENTATION, "training.loss": {"kind": "dice", "dice_over": "batch"}},
    "privacy with Dice over each image":
        {**SEGMENTATION, **PRIVATE, "training.loss": {"kind": "dice", "dice_over": "image"}},
    "privacy with an average of models":
        {**PRIVATE, "server_optimizer": {"name": "fedavg", "ema": 0.875}},
    "privacy with several images of a patient": {**PRIVATE, "privacy.max_images_per_patient": 4},
}  # fmt: skip

SITE_CASES = [
    SiteCase("site without a name", {"name": GONE}, "name", "Field required"),
    SiteCase("site with a name of two words", {"name": "St Olav"}, "name", "match pattern"),
    SiteCase("no state folder", {"state_dir": GONE}, "state_dir", "Field required"),
    SiteCase("state folder is a number", {"state_dir": 98765}, "state_dir", "valid string"),
    SiteCase("unknown device", {"device": "cuda:7"}, "device", "'auto', 'cpu' or 'cuda'"),
    SiteCase("no data", {"data": GONE}, "data", "Field required"),
    SiteCase("data is a path", {"data": PATIENT}, "data", "object"),
    SiteCase("data without a format", {"data.format": GONE}, "data.format", "Field required"),
    SiteCase("unknown format", {"data.format": "bruker"}, "data.format", "'npz', 'folder'"),
    SiteCase("data without a root", {"data.root": GONE}, "data.root", "Field required"),
    SiteCase("root is a list", {"data.root": [PATIENT]}, "data.root", "valid string", PATIENT),
    SiteCase("data without a name", {"data.name": GONE}, "data.name", "Field required"),
    SiteCase("misspelt root", {"data.roots": PATIENT}, "data.roots", "did you mean 'root'?"),
    SiteCase("a key of another format", {"data.layout": "classes"}, "data.layout", "permitted"),
    SiteCase("a secret in the wrong place", {"password": PATIENT}, "password", "not permitted"),
    SiteCase("declares no patient", {"data.declared_patients": 0}, "data.declared_patients",
             "greater than"),
    SiteCase("declares NaN patients", {"data.declared_patients": math.nan},
             "data.declared_patients", "valid integer"),
    SiteCase("unknown way with broken files", {"data.on_broken": "ignore"}, "data.on_broken",
             "'stop' or 'skip'"),
    SiteCase("half of the patients for the test", {"data.splits.test": 0.5}, "data.splits.test",
             "less than 0.5"),
    SiteCase("negative validation share", {"data.splits.validation": -0.125},
             "data.splits.validation", "greater than"),
    SiteCase("split seed in quotes", {"data.split_seed": "98765"}, "data.split_seed", "integer"),
    SiteCase("layout of another kind", {**FOLDER, "data.layout": "pairwise"}, "data.layout",
             "'classes'", "pairwise"),
    SiteCase("patient pattern that is none", {**FOLDER, "data.patient": f"({PATIENT}"},
             "data.patient", "not a regular expression", PATIENT),
    SiteCase("patient pattern without a group", {**FOLDER, "data.patient": PATIENT},
             "data.patient", "exactly one group", PATIENT),
    SiteCase("patient pattern with two groups", {**FOLDER, "data.patient": "(12345)-(x)"},
             "data.patient", "exactly one group", "12345"),
    SiteCase("patients flag as a word", {"data.patients": "yes!"}, "data.patients", "boolean"),
    SiteCase("three phantoms", {**PHANTOM, "data.num_patients": 3}, "data.num_patients", "4"),
    SiteCase("phantoms with a root", {**PHANTOM, "data.root": PATIENT}, "data.root", "permitted",
             PATIENT),
    SiteCase("a phantom site beyond 255", {**PHANTOM, "data.site_index": 987},
             "data.site_index", "equal to 254"),
]  # fmt: skip


@pytest.fixture
def write(tmp_path: Path, tiny_study_table: Callable[[], dict[str, Any]]) -> Callable[..., Path]:
    """Write a good study or site file with some edits."""

    def write_file(edits: Mapping[str, Any], kind: type[Frozen] = Study) -> Path:
        table = copy.deepcopy(SITE) if kind is SiteConfig else tiny_study_table()
        for key, value in copy.deepcopy(dict(edits)).items():
            *sections, last = key.split(".")
            here = table
            for section in sections:
                here = here.setdefault(section, {})
            here[last] = value
        path = tmp_path / "written.toml"
        path.write_text(tomli_w.dumps(without_gone(table)), encoding="utf-8")
        return path

    return write_file


def without_gone(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: without_gone(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not GONE
    }


def leaves(table: Mapping[str, Any], beginning: str = "") -> dict[str, str]:
    """Dotted key to value, as text."""
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{beginning}{key}.")
        else:
            found[beginning + key] = repr(value)
    return found


def problems(error: ConfigError) -> dict[str, str]:
    """Key to sentence, from a message whose head counts them."""
    head, *lines = str(error).splitlines()
    assert head == f"written.toml has {len(lines)} problem(s):"
    assert all(line.startswith("  ") for line in lines)
    return dict(line.strip().split(": ", maxsplit=1) for line in lines)


@pytest.mark.parametrize("kind", [Study, SiteConfig])
def test_the_file_that_all_mistakes_are_made_in_is_good(
    kind: type[Frozen], write: Callable[..., Path]
) -> None:
    assert isinstance(load(write({}, kind), kind), kind)


@pytest.mark.parametrize("title", GOOD_STUDIES)
def test_what_fits_together_is_accepted_and_kept(title: str, write: Callable[..., Path]) -> None:
    path = write(GOOD_STUDIES[title])
    study, table = load(path, Study), tomllib.loads(path.read_text())
    assert leaves(table).items() <= leaves(study.as_table()).items()


@pytest.mark.parametrize("case", [*STUDY_CASES, *SITE_CASES], ids=str)
def test_one_mistake_gives_one_problem_that_names_the_key_and_not_the_value(
    case: Case, write: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(write(case.edits, case.kind), case.kind)
    ((key, sentence),) = problems(refused.value).items()
    assert (key, refused.value.exit_code) == (case.key, 2)
    assert case.says in sentence
    first = next(iter(case.edits.values()))
    secret = first if isinstance(first, str) else repr(first)
    if case.secret is not None:
        secret = case.secret
    if len(secret) > 3:  # shorter ones also occur in honest sentences
        assert secret not in str(refused.value)


def test_there_are_enough_mistakes() -> None:
    titles = [case.title for case in (*STUDY_CASES, *SITE_CASES)]
    assert len(set(titles)) == len(titles) >= 50


def test_impossible_combinations_are_shown_at_once(write: Callable[..., Path]) -> None:
    edits = {
        **PRIVATE,
        **STOPPING,
        "model": UNET,
        "input": {"size": [36, 32], "patches": True, "channels": 3, "colour": "red"},
        "training.logit_adjustment": True,
        "training.mixed_precision": True,
        "training.loss": {"kind": "dice", "dice_over": "batch", "class_weights": [1.0]},
        "training.warmup_rounds": 2,
        "server_optimizer": {"name": "fedavg", "ema": 0.5},
    }
    with pytest.raises(ConfigError) as refused:
        load(write(edits), Study)
    found = problems(refused.value)
    assert set(found) == {
        "model.name",
        "input.size",
        "input.patches",
        "input.colour",
        "training.local_epochs",
        "training.logit_adjustment",
        "training.early_stopping",
        "training.mixed_precision",
        "training.warmup_rounds",
        "training.loss.kind",
        "training.loss.class_weights",
        "training.loss.dice_over",
        "server_optimizer.ema",
    }
    assert found["training.loss.class_weights"] == (
        "1 given, the task has 2; dice takes none; every class counts the same"
    )


def test_several_problems_are_shown_at_once(write: Callable[..., Path]) -> None:
    edits = {
        "seed": "98765",
        "colour": PATIENT,
        "model.width": 13,
        "input.size": [32, "32"],
        "training.early_stopping": {"patience": 3, "figure": "dice"},
        "cohort.min_sites": 200,
        "deadlines": GONE,
        "privacy": GONE,
    }
    with pytest.raises(ConfigError) as refused:
        load(write(edits), Study)
    wanted = {"seed", "colour", "model.width", "input.size.1", "privacy"}
    assert wanted <= set(problems(refused.value))
    assert PATIENT not in str(refused.value)


@pytest.mark.parametrize(
    ("edits", "key"),
    [
        ({**SEGMENTATION, "model.channels": [16, 5]}, "model.channels.1"),
        ({"input.size": [32, "32"]}, "input.size.1"),
    ],
    ids=["a U-Net's level", "an image's side"],
)
def test_a_wrong_item_does_not_make_its_list_too_short(
    edits: dict[str, Any], key: str, write: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(write(edits), Study)
    assert set(problems(refused.value)) == {key}


def test_a_wrong_type_does_not_hide_an_impossible_combination(write: Callable[..., Path]) -> None:
    edits = {"seed": "98765", "members": [{"name": "a"}] * 3, "deadlines.upload_s": -5}
    with pytest.raises(ConfigError) as refused:
        load(write(edits), Study)
    assert set(problems(refused.value)) == set(edits)


def test_a_site_with_four_mistakes_hears_of_four(write: Callable[..., Path]) -> None:
    edits = {
        "device": "tpu",
        "data.root": GONE,
        "data.split_seed": -1,
        "data.splits.test": 0.75,
    }
    with pytest.raises(ConfigError) as refused:
        load(write(edits, SiteConfig), SiteConfig)
    assert set(problems(refused.value)) == {"device", *list(edits)[1:]}


RAW_FILES = {
    "broken TOML": (b"name = \n", "not valid TOML"),
    "a key twice": (b"seed = 1\nseed = 2\n", "not valid TOML"),
    "JSON instead of TOML": (b'{"name": "x"}', "not valid TOML"),
    "Latin-1 text": ('name = "Tromsø"'.encode("latin-1"), "not UTF-8 text at byte 13"),
    "UTF-16 text": ('name = "x"'.encode("utf-16"), "not UTF-8 text at byte 0"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "not UTF-8 text at byte 0"),
}


@pytest.mark.parametrize("kind", [Study, SiteConfig])
@pytest.mark.parametrize("title", RAW_FILES)
def test_a_file_that_is_not_toml_is_refused_by_name(
    title: str, kind: type[Frozen], tmp_path: Path
) -> None:
    content, sentence = RAW_FILES[title]
    path = tmp_path / "written.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"written.toml: {sentence}"):
        load(path, kind)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.toml: No such file .*check the path"):
        load(tmp_path / "absent.toml", Study)
    with pytest.raises(ConfigError, match=f"{tmp_path.name}: Is a directory"):
        load(tmp_path, Study)


def test_an_empty_file_hears_of_everything_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "written.toml").write_text("")
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "written.toml", SiteConfig)
    assert problems(refused.value) == dict.fromkeys(("name", "state_dir", "data"), "Field required")


def test_a_path_is_relative_to_the_file_it_stands_in(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write({"data.root": "../scans"}, SiteConfig)
    monkeypatch.chdir(path.parent.parent)
    loaded = load(Path(path.parent.name) / path.name, SiteConfig)
    assert loaded.data.root == tmp_path.parent / "scans"
    assert loaded.state_dir == tmp_path / "state"


def test_a_configuration_cannot_be_changed(write: Callable[..., Path]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(write({}), Study).seed = 2


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_example_study_and_site_table_is_good(path: Path) -> None:
    if path.name.endswith(".site.toml"):
        return
    study, simulation = plan_simulation(path, num_sites=5)
    assert study.name == path.stem
    assert study.site_names == ("site-1", "site-2", "site-3", "site-4", "site-5")
    assert simulation.data["name"]


def test_the_digest_survives_writing_and_reading(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    study = load(write({"training.early_stopping": {"patience": 2}}), Study)
    again = tmp_path / "again.toml"
    again.write_text(tomli_w.dumps(study.as_table()))
    assert load(again, Study) == study
    assert load(again, Study).digest() == study.digest()


def test_the_digest_depends_on_every_value_and_not_on_defaults_being_spelt_out(
    write: Callable[..., Path],
) -> None:
    plain = load(write({}), Study).digest()
    assert load(write({"input.std": 1.0, "cohort": {}}), Study).digest() == plain
    for key, value in {"seed": 4, "input.std": 2.0, "members": GONE, "num_rounds": 3}.items():
        assert load(write({key: value}), Study).digest() != plain


def test_overrides_replace_values_and_are_checked_like_the_file(
    write: Callable[..., Path],
) -> None:
    path = write({})
    assert load(path, Study, {"training.learning_rate": 0.5}).training.learning_rate == 0.5
    assert load(path, Study, {"aggregation.ring_bits": 16}).aggregation.ring_bits == 16
    with pytest.raises(ConfigError, match=r"aggregation\.ring_bits"):
        load(path, Study, {"aggregation.ring_bits": 17})
    with pytest.raises(ConfigError, match=r"--set seed\.x: seed is a value, not a table"):
        load(path, Study, {"seed.x": 3})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a.b = 3.5", 3.5),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ('a.b="7"', "7"),
        ("a.b=adamw", "adamw"),
        ("a.b=x=y", "x=y"),
        ("a.b=", ""),
    ],
)
def test_an_assignment_is_toml_or_else_text(text: str, value: object) -> None:
    assert parse_assignment(text) == ("a.b", value)


@pytest.mark.parametrize("text", ["num_rounds", "=3", " = 3", ""])
def test_an_assignment_needs_a_key_and_an_equals_sign(text: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_assignment(text)


COMMAND_LINES = {
    "an unknown key of the study": (["--set", f"training.learning_rat={PATIENT}"],
                                    "training.learning_rat: "),
    "a number in quotes": (["--set", 'num_rounds="98765"'], "num_rounds: "),
    "a partition that does not exist": (["--partition", "column:age"], "--partition"),
    "too few sites": (["--sites", "2"], "2 sites, the study needs 3 or more"),
    "phantoms are not dealt out": (["--partition", "iid"], "each site generates its own"),
    "a study that is not there": (["--study", "nowhere.toml"], "nowhere.toml: No such file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def phantom_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for name in ("phantoms.toml", "phantoms.site.toml"):
        shutil.copy(ROOT / "studies" / name, folder)
    return folder / "phantoms.toml"


def imported(trace: str) -> Iterator[str]:
    """Modules in what ``-X importtime`` wrote."""
    for line in trace.splitlines():
        if line.startswith("import time:"):
            yield line.rsplit("|", maxsplit=1)[1].strip()


@pytest.mark.parametrize("title", COMMAND_LINES)
def test_the_command_line_refuses_before_torch_is_imported(
    title: str, phantom_study: Path, tmp_path: Path
) -> None:
    arguments, sentence = COMMAND_LINES[title]
    command = [ROOT / "scripts" / "simulate", "--study", phantom_study, *arguments]
    result = subprocess.run(
        [*command, "--run-dir", tmp_path / "run"],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    loaded = set(imported(result.stderr))
    message = "".join(
        line for line in result.stderr.splitlines(True) if not line.startswith("import time:")
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert message.startswith("ConfigError: ")
    assert sentence in message
    assert "Traceback" not in message
    assert PATIENT not in message
    assert "98765" not in message
    assert "common.config" in loaded
    assert not loaded & {"torch", "monai", "flwr", "numpy"}
    assert not list(tmp_path.iterdir())


def test_a_wrong_option_is_a_usage_error(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "simulate", "--sties", "4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "No such option" in result.stderr


@pytest.mark.slow
def test_50_mutated_files_each_end_a_command_with_one_error_that_names_the_key(
    write: Callable[..., Path],
) -> None:
    """``-s`` shows how long each took; importing torch in the same minute is the bound."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, monai"], check=True)
    torch_s = time.perf_counter() - started
    seconds = []
    cases = [*STUDY_CASES[:: len(STUDY_CASES) // 35], *SITE_CASES][:50]
    for case in cases:
        path = write(case.edits, case.kind)
        command = [BIN / "fl-server", "--study", path, "--dry-run"]
        if case.kind is SiteConfig:
            command = [BIN / "fl-client", "--site-config", path, "check"]
        started = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - started)
        assert (ended.returncode, ended.stdout) == (2, ""), case.title
        assert ended.stderr.startswith("ConfigError: written.toml has 1 problem(s):"), case.title
        assert f"\n  {case.key}: " in ended.stderr, case.title
    slowest = f"slowest {max(seconds):.2f} s, torch {torch_s:.2f} s"
    print(f"{len(cases)} files, exit 2 each; {slowest}")  # noqa: T201
    assert len(cases) == 50
    assert max(seconds) < torch_s


def test_the_keys_that_could_be_meant_are_collected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of unknown keys would take minutes otherwise."""

    class Small(Frozen):
        number: int = 1

    schemas = []

    def schema(kind: type[Frozen], **more: Any) -> dict[str, Any]:
        schemas.append(kind)
        return {"properties": {"number": {}}}

    monkeypatch.setattr(Frozen, "model_json_schema", classmethod(schema))
    with pytest.raises(ConfigError, match="did you mean 'number'"):
        validate({f"numbe{k}": 1 for k in range(50)}, Small, source=Path("small.toml"))
    assert len(schemas) == 1


def test_a_message_is_read_once_and_of_its_wrong_keys_a_few_are_named() -> None:
    wrong = json.dumps({"\x1b[8m": 1, **{f"key{k}": 1 for k in range(99)}})
    with pytest.raises(RemoteProtocolError) as caught:
        parse_message(wrong, Frozen, what="thing", rule="R2")
    assert str(caught.value).startswith("not a thing of this version: ?[8m, key0, key1")
    assert str(caught.value).endswith("key8 and 90 more [R2]")


def test_a_message_whose_values_conflict_is_refused() -> None:
    class Pair(Frozen):
        low: int
        high: int

        def conflicts(self) -> Iterator[tuple[str, str]]:
            if self.low > self.high:
                yield "low", "is above high"

    assert parse_message('{"low": 1, "high": 2}', Pair, what="pair").high == 2
    with pytest.raises(RemoteProtocolError, match="not a pair of this version: low"):
        parse_message('{"low": 3, "high": 2}', Pair, what="pair")
