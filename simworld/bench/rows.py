"""Rows of benchmark tables: published figures, our own over several seeds, and what made them."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from statistics import median
from typing import Any

import torch

from simworld.metrics import Row, Static, one_step_velocity_mse
from simworld.models.checkpoint import shipped
from simworld.simulate import Simulator
from simworld.trajectory import Trajectory

RESULT_SCHEMA = 1


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


def checkpoints_of(name: str) -> list[str]:
    """Return the names of the shipped checkpoints of a benchmark, one per seed."""
    found = [known for known in shipped(".safetensors") if known.rpartition("_")[0] == name]
    if not found:
        raise FileNotFoundError(f"No checkpoint of {name} is shipped; train one and give it with --checkpoint.")
    return found


def over_seeds(rows: Sequence[Sequence[Row]]) -> list[Row]:
    """Return one table of the tables of several seeds: their median and range where they differ."""
    if len(rows) == 1:
        return list(rows[0])
    joined = []
    for same in zip(*rows, strict=True):
        values = [row.value for row in same]
        if not same[0].model.startswith("simworld"):
            joined.append(same[0])
        else:
            middle = next((row for row in same if row.value == median(values)), same[0])
            joined.append(replace(middle, value=median(values), low=min(values), high=max(values), seeds=len(values)))
    return joined


@torch.no_grad()
def velocity_rows(models: Sequence[Simulator], sets: Mapping[str, Trajectory]) -> list[Row]:
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
