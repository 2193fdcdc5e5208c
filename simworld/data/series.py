"""Series of files that meshio reads, a frame in each or all in one, whatever is in them."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from simworld.data.arrays import Array
from simworld.extras import needed
from simworld.fields import Field
from simworld.state import State
from simworld.trajectory import Trajectory

IDS = "ids"  # numbers of rows, which exported frames carry
UNIT = re.compile(r"^(?P<name>.+?) \[(?P<unit>[^\]]*)\]$")  # how exported names carry units
NUMBER = re.compile(r"\d+\.\d+|\d+")
PROGRAMS_OWN = re.compile(r"^(gmsh|medit|cell_tags|med|abaqus|flac3d|GlobalNodeId|GlobalElementId)\b")  # their numbers


def several(path: Path) -> list[Path]:
    """Return the series in a folder, or the path itself where it is one."""
    if not path.is_dir():
        return [path]
    inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
    return (
        [one for one in inside if one.suffix in (".xdmf", ".pvd")] or [one for one in inside if one.is_dir()] or [path]
    )


def of_one_dt(trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
    """Yield trajectories, with the first one's step where theirs agrees with it to a millionth."""
    first = None
    for made in trajectories:
        first = first or made.dt
        yield replace(made, dt=first) if math.isclose(made.dt, first, rel_tol=1e-6) else made


def read_series(path: Path, dt: float | None) -> tuple[list[Any], float]:
    """Return the meshio.Mesh of each frame of a series, and the step between them where `dt` does not say it.

    Raises:
        ValueError: there are fewer than two frames, or they are not evenly spaced in time.
    """
    found = list(frames(path))
    if len(found) < 2:
        raise ValueError(f"{path} must hold a series of two frames or more; got {len(found)}.")
    times = [time for time, _ in found]
    if dt is None:
        steps = np.diff([np.nan if time is None else time for time in times])
        if not (np.isfinite(steps).all() and (steps > 0).all() and np.allclose(steps, steps[0], rtol=1e-3)):
            raise ValueError(
                f"{path} must hold frames at even distances in time; got times {times[:5]}. Give dt if you know it."
            )
        dt = float(steps.mean())
    return [mesh for _, mesh in found], dt


def warn_of_cell_data(mesh: Any, where: str) -> None:
    """Warn of data of cells, which no state holds."""
    left = sorted(name for name in mesh.cell_data if not PROGRAMS_OWN.match(name))
    if left:
        warnings.warn(f"{where}: data of cells is left out: {', '.join(left)}. Average it to nodes.", stacklevel=5)


def node_data(
    mesh: Any, kind: type[State], names: Mapping[str, str], units: Mapping[str, str], where: str
) -> dict[str, tuple[Array, str | None]]:
    """Return values of nodes and their units, by field of a kind of state; rows' numbers (`IDS`) are none."""
    found: dict[str, tuple[Array, str | None]] = {}
    unused = {*names, *units}
    for said, array in mesh.point_data.items():
        matched = UNIT.match(said)
        plain, unit = (matched["name"], matched["unit"]) if matched else (said, None)
        name = names.get(said, names.get(plain, plain))
        if name == IDS or PROGRAMS_OWN.match(name):
            continue
        unused -= {said, plain, name}
        unit = units.get(name, units.get(said, units.get(plain, unit)))
        if name not in kind.fields and unit is None:
            raise ValueError(
                f"{where}: the data '{said}' has no unit and is no field of {kind.__name__}. Say its unit "
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


def node_values(field: Field | None, value: Array, space: int, where: str) -> Tensor:
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


def frames(path: Path) -> Iterator[tuple[float | None, Any]]:
    """Yield the time, where it is said, and the meshio.Mesh of each frame of a series."""
    if path.is_dir():
        for file in _in_order(path):
            yield None, read_frame(file)
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
        yield time, read_frame(path.parent / name)


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


def read_frame(path: Path) -> Any:
    """Return the meshio.Mesh in a file, units in the names of its data as "name [unit]"."""
    meshio = needed("meshio", "Reading a mesh", "mesh")
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'; give one that is there.")
    mesh = _by_meshio(path, "a mesh", lambda: meshio.read(path))
    units = _vtu_units(path) if path.suffix == ".vtu" else {}
    mesh.point_data = {
        f"{name} [{units[name]}]" if name in units and name != IDS else name: value
        for name, value in mesh.point_data.items()
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
