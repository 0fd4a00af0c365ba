"""The model that a run returned, kept at the site: whole, with what never travelled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from common.disk import replace_file
from common.errors import DataError
from common.models.flat import FlatNetwork

RETURNED = "returned.safetensors"  # in a study's folder


def keep_returned(network: FlatNetwork, folder: Path) -> None:
    """Keep the model that the network holds: a hospital wants to use it."""
    replace_file(folder / RETURNED, save(tensors_of(network)))


def tensors_of(network: FlatNetwork) -> Mapping[str, NDArray[np.float32]]:
    """Copies of all parameters by name."""
    return {
        name: parameter.detach().cpu().numpy().copy()
        for name, parameter in network.module.named_parameters()
    }


def fill(network: FlatNetwork, path: Path) -> None:
    """Set all parameters from a file.

    Raises:
      DataError: It is not there, damaged, or of another model.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no run of this study has returned a model here; take part in one first"
        ) from None
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}); the next run writes it again") from None
    with torch.no_grad():
        for name, parameter in network.module.named_parameters():
            if name not in tensors or tensors[name].shape != tuple(parameter.shape):
                raise DataError(f"{path}: {name} is missing or has another shape than the study's")
            parameter.copy_(torch.from_numpy(tensors[name]))
