"""Tables of mesh simulators: Couette flow and bent beam of ThermodynamicsGNN, cylinder flow, plates, flags."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from simworld.bench.rows import Progress, checkpoints_of, episodes_of, evaluate_seeds, over_seeds, published
from simworld.data import open_trajectories, read_tignn
from simworld.data.generate import GENERATORS, SPLITS
from simworld.metrics import Horizon, Metric, Row, field_mse, relative_l2
from simworld.models import LearnedSimulator, load_checkpoint
from simworld.physics.flow_worlds import force_on_obstacle
from simworld.prescriptions import script
from simworld.simulate import rollout
from simworld.trajectory import Trajectory

SEEDS = {"cylinder_flow_small": 2051, "deforming_plate_small": 2052, "flag_simple_small": 2053}
SMALL_CYLINDER: Mapping[str, Any] = {
    "num_steps": 120,
    "length": 1.6,
    "size": 0.06,
    "obstacle_size": 0.015,
    "warm_up": 2.5,
    "num_sub_steps": 2,
}
"""How datasets/cylinder_flow_small/recipe.toml differs from the full world; the next two likewise."""
SMALL_PLATE: Mapping[str, Any] = {"num_steps": 40, "size": 0.025, "depth": 0.05, "dt": 0.05}
SMALL_FLAG: Mapping[str, Any] = {"num_steps": 100, "size": 0.1, "warm_up": 1.0, "num_sub_steps": 4}
RECORDED = {
    "couette": ("positions", "velocities", "energies", "stresses"),
    "beam": ("positions", "velocities", "stresses"),
}
"""Fields of what ThermodynamicsGNN recorded."""
TIMED = 20  # steps, of which the median counts


def couette(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """The start-up of a Couette flow, recorded by ThermodynamicsGNN: relative L2 and RMSE of rollouts, by quantity.

    `data` is an .npz of their layout or an .h5 made of it; the network is one that datasets/couette trains.
    """
    return _thermodynamic("couette", data, checkpoints, progress)


def beam(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """A viscoelastic beam that is bent, recorded by ThermodynamicsGNN: relative L2 and RMSE of rollouts, by quantity.

    `data` is an .npz of their layout or an .h5 made of it; the network is one that datasets/beam trains.
    """
    return _thermodynamic("beam", data, checkpoints, progress)


def cylinder_flow_small(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Flow round a cylinder: errors of rollouts, shedding frequency, drag and lift, time per step and the solver's."""
    fields = ("velocities", "pressures")
    found = _generated("cylinder_flow_small", SMALL_CYLINDER, 6, fields, (1, 50, "all"), data, checkpoints, progress)
    forces = over_seeds([_forces_rows(model, found.paths, found.dataset) for model in found.models])
    return found.rows + forces + found.times + published("cylinder-flow-small")


def plate_small(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Plates that a ball is pressed into: errors of positions and stresses, time per step and the solver's."""
    fields = ("positions", "stresses")
    found = _generated("deforming_plate_small", SMALL_PLATE, 10, fields, (1, 20, "all"), data, checkpoints, progress)
    return found.rows + found.times + published("plate-small")


def flag_small(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Flags in the wind: errors of positions, time per step and the solver's."""
    found = _generated("flag_simple_small", SMALL_FLAG, 6, ("positions",), (1, 50, "all"), data, checkpoints, progress)
    return found.rows + found.times + published("flag-small")


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Error rows of models on episodes of a world, and rows of their times."""

    dataset: str
    models: Sequence[LearnedSimulator]
    paths: Sequence[Trajectory]
    rows: list[Row]
    times: list[Row]


def _generated(
    world: str,
    arguments: Mapping[str, Any],
    count: int,
    fields: Sequence[str],
    horizons: Sequence[Horizon],
    data: str | Path | None,
    checkpoints: Sequence[str | Path] | None,
    progress: Progress | None,
) -> _Measured:
    models = [load_checkpoint(one) for one in checkpoints or checkpoints_of(world)]
    dataset = f"{world}, test" if data is None else Path(data).name
    paths = [path.to(torch.float32) for path in episodes_of(world, SEEDS[world], count, data, **arguments)]
    rows = _errors(models, paths, dataset, fields, horizons, progress)
    times = [_time("simworld", _step_time(models[0], paths[0]), dataset)]
    times.append(_time("solver", _solver_time(world, arguments), dataset))
    return _Measured(dataset=dataset, models=models, paths=paths, rows=rows, times=times)


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
    fields, got = RECORDED[world], sorted(paths[0].frames)
    if got != sorted(fields):
        raise ValueError(
            f"The table {world} is of recordings of {', '.join(fields)}; {data} holds {', '.join(got)}. Give the other."
        )
    models = [load_checkpoint(one) for one in checkpoints]
    horizons: tuple[Horizon, ...] = (1, 50, "all") if paths[0].num_steps > 50 else (1, "all")
    rows = _errors(models, paths, Path(data).name, fields, horizons, progress)
    return [*rows, _time("simworld", _step_time(models[0], paths[0]), Path(data).name), *published(world)]


def _errors(
    models: Sequence[LearnedSimulator],
    paths: Sequence[Trajectory],
    dataset: str,
    fields: Sequence[str],
    horizons: Sequence[Horizon],
    progress: Progress | None,
) -> list[Row]:
    """Return relative L2 as ThermodynamicsGNN has it and RMSE as MeshGraphNets have it, of rollouts, by field."""
    metrics: dict[str, tuple[Metric, str]] = {f"{name}_relative_l2": (relative_l2(name), "1") for name in fields}
    metrics |= {f"{name}_mse": (field_mse(name), f"({{{name}}})^2") for name in fields}
    rows = evaluate_seeds(models, paths, dataset=dataset, horizons=horizons, metrics=metrics, progress=progress)
    measured = [row for row in rows if row.metric in metrics]
    return [_root(row) if row.metric.endswith("_mse") else row for row in measured]


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
        made = rollout(
            path.initial, simulator=model, num_steps=path.num_steps, interventions=script(path, model.auxiliary)
        )
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
def _step_time(model: LearnedSimulator, path: Trajectory) -> float:
    """Return the milliseconds of a step of the model, its edges found before."""
    action = None if path.actions is None else path.actions[0]
    model.step(path.initial, action)
    return _milliseconds(lambda: model.step(path.initial, action), TIMED)


def _solver_time(world: str, arguments: Mapping[str, Any]) -> float:
    """Return the milliseconds of a step of the solver that made the data, in this same run.

    Where the steps of an episode are alike, those of one with more steps over one with few, so that making the mesh
    does not count; a plate that is pressed on is at rest at first, so of it the whole episode.
    """
    seed = [SEEDS[world], SPLITS.index("test"), 0]

    def made(**how: Any) -> float:
        return _milliseconds(lambda: GENERATORS[world].make([seed], **{**arguments, **how}), 3)

    if "warm_up" not in arguments:
        return made() / int(arguments["num_steps"])
    return (made(warm_up=0.0, num_steps=1 + TIMED) - made(warm_up=0.0, num_steps=1)) / TIMED


def _time(who: str, milliseconds: float, dataset: str) -> Row:
    return Row(
        model=who, dataset=dataset, metric="time_per_step", horizon=1, value=milliseconds, unit="ms", trajectories=1
    )


def _milliseconds(call: Callable[[], object], count: int) -> float:
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken)
