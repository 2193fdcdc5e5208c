"""Tables of bodies in contact: Newton's cradle, balls in a box, a string on a circle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simworld.bench.rows import Progress, episodes_of, evaluate_seeds, models_of, published, velocity_table
from simworld.data import read_propnet_cradle
from simworld.metrics import Row, evaluate
from simworld.models import LearnedSimulator
from simworld.physics.cradle import cradle_engine

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
    models = models_of("cradle", checkpoints, LearnedSimulator)
    if data is None:
        name, episodes = "own test episodes", episodes_of("cradle", CRADLE_SEED, 10)
        sets = {name: episodes}
    else:
        name, episodes = Path(data).name, read_propnet_cradle(data)
        sets = {name: episodes, f"{name}, from frame {LATE}": [path.window(LATE, len(path)) for path in episodes]}
    rows = []
    for dataset, paths in sets.items():
        rows += evaluate_seeds(models, paths, dataset=dataset, progress=progress)
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
    models = models_of("balls_in", checkpoints, LearnedSimulator)
    return velocity_table(
        "balls_in", models, worlds, seed=BALLS_SEED, count=100, data=data, horizons=(20, 100), progress=progress
    )


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
    models = models_of("string_in", checkpoints, LearnedSimulator)
    return velocity_table(
        "string_in", models, worlds, seed=STRING_SEED, count=100, data=data, horizons=(20, 100), progress=progress
    )
