"""Named benchmarks: one error table each, with naive rows and published figures beside ours."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from simworld.data import open_trajectories, read_propnet_rope
from simworld.metrics import Row, evaluate
from simworld.models import load_checkpoint
from simworld.models.checkpoint import shipped
from simworld.trajectory import Trajectory

RESULT_SCHEMA = 1
PROPNET = "PropNet's published weights re-run on the 10 recorded validation rollouts of Rope"
PUBLISHED_ROPE: Mapping[tuple[str, int | str], float] = {
    ("one_step_position_mse", 1): 6.35e-3,
    ("rollout_position_mse", 20): 0.132,
    ("rollout_position_mse", "all"): 59.2,
}


def rope(
    data: str | Path | None = None,
    *,
    checkpoint: str | Path = "rope",
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Return the error rows of a model of the rope world, [px^2], from the first frame of each episode.

    `data` is an .npz as Propagation Networks recorded it, an .h5 of ours, or None for the test episodes
    shipped with the package. PropNet's figures were measured on its own recorded rollouts: beside other
    data they are a reference, not a comparison.

    Raises:
        FileNotFoundError, ValueError: `data` or `checkpoint` cannot be read.
    """
    path = shipped(".h5")["rope_test"] if data is None else Path(data)
    model = load_checkpoint(checkpoint)
    trajectories = (t.to(torch.float32) for t in read_rope(path))
    rows = evaluate({"simworld": model}, trajectories, dataset=path.name, progress=progress)
    published = [
        Row(
            model="published:PropNet",
            dataset="Rope_valid.npz",
            metric=metric,
            horizon=horizon,
            value=value,
            unit="px^2",
            trajectories=10,
            source=PROPNET,
        )
        for (metric, horizon), value in PUBLISHED_ROPE.items()
    ]
    return rows + published


def read_rope(path: Path) -> Iterable[Trajectory]:
    """Return rope episodes from a file of either format."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file '{path}'; give an .npz of PropNet's or an .h5 of simworld's.")
    return read_propnet_rope(path) if path.suffix == ".npz" else open_trajectories(path)


BENCHMARKS: Mapping[str, Callable[..., list[Row]]] = {"rope": rope}


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
