"""Episodes recorded by DPI-Net (Li et al. 2019) with NVIDIA FleX, each world repacked as one .npz file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simworld.data.arrays import Array, from_arrays
from simworld.data.unpickle import load_npz
from simworld.kinds import RIGID, WATER
from simworld.trajectory import Trajectory

DT = 1 / 60


def read_dpinet(path: str | Path, *, history: int = 5) -> Iterator[Trajectory]:
    """Yield the episodes in an .npz of `positions` and `velocities` [e, T, n, 3], a frame each 1/60 s.

    All particles are water (5); where there are `clusters` [e, T, ..., k], the first k are a rigid body (0).
    The files say nothing of walls or gravity. Velocities are made anew from positions, from which those
    recorded differ by rounding. Frame 0 is recorded frame `history` + 1; see `from_arrays`.

    Raises:
        ValueError: the file is not such an .npz, or its arrays have other shapes.

    Warns:
        UserWarning: recorded velocities are others than those of the positions.
    """
    found = load_npz(path)
    missing = [name for name in ("positions", "velocities") if not isinstance(found.get(name), np.ndarray)]
    if missing:
        raise ValueError(f"{path} is not a recording of DPI-Net's: it has no array '{missing[0]}'.")
    positions, velocities = found["positions"], found["velocities"]
    if positions.ndim != 4 or positions.shape[3] != 3 or velocities.shape != positions.shape or not len(positions):
        raise ValueError(
            f"{path} must hold positions and velocities [e, T, n, 3] of 1 episode or more; "
            f"got {list(positions.shape)} and {list(velocities.shape)}."
        )
    types = _types(path, positions, found.get("clusters"))
    for number, places in enumerate(positions):
        try:
            made = from_arrays(positions=places, dt=DT, history=history, particle_types=types)
        except ValueError as error:
            raise ValueError(f"{path}, episode {number}: {error}") from error
        own, said = made["velocities"].numpy(), velocities[number, history + 1 :]
        if not np.allclose(own, said, rtol=0.01, atol=1e-3 + 0.01 * np.abs(own).max()):
            warnings.warn(
                f"{path}, episode {number}: recorded velocities are not those that its positions have at a frame each "
                f"1/60 s, up to {np.abs(own).max():.3g} m/s. The latter are taken; check units and times.",
                stacklevel=2,
            )
        yield made


def _types(path: str | Path, positions: Array, clusters: Array | None) -> Array:
    types = np.full(positions.shape[2], WATER)
    if clusters is not None:
        if clusters.shape[:2] != positions.shape[:2] or clusters.shape[-1] > len(types):
            raise ValueError(
                f"{path} must hold clusters [e, T, ..., k] of {list(positions.shape[:2])} episodes and frames and "
                f"{len(types)} particles at most; got {list(clusters.shape)}."
            )
        types[: clusters.shape[-1]] = RIGID
    return types
