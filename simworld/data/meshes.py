"""Meshes and what happened to them, in the formats that meshio and trimesh read."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from simworld.data.arrays import Array
from simworld.data.mesh_cells import CELLS, held_nodes, mesh_faults
from simworld.extras import needed
from simworld.fields import Field
from simworld.kinds import MeshState
from simworld.trajectory import Trajectory

HIGHER = ("tetra", "hexahedron", "triangle", "quad", "line")  # the solid before its surface, a surface before its rim
MIXED = ({"tetra", "hexahedron"}, {"triangle", "quad"})
REST = "rest_positions"
PLANE = 1e-12  # of the size of the whole: nearer than this to a plane is in it
UNIT = re.compile(r"^(?P<name>.+?) \[(?P<unit>[^\]]*)\]$")  # how exported names carry units
NUMBER = re.compile(r"\d+\.\d+|\d+")
PROGRAMS_OWN = re.compile(r"^(gmsh|medit|cell_tags|med|abaqus|flac3d|GlobalNodeId|GlobalElementId)\b")  # their numbers


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
    first = dt
    for one in _several(Path(path)):
        made = _series(one, names or {}, units or {}, dt)
        first = made.dt if first is None else first
        yield replace(made, dt=first) if math.isclose(made.dt, first, rel_tol=1e-6) else made


def _several(path: Path) -> list[Path]:
    """Return the series in a folder, or the path itself where it is one."""
    if not path.is_dir():
        return [path]
    inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
    return (
        [one for one in inside if one.suffix in (".xdmf", ".pvd")] or [one for one in inside if one.is_dir()] or [path]
    )


def _series(path: Path, names: Mapping[str, str], units: Mapping[str, str], dt: float | None) -> Trajectory:
    frames = list(_frames(path))
    if len(frames) < 2:
        raise ValueError(f"{path} must hold a series of two frames or more; got {len(frames)}.")
    times = [time for time, _ in frames]
    if dt is None:
        steps = np.diff([np.nan if time is None else time for time in times])
        if not (np.isfinite(steps).all() and (steps > 0).all() and np.allclose(steps, steps[0], rtol=1e-3)):
            raise ValueError(
                f"{path} must hold frames at even distances in time; got times {times[:5]}. Give dt if you know it."
            )
        dt = float(steps.mean())
    said = [f"{path}, frame {number}" for number in range(len(frames))]
    parts = [_Parts.of(mesh, names, units, where) for (_, mesh), where in zip(frames, said, strict=True)]
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
        mesh = next(mesh for _, mesh in _frames(path)) if path.suffix in (".xdmf", ".pvd") else _read(path)
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
        left = sorted(name for name in mesh.cell_data if not PROGRAMS_OWN.match(name))
        if left:
            warnings.warn(f"{where}: data of cells is left out: {', '.join(left)}. Average it to nodes.", stacklevel=4)
        points = np.ascontiguousarray(mesh.points, dtype=np.float64)
        return _Parts(kind=kind, points=points, cells=cells, data=_data(mesh, names or {}, units or {}, where))

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
            values[name] = _tensor(known, value, wide, f"{where}: {name}")
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
        raise ValueError(f"{where} has points but no cells; a mesh needs {', '.join(CELLS)}.")
    mixed = [pair for pair in MIXED if kinds[0] in pair and pair <= set(kinds)]
    if mixed:
        raise ValueError(
            f"{where} mixes cells: {' and '.join(sorted(mixed[0]))}. Split the larger ones, one kind is taken."
        )
    return kinds[0], np.concatenate(found[kinds[0]])


def _data(
    mesh: Any, names: Mapping[str, str], units: Mapping[str, str], where: str
) -> dict[str, tuple[Array, str | None]]:
    """Return values of nodes and their units, by field."""
    found: dict[str, tuple[Array, str | None]] = {}
    unused = {*names, *units}
    for said, array in mesh.point_data.items():
        matched = UNIT.match(said)
        plain, unit = (matched["name"], matched["unit"]) if matched else (said, None)
        name = names.get(said, names.get(plain, plain))
        if PROGRAMS_OWN.match(name):
            continue
        unused -= {said, plain, name}
        unit = units.get(name, units.get(said, units.get(plain, unit)))
        if name not in MeshState.fields and unit is None:
            raise ValueError(
                f"{where}: the data '{said}' has no unit and is no field of MeshState. Say its unit "
                f"(units={{'{name}': 'm/s'}}, --unit {name}=m/s, or '{name} [m/s]' in the file) or which field it is "
                f"(names={{'{said}': 'velocities'}}, --name {said}=velocities)."
            )
        if unit is not None and not unit.strip():
            raise ValueError(f"{where}: the unit of '{said}' is empty; say 1 for what has none.")
        if name in found:
            raise ValueError(f"{where} has '{name}' twice, once as '{said}'; give one of them another name.")
        found[name] = (np.asarray(array), unit)
    if unused:
        has = ", ".join(mesh.point_data) or "none"
        raise ValueError(f"{where} has no data '{min(unused)}'; it has {has}.")
    return found


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


def _tensor(field: Field | None, value: Array, space: int, where: str) -> Tensor:
    """Return point data as the field has it: without a third component that fills up a plane's vectors."""
    if field is not None and field.shape in (("d",), ("e",)) and value.ndim == 2:
        value = value[:, :space]
    if field is not None and field.shape == () and value.ndim == 2 and value.shape[1] == 1:
        value = value[:, 0]  # some writers have a scalar as a column
    if field is not None and field.kind in ("int", "bool"):
        if not np.array_equal(value, np.round(value)):
            raise ValueError(f"{where} must be whole numbers; got {value[value != np.round(value)][0]}.")
        return torch.from_numpy(value.astype(np.int64 if field.kind == "int" else np.bool_))
    return torch.from_numpy(np.ascontiguousarray(value.astype(np.float64)))


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


