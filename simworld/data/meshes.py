"""Meshes and what happened to them, in the formats that meshio and trimesh read, and what can be wrong with a mesh."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import torch
from torch import Tensor

from simworld.fields import Field
from simworld.kinds import MeshState
from simworld.state import State
from simworld.trajectory import Trajectory

Arrays = np.ndarray[Any, Any]
CELLS = {"line": 2, "triangle": 3, "quad": 4, "tetra": 4, "hexahedron": 8}
"""Kinds of cells, in meshio's words, and their numbers of nodes."""
HIGHER = ("tetra", "hexahedron", "triangle", "quad", "line")  # the solid before its surface, a surface before its rim
XDMF_KINDS = {
    "line": "Polyline",
    "triangle": "Triangle",
    "quad": "Quadrilateral",
    "tetra": "Tetrahedron",
    "hexahedron": "Hexahedron",
}
REST = "rest_positions"
FLAT = 1e-9  # of the size of the whole: smaller cells have no inside
UNIT = re.compile(r"^(?P<name>.+?) \[(?P<unit>[^\]]*)\]$")  # how exported names carry units


def read_meshes(
    path: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    dt: float | None = None,
) -> Iterator[Trajectory]:
    """Yield the series of frames in an .xdmf, a .pvd or a folder of numbered files, all of one mesh.

    Whatever meshio reads will do: VTK, VTU, XDMF, gmsh, Abaqus, Exodus. `names` says which of a file's point data is
    which field ({"U": "velocities"}); data called as a field of MeshState is that field. Any other needs its unit, in
    `units` or as "name [unit]", and becomes a field of its own. Numbered files do not know their times: give `dt` [s].
    Points that move become `positions`, those of the first frame `rest_positions`.

    Raises:
        ValueError: frames differ in mesh or fields, are not evenly spaced, a unit is missing, or the mesh is faulty.
        ImportError: meshio is missing.
    """
    path = Path(path)
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
    states = [
        mesh_state(mesh, names=names, units=units, where=f"{path}, frame {k}") for k, (_, mesh) in enumerate(frames)
    ]
    yield _joined(path, states, dt)


def read_mesh(path: str | Path) -> tuple[MeshState, list[str]]:
    """Return the mesh in a file that meshio reads, without its data, and what is wrong with it (`mesh_faults`).

    Raises:
        ValueError: meshio cannot read the file, or its cells are of kinds that are not known or of several.
        ImportError: meshio is missing.
    """
    points, cells, _ = _parts(_read(Path(path)), str(path))
    state = MeshState(rest_positions=torch.from_numpy(points), cells=torch.from_numpy(cells))
    return state, mesh_faults(state)


def mesh_state(
    mesh: Any,
    *,
    names: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    where: str = "The mesh",
) -> MeshState:
    """Return a meshio.Mesh (or a trimesh.Trimesh) as a state: its points at rest, its cells, its point data.

    Of cells of several dimensions those of the highest count: a solid's tetrahedra, not the triangles of its surface.

    Raises:
        ValueError: the cells are of several kinds or of one that is not known, a unit is missing, the mesh is faulty.
    """
    points, cells, data = _parts(mesh, where)
    rest = torch.from_numpy(points)
    values: dict[str, Any] = {REST: rest, "cells": torch.from_numpy(cells)}
    extra: dict[str, Field] = {}
    for said, array in data.items():
        found = UNIT.match(said)
        plain, unit = (found["name"], found["unit"]) if found else (said, None)
        name = (names or {}).get(said, (names or {}).get(plain, plain))
        unit = (units or {}).get(name, unit)
        known = MeshState.fields.get(name)
        if known is None and unit is None:
            raise ValueError(
                f"{where}: the data '{said}' has no unit and is no field of MeshState. Say its unit "
                f"(units={{'{name}': 'm/s'}}, or '{name} [m/s]' in the file) or which field it is "
                f"(names={{'{said}': 'velocities'}})."
            )
        value = np.asarray(array)
        if known is None:
            extra[name] = Field(unit=str(unit), shape=() if value.ndim == 1 else (value.shape[1],))
        values[name] = _as(known, value, points.shape[1])
    if values[REST] is not rest:  # then points are where nodes are now
        values.setdefault("positions", rest)
    kind = MeshState.with_fields(**extra) if extra else MeshState
    state = kind(**values)
    faults = mesh_faults(state)
    if faults:
        raise ValueError(f"{where}: {faults[0]}")
    return state


