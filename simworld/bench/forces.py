"""Tables of bodies that act at a distance: springs and charges (NRI), charges in space (EGNN), planets (IN)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simworld.bench.rows import checkpoints_of, over_seeds, published, velocity_rows, with_ratios
from simworld.data import open_trajectories
from simworld.data.generate import GENERATORS, SPLITS
from simworld.metrics import ConstantVelocity, Row, Static
from simworld.models import ForceNetwork, load_checkpoint
from simworld.models.force_network import infer_springs
from simworld.simulate import Simulator, rollout
from simworld.trajectory import Trajectory

Progress = Callable[[int], None]
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
    rows = []
    models = [_force_network(one) for one in checkpoints or checkpoints_of("springs_nri")]
    if any(model.graph != "springs" for model in models):
        raise ValueError("This table is one of models that act along springs (graph='springs'); one here is not.")
    dataset = "springs, test" if data is None else Path(data).name
    paths = _nri("springs_nri", data, count, progress)
    for model in models:
        rows.append(_nri_rows("springs_nri", dataset, paths, {"simworld, graph known": model}))
        found, accuracy = zip(*[_with_graph_found(model, path) for path in paths], strict=True)
        rows[-1] += _nri_rows("springs_nri", dataset, found, {"simworld, graph found": model}, naive=False)
        share = 100 * float(torch.cat(accuracy).double().mean())
        rows[-1].append(
            _row("simworld, graph found", dataset, "edge_accuracy", OBSERVED, share, _count(paths), unit="%")
        )
    return over_seeds(rows) + published("springs")


def charged(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
    count: int = 10_000,
) -> list[Row]:
    """NRI charges: MSE after 1, 10 and 20 steps in the paper's units, charges known; as `springs`."""
    models = [_force_network(one) for one in checkpoints or checkpoints_of("charged_nri")]
    paths = _nri("charged_nri", data, count, progress)
    dataset = "charged, test" if data is None else Path(data).name
    rows = [_nri_rows("charged_nri", dataset, paths, {"simworld, charges known": model}) for model in models]
    return over_seeds(rows) + published("charged")


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
    arguments = {"first_frame": 30, "every": 10, "num_frames": 2}
    path = Trajectory.cat(_joined("nbody_egnn", EGNN_SEED, "test", 2000, data, arguments, 2000))
    if (path.num_steps, path.dt, path["positions"].shape[2]) != (1, 1.0, 3):
        raise ValueError(
            f"The table asks from one frame in space for one a unit of time later; {data} holds {len(path)} frames, "
            f"{path.dt} apart. Make them with datasets/nbody_egnn/recipe.toml."
        )
    (train,) = _joined("nbody_egnn", EGNN_SEED, "train", 3000, None, arguments, 3000)
    moved, speeds = train["positions"].diff(dim=0)[0], train["velocities"][0]
    linear = float((moved * speeds).sum() / speeds.square().sum())
    if progress:
        progress(5000)
    chosen: Mapping[str, Sequence[str | Path]] = (
        {"simworld": checkpoints}
        if checkpoints
        else {
            "simworld, two frames": checkpoints_of("nbody_egnn"),
            "simworld, whole trajectories": checkpoints_of("nbody_egnn_whole"),
        }
    )
    shared: dict[str, Any] = {
        "dataset": "n-body, frames 30 to 40, test" if data is None else Path(data).name,
        "metric": "position_mse",
        "horizon": "frame 40",
    }
    naive = {"static": 0.0, "constant_velocity": 1.0, "linear": linear}
    rows = []
    for name, share in naive.items():
        guess = path["positions"][0] + share * path["velocities"][0]
        rows.append(_row(name, value=_mse(guess, path), count=_count([path]), **shared))
    for name, known in chosen.items():
        found = [
            [_row(name, value=_mse(_end(_force_network(one), path), path), count=_count([path]), **shared)]
            for one in known
        ]
        rows += over_seeds(found)
    return rows + published("nbody-egnn")


def nbody_in(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Interaction Networks' planets: one-step velocity MSE, and over constant velocity's, for 6, 3 and 12 bodies."""
    models = [_force_network(one) for one in checkpoints or checkpoints_of("nbody_in")]
    sets = {
        f"{bodies} bodies" if data is None else Path(data).name: Trajectory.cat(
            _joined("nbody_in", PLANET_SEED, "test", 200, data, {"num_bodies": bodies}, 200)
        )
        for bodies in ((6,) if data else (6, 3, 12))
    }
    if progress:
        progress(600)
    return with_ratios(velocity_rows(models, sets)) + with_ratios(published("nbody-in"))


def _joined(
    world: str, seed: int, split: str, count: int, data: str | Path | None, arguments: dict[str, Any], chunk: int
) -> list[Trajectory]:
    """Return episodes of a world, or of a file, as trajectories of up to `chunk` scenes in double precision."""
    if data is not None:
        with open_trajectories(data) as file:
            episodes: Iterable[Trajectory] = file[:]
    else:
        seeds = [[seed, SPLITS.index(split), number] for number in range(count)]
        episodes = GENERATORS[world].make(seeds, **arguments)
    episodes = list(episodes)
    return [
        Trajectory.cat(episodes[first : first + chunk]).to(torch.float64) for first in range(0, len(episodes), chunk)
    ]


def _nri(world: str, data: str | Path | None, count: int, progress: Progress | None) -> list[Trajectory]:
    paths = _joined(world, NRI_SEED, "test", count, data, {"num_frames": OBSERVED + 1 + PREDICTED}, CHUNK)
    if any(path.num_steps < OBSERVED + PREDICTED for path in paths):
        raise ValueError(f"The table needs {OBSERVED + 1 + PREDICTED} frames per episode; {data} has fewer.")
    if progress:
        progress(_count(paths))
    return paths


@torch.no_grad()
def _nri_rows(
    world: str, dataset: str, paths: Sequence[Trajectory], models: Mapping[str, Simulator], naive: bool = True
) -> list[Row]:
    """Return the errors after 1, 10 and 20 steps: means over positions and velocities in units of their ranges."""
    dt = paths[0].dt
    named: dict[str, Simulator] = (
        {"static": Static(dt=dt), "constant_velocity": ConstantVelocity(dt=dt)} if naive else {}
    )
    named |= models
    sums = {name: torch.zeros(PREDICTED + 1, dtype=torch.float64) for name in named}
    for path in paths:
        seen = path.window(OBSERVED, OBSERVED + 1 + PREDICTED)
        for name, simulator in named.items():
            predicted = rollout(seen.initial, simulator=simulator, num_steps=PREDICTED)
            sums[name] += path.initial.num_scenes * _normalized_errors(world, predicted, seen)
    return [
        _row(name, dataset, "normalized_mse", h, float(total[h]) / _count(paths), _count(paths))
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


def _force_network(checkpoint: str | Path) -> ForceNetwork:
    model = load_checkpoint(checkpoint)
    if not isinstance(model, ForceNetwork):
        raise ValueError(f"This table is one of ForceNetworks; '{checkpoint}' holds a {type(model).__name__}.")
    return model.double()


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


def _row(model: str, dataset: str, metric: str, horizon: int | str, value: float, count: int, unit: str = "1") -> Row:
    return Row(model=model, dataset=dataset, metric=metric, horizon=horizon, value=value, unit=unit, trajectories=count)
