"""Episodes of geoelements/gns: .npz files of pickled arrays, read without running the pickles."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simworld.data.arrays import Array, from_arrays, recorded_positions
from simworld.data.deepmind import peer_types
from simworld.data.metadata import Metadata, read_metadata
from simworld.data.unpickle import load_npz, load_pickle, opened
from simworld.kinds import WATER, ParticleState
from simworld.saving import replacing
from simworld.trajectory import Trajectory


def read_geoelements(path: str | Path, *, history: int = 5) -> Iterator[Trajectory]:
    """Yield the episodes of an .npz file, or of a saved rollout; metadata.json lies beside it.

    An episode is positions [T, n, d], a type or one for each particle and, if there, a material property; each
    has a name of its own, or all lie in `gns_data`. A rollout is a .pkl of geoelements' or an .npz of
    `positions` and `particle_type`; of it the truth is read, not what was predicted. Of metadata in sections,
    "train" counts for train.npz and "rollout" for others. Episodes may differ in length, so its
    sequence_length is not compared. Frame 0 is recorded frame `history` + 1; see `from_arrays`.

    Raises:
        ValueError: the file is damaged, or holds other things than arrays, or metadata and arrays disagree.
    """
    path = Path(path)
    said = read_metadata(path, "train" if path.stem.startswith("train") else "rollout")
    episodes = _episodes(path)
    if not episodes:
        raise ValueError(f"{path} holds no episode; give a file with one or more.")
    for name, parts in episodes.items():
        try:
            yield _trajectory(parts, said, history)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, '{name}': {error}") from error


def write_geoelements(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write trajectories to an .npz file that geoelements/gns trains on; see `peer_metadata` for the rest.

    Positions are stored in single precision; kinematic particles get type 3, others without a type 5.
    `materials` of one column become the material property.

    Raises:
        ValueError: there are none, or one has more than one material property, periodic axes, or particles that come
            or go.
    """
    number = -1
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, trajectory in enumerate(trajectories):
            row = _row(trajectory, number)
            with archive.open(f"simulation_trajectory_{number}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, row, allow_pickle=True)
        if number < 0:
            raise ValueError("There is no trajectory to write; give at least one.")


def _row(trajectory: Trajectory, number: int) -> Array:
    state = trajectory.initial
    if not isinstance(state, ParticleState):
        raise ValueError(f"Only ParticleState goes into such files; got {type(state).__name__}.")
    parts = [recorded_positions(trajectory).astype(np.float32), peer_types(state)]
    if "materials" in state:
        if state.materials.shape[1] != 1:
            raise ValueError(
                f"Trajectory {number} has {state.materials.shape[1]} material parameters, where geoelements has one; "
                "choose one of them."
            )
        parts.append(state.materials[:, 0].cpu().numpy())
    row = np.empty(len(parts), dtype=object)
    row[:] = parts
    return row


def _episodes(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return positions, types and materials of each episode by its name."""
    if path.suffix == ".pkl":
        with opened(path) as file:
            return {"rollout": _rollout(path, load_pickle(file, str(path)))}
    found = load_npz(path)
    if "positions" in found:
        return {"positions": (found["positions"], found.get("particle_type", WATER))}
    if "gns_data" in found:
        found = {f"gns_data[{k}]": row for k, row in enumerate(found["gns_data"])}
    return {name: _parts(path, name, row) for name, row in found.items()}


def _parts(path: Path, name: str, row: Any) -> tuple[Any, ...]:
    row = row.item() if isinstance(row, np.ndarray) and row.ndim == 0 and row.dtype.hasobject else row
    listed = isinstance(row, list | tuple) or (isinstance(row, np.ndarray) and row.dtype.hasobject and row.ndim == 1)
    if not listed or len(row) not in (2, 3):
        raise ValueError(f"{path}, '{name}' must be positions, particle type and perhaps a material; give another.")
    return tuple(row)


def _rollout(path: Path, found: Any) -> tuple[Any, ...]:
    names = ("initial_positions", "ground_truth_rollout", "particle_types")
    if not isinstance(found, Mapping) or not all(isinstance(found.get(name), np.ndarray) for name in names):
        raise ValueError(f"{path} must hold the arrays {', '.join(names)}; give a rollout that geoelements saved.")
    first, then, types = (found[name] for name in names)
    if first.ndim != 3 or first.shape[1:] != then.shape[1:]:
        raise ValueError(
            f"{path} has initial_positions {list(first.shape)} and ground_truth_rollout {list(then.shape)}; "
            "both must be [frames, n, d]."
        )
    return np.concatenate([first, then]), types


def _trajectory(parts: tuple[Any, ...], said: Metadata, history: int) -> Trajectory:
    positions = np.asarray(parts[0])
    if positions.ndim == 3 and positions.shape[2] != said.dim:
        raise ValueError(
            f"positions have {positions.shape[2]} dimensions, where {said.path.name} says {said.dim}; correct it."
        )
    materials = None
    if len(parts) == 3:
        materials = np.asarray(parts[2], dtype=float)
        materials = np.broadcast_to(materials, positions.shape[1:2]) if materials.size == 1 else materials
    types = np.asarray(parts[1])
    if types.dtype.kind == "f" and bool((types == np.round(types)).all()):
        types = types.astype(np.int64)
    return from_arrays(
        positions=positions,
        dt=said.dt,
        history=history,
        particle_types=types,
        materials=materials,
        boundaries=said.boundaries,
    )
