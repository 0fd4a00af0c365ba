"""What was studied, in words: one row for each choice of a study that its readers should know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from common.study import (
    AttentionUnet,
    Augmentation,
    CenterUnet,
    Input,
    Logistic,
    Mlp,
    Model,
    Multimodal,
    SegResNet,
    Study,
    Table,
    Training,
    Unet,
)
from server.reporting.glossary import loss_of, title_of

MODELS: Final = {
    "cnn": "Small convolutional network",
    "resnet18": "ResNet-18",
    "densenet121": "DenseNet-121",
    "efficientnet-b0": "EfficientNet-B0",
    "unet": "U-Net",
    "attention-unet": "U-Net with attention gates",
    "segresnet": "SegResNet",
    "logistic": "Logistic regression",
    "mlp": "Layers of hidden units",
    "multimodal": "Network for images beside a layer for clinical columns",
    "center-unet": "U-Net with attention gates that finds centres and sides of boxes",
}
COLOURS: Final = {
    "luminance": "greyscale",
    "red": "the red channel of a colour image",
    "green": "the green channel of a colour image",
    "blue": "the blue channel of a colour image",
}
OPTIMIZERS: Final = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
SCHEDULES: Final = {
    "constant": "the same in every round",
    "linear": "falling in a straight line over the rounds",
    "cosine": "falling along a cosine over the rounds",
}
SERVER_OPTIMIZERS: Final = {
    "fedavg": "Mean update added to the model (FedAvg)",
    "fedavgm": "Mean update with momentum (FedAvgM)",
    "fedadam": "Rule of Adam on the mean update (FedAdam)",
    "fedadagrad": "Rule of Adagrad on the mean update (FedAdagrad)",
    "fedyogi": "Rule of Yogi on the mean update (FedYogi)",
}
LOSSES: Final = {
    "cross-entropy": "the higher, the less probability the model gives the right answer",
    "focal": "cross-entropy in which an answer counts less, the surer the model already is of it",
    "dice": "how much the answer fails to overlap the truth",
    "dice-cross-entropy": "missing overlap with the truth, and every single pixel for itself",
}


class Row(NamedTuple):
    """One row of the settings."""

    what: str
    words: str


def studied(study: Study, num_params: int, num_rounds: int) -> list[Row]:
    """Rows of the settings; what a study does not use has no row.

    Args:
      study: Of the run.
      num_params: Parameters that the sites trained.
      num_rounds: Rounds that the run took.
    """
    if not study.num_rounds:
        return [*_images(study.input), *_columns(study.table), Row("Rounds", "None: no training")]
    return [
        Row("Model", _model(study.model, num_params)),
        *_frozen(study.model),
        *_images(study.input),
        *_columns(study.table),
        *_patches(study.input),
        Row("Training in a round", _training(study.training)),
        *_changes(study.training.augmentation),
        Row("Loss", _loss(study)),
        *_proximal(study.training),
        *_between_rounds(study.training),
        *_balance(study),
        Row("Rounds", _rounds(study, num_rounds)),
        Row("Next model", _next_model(study)),
        *_average(study),
    ]


def grouped(number: int) -> str:
    """Thousands apart by a narrow space that never breaks."""
    return f"{number:,}".replace(",", "\u202f")


def _model(model: Model, num_params: int) -> str:
    words = [MODELS[model.name]]
    if isinstance(model, Multimodal):
        words.append(f"the images by {MODELS[model.image.name]}")
    if not isinstance(model, Logistic | Mlp):
        words.append("normalised by groups")
    if isinstance(model, Mlp):
        words.append(f"{listed(map(str, model.hidden))} units")
    if isinstance(model, Unet | AttentionUnet | SegResNet | CenterUnet):
        levels = listed(map(str, model.maps))
        words.append(f"{len(model.maps)} levels of {levels} feature maps")
    if dropout := getattr(model, "dropout", 0.0):
        words.append(f"dropout {dropout:g}")
    return f"{', '.join(words)}; {_counted(num_params, 'parameter')}"


def _frozen(model: Model) -> Iterator[Row]:
    if model.frozen:
        names = listed(f"“{name}”" for name in model.frozen)
        yield Row(
            "Frozen",
            f"Parameters whose names begin with {names} kept their initial values; no site "
            "trained or sent them",
        )


def _images(config: Input) -> Iterator[Row]:
    if config.size:
        yield Row("Input", _input(config))


def _columns(table: Table | None) -> Iterator[Row]:
    if table is None:
        return
    names = listed(f"“{column.name}”" for column in table.columns)
    text = f"{names}; scales and values are constants of the study, not of its patients"
    if table.missing == "indicator":
        text += (
            "; an empty cell counts as the middle of its scale, and the model is told that it is"
        )
    yield Row("Clinical columns", text)


def _input(config: Input) -> str:
    sides = " \N{MULTIPLICATION SIGN} ".join(map(str, config.size))
    kind = COLOURS[config.colour] if config.channels == 1 else "colour"
    if config.intensity == "image":
        values = "each image brought to mean 0 and standard deviation 1"
    elif config.window is not None:
        low, high = config.window
        values = f"values from {low:g} to {high:g} brought to between 0 and 1, others cut off"
    elif config.intensity == "file-window":
        values = "values in the window that each file names brought to between 0 and 1"
    else:
        values = "values brought from the range of the number type of the file to between 0 and 1"
    if config.mean or config.std != 1:
        values += f", then (value \N{MINUS SIGN} {config.mean:g}) / {config.std:g}"
    if config.spacing is not None:
        spacing = " \N{MULTIPLICATION SIGN} ".join(f"{side:g}" for side in config.spacing)
        values = f"resampled to {spacing} mm; {values}"
    return f"{sides} {pixel_of(config)}s, {kind}; {values}"


def _patches(config: Input) -> Iterator[Row]:
    if config.patches:
        yield Row(
            "Patches",
            "Images keep their own size: training drew patches of this size at random places, "
            "scoring moved a window of this size over the whole image",
        )


def _training(training: Training) -> str:
    if training.local_epochs:
        length = f"{_counted(training.local_epochs, 'pass', 'passes')} over the training split"
    else:
        length = _counted(training.local_steps or 0, "step")
    words = [
        f"{length} in batches of {training.batch_size}; {OPTIMIZERS[training.optimizer]}",
        f"learning rate {training.learning_rate:g}",
        SCHEDULES[training.schedule],
    ]
    if training.warmup_rounds == 1:
        words.append("lower in the first round (warm-up)")
    if training.warmup_rounds > 1:
        words.append(f"growing over the first {training.warmup_rounds} rounds (warm-up)")
    text = ", ".join(words)
    if training.mixed_precision:
        text += "; in 16 bits where that is safe (mixed precision)"
    return text


def _changes(augmentation: Augmentation) -> Iterator[Row]:
    names = [name.replace("_degrees", "") for name, amount in augmentation if amount]
    if names:
        known = {"flip_vertical": "vertical flip", "quarter_turns": "quarter turns"}
        changes = ", ".join(known.get(name, name) for name in names)
        yield Row("Random changes", f"Of every training image, drawn anew each time: {changes}")


def _loss(study: Study) -> str:
    loss = study.training.loss
    name = loss_of(study)
    text = f"{name[0].upper()}{name[1:]}: {LOSSES[loss.kind]}"
    if study.task.kind == "detection":
        text += "; and how much the boxes fail to overlap the true ones"
    if loss.has_dice and loss.dice_over == "batch":
        text += "; overlap of all images of a batch together"
    if loss.class_weights:
        weights = zip(study.task.classes, loss.class_weights, strict=True)
        text += "; classes weigh " + listed(f"{weight:g} ({name})" for name, weight in weights)
    return text


def _proximal(training: Training) -> Iterator[Row]:
    if training.proximal:
        yield Row(
            "Proximal term",
            "At every step the model of a site was pulled back towards the common model of the "
            f"round (FedProx), by {training.proximal:g} times its distance from it",
        )


def _between_rounds(training: Training) -> Iterator[Row]:
    if training.control_variates:
        yield Row(
            "Control variates",
            "Every step of a site was corrected by how far its own gradients pull the model aside "
            "(SCAFFOLD); the mean gradients of the sites were part of the masked sum",
        )
    if training.local_normalisation:
        yield Row(
            "Stayed at the sites",
            "Each site trained the layers that normalise for itself and never sent them (FedBN): "
            "the figures are of as many models, and the returned file has their initial values",
        )


def _balance(study: Study) -> Iterator[Row]:
    training = study.training
    if study.task.kind != "classification":
        return
    if training.logit_adjustment:
        text = (
            "Training allowed for how common each class is at a site, so the probabilities of the "
            "model read as if all classes were equally common"
        )
    elif training.loss.class_weights:
        text = "Classes weigh what the study says, the same at every site"
    else:
        text = "No correction for how common each class is at a site"
    yield Row("Class balance", text)


def _rounds(study: Study, num_rounds: int) -> str:
    text = f"{num_rounds} of at most {study.num_rounds}"
    if stopping := study.training.early_stopping:
        text += (
            f"; stopped once the validation {title_of(stopping.figure)} had not improved for "
            f"{_counted(stopping.patience, 'round')}"
        )
    return text


def _next_model(study: Study) -> str:
    optimizer = study.server_optimizer
    return (
        f"{SERVER_OPTIMIZERS[optimizer.name]}, rate {optimizer.learning_rate:g}; "
        f"a round needs at least {study.cohort.min_sites} sites"
    )


def _average(study: Study) -> Iterator[Row]:
    if decay := study.server_optimizer.ema:
        yield Row(
            "Returned model",
            f"Exponential moving average of the models after each round, decay {decay:g}",
        )


def pixel_of(config: Input) -> str:
    """A pixel, or a voxel in studies of volumes."""
    return "pixel" if len(config.size) == 2 else "voxel"  # noqa: PLR2004


def listed(words: Iterable[str]) -> str:
    """One, two and three."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{grouped(number)} {one if number == 1 else many or one + 's'}"
