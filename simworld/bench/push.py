"""Boxes and balls on a table: errors of rollouts under unseen pushes, and time per step beside MuJoCo's."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from simworld.bench.rows import episodes_of, models_of, over_seeds
from simworld.metrics import ConstantVelocity, Row, Static
from simworld.models import RigidBodyNetwork
from simworld.physics.push import PushEngine, push_episode, rotation_error
from simworld.simulate import Simulator, rollout
from simworld.trajectory import Trajectory

SEED, COUNT, TIMED, BATCH = 2026, 100, 30, 64
HORIZONS = (20, 100)


@torch.no_grad()
def push_3d(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Pushed boxes and balls: mean distance [m] and rotation [deg] off over 20 and 100 steps, time per step [ms].

    Means over frames and bodies; balls turn too. "untrained" is the model with its networks silent, what
    geometry, inertia and built-in constants do alone. "engine, restarted" is MuJoCo restarted at every frame, told
    no more than a model is; "engine, 2 ms" has steps twice as long. Time is the median of single steps
    of one scene, or of a batch of 64, per scene; MuJoCo's own is that of uninterrupted episodes.
    """
    models = [model.float() for model in models_of("push_3d", checkpoints, RigidBodyNetwork)]
    episodes = episodes_of("push_3d", SEED, COUNT, data)
    path = Trajectory.cat(episodes)
    if path.num_steps < max(HORIZONS) or path.actions is None:
        raise ValueError(f"This table needs episodes of {max(HORIZONS)} steps with actions; {data} has others.")
    if progress:
        progress(len(episodes))
    first = episodes[0].to(torch.float32)
    naive: Mapping[str, Simulator] = {
        "static": Static(dt=path.dt),
        "constant_velocity": ConstantVelocity(dt=path.dt),
        "engine, restarted": PushEngine(path.dt),
        "engine, 2 ms": PushEngine(path.dt, time_step=2e-3),
    }
    single = path.to(torch.float32)
    many = Trajectory.cat(episodes[:BATCH]).to(torch.float32)
    rows = over_seeds(
        [
            _errors("simworld", model, single) + _time("simworld", model, first) + _time("simworld", model, many)
            for model in models
        ]
    )
    rows += _errors("untrained", _silent(models[0]), single)
    for name, simulator in naive.items():
        rows += _errors(name, simulator, path)
    return rows + _time("engine, restarted", PushEngine(path.dt), first) + [_own_time()]


def _silent(model: RigidBodyNetwork) -> RigidBodyNetwork:
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if ".answer." in name:
            weight.zero_()
    return model


def _errors(name: str, simulator: Simulator, path: Trajectory) -> list[Row]:
    predicted = rollout(path.initial, path.actions, simulator=simulator, num_steps=path.num_steps)
    away = (predicted["positions"].double() - path["positions"].double()).norm(dim=-1)[1:]
    turned = rotation_error(predicted["quats"], path["quats"])[1:]
    return [
        _row(name, metric, horizon, float(errors[:horizon].mean()), unit, path.initial.num_scenes)
        for metric, errors, unit in (("distance", away, "m"), ("rotation", turned, "deg"))
        for horizon in HORIZONS
    ]


def _time(name: str, simulator: Simulator, path: Trajectory) -> list[Row]:
    """Return the median time of a step, per scene."""
    assert path.actions is not None
    state, times, scenes = path.initial, [], path.initial.num_scenes
    for action in path.actions[:TIMED]:
        start = time.perf_counter()
        state = simulator.step(state, action)
        times.append(1e3 * (time.perf_counter() - start) / scenes)
    metric = "step_time" if scenes == 1 else f"step_time_of_{scenes}"
    return [_row(name, metric, 1, statistics.median(times), "ms", scenes)]


def _own_time() -> Row:
    times = []
    for number in range(5):
        start = time.perf_counter()
        steps = push_episode([SEED, 2, number]).num_steps
        times.append(1e3 * (time.perf_counter() - start) / steps)
    return _row("MuJoCo, uninterrupted", "step_time", 1, statistics.median(times), "ms", 1)


def _row(model: str, metric: str, horizon: int, value: float, unit: str, count: int) -> Row:
    return Row(
        model=model,
        dataset="push_3d, test",
        metric=metric,
        horizon=horizon,
        value=value,
        unit=unit,
        trajectories=count,
    )
