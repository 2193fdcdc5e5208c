"""Particles in series of VTK files: points without a mesh, as this library or others write them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simworld.data.arrays import Array, checked_places, displacements, periodic_size, static_fields
from simworld.data.series import IDS, node_data, node_values, of_one_dt, read_series, several, warn_of_cell_data
from simworld.fields import Field
from simworld.kinds import ParticleState
from simworld.trajectory import Trajectory

OF_SCENE = {"gravity": 1, "periodic": 1, "boundaries": 2}  # how often they have a number for each axis


def read_vtk(
    path: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    dt: float | None = None,
    history: int = 5,
) -> Iterator[Trajectory]:
    """Yield the series of points in a .pvd or a folder of numbered files (.vtu, .vtk), or of each series in a folder.

    `write_vtk` is the way back. `names`, `units` and `dt` [s] say of data what they say to `read_meshes`, with the
    fields of ParticleState; further data becomes a field of its own. Places are in the length of the unit of
    velocities, where `units` does not say that of `positions`. Points have a row for each of the `ids` in the
    data, and where these come and go are `active` while they are there, else held at their last or first place. Without
    ids all frames have the same points. Those that stay in the plane across the third axis have two coordinates, unless
    gravity or a box, which field data may hold, has three.

    Recorded velocities are taken as they are, with a recorded history; frame 0 is then the first. Without a history
    frame 0 is number `history`, the first that knows so many velocities before. Without velocities these are made of
    positions, as `from_arrays` makes them, and frame 0 is number `history` + 1.

    Raises:
        ValueError: frames hold a mesh, differ in points, fields or units, are not evenly spaced or too few, what stays
            the same changes, a unit is missing, or `names` or `units` says something of data that is not there.
        ImportError: meshio is missing.

    Warns:
        UserWarning: data of cells, or field data that no ParticleState has, is left out.
    """
    yield from of_one_dt(_series(one, names or {}, units or {}, dt, history) for one in several(Path(path)))


def _series(
    path: Path, names: Mapping[str, str], units: Mapping[str, str], dt: float | None, history: int
) -> Trajectory:
    meshes, dt = read_series(path, dt)
    wheres = [f"{path}, frame {number}" for number in range(len(meshes))]
    for mesh, where in zip(meshes, wheres, strict=True):
        _check_points(mesh, where)
    of_data = {name: unit for name, unit in units.items() if name != "positions"}
    data = [node_data(mesh, ParticleState, names, of_data, where) for mesh, where in zip(meshes, wheres, strict=True)]
    said = [sorted(f"{name} [{unit}]" for name, (_, unit) in own.items()) for own in data]
    for own, where in zip(said, wheres, strict=True):
        if own != said[0]:
            raise ValueError(f"{where} has the data {', '.join(own)}; frame 0 has {', '.join(said[0])}.")
    rows, active = _rows(meshes, wheres)
    space = _space(meshes, data)
    points = [np.asarray(mesh.points)[:, :space] for mesh in meshes]
    found = {"positions": _filled(points, rows, active)}
    for name in data[0]:
        known = ParticleState.fields.get(name)
        values = [node_values(known, own[name][0], space, f"{w}: {name}") for own, w in zip(data, wheres, strict=True)]
        if len({value.shape[1:] for value in values}) > 1:
            raise ValueError(f"{path}: {name} has another number of columns in some frames than in others.")
        found[name] = _filled([value.numpy() for value in values], rows, active)
    kept, context = _of_scene(meshes, space, path)
    own_units = {name: unit for name, (_, unit) in data[0].items() if unit is not None}
    length = units.get("positions", own_units.get("velocities", "").partition("/")[0])
    own_units |= {"positions": length} if length else {}
    try:
        return _trajectory(found, kept, context, active, dt, history, own_units)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _of_scene(meshes: Sequence[Any], space: int, path: Path) -> tuple[dict[str, Array], list[Array]]:
    """Return what field data says of the scene, and the context of each frame, if any; warn of what is left out."""
    data = meshes[0].field_data
    kept = {name: np.asarray(data[name]) for name in OF_SCENE if name in data}
    for name, value in kept.items():
        wanted = space * OF_SCENE[name]
        if value.size != wanted:
            raise ValueError(f"{path}: the field data '{name}' must be {wanted} numbers; got {value.size}.")
    if "boundaries" in kept:
        kept["boundaries"] = kept["boundaries"].reshape(2, -1)
    if "periodic" in kept:
        kept["periodic"] = kept["periodic"].astype(np.bool_)
    context = [mesh.field_data["context"] for mesh in meshes if "context" in mesh.field_data]
    if len(context) not in (0, len(meshes)):
        raise ValueError(f"{path}: {len(context)} of {len(meshes)} frames have a context; give each one or none.")
    left = sorted(data.keys() - {*OF_SCENE, "context", "TimeValue", "TIME"})
    if left:
        warnings.warn(f"{path}: field data is left out: {', '.join(left)}.", stacklevel=5)
    return kept, context


def _check_points(mesh: Any, where: str) -> None:
    kinds = sorted({block.type for block in mesh.cells} - {"vertex", "poly_vertex"})
    if kinds:
        raise ValueError(f"{where} has cells of the kind {kinds[0]}, a mesh; import it by the format meshio.")
    warn_of_cell_data(mesh, where)


def _rows(meshes: Sequence[Any], wheres: Sequence[str]) -> tuple[list[Array], Array]:
    """Return the row of each point of each frame, and which rows are there in it [T, n]."""
    ids = [np.asarray(mesh.point_data.get(IDS, np.arange(len(mesh.points)))).reshape(-1) for mesh in meshes]
    known = np.unique(np.concatenate(ids))
    active = np.stack([np.isin(known, own) for own in ids])
    for own, there, mesh, where in zip(ids, active, meshes, wheres, strict=True):
        if there.sum() != len(own):
            raise ValueError(f"{where} has ids that are there twice; each point needs its own.")
        if IDS not in mesh.point_data and not there.all():
            raise ValueError(
                f"{where} has {len(own)} points and another frame {len(known)}, and no point data '{IDS}' says which "
                "are the same; add it."
            )
    return [np.searchsorted(known, own) for own in ids], active


def _space(meshes: Sequence[Any], data: Sequence[Mapping[str, tuple[Array, str | None]]]) -> int:
    """Return the number of coordinates: that of gravity or box, or 2 where nothing leaves the plane, or 3."""
    said = meshes[0].field_data
    vectors = [mesh.points for mesh in meshes] + [own["velocities"][0] for own in data if "velocities" in own]
    if any(np.any(vector[:, 2:]) for vector in vectors):
        return 3
    spaces = [np.size(said[name]) / times for name, times in OF_SCENE.items() if name in said]
    return 3 if 3 in spaces else 2


def _filled(values: Sequence[Array], rows: Sequence[Array], active: Array) -> Array:
    """Return [T, n, ...] of values of the points in each frame; where a row is not there, those it had or will have."""
    whole = np.zeros((*active.shape, *values[0].shape[1:]), dtype=values[0].dtype.newbyteorder("="))
    for frame, (value, own) in enumerate(zip(values, rows, strict=True)):
        whole[frame, own] = value
    latest = np.maximum.accumulate(np.where(active, np.arange(len(active))[:, None], -1), axis=0)
    return whole[np.where(latest < 0, active.argmax(0), latest), np.arange(active.shape[1])]


def _trajectory(
    found: dict[str, Array],
    kept: Mapping[str, Array],
    context: Sequence[Array],
    active: Array,
    dt: float,
    history: int,
    units: Mapping[str, str],
) -> Trajectory:
    """Return the trajectory of what was found, [T, n, ...] by field, and what is `kept` of the scene."""
    past, fields = 0 if "history" in found else history, ParticleState.fields
    places = checked_places(found["positions"], past)
    static = {name: found.pop(name) for name in list(found) if name in fields and fields[name].static}
    for name, value in static.items():
        changes = (value != value[0]).reshape(len(value), -1).any(1)
        if changes.any():
            raise ValueError(f"{name} change in frame {changes.argmax()}; they stay as they are in a trajectory.")
    still = static_fields({**{name: value[0] for name, value in static.items()}, **kept}, places)
    values: dict[str, Any] = dict(still)
    if "history" in found:
        values["history"] = _history(found.pop("history")[0], places, "velocities" in found)
    if context:
        found["context"] = np.stack(context)[:, None]
    if "velocities" not in found:
        moved = displacements(places, periodic_size(still)) / dt
        there = (active[1:] & active[:-1])[..., None]
        found = {name: value[1:] for name, value in found.items()} | {"velocities": np.where(there, moved, 0.0)}
        active = active[1:] & active[:-1]  # who appears is there once its velocity is known
    frames = {
        name: torch.from_numpy(value.astype(places.dtype if value.dtype.kind == "f" else value.dtype))
        for name, value in found.items()
    }
    if past:
        values["history"] = frames["velocities"][:past].transpose(0, 1).contiguous()
    frames = {name: value[past:] for name, value in frames.items()}
    extra = {
        name: Field(unit=units[name], shape=value.shape[2:]) for name, value in frames.items() if name not in fields
    }
    changed = {name: unit for name, unit in units.items() if name in fields and unit != fields[name].unit}
    shown = torch.from_numpy(active[past:].copy())
    kind = ParticleState.with_units(**changed).with_fields(**extra)
    values |= {name: value[0] for name, value in frames.items()}
    made = Trajectory(initial=kind(active=shown[0], **values), frames=frames, active=shown, dt=dt)
    made.check_finite()
    return made


def _history(recorded: Array, places: Array, moving: bool) -> torch.Tensor:
    """Return earlier velocities [n, h, d] of a frame, which VTK has in one row for each point."""
    num, width = places.shape[1:]
    if not moving or recorded.size % (num * width):
        raise ValueError(
            f"history must be {width} numbers for each earlier velocity, beside velocities; got {list(recorded.shape)}"
            f"{'' if moving else ' and no velocities'}. Take it out, or correct it."
        )
    return torch.from_numpy(recorded.reshape(num, -1, width).astype(places.dtype))
