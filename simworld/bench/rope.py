"""The rope of Propagation Networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from simworld.bench.rows import evaluate_seeds, published
from simworld.data import open_trajectories, read_propnet_rope
from simworld.metrics import Row
from simworld.models import load_checkpoint
from simworld.models.checkpoint import shipped
from simworld.trajectory import Trajectory


def rope(
    data: str | Path | None = None,
    *,
    checkpoints: Sequence[str | Path] = ("rope",),
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Return the error rows of a model of the rope world, [px^2], from the first frame of each episode.

    `data` is an .npz as Propagation Networks recorded it, an .h5 of ours, or None for the test episodes
    shipped with the package. PropNet's figures were measured on its own recorded rollouts: beside other
    data they are a reference, not a comparison.

    Raises:
        FileNotFoundError, ValueError: `data` or a checkpoint cannot be read.
    """
    file = shipped(".h5")["rope_test"] if data is None else Path(data)
    models = [load_checkpoint(checkpoint) for checkpoint in checkpoints]
    trajectories = (path.to(torch.float32) for path in read_rope(file))
    return evaluate_seeds(models, trajectories, dataset=file.name, progress=progress) + published("rope")


def read_rope(path: Path) -> Iterable[Trajectory]:
    """Return rope episodes from a file of either format."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file '{path}'; give an .npz of PropNet's or an .h5 of simworld's.")
    return read_propnet_rope(path) if path.suffix == ".npz" else open_trajectories(path)
