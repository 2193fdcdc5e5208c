"""Rows of benchmark tables: published figures, our own over several seeds, and what made them."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from simworld.data import open_trajectories
from simworld.data.generate import GENERATORS, SPLITS
from simworld.metrics import Horizon, Metric, Row, Static, evaluate, one_step_velocity_mse
from simworld.models import LearnedSimulator, load_checkpoint
from simworld.models.checkpoint import shipped
from simworld.simulate import Simulator, check_suits
from simworld.trajectory import Trajectory

RESULT_SCHEMA = 1
Progress = Callable[[int], None]
Model = TypeVar("Model", bound=LearnedSimulator)


def published(table: str) -> list[Row]:
    """Return the published rows of a table, with their sources, as `assets/published.toml` holds them."""
    text = (resources.files("simworld") / "assets/published.toml").read_text(encoding="utf-8")
    rows = []
    for group in tomllib.loads(text)[table]:
        shared = {k: group[k] for k in ("dataset", "unit", "trajectories", "source")}
        for model, values in group["rows"].items():
            for (metric, horizon), value in zip(group["columns"], values, strict=True):
                rows.append(Row(model=f"published:{model}", metric=metric, horizon=horizon, value=value, **shared))
    return rows


def checkpoints_of(*names: str) -> list[str]:
    """Return the names of the shipped checkpoints of a benchmark, or of each of some, one per seed."""
    found = [known for name in names for known in shipped(".safetensors") if known.rpartition("_")[0] == name]
    if not found:
        raise FileNotFoundError(
            f"No checkpoint of {' or '.join(names)} is shipped; train one and give it with --checkpoint."
        )
    return found


def titles(checkpoints: Sequence[str | Path]) -> list[str]:
    """Return what the rows of checkpoints are named by, each differently: files, else their folders, else whole paths.

    Raises:
        ValueError: a checkpoint is given twice.
    """
    paths = [Path(one) for one in checkpoints]
    made = [path.parent.name if path.stem == "model" and path.parent.name else path.stem for path in paths]
    for longer in ([f"{path.parent.name}/{path.stem}" for path in paths], [str(path) for path in paths]):
        made = [more if made.count(name) > 1 else name for name, more in zip(made, longer, strict=True)]
    twice = [name for name in made if made.count(name) > 1]
    if twice:
        raise ValueError(f"The checkpoint '{twice[0]}' is given twice; give each once.")
    return made


def models_of(name: str, checkpoints: Sequence[str | Path] | None, kind: type[Model]) -> list[Model]:
    """Return the models in some checkpoints, or in the shipped ones of a benchmark, in double precision.

    Raises:
        FileNotFoundError, ValueError: a checkpoint cannot be read, or holds another kind of model.
    """
    models = []
    for one in checkpoints or checkpoints_of(name):
        model = load_checkpoint(one).double()
        if not isinstance(model, kind):
            raise ValueError(f"This table is one of {kind.__name__}s; '{one}' holds a {type(model).__name__}.")
        models.append(model)
    return models


def episodes_of(
    world: str, seed: int, count: int, data: str | Path | None = None, *, split: str = "test", **arguments: Any
) -> list[Trajectory]:
    """Return the episodes of a file, or without one `count` new ones of a world, in double precision."""
    if data is not None:
        with open_trajectories(data) as file:
            return [path.to(torch.float64) for path in file]
    made = GENERATORS[world].make([[seed, SPLITS.index(split), number] for number in range(count)], **arguments)
    return [path.to(torch.float64) for path in made]


def over_seeds(rows: Sequence[Sequence[Row]]) -> list[Row]:
    """Return one table of the tables of several seeds: their median and range."""
    if len(rows) == 1:
        return list(rows[0])
    joined = []
    for same in zip(*rows, strict=True):
        values = [row.value for row in same]
        middle = next((row for row in same if row.value == median(values)), same[0])
        joined.append(replace(middle, value=median(values), low=min(values), high=max(values), seeds=len(values)))
    return joined


def evaluate_seeds(
    models: Sequence[Simulator] | Mapping[str, Sequence[Simulator]],
    trajectories: Iterable[Trajectory],
    *,
    dataset: str,
    horizons: Sequence[Horizon] = (1, 20, "all"),
    metrics: Mapping[str, tuple[Metric, str]] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Return error rows as `evaluate` does, with one "simworld" for models trained with several seeds.

    Of several groups of such models each has its name.
    """
    groups = models if isinstance(models, Mapping) else {"simworld": models}
    names = {f"{group}, checkpoint {number + 1}": group for group in groups for number in range(len(groups[group]))}
    named = dict(zip(names, (model for group in groups.values() for model in group), strict=True))
    rows = evaluate(named, trajectories, dataset=dataset, horizons=horizons, metrics=metrics, progress=progress)
    joined = []
    for group in groups:
        own = [name for name in names if names[name] == group]
        joined += over_seeds([[replace(row, model=group) for row in rows if row.model == name] for name in own])
    return joined + [row for row in rows if row.model not in named]