def mesh_faults(state: State) -> list[str]:
    """Return what is wrong with a mesh, a sentence each: cells without an inside, inverted, nodes apart or twice."""
    places = state["rest_positions" if "rest_positions" in state else "positions"].detach().cpu().double()
    cells = state["cells"].cpu()
    size = float((places.amax(0) - places.amin(0)).norm()) if len(places) else 0.0
    insides = _insides(places, cells)
    flat = insides.abs() <= FLAT * size ** _dimension(places, cells)
    faults = []
    if bool(flat.any()):
        faults.append(
            _said(flat, "cell has no inside", "cells have no inside", "its nodes lie on one another or in a row")
        )
    turned = (insides < 0) & ~flat
    if bool(turned.any()) and not bool(turned[~flat].all()):
        fewer = turned if int(turned.sum()) <= int((~turned & ~flat).sum()) else ~turned & ~flat
        faults.append(
            _said(fewer, "cell is inverted", "cells are inverted", "turned against the others; swap two of its nodes")
        )
    alone = torch.ones(len(places), dtype=torch.bool)
    alone[cells.flatten()] = False
    if bool(alone.any()):
        faults.append(_said(alone, "node is in no cell", "nodes are in no cell", "take it out"))
    _, where, counts = torch.unique(places, dim=0, return_inverse=True, return_counts=True)
    twice = counts[where] > 1
    if bool(twice.any()):
        faults.append(_said(twice, "node lies on another", "nodes lie on one another", "merge them"))
    return faults


def read_surface(path: str | Path) -> MeshState:
    """Return the triangles of a surface (STL, OBJ, PLY, GLB) as a state, equal points merged, by trimesh.

    Raises:
        ValueError: the file is no surface, or a faulty one.
    """
    import trimesh

    found = trimesh.load(Path(path), force="mesh")
    if not isinstance(found, trimesh.Trimesh) or not len(found.faces):
        raise ValueError(f"{path} holds no surface of triangles; give an STL, OBJ, PLY or GLB file of one.")
    return mesh_state(found, where=str(path))


def write_xdmf(path: str | Path, trajectory: Trajectory, *, every: int = 1) -> list[Path]:
    """Write each `every`-th frame of a mesh as an XDMF series, numbers in an .h5 beside, names like "pressures [Pa]".

    Raises:
        ValueError: the state has no cells or several scenes, or the file name does not end in .xdmf.
    """
    import h5py

    path, state = Path(path), trajectory.initial
    if path.suffix != ".xdmf" or "cells" not in state or state.num_scenes != 1 or every < 1:
        raise ValueError(
            f"An .xdmf series shows a mesh of one scene, every 1st frame or fewer; got '{path.name}', "
            f"{type(state).__name__} of {state.num_scenes} scenes, every={every}."
        )
    numbers = path.with_suffix(".h5")
    kind, size = XDMF_KINDS[cell_kind(state)], state.cells.shape[1]
    grids = []
    with h5py.File(numbers, "w") as file:
        cells = _item(file, "cells", state.cells.cpu().numpy())
        order = f' NodesPerElement="{size}"' if kind == "Polyline" else ""
        topology = f'<Topology TopologyType="{kind}" NumberOfElements="{len(state.cells)}"{order}>{cells}</Topology>'
        for number in range(0, len(trajectory), every):
            frame = trajectory.frame(number)
            points = _item(file, f"{number}/points", _spatial(frame["positions" if "positions" in frame else REST]))
            parts = [topology, f'<Geometry GeometryType="XYZ">{points}</Geometry>']
            for name in frame:
                parts += _attribute(file, number, name, frame)
            time = f'<Time Value="{number * trajectory.dt!r}"/>'
            grids.append(f'<Grid Name="frame {number}" GridType="Uniform">{time}{"".join(parts)}</Grid>')
    series = f'<Grid Name="series" GridType="Collection" CollectionType="Temporal">{"".join(grids)}</Grid>'
    path.write_text(f'<?xml version="1.0"?>\n<Xdmf Version="3.0"><Domain>{series}</Domain></Xdmf>\n', encoding="utf-8")
    return [path, numbers]


def cell_kind(state: State) -> str:
    """Return the kind of a mesh's cells, in meshio's words."""
    size = state["cells"].shape[1]
    if size == 4:
        return (
            "tetra" if state["rest_positions" if "rest_positions" in state else "positions"].shape[1] == 3 else "quad"
        )
    return next(kind for kind, count in CELLS.items() if count == size)


def _attribute(file: Any, number: int, name: str, frame: State) -> list[str]:
    """Return a field of nodes as XML, its numbers written to the file; nothing of other fields."""
    field = frame.fields[name]
    if field.per != "entity" or (name == REST and "positions" not in frame):
        return []
    value = _spatial(frame[name]) if field.shape in (("d",), ("e",)) else frame[name].detach().cpu().numpy()
    value = value.astype(np.uint8) if value.dtype == np.bool_ else value
    kind = "Scalar" if value.ndim == 1 else "Vector" if value.shape[1:] == (3,) else "Matrix"
    item = _item(file, f"{number}/{name}", value)
    said = quoteattr(f"{name} [{field.unit}]")
    return [f'<Attribute Name={said} AttributeType="{kind}" Center="Node">{item}</Attribute>']


def _item(file: Any, name: str, value: Arrays) -> str:
    """Return an array as XML that points to it, written to the file."""
    file[name] = value
    kind = {"f": "Float", "i": "Int", "u": "UInt"}[value.dtype.kind]
    sizes = " ".join(map(str, value.shape))
    where = escape(f"{Path(file.filename).name}:/{name}")
    return (
        f'<DataItem DataType="{kind}" Precision="{value.dtype.itemsize}" Dimensions="{sizes}" Format="HDF">'
        f"{where}</DataItem>"
    )


