"""What the job's server and its sites do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.fedavg import FedAvg

VECTOR, SAVED = "vector", "model.fobs"


class TimedFedAvg(FedAvg):
    """NVFlare's FedAvg over one flat array; it notes when its rounds begin."""

    # A job's configuration holds what the signature names, under the attributes' names.
    def __init__(self, result: str, num_params: int, num_rounds: int, num_clients: int) -> None:
        super().__init__(
            persistor_id="", num_rounds=num_rounds, num_clients=num_clients, save_filename=SAVED
        )
        self.result = result
        self.num_params = num_params
        self._times: list[float] = []
        self._means: list[float] = []

    def load_model(self) -> FLModel:
        """The first model."""
        values = np.random.default_rng(0).random(self.num_params, np.float32)
        self._means.append(float(values.mean()))
        return FLModel(params={VECTOR: values})

    def event(self, event_type: str) -> None:
        """Note the time."""
        if event_type == AppEventType.ROUND_STARTED:
            self._times.append(time.monotonic())
        super().event(event_type)

    def save_model(self, model: FLModel) -> None:
        """Keep the mean, which tells what was learned."""
        super().save_model(model)
        self._means.append(float(model.params[VECTOR].mean()))

    def run(self) -> None:
        """All rounds; then write what was noted."""
        super().run()
        times = [*self._times, time.monotonic()]
        Path(self.result).write_text(json.dumps({"times": times, "means": self._means}))


class AddsNumber(Executor):
    """A site that adds its own number to the model."""

    def __init__(self, adds: int) -> None:
        super().__init__()
        self.adds = adds

    def execute(self, _: str, shareable: Shareable, *__: Any) -> Shareable:
        """One array in, one out."""
        values = from_shareable(shareable).data[VECTOR]
        added = {VECTOR: values + np.float32(self.adds)}
        return DXO(DataKind.WEIGHTS, data=added).to_shareable()
