"""Meshes and what happened to them as XDMF series, which ParaView, PyVista and meshio open."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from simworld.data.arrays import Array
from simworld.data.mesh_cells import cell_kind, spatial
from simworld.saving import replacing
from simworld.state import State
from simworld.trajectory import Trajectory

PLACES = "rest_positions"
KINDS = {
    "line": "Polyline",
    "triangle": "Triangle",
    "quad": "Quadrilateral",
    "tetra": "Tetrahedron",
    "hexahedron": "Hexahedron",
}


def write_xdmf(path: str | Path, trajectory: Trajectory, *, every: int = 1) -> list[Path]:
    """Write each `every`-th frame of a mesh as an XDMF series, numbers in an .hdf beside, names like "pressures [Pa]".

    Fields of nodes are written; fields of scenes, actions and which nodes are active are not. Returns both files.

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
    numbers = path.with_suffix(".hdf")
    with replacing(path) as document, replacing(numbers) as partial:
        with h5py.File(partial, "w") as file:
            text = _document(file, numbers.name, trajectory, every)
        document.write_text(text, encoding="utf-8")
    return [path, numbers]


def _document(file: Any, called: str, trajectory: Trajectory, every: int) -> str:
    """Return the XML of a series whose numbers are written to an open HDF5 file, later `called` so."""
    state = trajectory.initial
    kind, size = KINDS[cell_kind(state)], state.cells.shape[1]
    cells = _item(file, called, "cells", state.cells.cpu().numpy())
    order = f' NodesPerElement="{size}"' if kind == "Polyline" else ""
    topology = f'<Topology TopologyType="{kind}" NumberOfElements="{len(state.cells)}"{order}>{cells}</Topology>'
    grids = []
    for number in range(0, len(trajectory), every):
        frame = trajectory.frame(number)
        places = frame["positions" if "positions" in frame else PLACES].detach().cpu().numpy()
        points = _item(file, called, f"{number}/points", spatial(places))
        parts = [topology, f'<Geometry GeometryType="XYZ">{points}</Geometry>']
        for name in frame:
            parts += _attribute(file, called, number, name, frame)
        time = f'<Time Value="{number * trajectory.dt!r}"/>'
        grids.append(f'<Grid Name="frame {number}" GridType="Uniform">{time}{"".join(parts)}</Grid>')
    series = f'<Grid Name="series" GridType="Collection" CollectionType="Temporal">{"".join(grids)}</Grid>'
    return f'<?xml version="1.0"?>\n<Xdmf Version="3.0"><Domain>{series}</Domain></Xdmf>\n'


def _attribute(file: Any, called: str, number: int, name: str, frame: State) -> list[str]:
    """Return a field of nodes as XML, its numbers written to the file; nothing of other fields."""
    field = frame.fields[name]
    if field.per != "entity" or (name == PLACES and "positions" not in frame):
        return []
    value = frame[name].detach().cpu().numpy()
    value = spatial(value) if field.shape in (("d",), ("e",)) else value
    value = value.astype(np.uint8) if value.dtype == np.bool_ else value
    kind = "Scalar" if value.ndim == 1 else "Vector" if value.shape[1:] == (3,) else "Matrix"
    item = _item(file, called, f"{number}/{name}", value)
    said = quoteattr(f"{name} [{field.unit}]")
    return [f'<Attribute Name={said} AttributeType="{kind}" Center="Node">{item}</Attribute>']


def _item(file: Any, called: str, name: str, value: Array) -> str:
    """Return an array as XML that points to it, written to the file."""
    file[name] = value
    kind = {"f": "Float", "i": "Int", "u": "UInt"}[value.dtype.kind]
    sizes = " ".join(map(str, value.shape))
    where = escape(f"{called}:/{name}")
    return (
        f'<DataItem DataType="{kind}" Precision="{value.dtype.itemsize}" Dimensions="{sizes}" Format="HDF">'
        f"{where}</DataItem>"
    )