def _frames(path: Path) -> Iterator[tuple[float | None, Any]]:
    import meshio

    if path.suffix == ".xdmf":
        with meshio.xdmf.TimeSeriesReader(path) as reader:
            points, cells = reader.read_points_cells()
            for number in range(reader.num_steps):
                time, point_data, _ = reader.read_data(number)
                yield float(time), meshio.Mesh(points, cells, point_data=point_data)
        return
    if path.suffix == ".pvd":
        for entry in ElementTree.parse(path).iter("DataSet"):
            yield float(entry.get("timestep", "nan")), _read(path.parent / str(entry.get("file")))
        return
    if not path.is_dir():
        raise ValueError(f"{path} must be an .xdmf or .pvd series or a folder of numbered files, each a frame.")
    for file in sorted(path.iterdir(), key=_number):
        yield None, _read(file)


def _read(path: Path) -> Any:
    import meshio

    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    try:
        return meshio.read(path)
    except (Exception, SystemExit) as error:  # meshio leaves the program on files that it cannot read
        raise ValueError(f"{path} is not a mesh that meshio reads ({error}); convert it to .vtu or .msh.") from error


def _number(file: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", file.stem)
    return (int(digits[-1]) if digits else -1, file.name)


def _parts(mesh: Any, where: str) -> tuple[Arrays, Arrays, Mapping[str, Arrays]]:
    """Return points [n, e], cells [c, k] and point data; a third axis along which nothing lies is left out."""
    if hasattr(mesh, "faces"):
        return np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces, dtype=np.int64), {}
    points = np.asarray(mesh.points, dtype=np.float64)
    found: dict[str, list[Arrays]] = {}
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
    pairs = ({"tetra", "hexahedron"}, {"triangle", "quad"})
    mixed = [pair for pair in pairs if kinds[0] in pair and pair <= set(kinds)]
    if mixed:
        raise ValueError(
            f"{where} mixes cells: {' and '.join(sorted(mixed[0]))}. Split the larger ones, one kind is taken."
        )
    if points.shape[1] == 3 and kinds[0] in ("triangle", "quad", "line") and np.ptp(points[:, 2]) == 0:
        points = points[:, :2]
    return np.ascontiguousarray(points), np.concatenate(found[kinds[0]]), mesh.point_data


def _as(field: Field | None, value: Arrays, space: int) -> Tensor:
    """Return point data as the field has it: without a third component that fills up a plane's vectors."""
    if field is not None and field.shape in (("d",), ("e",)) and value.ndim == 2:
        value = value[:, :space]
    if field is not None and field.kind in ("int", "bool"):
        return torch.from_numpy(value.astype(np.int64 if field.kind == "int" else np.bool_))
    return torch.from_numpy(np.ascontiguousarray(value.astype(np.float64)))


def _joined(path: Path, states: Sequence[MeshState], dt: float) -> Trajectory:
    """Return the trajectory of states of one mesh."""
    first = states[0]
    for number, state in enumerate(states):
        if state.cells.shape != first.cells.shape or not torch.equal(state.cells, first.cells):
            raise ValueError(
                f"{path}, frame {number}: the mesh is another than that of frame 0; one trajectory has one mesh. "
                "Interpolate to one, or give the frames between changes apart."
            )
        if set(state) != set(first):
            raise ValueError(
                f"{path}, frame {number} has the fields {', '.join(state)}; frame 0 has {', '.join(first)}."
            )
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


def _insides(places: Tensor, cells: Tensor) -> Tensor:
    """Return [c]: lengths, signed areas (unsigned in space) or signed volumes of cells."""
    corners = places[cells]
    sides = corners[:, 1:] - corners[:, :1]
    count, space = cells.shape[1], places.shape[1]
    if count == 2:
        found = sides[:, 0].norm(dim=1)
    elif count == 8:
        found = torch.linalg.det(sides[:, [0, 2, 3]])
    elif count == 4 and space == 3:
        found = torch.linalg.det(sides) / 6
    elif space == 2:
        after = corners.roll(-1, 1)
        found = 0.5 * (corners[..., 0] * after[..., 1] - corners[..., 1] * after[..., 0]).sum(1)
    else:
        found = 0.5 * torch.linalg.cross(corners, corners.roll(-1, 1)).sum(1).norm(dim=1)
    return torch.as_tensor(found)


def _dimension(places: Tensor, cells: Tensor) -> int:
    return {2: 1, 3: 2, 8: 3}.get(cells.shape[1], 3 if places.shape[1] == 3 else 2)


def _said(which: Tensor, one: str, several: str, more: str) -> str:
    rows = which.nonzero()[:, 0].tolist()
    listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"{len(rows)} {one if len(rows) == 1 else several} ({listed}): {more}."


def _spatial(values: Tensor) -> Arrays:
    flat = values.detach().cpu().numpy()
    return np.pad(flat, ((0, 0), (0, 3 - flat.shape[1])))
