"""What a site keeps from round to round and never sends, in one file in its state folder.

A round that was trained is kept beside the one before until the next model shows that its sum was
made and holds this site's update. So a void sum, a lost upload or a crash leave a site where it
was, and equal survivors give equal models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from client.scaffold import Variates
from client.site import Site
from common.disk import replace_file
from common.errors import DataError
from common.messages import RoundTask
from common.models.flat import SUMMED
from common.quantize import dequantize
from common.update import QuantizedUpdate

NAME = "kept.safetensors"
LOCAL, VARIATE = "local", "variate"  # layers of FedBN, control variate of SCAFFOLD
Arrays = Mapping[str, NDArray[np.float32]]


class Keeping:
    """Private. Arrays of one run, for two models at most: the last that counts, and the next."""

    def __init__(self, folder: Path, run: str) -> None:
        self._path = folder / NAME
        self._run = run

    def recall(self, last_summed: int) -> Arrays:
        """What belongs to a model; nothing before the first round that counts.

        Args:
          last_summed: The last round that made the model and whose sum holds this site's update.

        Raises:
          DataError: The file is damaged.
        """
        known = self._read()
        if known is None:
            return {}
        settled, trained, trained_round = known
        return trained if trained_round == last_summed else settled

    def remember(self, model_round: int, settled: Arrays, trained: Arrays) -> None:
        """Keep what was trained on a model, beside what it was trained from.

        Args:
          model_round: Rounds that made the model.
          settled: What ``recall`` gave for it.
          trained: What belongs to the next model, if the sum is made.
        """
        arrays = {f"settled/{name}": array for name, array in settled.items()}
        arrays |= {f"trained/{name}": array for name, array in trained.items()}
        about = {"run": self._run, "round": str(model_round + 1)}
        replace_file(self._path, save(arrays, metadata=about))

    def _read(self) -> tuple[Arrays, Arrays, int] | None:
        try:
            with safe_open(self._path, framework="numpy") as file:
                about = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            raise DataError(
                f"{self._path}: damaged ({error}); what belongs to the model is lost: remove it, "
                "and this site goes on as in its first round"
            ) from None
        if about["run"] != self._run:
            return None  # of an earlier run of this study
        settled, trained = (
            {name.removeprefix(kind): array for name, array in arrays.items() if kind in name}
            for kind in ("settled/", "trained/")
        )
        return settled, trained, int(about["round"])


def recall(task: RoundTask, run: str, site: Site) -> Arrays:
    """What this site kept for the task's model, its local parameters already in the network."""
    if not site.study.training.keeps_state:
        return {}
    last_summed = int(site.network.schema.split(task.model)[SUMMED][site.index])
    kept = Keeping(site.state_dir, run).recall(last_summed)
    site.network.load_local(kept.get(LOCAL, site.first_local))
    return kept


def variates_of(task: RoundTask, site: Site, kept: Arrays) -> Variates:
    """SCAFFOLD's two variates for this round."""
    common = site.network.schema.control(task.model)
    return Variates(kept.get(VARIATE, np.zeros_like(common)), common)


def contribution_of(quantized: QuantizedUpdate, task: RoundTask, site: Site) -> NDArray[np.float32]:
    """What the sum will hold of this site's update: rounded, and clipped to the ring."""
    return dequantize(
        quantized.values,
        sizes=site.network.schema.sizes,
        exponents=task.exponents,
        weight=site.weight,
        weight_cap=site.study.aggregation.weight_cap,
    )


def remember(
    task: RoundTask, run: str, site: Site, kept: Arrays, contributed: NDArray[np.float32]
) -> None:
    """Keep what was trained, beside what it was trained from.

    Args:
      task: That was trained for.
      run: Its run.
      site: Whose network holds what was trained.
      kept: What ``recall`` gave for the task's model.
      contributed: The update as the sum will hold it: the common variate moves by no more.
    """
    trained: dict[str, NDArray[np.float32]] = {}
    training = site.study.training
    if training.local_normalisation:
        trained[LOCAL] = site.network.local()
    if training.control_variates:
        change = site.network.schema.control(contributed)
        trained[VARIATE] = kept.get(VARIATE, np.zeros_like(change)) + change
    Keeping(site.state_dir, run).remember(task.round_number - 1, kept, trained)