def _frames(path: Path) -> Iterator[tuple[float | None, Any]]:
    if path.is_dir():
        for file in _in_order(path):
            yield None, _read(file)
        return
    if path.suffix not in (".xdmf", ".pvd"):
        raise ValueError(f"{path} must be an .xdmf or .pvd series or a folder of numbered files, each a frame.")
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    if path.suffix == ".xdmf":
        yield from _by_meshio(path, "an XDMF series", lambda: list(_xdmf_frames(path)))
        return
    try:
        entries = [
            (float(e.get("timestep", "nan")), str(e.get("file"))) for e in ElementTree.parse(path).iter("DataSet")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is not a .pvd series ({error}); write it again.") from error
    for time, name in entries:
        yield time, _read(path.parent / name)


def _xdmf_frames(path: Path) -> Iterator[tuple[float, Any]]:
    meshio = needed("meshio", "Reading a mesh", "mesh")
    with meshio.xdmf.TimeSeriesReader(path) as reader:
        mesh = None
        for number in range(reader.num_steps):
            own = {part.tag for part in reader.collection[number]}
            if {"Geometry", "Topology"} <= own:
                reader.mesh_grid = reader.collection[number]
                mesh = reader.read_points_cells()
            elif mesh is None:
                mesh = reader.read_points_cells()
            time, point_data, cell_data = reader.read_data(number)
            yield float(time), meshio.Mesh(*mesh, point_data=point_data, cell_data=cell_data)


def _read(path: Path) -> Any:
    meshio = needed("meshio", "Reading a mesh", "mesh")
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    mesh = _by_meshio(path, "a mesh", lambda: meshio.read(path))
    units = _vtu_units(path) if path.suffix == ".vtu" else {}
    mesh.point_data.pop("ids", None)  # numbers of rows, which exported frames carry
    mesh.point_data = {
        f"{name} [{units[name]}]" if name in units else name: value for name, value in mesh.point_data.items()
    }
    return mesh


def _by_meshio(path: Path, what: str, job: Any) -> Any:
    """Return what meshio makes of a file; say in one sentence what it prints, raises or leaves the program with."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return job()
    except (Exception, SystemExit) as error:
        printed = " ".join(said.getvalue().split()).removeprefix("Error: ")
        reason = printed or str(error) or type(error).__name__
        raise ValueError(f"{path} is not {what} that meshio reads ({reason}); convert it to .vtu or .msh.") from error


def _vtu_units(path: Path) -> dict[str, str]:
    """Return the units that a .vtu has beside its arrays (`UNITS_LABEL`), which meshio does not hand on."""
    try:
        arrays = ElementTree.parse(path).iter("DataArray")
        found = {str(one.get("Name")): key for one in arrays for key in one.iter("InformationKey")}
    except ElementTree.ParseError:
        return {}  # raw appended data, which is no XML
    return {name: str(key.text) for name, key in found.items() if key.get("name") == "UNITS_LABEL" and key.text}


def _in_order(folder: Path) -> list[Path]:
    """Return the files of a folder by the one number in their names that differs."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    numbers = [[float(number) for number in NUMBER.findall(file.stem)] for file in files]
    if len({len(found) for found in numbers}) == 1:
        differing = [column for column in zip(*numbers, strict=True) if len(set(column)) == len(files)]
        if len(differing) == 1:
            return [file for _, file in sorted(zip(differing[0], files, strict=True))]
    if len(files) < 2:
        return files
    raise ValueError(
        f"{folder} must hold files whose names differ in one number, that of the frame; got {files[0].name}, "
        f"{files[1].name}. Take other files out, or give a .pvd series."
    )