def velocity_table(
    world: str,
    models: Sequence[Simulator],
    worlds: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    count: int,
    data: str | Path | None = None,
    horizons: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[Row]:
    """Return the table of a world of Interaction Networks: velocity errors, over constant velocity's, and published.

    It is of the episodes of a file, or of `count` new ones for each of `worlds`, which names their arguments.
    With `horizons`, position errors of rollouts from 20 episodes of the first world are measured too.
    """
    sets = {}
    for name, arguments in {Path(data).name: {}}.items() if data else worlds.items():
        sets[name] = episodes_of(world, seed, count, data, **arguments)
        for model in models:
            check_suits("The model", model, sets[name][0])
        short = min(path.num_steps for path in sets[name])
        if short < max(horizons, default=1):
            raise ValueError(
                f"This table needs episodes of {max(horizons, default=1)} steps or more; {data} has one of {short}."
            )
        if progress:
            progress(sum(map(len, sets.values())))
    rows = with_ratios(_velocity_rows(models, {name: Trajectory.cat(paths) for name, paths in sets.items()}))
    if horizons:
        name, paths = next(iter(sets.items()))
        rows += evaluate_seeds(models, paths[:20], dataset=name, horizons=horizons)
    return rows + with_ratios(published(world.replace("_", "-")))


@torch.no_grad()
def _velocity_rows(models: Sequence[Simulator], sets: Mapping[str, Trajectory]) -> list[Row]:
    """Return the one-step velocity errors of models trained with several seeds, and of constant velocity."""
    rows = []
    for name, path in sets.items():
        unit = {"m/s": "m^2/s^2", "1": "1"}.get(velocity := path.initial.fields["velocities"].unit, f"({velocity})^2")
        shared: dict[str, Any] = {"dataset": name, "metric": "one_step_velocity_mse", "horizon": 1, "unit": unit}
        shared["trajectories"] = path.initial.num_scenes
        still = one_step_velocity_mse(Static(dt=path.dt), path)
        rows.append(Row(model="constant_velocity", value=still, **shared))
        rows += over_seeds(
            [[Row(model="simworld", value=one_step_velocity_mse(model, path), **shared)] for model in models]
        )
    return rows


def result(rows: Iterable[Row]) -> dict[str, Any]:
    """Return what `--json` writes: rows as plain values and the environment that made them."""
    return {"schema": RESULT_SCHEMA, "environment": environment(), "rows": [row.to_json() for row in rows]}


def environment() -> dict[str, Any]:
    """Return versions and hardware that a figure depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return velocity errors, each followed by its ratio to that of constant velocity on the same data."""
    naive = {row.dataset: row.value for row in rows if row.model.lower().endswith("constant_velocity")}
    naive |= {row.dataset: row.value for row in rows if row.model == "published:Constant velocity"}
    found = []
    for row in rows:
        low, high = (None if end is None else end / naive[row.dataset] for end in (row.low, row.high))
        value = row.value / naive[row.dataset]
        ratio = replace(row, metric="velocity_mse_over_constant", unit="1", value=value, low=low, high=high)
        found += [row, replace(ratio, spread=None)]
    return found
