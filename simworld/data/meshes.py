"""Meshes and what happened to them, in the formats that meshio and trimesh read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simworld.data.arrays import Array
from simworld.data.mesh_cells import CELLS, held_nodes, mesh_faults
from simworld.data.series import (
    frames,
    node_data,
    node_values,
    of_one_dt,
    read_frame,
    read_series,
    several,
    warn_of_cell_data,
)
from simworld.fields import Field
from simworld.kinds import MeshState
from simworld.trajectory import Trajectory

HIGHER = ("tetra", "hexahedron", "triangle", "quad", "line")  # the solid before its surface, a surface before its rim
MIXED = ({"tetra", "hexahedron"}, {"triangle", "quad"})
REST = "rest_positions"
PLANE = 1e-12  # of the size of the whole: nearer than this to a plane is in it


def read_meshes(
    path: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    dt: float | None = None,
) -> Iterator[Trajectory]:
    """Yield the series of frames in an .xdmf, a .pvd or a folder of numbered files, all of one mesh.

    A folder of several series, .xdmf or .pvd files or folders of numbered files, is an episode for each, by name; steps
    that agree to a millionth are the same. Whatever meshio reads will do: VTK, VTU, XDMF, gmsh, Abaqus, Exodus.
    `names` says which of a file's point data is which field ({"U": "velocities"}); data called as a field of MeshState
    is that field, in the unit that the file or `units`, by the field's name or the file's, says or, where neither does,
    in MeshState's. Any other needs its unit, in `units` or as "name [unit]", and becomes a field of its own. Nodes are
    held (`kinematic`) as `node_types` have it where the data does not say itself: all but normal ones and those of an
    outflow. Numbered files do not know their times: give `dt` [s]. Points that move become `positions`, those of the
    first frame `rest_positions`. What lies in a plane throughout has two coordinates. Data of cells is left out, with a
    warning.

    Raises:
        ValueError: frames differ in mesh, fields or units, are not evenly spaced, a unit is missing, `names` or `units`
            says something of data that is not there, or the mesh is faulty.
        ImportError: meshio is missing.
    """
    yield from of_one_dt(_series(one, names or {}, units or {}, dt) for one in several(Path(path)))


def _series(path: Path, names: Mapping[str, str], units: Mapping[str, str], dt: float | None) -> Trajectory:
    meshes, dt = read_series(path, dt)
    said = [f"{path}, frame {number}" for number in range(len(meshes))]
    parts = [_Parts.of(mesh, names, units, where) for mesh, where in zip(meshes, said, strict=True)]
    space = _space(parts)
    states = [part.state(space, where, faulty=k > 0) for k, (part, where) in enumerate(zip(parts, said, strict=True))]
    return _joined(path, states, dt)


def read_mesh(path: str | Path) -> tuple[MeshState, list[str]]:
    """Return the mesh in a file that meshio or trimesh reads, without data, and what is wrong with it (`mesh_faults`).

    Of a series, an .xdmf or a .pvd, that is the mesh of its first frame; trimesh reads .glb and .gltf.

    Raises:
        ValueError: the file cannot be read, or its cells are of kinds that are not known or of several.
        ImportError: meshio is missing.
    """
    path = Path(path)
    if path.suffix in (".glb", ".gltf"):
        part = _surface(path)
    else:
        mesh = next(mesh for _, mesh in frames(path)) if path.suffix in (".xdmf", ".pvd") else read_frame(path)
        mesh.point_data = {}
        part = _Parts.of(mesh, None, None, str(path))
    state = part.state(_space([part]), str(path), faulty=True)
    return state, mesh_faults(state)


def mesh_state(
    mesh: Any,
    *,
    names: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    where: str = "The mesh",
) -> MeshState:
    """Return a meshio.Mesh as a state: its points at rest, its cells, its point data; see `read_meshes`.

    Of cells of several dimensions those of the highest count: a solid's tetrahedra, not the triangles of its surface.

    Raises:
        ValueError: the cells are of several kinds or of one that is not known, a unit is missing, the mesh is faulty.
    """
    part = _Parts.of(mesh, names, units, where)
    return part.state(_space([part]), where)


def read_surface(path: str | Path) -> MeshState:
    """Return the triangles of a surface (STL, OBJ, PLY, GLB) as a state, equal points merged, by trimesh.

    Raises:
        ValueError: there is no such file, it is no surface, or a faulty one.
    """
    part = _surface(Path(path))
    return part.state(_space([part]), str(path))


def _surface(path: Path) -> _Parts:
    import trimesh

    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    try:
        found = trimesh.load(path, force="mesh")
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} is no surface that trimesh reads ({error}); give an STL, OBJ, PLY or GLB.") from error
    if not isinstance(found, trimesh.Trimesh) or not len(found.faces):
        raise ValueError(f"{path} holds no surface of triangles; give an STL, OBJ, PLY or GLB file of one.")
    points, cells = np.asarray(found.vertices, dtype=np.float64), np.asarray(found.faces, dtype=np.int64)
    return _Parts(kind="triangle", points=points, cells=cells, data={})


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """A mesh as a file has it: points [n, 2 or 3], cells [c, k] of a kind, and values and units of nodes by field."""

    kind: str
    points: Array
    cells: Array
    data: Mapping[str, tuple[Array, str | None]]

    @staticmethod
    def of(mesh: Any, names: Mapping[str, str] | None, units: Mapping[str, str] | None, where: str) -> _Parts:
        kind, cells = _cells(mesh, where)
        warn_of_cell_data(mesh, where)
        points = np.ascontiguousarray(mesh.points, dtype=np.float64)
        return _Parts(
            kind=kind, points=points, cells=cells, data=node_data(mesh, MeshState, names or {}, units or {}, where)
        )

    def state(self, space: int, where: str, *, faulty: bool = False) -> MeshState:
        """Return the mesh with `space` coordinates; refuse a faulty one, unless told otherwise."""
        points = torch.from_numpy(np.ascontiguousarray(self.points[:, :space]))
        values: dict[str, Any] = {"cells": torch.from_numpy(self.cells)}
        extra: dict[str, Field] = {}
        changed: dict[str, str] = {}
        for name, (value, unit) in self.data.items():
            known = MeshState.fields.get(name)
            if known is None:
                extra[name] = Field(unit=str(unit), shape=() if value.ndim == 1 else (value.shape[1],))
            elif unit is not None and unit != known.unit:
                changed[name] = unit
            wide = space if name != REST or self.kind not in ("triangle", "quad", "line") or value[:, 2:].any() else 2
            values[name] = node_values(known, value, wide, f"{where}: {name}")
        values |= {"positions": points} if REST in values and "positions" not in values else {}
        values.setdefault(REST, points)
        if "node_types" in values and "kinematic" not in values:
            values["kinematic"] = held_nodes(values["node_types"], where)
        if self.kind == "quad" and values[REST].shape[1] == 3:
            raise ValueError(
                f"{where} has quads in space, which would be read as tetrahedra; split them into triangles."
            )
        state = MeshState.with_units(**changed).with_fields(**extra)(**values)
        faults = [] if faulty else mesh_faults(state)
        if faults:
            raise ValueError(f"{where}: {faults[0]}")
        return state


def _cells(mesh: Any, where: str) -> tuple[str, Array]:
    """Return the cells [c, k] of the highest dimension, and their kind."""
    found: dict[str, list[Array]] = {}
    for block in mesh.cells:
        found.setdefault(block.type, []).append(np.asarray(block.data, dtype=np.int64))
    unknown = [kind for kind in found if kind not in (*CELLS, "vertex")]
    if unknown:
        raise ValueError(
            f"{where} has cells of the kind {unknown[0]}; those known are {', '.join(CELLS)}. Convert them."
        )
    kinds = [kind for kind in HIGHER if kind in found]
    if not kinds:
        raise ValueError(
            f"{where} has points but no cells; a mesh needs {', '.join(CELLS)}. Import particles by the format vtk."
        )
    mixed = [pair for pair in MIXED if kinds[0] in pair and pair <= set(kinds)]
    if mixed:
        raise ValueError(
            f"{where} mixes cells: {' and '.join(sorted(mixed[0]))}. Split the larger ones, one kind is taken."
        )
    return kinds[0], np.concatenate(found[kinds[0]])


def _space(parts: Sequence[_Parts]) -> int:
    """Return 2 where surfaces and lines, and vectors on them, lie in one plane across the third axis throughout."""
    if any(part.points.shape[1] == 2 for part in parts):
        return 2
    vectors = [
        value
        for part in parts
        for name, (value, _) in part.data.items()
        if name in MeshState.fields and MeshState.fields[name].shape == ("d",) and value.ndim == 2
    ]
    heights = np.concatenate([part.points[:, 2] for part in parts])
    size = np.ptp(parts[0].points, axis=0).max(initial=0.0)
    flat = np.ptp(heights) <= PLANE * size and not any(value[:, 2:].any() for value in vectors)
    return 2 if flat and parts[0].kind in ("triangle", "quad", "line") else 3


def _joined(path: Path, states: Sequence[MeshState], dt: float) -> Trajectory:
    """Return the trajectory of states of one mesh."""
    first = states[0]
    for number, state in enumerate(states):
        _check_alike(first, state, f"{path}, frame {number}")
    frames = {name: torch.stack([state[name] for state in states]) for name in first.dynamic_fields}
    moved = torch.stack([state.rest_positions for state in states])
    known: dict[str, Any] = {name: first[name] for name in first}
    if "positions" not in frames and not torch.equal(moved, moved[:1].expand_as(moved)):
        frames["positions"] = moved
        known["positions"] = moved[0]
    there = torch.ones(len(states), len(first), dtype=torch.bool)
    made = Trajectory(initial=type(first)(**known), frames=frames, active=there, dt=dt)
    made.check_finite()
    return made


def _check_alike(first: MeshState, state: MeshState, where: str) -> None:
    """Refuse a frame that is not of frame 0's mesh, fields and units."""
    if state.cells.shape != first.cells.shape or not torch.equal(state.cells, first.cells):
        raise ValueError(
            f"{where}: the mesh is another than that of frame 0; one trajectory has one mesh. "
            "Interpolate to one, or give the frames between changes apart."
        )
    if set(state) != set(first):
        raise ValueError(f"{where} has the fields {', '.join(state)}; frame 0 has {', '.join(first)}.")
    for name in first:
        if state.fields[name].unit != first.fields[name].unit or state[name].shape != first[name].shape:
            here, there = (f"{list(s[name].shape)} {s.fields[name].unit}" for s in (state, first))
            raise ValueError(f"{where} has {name} {here}; frame 0 has {there}.")
        if state.fields[name].static and name != REST and not torch.equal(state[name], first[name]):
            raise ValueError(f"{where} has other {name} than frame 0; they stay as they are in a trajectory.")
