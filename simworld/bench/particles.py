"""Tables of particle simulators: water and sand in boxes, a vortex, falling FleX fluid, Lennard-Jones particles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from simworld.bench.rows import Progress, checkpoints_of, episodes_of, evaluate_seeds, over_seeds, published
from simworld.data import read_dpinet, read_lagrangebench
from simworld.losses import Loss, one_step, unrolled
from simworld.metrics import Horizon, Metric, Row, evaluate, position_mse
from simworld.models import GNS, LearnedSimulator, load_checkpoint
from simworld.models.base import told_to_measure
from simworld.particle_metrics import PARTICLE_METRICS, blocks, kinetic_energy_mse
from simworld.simulate import Intervention, rollout
from simworld.space import inside, outside
from simworld.state import State
from simworld.train import Fit, fit, weights_checksum
from simworld.trajectory import Trajectory

WATER_SEED, SAND_SEED, VORTEX_SEED, RAMPS_SEED = 2041, 2042, 2049, 2051
SMALL_VORTEX: Mapping[str, Any] = {"num_per_side": 25, "num_sub_steps": 50}
"""How datasets/tgv_2d_small/recipe.toml differs from the full world."""
TILTED: Mapping[str, Any] = {"max_tilt": 30.0, "gravity_range": [0.7, 1.3]}
"""How datasets/water_ramps/recipe.toml differs from an upright world."""
LATE = 5  # frame from which DPI-Net's figures are measured
FALLING = 189  # particles of DPI-Net's FluidFall
LONGER = 3  # times the recorded length, over which a rollout must stay in its box and keep its energy bounded
FOLLOWED = 3  # episodes that are followed so long
OFF = (1e-6, 1e-4)  # of the box's sides, by which twins of an episode begin elsewhere
SMALL_WATER: Mapping[str, Any] = {"num_steps": 400, "num_cells": 28, "min_particles": 200, "max_particles": 350}
"""How datasets/water_drop_small/recipe.toml differs from the full world."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a table trains a network of its own, because what it is trained on may not be shipped: stage after stage."""

    arguments: Mapping[str, Any]
    stages: Sequence[tuple[Loss, Fit]]


FLUID_FALL = Training(
    arguments={
        "connectivity_radius": 0.08,
        "num_dimensions": 3,
        "num_velocities": 2,
        "num_particle_types": 1,
        "latent_size": 64,
        "num_message_passing_steps": 4,
        "relative_velocities": True,
        "num_kernels": 10,
        "kernel_radius": 0.12,
        "solid_walls": True,
    },
    stages=(
        (
            one_step(noise_std=0.01),
            Fit(
                num_steps=3000,
                batch_size=2,
                learning_rate=1e-3,
                warm_up=200,
                ema_decay=0.99,
                evaluate_every=500,
                num_valid=0,
            ),
        ),
        (
            unrolled(6),
            Fit(
                num_steps=600,
                batch_size=1,
                learning_rate=5e-4,
                warm_up=50,
                ema_decay=0.99,
                evaluate_every=200,
                num_valid=0,
            ),
        ),
    ),
)
LENNARD_JONES = Training(
    arguments={
        "connectivity_radius": 2.49,  # a radius of 3.0, as in the metadata, would see some pairs twice in a box of 5
        "num_dimensions": 3,
        "num_velocities": 5,  # changes of velocity go on: a thermostat, which no frame shows, drags or drives
        "num_particle_types": 1,
        "latent_size": 64,
        "num_message_passing_steps": 1,
    },
    stages=(
        (
            one_step(tolerance=1e-4),  # few steps are collisions, and these would rule the mean
            Fit(
                num_steps=1000,
                batch_size=64,
                learning_rate=2e-3,
                warm_up=200,
                ema_decay=0.995,
                evaluate_every=1000,
                num_valid=0,
            ),
        ),
    ),
)
TURNS = 16  # copies of each recorded fall, turned about the vertical and mirrored, to train on


