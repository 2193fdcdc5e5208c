"""Data sets of "Learning mesh-based simulation with graph networks" (Pfaff et al. 2021): TFRecord and meta.json."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.data.mesh_cells import held_nodes, mesh_faults
from simworld.data.tfrecord import Value, read_tfrecord
from simworld.fields import Field
from simworld.kinds import MeshState
from simworld.trajectory import Trajectory

Arrays = np.ndarray[Any, Any]
KINDS = ("float32", "float64", "int32", "int64", "uint8")
SIZING = "sizing_field"  # of their remesher: no quantity of the flow or cloth
NAMES = {
    "mesh_pos": "rest_positions",
    "world_pos": "positions",
    "velocity": "velocities",
    "pressure": "pressures",
    "stress": "stresses",
    "density": "densities",
    "node_type": "node_types",
    "cells": "cells",
}
"""Fields of theirs and ours."""
DERIVED = ("prev|", "target|")  # what their loaders make of neighbouring frames
Recorded = MeshState.with_fields(densities=Field(unit="kg/m^3"))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a meta.json says: how each field lies in a record, and the seconds between frames."""

    path: Path
    features: Mapping[str, Mapping[str, Any]]
    dt: float | None


def read_meshgraphnets(path: str | Path, *, dt: float | None = None) -> Iterator[Trajectory]:
    """Yield the episodes of a TFRecord file, one by one; meta.json lies beside it.

    `dt` [s] is that of meta.json, if not given; sets of states at rest (deforming plates) say none, or 0: choose one.

    Nodes of another type than normal and outflow are kinematic. Where nodes move and no velocities are recorded these
    are (x_t - x_(t-1)) / dt, so frame 0 is the second recorded. Fields of varying length (`dynamic_varlen`) are of a
    mesh that is cut anew as it moves: every run of frames with one mesh becomes an episode of its own. Their
    sizing field is left out.

    Raises:
        ValueError: the file is damaged, or meta.json and records disagree; it names file and record.
    """
    said = read_layout(path)
    dt = said.dt if dt is None else dt
    if dt is None:
        raise ValueError(f"{said.path} says no time between frames, as dt or at all; give dt in seconds (--dt).")
    number = -1
    for number, example in enumerate(read_tfrecord(path)):
        try:
            yield from _episodes(_arrays(example.context, said), dt)
        except ValueError as error:
            raise ValueError(f"{path}, record {number}: {error}") from error
    if number < 0:
        raise ValueError(f"{path} holds no record; give a TFRecord file with an episode or more.")


def read_layout(path: str | Path) -> Layout:
    """Return what the meta.json beside a file says.

    Raises:
        ValueError: there is none, it is not JSON, lacks features, or says of one what cannot be.
    """
    path = Path(path).parent / "meta.json"
    if not path.is_file():
        raise ValueError(f"There is no '{path}'; put the data set's meta.json beside its episodes.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again.") from error
    features = values.get("features") if isinstance(values, dict) else None
    if not isinstance(features, dict) or not all(isinstance(one, dict) for one in features.values()):
        raise ValueError(f"{path} must hold an object with features, each with type, shape and dtype.")
    dt = values.get("dt") or None  # 0 where nothing moves by itself
    if dt is not None and (isinstance(dt, bool) or not isinstance(dt, int | float) or not 0 < dt < math.inf):
        raise ValueError(f"{path} must have a positive dt; got {dt!r}: correct it, or give dt.")
    for name, feature in features.items():
        if not _sound(feature):
            raise ValueError(
                f"{path}: {name} must have a type (static, dynamic or dynamic_varlen), a shape of two or three sizes, "
                f"the last positive, and a dtype ({', '.join(KINDS)}); got {feature}."
            )
    return Layout(path=path, features=features, dt=None if dt is None else float(dt))


def _sound(feature: Mapping[str, Any]) -> bool:
    shape = feature.get("shape")
    if feature.get("type") not in ("static", "dynamic", "dynamic_varlen") or _kind(feature) not in KINDS:
        return False
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(type(size) is int for size in shape):
        return False
    return bool(shape[-1] > 0) and (len(shape) == 3 or feature["type"] == "dynamic_varlen")


def _kind(feature: Mapping[str, Any]) -> str:
    """Return a feature's dtype; some of their files have it as TensorFlow prints it, <dtype: 'float32'>."""
    return str(feature.get("dtype")).removeprefix("<dtype: '").removesuffix("'>")


