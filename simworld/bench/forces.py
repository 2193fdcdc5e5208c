"""Tables of bodies that act at a distance: springs and charges (NRI), charges in space (EGNN), planets (IN)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.bench.rows import Progress, episodes_of, models_of, over_seeds, published, velocity_table
from simworld.metrics import ConstantVelocity, Row, Static
from simworld.models import ForceNetwork
from simworld.models.force_network import infer_springs
from simworld.simulate import Simulator, rollout
from simworld.trajectory import Trajectory

NRI_SEED, EGNN_SEED, PLANET_SEED = 42, 43, 2016
OBSERVED, PREDICTED = 49, 20
RANGES: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "springs_nri": ((-4.073, 4.432), (-1.416, 1.431)),
    "charged_nri": ((-5.0, 5.0), (-6.470, 6.379)),
}
"""Least and largest coordinate of position and velocity in the 50,000 published training simulations, by which
the table's units are defined: [-1, 1] is that range."""
CHUNK = 1000
PROGRAM_STEP = 1e-3


def springs(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
    count: int = 10_000,
) -> list[Row]:
    """NRI springs: MSE after 1, 10 and 20 steps in the paper's units, the graph known or found.

    The test simulations are the published ones (made anew from their seed), or those in the .h5 `data`. The
    first 49 frames are seen, then 20 steps are predicted. "graph found" is told no springs: those that
    explain the seen frames best under the learned law are taken (`infer_springs`).
    """
    models = models_of("springs_nri", checkpoints, ForceNetwork)
    if any(model.graph != "springs" for model in models):
        raise ValueError("This table is one of models that act along springs (graph='springs'); one here is not.")
    dataset = "springs, test" if data is None else Path(data).name
    paths = _nri("springs_nri", data, count, progress)
    rows = []
    for model in models:
        found, accuracy = zip(*[_with_graph_found(model, path) for path in paths], strict=True)
        edges = Row(
            model="simworld, graph found",
            dataset=dataset,
            metric="edge_accuracy",
            horizon=OBSERVED,
            value=100 * float(torch.cat(accuracy).double().mean()),
            unit="%",
            trajectories=_count(paths),
        )
        known = _nri_rows("springs_nri", dataset, paths, {"simworld, graph known": model})
        rows.append([*known, *_nri_rows("springs_nri", dataset, found, {edges.model: model}), edges])
    return _nri_rows("springs_nri", dataset, paths, _naive(paths)) + over_seeds(rows) + published("springs")


def charged(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
    count: int = 10_000,
) -> list[Row]:
    """NRI charges: MSE after 1, 10 and 20 steps in the paper's units, charges known; as `springs`."""
    models = models_of("charged_nri", checkpoints, ForceNetwork)
    paths = _nri("charged_nri", data, count, progress)
    dataset = "charged, test" if data is None else Path(data).name
    rows = [_nri_rows("charged_nri", dataset, paths, {"simworld, charges known": model}) for model in models]
    return _nri_rows("charged_nri", dataset, paths, _naive(paths)) + over_seeds(rows) + published("charged")


