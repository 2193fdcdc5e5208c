"""Tables of bodies in contact: Newton's cradle, balls in a box, a string on a circle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from simworld.bench.rows import checkpoints_of, over_seeds, published, velocity_rows, with_ratios
from simworld.data import open_trajectories, read_propnet_cradle
from simworld.data.generate import GENERATORS, SPLITS
from simworld.metrics import Row, evaluate
from simworld.models import LearnedSimulator, load_checkpoint
from simworld.physics.cradle import cradle_engine
from simworld.trajectory import Trajectory

Progress = Callable[[int], None]
CRADLE_SEED, BALLS_SEED, STRING_SEED = 2027, 2028, 2029
LATE = 5
"""Frame from which recorded cradles are also measured: their first frame comes twice, which no simulator can tell."""


def cradle(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Newton's cradle: position errors [px^2] over one step, 20 steps and all, beside PropNet's.

    `data` is PropNet's Cradle_valid.npz; ten episodes of our own engine, if None. "engine, restarted" is the
    engine itself, told no more than a model is: one frame.
    """
    if data is None:
        name, episodes = "own test episodes", _episodes("cradle", CRADLE_SEED, 10, {})
        sets = {name: episodes}
    else:
        name, episodes = Path(data).name, read_propnet_cradle(data)
        sets = {name: episodes, f"{name}, from frame {LATE}": [path.window(LATE, len(path)) for path in episodes]}
    rows = []
    for dataset, paths in sets.items():
        found = [
            evaluate({"simworld": model}, paths, dataset=dataset, progress=progress)
            for model in _models("cradle", checkpoints)
        ]
        rows += over_seeds(found)
        rows += evaluate({"engine, restarted": cradle_engine()}, paths, dataset=dataset, baselines=False)
    return rows + published("cradle")


def balls_in(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Interaction Networks' balls: one-step velocity MSE, and over constant velocity's, for 6, 3 and 9 balls."""
    worlds = {f"{count} balls": {"num_balls": count} for count in (6, 3, 9)}
    return _velocity_table("balls_in", "balls-in", BALLS_SEED, worlds, data, checkpoints, progress)


def string_in(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Interaction Networks' string: one-step velocity MSE, and over constant velocity's, for other lengths and pins."""
    worlds = {
        f"{masses} masses, {pinned} pinned": {"num_masses": masses, "num_pinned": pinned}
        for masses, pinned in ((15, 1), (5, 1), (30, 1), (15, 0), (15, 2))
    }
    return _velocity_table("string_in", "string-in", STRING_SEED, worlds, data, checkpoints, progress)


def _velocity_table(
    world: str,
    table: str,
    seed: int,
    worlds: Mapping[str, dict[str, Any]],
    data: str | Path | None,
    checkpoints: Sequence[str | Path] | None,
    progress: Progress | None,
) -> list[Row]:
    models = _models(world, checkpoints)
    if data is not None:
        with open_trajectories(data) as file:
            sets = {Path(data).name: [path.to(torch.float64) for path in file]}
    else:
        sets = {}
        for name, arguments in worlds.items():
            sets[name] = _episodes(world, seed, 100, arguments)
            if progress:
                progress(100 * len(sets))
    rows = with_ratios(velocity_rows(models, {name: Trajectory.cat(paths) for name, paths in sets.items()}))
    first, paths = next(iter(sets.items()))
    rows += over_seeds(
        [evaluate({"simworld": model}, paths[:20], dataset=first, horizons=(20, 100)) for model in models]
    )
    return rows + with_ratios(published(table))


def _models(world: str, checkpoints: Sequence[str | Path] | None) -> list[LearnedSimulator]:
    return [load_checkpoint(one).double() for one in checkpoints or checkpoints_of(world)]


def _episodes(world: str, seed: int, count: int, arguments: dict[str, Any]) -> list[Trajectory]:
    return GENERATORS[world].make([[seed, SPLITS.index("test"), number] for number in range(count)], **arguments)
