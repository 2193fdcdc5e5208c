"""Data sets of LagrangeBench (Toshev et al. 2023): HDF5 files of positions and types, a metadata.json beside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simworld.data.arrays import Array, from_arrays, recorded_positions
from simworld.data.metadata import Metadata, read_metadata
from simworld.kinds import KINEMATIC, RIGID, WATER, ParticleState
from simworld.saving import replacing
from simworld.trajectory import Trajectory

PAD, FLUID, SOLID_WALL, MOVING_WALL, RIGID_BODY = -1, 0, 1, 2, 3
# Ours after DeepMind's numbers; 2, which stands for nothing there, tells moving walls from those at rest.
_TYPES = {FLUID: WATER, SOLID_WALL: KINEMATIC, MOVING_WALL: 2, RIGID_BODY: RIGID}


def read_lagrangebench(path: str | Path, *, history: int = 5) -> Iterator[Trajectory]:
    """Yield the episodes of an HDF5 file, one by one; metadata.json lies beside it.

    Types become fluid 5, wall at rest 3, moving wall 2, rigid body 0; walls are kinematic, rows of padding
    are left out. Stored frames are `dt` times `write_every` seconds apart. An external force is code there
    (force.py): it is neither read nor run. Frame 0 is recorded frame `history` + 1; see `from_arrays`.

    Raises:
        ValueError: the file is damaged, or metadata and arrays disagree; it names file and episode.
    """
    import h5py

    said = read_metadata(path)
    periodic = np.asarray(said.values.get("periodic_boundary_conditions", [False] * said.dim))
    if periodic.shape != (said.dim,) or periodic.dtype != np.bool_:
        raise ValueError(
            f"{said.path} must have periodic_boundary_conditions, true or false for each of {said.dim} axes; "
            f"got {said.values['periodic_boundary_conditions']!r}."
        )
    if not Path(path).is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    try:
        file = h5py.File(path, "r")
        names = list(file)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole HDF5 file ({error}); copy it again.") from error
    with file:
        if not names:
            raise ValueError(f"{path} holds no episode; give a file with one or more.")
        for name in names:
            try:
                if not isinstance(file[name], h5py.Group):
                    raise ValueError(
                        "it is an array; an episode is a group that holds position and particle_type: write it so."
                    )
                yield _trajectory(file[name], said, periodic, history)
            except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
                raise ValueError(f"{path}, episode {name}: {error}") from error


def write_lagrangebench(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write trajectories to an HDF5 file that LagrangeBench trains on; see `peer_metadata` for the rest.

    Positions are stored in single precision. Kinematic particles of type 2, or that move, are moving walls,
    other kinematic ones walls at rest; those of type 0 are rigid bodies and all others fluid.

    Raises:
        ValueError: there are none, they differ in length, or have particles that come or go.
    """
    import h5py

    length = None
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        for number, trajectory in enumerate(trajectories):
            positions = recorded_positions(trajectory).astype(np.float32)
            if len(positions) != (length or len(positions)):
                raise ValueError(
                    f"Trajectory {number} has {len(positions)} frames and the first {length}; LagrangeBench wants "
                    "equally many: cut them with window()."
                )
            length = len(positions)
            group = file.create_group(f"{number:05d}")
            group.create_dataset("position", data=positions, compression="gzip", shuffle=True)
            group.create_dataset("particle_type", data=_types(trajectory))
        if length is None:
            raise ValueError("There is no trajectory to write; give at least one.")


def _types(trajectory: Trajectory) -> Array:
    state = trajectory.initial
    assert isinstance(state, ParticleState)
    own = state.particle_types.cpu().numpy() if "particle_types" in state else np.full(state.num_entities, WATER)
    fixed = state.kinematic.cpu().numpy() if "kinematic" in state else np.zeros(len(own), dtype=bool)
    moves = (trajectory["velocities"] != 0).any(2).any(0).cpu().numpy()
    walls = np.where(moves | (own == _TYPES[MOVING_WALL]), MOVING_WALL, SOLID_WALL)
    return np.where(fixed, walls, np.where(own == _TYPES[RIGID_BODY], RIGID_BODY, FLUID)).astype(np.int32)


def _trajectory(group: Any, said: Metadata, periodic: Array, history: int) -> Trajectory:
    missing = [name for name in ("position", "particle_type") if name not in group]
    if missing:
        raise ValueError(f"it lacks '{missing[0]}'; write or copy the file again.")
    positions: Array = np.asarray(group["position"][()])
    types: Array = np.asarray(group["particle_type"][()])
    if positions.ndim != 3 or positions.shape[2] != said.dim or types.shape != positions.shape[1:2]:
        raise ValueError(
            f"position must be [frames, n, {said.dim}] and particle_type [n], with the dim of {said.path.name}; "
            f"got {list(positions.shape)} and {list(types.shape)}."
        )
    positions, types = positions[:, types != PAD], types[types != PAD]
    unknown = sorted(set(types.tolist()) - _TYPES.keys())
    if unknown:
        raise ValueError(f"particle_type must be from -1 to 3; got {unknown[0]}.")
    return from_arrays(
        positions=positions,
        dt=said.dt,
        history=history,
        particle_types=np.array([_TYPES[kind] for kind in types.tolist()], dtype=np.int64),
        kinematic=(types == SOLID_WALL) | (types == MOVING_WALL),
        boundaries=said.boundaries,
        periodic=periodic if periodic.any() else None,
    )