def water_drop_small(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Water in a box: position errors [m^2], fields and energies of ten test episodes, and three times as long.

    Beside them the engine's own errors where its particles begin a little elsewhere: what is left to chaos.
    """
    return _generated("water_drop_small", WATER_SEED, SMALL_WATER, data, checkpoints, progress)


def sand(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Sand on ramps: the same figures."""
    return _generated("sand_ramps", SAND_SEED, {}, data, checkpoints, progress)


def water_ramps(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Water on ramps under gravity that differs: the same figures."""
    return _generated("water_ramps", RAMPS_SEED, TILTED, data, checkpoints, progress)


def fluid_fall(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
    out: str | Path = "runs/fluid_fall",
) -> list[Row]:
    """Fluid that FleX dropped on a floor, recorded by DPI-Net: trained on four episodes, measured on the fifth.

    `data` is their FluidFall_valid.npz. Five networks are trained, one for each episode left out, each in `out`; or
    `checkpoints` are given, the first for the first episode left out. DPI-Net itself was trained on thousands of
    other episodes, and on none of these.
    """
    recorded = list(read_dpinet(_needed(data, "fluid-fall", "DPI-Net's FluidFall_valid.npz"), history=LATE - 1))
    if len(recorded) < 2 or any(path.initial.num_entities != FALLING for path in recorded):
        raise ValueError(
            f"The table fluid-fall is of DPI-Net's FluidFall, episodes of {FALLING} particles, two or more; "
            f"'{data}' has {len(recorded)} of {recorded[0].initial.num_entities}."
        )
    paths = [_on_a_floor(path) for path in recorded]
    tables = []
    for left_out, path in enumerate(paths):
        if checkpoints:
            model = load_checkpoint(checkpoints[left_out])
        else:
            others = [turned for number, other in enumerate(paths) if number != left_out for turned in _turns(other)]
            model = _trained(FLUID_FALL, others, Path(out) / f"without_{left_out}")
        tables.append(evaluate({"simworld": model}, [path], dataset=Path(str(data)).name))
        if progress:
            progress(left_out + 1)
    return _over_folds(tables) + published("fluid-fall")


def lj3(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
    out: str | Path = "runs/lj3",
) -> list[Row]:
    """Three Lennard-Jones particles in a periodic box, from LagrangeBench's tests: position errors over 20 steps.

    `data` is the folder with train.h5 and test.h5. The network is trained on the one and measured on pieces of the
    other, unless `checkpoints` are given.
    """
    folder = Path(_needed(data, "lj3", "the folder of LagrangeBench's 3D_LJ_3_1214every1"))
    train, test = (list(read_lagrangebench(folder / f"{split}.h5")) for split in ("train", "test"))
    train = [_from_motion(path) for path in train]
    models = [load_checkpoint(one) for one in checkpoints or ()] or [_trained(LENNARD_JONES, train, Path(out))]
    pieces = [path.window(first, first + 21) for path in test for first in range(0, path.num_steps - 20, 20)]
    return evaluate_seeds(models, pieces, dataset="lj3, test", horizons=(1, 20), progress=progress)


def tgv_2d(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """The Taylor-Green vortex with a quarter of the particles: LagrangeBench's figures over pieces of 20 steps.

    Its own rows are of 2,500 particles, from its own solver, after half a million steps of training.
    """
    models = [load_checkpoint(one) for one in checkpoints or checkpoints_of("tgv_2d_small")]
    dataset = "tgv_2d_small, test" if data is None else Path(data).name
    paths = [path.to(torch.float32) for path in episodes_of("tgv_2d_small", VORTEX_SEED, 5, data, **SMALL_VORTEX)]
    pieces = [piece for path in paths for piece in blocks(path, 20)]
    spacing = float(len(paths[0].initial)) ** -0.5
    metrics: dict[str, tuple[Metric, str]] = {
        "sinkhorn_divergence": PARTICLE_METRICS["sinkhorn_divergence"],
        "kinetic_energy_mse": (partial(kinetic_energy_mse, spacing=spacing), "(m^2 ({velocities})^2)^2"),
    }
    rows = evaluate_seeds(models, pieces, dataset=dataset, horizons=(1, 5, 20), metrics=metrics, progress=progress)
    kept = [row for row in rows if row.horizon == 20 or row.metric.endswith("position_mse")]
    return kept + published("tgv-2d")


def _generated(
    world: str,
    seed: int,
    arguments: Mapping[str, Any],
    data: str | Path | None,
    checkpoints: Sequence[str | Path] | None,
    progress: Progress | None,
) -> list[Row]:
    models = _by_kind(checkpoints or checkpoints_of(world, f"{world}_grid"))
    dataset = f"{world}, test" if data is None else Path(data).name
    paths = [path.to(torch.float32) for path in episodes_of(world, seed, 10, data, **arguments)]
    rows = evaluate_seeds(models, paths, dataset=dataset, progress=progress)
    if data is None:  # a file does not say all that its engine knew
        rows += twin_rows(world, seed, paths, **arguments)
    for name, same in models.items():
        rows += over_seeds([_longer_rows(model, name, paths[:FOLLOWED], dataset) for model in same])
    return rows


def _by_kind(checkpoints: Sequence[str | Path]) -> dict[str, list[LearnedSimulator]]:
    """Return the models in checkpoints by what rows call them: "simworld", and of what kind where there are several."""
    kinds: dict[str, list[LearnedSimulator]] = {}
    for model in map(load_checkpoint, checkpoints):
        kinds.setdefault(f"simworld: {type(model).__name__}", []).append(model)
    return kinds if len(kinds) > 1 else {"simworld": next(iter(kinds.values()))}


def twin_rows(world: str, seed: int, paths: Sequence[Trajectory], **arguments: Any) -> list[Row]:
    """Return position errors [m^2] of the engine itself, where free particles begin at random a little elsewhere.

    `paths` are test episodes of a world, made with these `arguments`. No model that is told positions only as
    precisely as that can be expected to do better.
    """
    rows = []
    for share in OFF:
        twins = episodes_of(world, seed, len(paths), **arguments, interventions=[_put_off(share)])
        missed = [position_mse(twin, path)[1:] for twin, path in zip(twins, paths, strict=True)]
        horizons: dict[Horizon, int | None] = {20: 20, "all": None}
        for horizon, count in horizons.items():
            values = torch.stack([errors[:count].mean() for errors in missed])
            rows.append(
                Row(
                    model=f"engine, put off by {share:g} of the box",
                    dataset=f"{world}, test",
                    metric="rollout_position_mse",
                    horizon=horizon,
                    value=float(values.mean()),
                    unit="m^2",
                    trajectories=len(paths),
                    spread=float(values.std()) if len(paths) > 1 else None,
                )
            )
    return rows


def _put_off(share: float) -> Intervention:
    """Return what moves free particles at step 0 at random, by a share of the box's sides along each axis."""

    def intervention(state: State, step: int) -> State:
        if step:
            return state
        drawn = torch.randn(state.positions.shape, generator=torch.Generator().manual_seed(0)).to(state.positions)
        lower, upper = state.boundaries[state.batch].unbind(1)
        moved = inside(state, state.positions + share * (upper - lower) * drawn)
        return state.replace(positions=torch.where(state.free[:, None], moved, state.positions))

    return intervention


@torch.no_grad()
def _longer_rows(model: LearnedSimulator, name: str, paths: Sequence[Trajectory], dataset: str) -> list[Row]:
    """Return how far a rollout of three times the recorded length goes astray: its energy, and who left the box."""
    energies, escaped = [], []
    for path in paths:
        far = rollout(path.initial, simulator=model, num_steps=LONGER * path.num_steps)
        free = path.initial.free
        before, after = (known["velocities"][:, free].double().square().sum((1, 2)) for known in (path, far))
        energies.append(float(after.max() / before.max()))
        escaped.append(float(outside(path.initial, far["positions"][-1])[free].double().mean()))
    horizon = f"{LONGER} x the length"
    shared: dict[str, Any] = {
        "model": name,
        "dataset": dataset,
        "horizon": horizon,
        "unit": "1",
        "trajectories": len(paths),
    }
    return [
        Row(metric="largest_kinetic_energy_over_recorded", value=max(energies), **shared),
        Row(metric="share_outside_the_box", value=max(escaped), **shared),
    ]


def _trained(how: Training, trajectories: Sequence[Trajectory], out: Path) -> LearnedSimulator:
    """Return a network trained as said, or go on where its training in `out` was cut off."""
    (first, start), *_ = how.stages
    torch.manual_seed(start.seed)
    statistics = GNS.measure(trajectories, noise_std=first.noise_std, **told_to_measure(GNS, how.arguments))
    model: LearnedSimulator = GNS(dt=trajectories[0].dt, statistics=statistics, **how.arguments)
    for number, (loss, said) in enumerate(how.stages):
        model.provenance = {"initial_checksum": weights_checksum(model)}  # from other weights it is another run
        model = fit(model.train(), trajectories, loss, said, out=out / f"stage_{number}")
    return model


def _needed(data: str | Path | None, table: str, what: str) -> str | Path:
    if data is None:
        raise ValueError(f"The table {table} is measured on {what}, which simworld does not ship; give it with --data.")
    return data


def _from_motion(path: Trajectory) -> Trajectory:
    """Return the path from where on no frame, nor any in the history of the first, repeats the one before."""
    repeated = (path["velocities"] == 0).flatten(1).all(1).nonzero()[:, 0].tolist()
    past = path.initial.history.shape[1] if "history" in path.initial else 0
    return path.window(repeated[-1] + 1 + past, len(path)) if repeated else path


def _on_a_floor(path: Trajectory) -> Trajectory:
    """Return the path with what its recording leaves out: a floor at height 0, and no walls near."""
    far = torch.tensor([[[-10.0, 0.0, -10.0], [10.0, 10.0, 10.0]]])
    return replace(path, initial=path.initial.replace(boundaries=far))


def _turns(path: Trajectory) -> Iterable[Trajectory]:
    """Yield copies of a path turned about the vertical axis, every other one mirrored."""
    for number in range(TURNS):
        angle = 2 * math.pi * number / TURNS
        turn = torch.tensor(
            [[math.cos(angle), 0.0, -math.sin(angle)], [0.0, 1.0, 0.0], [math.sin(angle), 0.0, math.cos(angle)]]
        )
        turn[:, 0] *= (-1) ** number
        state = path.initial
        changes = {name: state[name] @ turn for name in (*state.dynamic_fields, *state.past_fields)}
        frames = {name: path[name] @ turn for name in path.frames}
        yield replace(path, initial=state.replace(**changes), frames=frames)


def _over_folds(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Return one table of those of several episodes: means, and spreads over episodes."""
    joined = []
    for same in zip(*tables, strict=True):
        values = torch.tensor([row.value for row in same], dtype=torch.float64)
        spread = float(values.std()) if len(values) > 1 else None
        joined.append(replace(same[0], value=float(values.mean()), spread=spread, trajectories=len(values)))
    return joined
