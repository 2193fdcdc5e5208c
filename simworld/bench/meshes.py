"""Tables of mesh simulators: a Couette flow and a bent beam of ThermodynamicsGNN, flow round a cylinder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.bench.rows import Progress, checkpoints_of, episodes_of, evaluate_seeds, over_seeds, published
from simworld.data import open_trajectories, read_tignn
from simworld.data.generate import SPLITS
from simworld.intervene import script
from simworld.metrics import Metric, Row, field_mse, relative_l2
from simworld.models import LearnedSimulator, load_checkpoint
from simworld.physics.flow_worlds import force_on_obstacle, random_flow
from simworld.simulate import rollout
from simworld.trajectory import Trajectory

CYLINDER_SEED = 2051
SMALL_CYLINDER: Mapping[str, Any] = {
    "num_steps": 120,
    "length": 1.6,
    "size": 0.06,
    "obstacle_size": 0.015,
    "warm_up": 2.5,
    "num_sub_steps": 2,
}
"""How datasets/cylinder_flow_small/recipe.toml differs from the full world."""
TIMED = 20  # steps, of which the median counts


def couette(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """The start-up of a Couette flow, recorded by ThermodynamicsGNN: relative L2 of rollouts, by quantity.

    `data` is an .npz of their layout or an .h5 made of it; the network is one that datasets/couette trains.
    """
    return _thermodynamic("couette", data, checkpoints, progress)


def beam(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """A viscoelastic beam that is bent, recorded by ThermodynamicsGNN: relative L2 of rollouts, by quantity.

    `data` is an .npz of their layout or an .h5 made of it; the network is one that datasets/beam trains.
    """
    return _thermodynamic("beam", data, checkpoints, progress)


def cylinder_flow_small(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Flow round a cylinder: RMSE of velocities, shedding frequency, drag and lift, time per step and the solver's."""
    models = [load_checkpoint(one) for one in checkpoints or checkpoints_of("cylinder_flow_small")]
    dataset = "cylinder_flow_small, test" if data is None else Path(data).name
    made = episodes_of("cylinder_flow_small", CYLINDER_SEED, 6, data, **SMALL_CYLINDER)
    paths = [path.to(torch.float32) for path in made]
    metrics: dict[str, tuple[Metric, str]] = {
        f"{name}_mse": (field_mse(name), f"({{{name}}})^2") for name in ("velocities", "pressures")
    }
    rows = evaluate_seeds(models, paths, dataset=dataset, horizons=(1, 50, "all"), metrics=metrics, progress=progress)
    rows = [_root(row) for row in rows]
    rows += over_seeds([_forces_rows(model, paths, dataset) for model in models])
    return rows + _times(models[0], paths[0], dataset) + published("cylinder-flow-small")


def _thermodynamic(
    world: str,
    data: str | Path | None,
    checkpoints: Sequence[str | Path] | None,
    progress: Progress | None,
) -> list[Row]:
    if data is None or not checkpoints:
        raise ValueError(
            f"The table {world} is measured on ThermodynamicsGNN's data, whose licence forbids to ship it or what was "
            f"trained on it: give --data FILE.npz or .h5, and --checkpoint runs/{world}_unrolled/model.safetensors, "
            f"which datasets/{world}/README.md says how to train."
        )
    if Path(data).suffix == ".npz":
        paths = list(read_tignn(data))
    else:
        with open_trajectories(data) as file:
            paths = list(file)
    metrics: dict[str, tuple[Metric, str]] = {
        f"{name}_relative_l2": (relative_l2(name), "1") for name in sorted(paths[0].frames)
    }
    models = [load_checkpoint(one) for one in checkpoints]
    dataset = Path(data).name
    rows = evaluate_seeds(models, paths, dataset=dataset, horizons=(1, "all"), metrics=metrics, progress=progress)
    return [row for row in rows if row.metric in metrics] + published(world)


def _root(row: Row) -> Row:
    """Return the row of a mean squared error as that of its root."""
    unit = row.unit.removesuffix("^2").removeprefix("(").removesuffix(")")
    low, high = (None if end is None else math.sqrt(end) for end in (row.low, row.high))
    name = row.metric.replace("_mse", "_rmse")
    return replace(row, metric=name, value=math.sqrt(row.value), unit=unit, low=low, high=high, spread=None)


@torch.no_grad()
def _forces_rows(model: LearnedSimulator, paths: Sequence[Trajectory], dataset: str) -> list[Row]:
    """Return how far shedding frequency, mean drag and the swing of lift are from the solver's, over rollouts."""
    misses: dict[str, list[float]] = {}
    for path in paths:
        made = rollout(path.initial, simulator=model, num_steps=path.num_steps, interventions=script(path))
        got, wanted = (force_on_obstacle(known).double() for known in (made, path))
        for name, measure in _MEASURES.items():
            misses.setdefault(name, []).append(abs(measure(got, path.dt) / measure(wanted, path.dt) - 1))
    shared: dict[str, Any] = {"model": "simworld", "dataset": dataset, "horizon": "all", "unit": "1"}
    return [
        Row(metric=f"{name}_relative_error", value=sum(values) / len(values), trajectories=len(paths), **shared)
        for name, values in misses.items()
    ]


def shedding_frequency(forces: Tensor, dt: float) -> float:
    """Return how often per second the lift, forces [T, 2], rises through its mean; NaN if less than twice."""
    lift = forces[:, 1] - forces[:, 1].mean()
    rising = ((lift[:-1] < 0) & (lift[1:] >= 0)).nonzero()[:, 0]
    if len(rising) < 2:
        return math.nan
    times = rising + lift[rising] / (lift[rising] - lift[rising + 1])
    return (len(times) - 1) / float(times[-1] - times[0]) / dt


_MEASURES: Mapping[str, Callable[[Tensor, float], float]] = {
    "shedding_frequency": shedding_frequency,
    "drag": lambda forces, dt: float(forces[:, 0].mean()),
    "lift_swing": lambda forces, dt: float(forces[:, 1].std()),
}


@torch.no_grad()
def _times(model: LearnedSimulator, path: Trajectory, dataset: str) -> list[Row]:
    """Return the time of a step of the model and of the solver, on one mesh of the world, in this same run."""
    state, rng = path.initial, np.random.default_rng([CYLINDER_SEED, SPLITS.index("test"), 0])
    known = {k: SMALL_CYLINDER[k] for k in ("length", "size", "obstacle_size")}
    count = SMALL_CYLINDER["num_sub_steps"]
    solver = random_flow(rng, **known, dt=path.dt / count)
    shared: dict[str, Any] = {"dataset": dataset, "horizon": 1, "unit": "ms", "trajectories": 1}
    model.step(state)  # edges are found once
    timed = {
        "simworld": _milliseconds(lambda: model.step(state)),
        "solver": _milliseconds(lambda: solver.advance(count)),
    }
    return [Row(model=name, metric="time_per_step", value=value, **shared) for name, value in timed.items()]


def _milliseconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(TIMED):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken)
