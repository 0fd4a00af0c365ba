"""Peak memory of every process of a deployment, in models of 4 bytes per parameter.

What counts as a process's own is told in ``our_rounds.memory``. The limit is what was promised: 4
models for the coordinator, whatever the number of sites, and 5 for a site that trains with AdamW:
weights, gradients and two moments of the optimizer, and the model that came.
"""

from __future__ import annotations

import sys
from typing import Any

from our_rounds.memory import (
    COORDINATOR,
    MEGA,
    ONE_STEP,
    SITE,
    SMALL_PARAMS,
    SMALL_SITES,
    SUPERLINK,
    TOGETHER,
    WHOLE_SITES,
    Taken,
    memory_of_run,
)

PARAMS, SITES = (11_000_000, 45_000_000), (4, 16)
PROMISED = {COORDINATOR: 4.0, SITE: 5.0}  # models
GROWTH = 1.1  # of what the coordinator takes, from the fewest sites to the most

Run = dict[str, Taken]


def rows() -> list[dict[str, Any]]:
    """A row for every process in every deployment, and for what grows with the number of sites."""
    small = memory_of_run(SMALL_PARAMS, SMALL_SITES)
    return [row for num_params in PARAMS for row in of_size(num_params, small)]


def of_size(num_params: int, small: Run) -> list[dict[str, Any]]:
    """Deployments of few and of many sites."""
    made = []
    runs = {num_sites: memory_of_run(num_params, num_sites) for num_sites in SITES}
    for num_sites, run in runs.items():
        for name, taken in run.items():
            models = models_of(taken, small[name], num_params)
            print(f"{name}, {num_params:,}, {num_sites}: {models:.2f}", file=sys.stderr, flush=True)
            settings = {
                "num_params": num_params,
                "num_sites": num_sites,
                **told(taken, small[name]),
            }
            case = f"{name}, {num_params:,} parameters, {num_sites} sites"
            made.append(row(case, "models", models, PROMISED.get(name), settings))
    fewest, most = (runs[num_sites] for num_sites in SITES)
    for name in (COORDINATOR, SUPERLINK):
        growth = models_of(most[name], small[name], num_params) / models_of(
            fewest[name], small[name], num_params
        )
        case = f"{name}, {num_params:,} parameters, {SITES[1]} sites as against {SITES[0]}"
        limit = GROWTH if name == COORDINATOR else None
        made.append(row(case, "of 1", growth, limit, {"num_params": num_params}))
    return made


def models_of(taken: Taken, small: Taken, num_params: int) -> float:
    """What a process takes beyond its like with a small model."""
    return (taken.peak - small.peak) / (4 * (num_params - SMALL_PARAMS))


def told(taken: Taken, small: Taken) -> dict[str, Any]:
    """Megabytes, and which step takes the most."""
    return {
        "peak_mb": taken.peak / MEGA,
        "idle_mb": taken.idle / MEGA,
        "peak_with_a_small_model_mb": small.peak / MEGA,
        "at": max(taken.steps, key=taken.steps.__getitem__),
        "steps_mb": {step: most / MEGA for step, most in taken.steps.items()},
        "whole_sites": WHOLE_SITES,
        "others_together": TOGETHER,
        "study": ONE_STEP,
    }


def row(
    case: str, unit: str, ours: float, promised: float | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """One line of the results."""
    limit = {"promised": promised} if promised else None
    fixed = {"peers": {}, "limit": limit, "better": "lower", "settings": settings}
    return {"case": case, "unit": unit, "ours": ours, **fixed}