def _arrays(values: Mapping[str, Any], said: Layout) -> dict[str, list[Arrays]]:
    """Return each field as a list of frames, [n, k] each; of one frame where it is static."""
    found = {}
    for name, feature in said.features.items():
        if name.startswith(DERIVED) or name == SIZING:
            continue
        flat = _bytes(values.get(name, ()), _kind(feature), name)
        frames, width = int(feature["shape"][0]), int(feature["shape"][-1])
        if feature["type"] == "dynamic_varlen":
            counts = _bytes(values.get(f"length_{name}", ()), "int32", f"length_{name}")
            if counts.sum() * width != len(flat) or (counts < 0).any():
                raise ValueError(f"length_{name} adds up to {counts.sum()} rows of {width}; {name} has {len(flat)}.")
            found[name] = np.split(flat.reshape(-1, width), np.cumsum(counts)[:-1])
            continue
        frames = 1 if feature["type"] == "static" else frames
        if frames < 1 or len(flat) % (frames * width) or not len(flat):
            raise ValueError(
                f"{name} holds {len(flat)} numbers, no multiple of the {frames} frames of {width} that "
                f"{said.path.name} says; correct its shape."
            )
        found[name] = list(flat.reshape(frames, -1, width))
    return found


def _bytes(values: Any, dtype: str, name: str) -> Arrays:
    found: list[Value] = list(values)
    kind = np.dtype(dtype).newbyteorder("<")
    if len(found) != 1 or not isinstance(found[0], bytes) or len(found[0]) % kind.itemsize:
        raise ValueError(f"{name} must be the bytes of one array of {dtype}; give another file.")
    return np.frombuffer(found[0], dtype=kind)


def _episodes(found: Mapping[str, list[Arrays]], dt: float) -> Iterator[Trajectory]:
    missing = [name for name in ("cells", "node_type") if name not in found]
    if missing or not {"mesh_pos", "world_pos"} & set(found):
        raise ValueError(f"it has no {missing[0] if missing else 'mesh_pos or world_pos'}; it has {', '.join(found)}.")
    count = max(map(len, found.values()))
    wrong = [name for name, frames in found.items() if len(frames) not in (1, count)]
    if wrong:
        raise ValueError(f"{wrong[0]} has {len(found[wrong[0]])} frames and others {count}.")
    meshes = [name for name in ("cells", "node_type", "mesh_pos") if name in found]
    start = 0
    for stop in range(1, count + 1):
        same = stop < count and all(
            len(found[name]) == 1 or np.array_equal(found[name][start], found[name][stop]) for name in meshes
        )
        if same:
            continue
        yield from _episode({k: v if len(v) == 1 else v[start:stop] for k, v in found.items()}, stop - start, dt)
        start = stop


def _episode(found: Mapping[str, list[Arrays]], count: int, dt: float) -> Iterator[Trajectory]:
    """Yield what one mesh went through, if it lasts for a step."""
    derived = "world_pos" in found and "velocity" not in found
    first = 1 if derived else 0
    if count < first + 2:
        return
    known = {NAMES.get(name, name): rows for name, rows in found.items()}
    unknown = [name for name in known if name not in Recorded.fields]
    if unknown:
        raise ValueError(
            f"its field {unknown[0]} is none that is known ({', '.join(NAMES)}); take it out of meta.json."
        )
    frames = {
        name: _frames(values, count, scalar=Recorded.fields[name].shape == ())
        for name, values in known.items()
        if name not in ("cells", "node_types", "rest_positions")
    }
    if derived:
        frames["velocities"] = torch.cat([frames["positions"][:1] * 0, frames["positions"].diff(dim=0) / dt])
    frames = {name: value[first:] for name, value in frames.items()}
    types = torch.from_numpy(known["node_types"][0].astype(np.int64)).flatten()
    fields: dict[str, Any] = {"cells": torch.from_numpy(known["cells"][0].astype(np.int64)), "node_types": types}
    if "rest_positions" in known:
        fields["rest_positions"] = torch.from_numpy(known["rest_positions"][0].astype(np.float32))
    wrong = [name for name, value in frames.items() if value.shape[1] != len(types)]
    if wrong:
        raise ValueError(f"{wrong[0]} has {frames[wrong[0]].shape[1]} rows and node_type {len(types)}.")
    fields |= {"kinematic": held_nodes(types, "it")}
    fields |= {name: value[0] for name, value in frames.items()}
    state = Recorded(**fields)
    for fault in mesh_faults(state):
        warnings.warn(f"A mesh of this recording is faulty: {fault}", stacklevel=2)
    there = torch.ones(count - first, len(types), dtype=torch.bool)
    path = Trajectory(initial=state, frames=frames, active=there, dt=dt)
    path.check_finite()
    yield path


def _frames(values: list[Arrays], count: int, *, scalar: bool) -> Tensor:
    """Return [T, n, k] of frames [n, k], or [T, n] of scalars, which are [n, 1] in their files."""
    if len({value.shape for value in values}) > 1:
        raise ValueError("a field changes its number of rows where the mesh does not; give another file.")
    stacked = torch.from_numpy(np.stack(values).astype(np.float32))
    stacked = stacked.expand(count, *stacked.shape[1:]) if len(values) == 1 else stacked
    return stacked[..., 0] if scalar else stacked