def nbody_egnn(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """EGNN n-body: MSE of positions 1 time unit on; trained on two frames, or on whole trajectories.

    2,000 published test simulations, frame 30 to frame 40, in sub-steps as fine as the program's. "linear" moves
    by a multiple of the velocity that is fitted to the training simulations.
    """
    worlds = {"simworld, two frames": "nbody_egnn", "simworld, whole trajectories": "nbody_egnn_whole"}
    chosen = {
        name: models_of(world, checkpoints, ForceNetwork)
        for name, world in ({"simworld": "nbody_egnn"} if checkpoints else worlds).items()
    }
    arguments: dict[str, Any] = {"first_frame": 30, "every": 10, "num_frames": 2}
    path = Trajectory.cat(episodes_of("nbody_egnn", EGNN_SEED, 2000, data, **arguments))
    if (path.num_steps, path.dt, path["positions"].shape[2]) != (1, 1.0, 3):
        raise ValueError(
            f"The table asks from one frame in space for one a unit of time later; {data} holds {len(path)} frames, "
            f"{path.dt} apart. Make them with datasets/nbody_egnn/recipe.toml."
        )
    train = Trajectory.cat(episodes_of("nbody_egnn", EGNN_SEED, 3000, split="train", **arguments))
    moved, speeds = train["positions"].diff(dim=0)[0], train["velocities"][0]
    linear = float((moved * speeds).sum() / speeds.square().sum())
    if progress:
        progress(5000)
    shared: dict[str, Any] = {
        "dataset": "n-body, frames 30 to 40, test" if data is None else Path(data).name,
        "metric": "position_mse",
        "horizon": "frame 40",
        "unit": "1",
        "trajectories": _count([path]),
    }
    naive = {"static": 0.0, "constant_velocity": 1.0, "linear": linear}
    rows = []
    for name, share in naive.items():
        guess = path["positions"][0] + share * path["velocities"][0]
        rows.append(Row(model=name, value=_mse(guess, path), **shared))
    for name, models in chosen.items():
        rows += over_seeds([[Row(model=name, value=_mse(_end(model, path), path), **shared)] for model in models])
    return rows + published("nbody-egnn")


def nbody_in(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Interaction Networks' planets: one-step velocity MSE, and over constant velocity's, for 6, 3 and 12 bodies."""
    models = models_of("nbody_in", checkpoints, ForceNetwork)
    worlds = {f"{bodies} bodies": {"num_bodies": bodies} for bodies in (6, 3, 12)}
    return velocity_table("nbody_in", models, worlds, seed=PLANET_SEED, count=200, data=data, progress=progress)


def _nri(world: str, data: str | Path | None, count: int, progress: Progress | None) -> list[Trajectory]:
    """Return the episodes as trajectories of up to `CHUNK` scenes."""
    episodes = episodes_of(world, NRI_SEED, count, data, num_frames=OBSERVED + 1 + PREDICTED)
    if any(path.num_steps < OBSERVED + PREDICTED for path in episodes):
        raise ValueError(f"The table needs {OBSERVED + 1 + PREDICTED} frames per episode; {data} has fewer.")
    if progress:
        progress(len(episodes))
    return [Trajectory.cat(episodes[first : first + CHUNK]) for first in range(0, len(episodes), CHUNK)]


def _naive(paths: Sequence[Trajectory]) -> dict[str, Simulator]:
    return {"static": Static(dt=paths[0].dt), "constant_velocity": ConstantVelocity(dt=paths[0].dt)}


@torch.no_grad()
def _nri_rows(world: str, dataset: str, paths: Sequence[Trajectory], simulators: Mapping[str, Simulator]) -> list[Row]:
    """Return the errors after 1, 10 and 20 steps: means over positions and velocities in units of their ranges."""
    shared: dict[str, Any] = {"dataset": dataset, "metric": "normalized_mse", "unit": "1"}
    shared["trajectories"] = _count(paths)
    sums = {name: torch.zeros(PREDICTED + 1, dtype=torch.float64) for name in simulators}
    for path in paths:
        seen = path.window(OBSERVED, OBSERVED + 1 + PREDICTED)
        for name, simulator in simulators.items():
            predicted = rollout(seen.initial, simulator=simulator, num_steps=PREDICTED)
            sums[name] += path.initial.num_scenes * _normalized_errors(world, predicted, seen)
    return [
        Row(model=name, horizon=h, value=float(total[h]) / _count(paths), **shared)
        for name, total in sums.items()
        for h in (1, 10, 20)
    ]


def _normalized_errors(world: str, predicted: Trajectory, target: Trajectory) -> Tensor:
    errors = []
    for name, (low, high) in zip(("positions", "velocities"), RANGES[world], strict=True):
        errors.append(((predicted[name] - target[name]) * (2 / (high - low))).square().mean((1, 2)))
    return (errors[0] + errors[1]) / 2


@torch.no_grad()
def _with_graph_found(model: ForceNetwork, path: Trajectory) -> tuple[Trajectory, Tensor]:
    """Return the path with the springs that its first 49 frames show, and which pairs were judged rightly."""
    found = infer_springs(model, path.window(0, OBSERVED))
    shown = found.spring_stiffnesses > 0.5 * model.arguments["statistics"]["stiffness"]
    truth = {tuple(sorted(pair)) for pair in path.initial.springs.tolist()}
    right = torch.tensor([(tuple(sorted(pair)) in truth) for pair in found.springs.tolist()]) == shown
    graph = found.replace(springs=found.springs[shown], spring_stiffnesses=_mean_stiffness(model, int(shown.sum())))
    told = Trajectory(initial=graph, frames=path.frames, active=path.active, dt=path.dt)
    return told, right


def _mean_stiffness(model: ForceNetwork, count: int) -> Tensor:
    return torch.full((count,), model.arguments["statistics"]["stiffness"], dtype=torch.float64)


@torch.no_grad()
def _end(model: ForceNetwork, path: Trajectory) -> Tensor:
    """Return the positions at the last frame of a path, in the program's own sub-steps whatever the model's step."""
    steps = path.dt * path.num_steps / model.dt
    if abs(steps - round(steps)) > 1e-6:
        raise ValueError(f"The model's steps of {model.dt} do not divide the table's {path.dt * path.num_steps}.")
    fine = model.at_rate(max(1, round(model.dt / PROGRAM_STEP)), "symplectic_euler")
    return rollout(path.initial, simulator=fine, num_steps=round(steps))["positions"][-1]


def _mse(guess: Tensor, path: Trajectory) -> float:
    return float((guess - path["positions"][-1]).square().mean())


def _count(paths: Sequence[Trajectory]) -> int:
    return sum(path.initial.num_scenes for path in paths)
