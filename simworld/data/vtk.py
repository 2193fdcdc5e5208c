"""Trajectories as series of VTK files, which ParaView and PyVista open."""

from __future__ import annotations

import base64
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from simworld.data.arrays import Array
from simworld.data.mesh_cells import cell_kind, spatial
from simworld.state import State
from simworld.trajectory import Trajectory

_KINDS = {"line": 3, "triangle": 5, "quad": 9, "tetra": 10, "hexahedron": 12}
_NAMES = {"f4": "Float32", "f8": "Float64", "i4": "Int32", "i8": "Int64", "u1": "UInt8"}


def write_vtk(path: str | Path, trajectory: Trajectory, *, every: int = 1) -> list[Path]:
    """Write each `every`-th frame as points or a mesh with the state's fields, and a .pvd file with their times in s.

    `path` is that of the .pvd file; frames lie in a folder beside it, of the same name without the suffix. Rows of
    active entities become points, in 2-D with a third coordinate 0; `ids` says which. Fields per entity keep their
    names and have their units beside them (`UNITS_LABEL`); fields per scene are field data. Returns all files.

    Raises:
        ValueError: the state has no positions or several scenes, or `every` is not positive.
    """
    path = Path(path)
    state = trajectory.initial
    if path.suffix != ".pvd":
        raise ValueError(f"A series needs a file name that ends in .pvd; got '{path}'.")
    if not {"positions", "rest_positions"} & set(state) or state.num_scenes != 1 or every < 1:
        raise ValueError(
            f"A series shows positions of one scene, each 1st frame or fewer; got {state.num_scenes} scenes of "
            f"{type(state).__name__} and every={every}. Take scenes() apart."
        )
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(0, len(trajectory), every):
        files.append(folder / f"frame_{index:06d}.vtu")
        files[-1].write_text(_frame(trajectory.frame(index), index * trajectory.dt), encoding="utf-8")
    sets = [
        f'<DataSet timestep="{k * every * trajectory.dt!r}" file={quoteattr(f"{folder.name}/{file.name}")}/>'
        for k, file in enumerate(files)
    ]
    for old in set(folder.glob("frame_??????.vtu")) - set(files):  # of a longer series of this name
        old.unlink()
    path.write_text(_document("Collection", "<Collection>" + "\n".join(sets) + "</Collection>"), encoding="utf-8")
    return [path, *files]


def _frame(state: State, time: float) -> str:
    rows = state.active.cpu().numpy()
    count = int(rows.sum())
    places = "positions" if "positions" in state else "rest_positions"
    points = spatial(state[places].detach().cpu().numpy()[rows])
    entity, scene = [_array("ids", np.flatnonzero(rows), "1")], [_array("TimeValue", np.array([time]), "s", True)]
    for name in state:
        field, value = state.fields[name], state[name].detach().cpu().numpy()
        value = value.astype(np.uint8) if value.dtype == np.bool_ else value
        if field.per == "entity" and name != places:
            own = value[rows]
            own = own.reshape(count, int(np.prod(own.shape[1:]))) if own.ndim > 2 else own
            own = spatial(own) if field.shape in (("d",), ("e",)) else own
            entity.append(_array(name, own, field.unit))
        elif field.per == "scene":
            scene.append(_array(name, value.reshape(-1), field.unit, True))
    nodes, kind = _cells(state, rows)
    ends = np.arange(1, len(nodes) + 1) * nodes.shape[1]
    kinds = np.full(len(nodes), kind, np.uint8)
    cells = [_array("connectivity", nodes.reshape(-1)), _array("offsets", ends), _array("types", kinds)]
    body = (
        f"<FieldData>{''.join(scene)}</FieldData>"
        f'<Piece NumberOfPoints="{count}" NumberOfCells="{len(nodes)}">'
        f"<Points>{_array('Points', points)}</Points><Cells>{''.join(cells)}</Cells>"
        f"<PointData>{''.join(entity)}</PointData></Piece>"
    )
    return _document("UnstructuredGrid", f"<UnstructuredGrid>{body}</UnstructuredGrid>")


def _cells(state: State, rows: Array) -> tuple[Array, int]:
    """Return the nodes [c, k] of cells, among the points that are shown, and VTK's number of their kind."""
    count = int(rows.sum())
    if "cells" not in state:
        return np.arange(count)[:, None], 1
    cells = state.cells.cpu().numpy()
    numbers = np.cumsum(rows) - 1
    return numbers[cells[rows[cells].all(1)]], _KINDS[cell_kind(state)]


def _array(name: str, value: Array, unit: str = "", whole: bool = False) -> str:
    """Return an array as XML: its size in bytes and its bytes, both in base64, and the unit after these."""
    raw = value.astype(value.dtype.newbyteorder("<"), copy=False)
    code = base64.b64encode(np.uint64(raw.nbytes).astype("<u8").tobytes() + raw.tobytes()).decode("ascii")
    size = f'NumberOfTuples="{len(value)}"' if whole else ""
    width = f'NumberOfComponents="{value.shape[1]}"' if value.ndim == 2 else ""
    key = '<InformationKey name="UNITS_LABEL" location="vtkDataArray">'
    return (
        f'<DataArray type="{_NAMES[value.dtype.str[1:]]}" Name={quoteattr(name)} {width} {size} '
        f'format="binary">{code}{f"{key}{escape(unit)}</InformationKey>" if unit else ""}</DataArray>\n'
    )


def _document(kind: str, body: str) -> str:
    head = f'<VTKFile type="{kind}" version="1.0" byte_order="LittleEndian" header_type="UInt64">'
    return f'<?xml version="1.0"?>\n{head}\n{body}\n</VTKFile>\n'
