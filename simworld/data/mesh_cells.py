"""Cells of meshes: their kinds, and what can be wrong with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simworld.data.arrays import Array
from simworld.kinds import NORMAL, OUTFLOW
from simworld.state import State

CELLS = {"line": 2, "triangle": 3, "quad": 4, "tetra": 4, "hexahedron": 8}
"""Kinds of cells, in meshio's words, and their numbers of nodes."""
NUM_TYPES = 9  # of nodes, that MeshGraphNets' data tell apart
FLAT = 1e-9  # of a cell's own size: one of less has no inside
HEXAHEDRON = ((1, 3, 4), (2, 0, 5), (3, 1, 6), (0, 2, 7), (7, 5, 0), (4, 6, 1), (5, 7, 2), (6, 4, 3))
"""Neighbours of each corner of a hexahedron, so turned that all volumes between them have one sign."""


def cell_kind(state: State) -> str:
    """Return the kind of a mesh's cells, in meshio's words.

    Raises:
        ValueError: cells have a number of nodes that no kind has.
    """
    size = state["cells"].shape[1]
    if size == 4:
        return "tetra" if _places(state).shape[1] == 3 else "quad"
    kinds = [kind for kind, count in CELLS.items() if count == size]
    if not kinds:
        raise ValueError(f"Cells are {', '.join(CELLS)}, of 2, 3, 4 or 8 nodes; got cells of {size}.")
    return kinds[0]


def mesh_faults(state: State) -> list[str]:
    """Return what is wrong with a mesh, a sentence each: cells without an inside, inverted, nodes apart or twice."""
    places, cells = _places(state).detach().cpu().double(), state["cells"].cpu()
    insides, folded = _insides(places, cells, cell_kind(state))
    dimension = {"line": 1, "triangle": 2, "quad": 2}.get(cell_kind(state), 3)
    longest = torch.cdist(places[cells], places[cells]).flatten(1).amax(1) if len(cells) else places.new_zeros(0)
    flat = (insides.abs() <= FLAT * longest**dimension) & ~folded
    faults = []
    if bool(flat.any()):
        faults.append(
            _said(flat, "cell has no inside", "cells have no inside", "its nodes lie on one another or in a row")
        )
    if bool(folded.any()):
        more = "corners turn both ways; list nodes round each face"
        faults.append(_said(folded, "cell is folded", "cells are folded", more))
    turned, right = (insides < 0) & ~flat & ~folded, (insides > 0) & ~flat & ~folded
    if bool(turned.any()) and bool(right.any()):
        fewer = turned if int(turned.sum()) <= int(right.sum()) else right
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


def held_nodes(types: Tensor, where: str) -> Tensor:
    """Return which nodes [n] are kinematic by their types [n]: all but those that are normal or of an outflow."""
    unknown = types[(types < 0) | (types >= NUM_TYPES)]
    if len(unknown):
        raise ValueError(
            f"{where} has nodes of type {int(unknown[0])}; those known are 0 to {NUM_TYPES - 1}. Number them so, or "
            "say by point data 'kinematic' which are held."
        )
    return (types != NORMAL) & (types != OUTFLOW)


def spatial(vectors: Array) -> Array:
    """Return vectors [n, d] with zeros for the components that they lack of three."""
    return np.pad(vectors, ((0, 0), (0, 3 - vectors.shape[1])))


def _places(state: State) -> Tensor:
    if not {"positions", "rest_positions"} & set(state):
        raise ValueError(f"A mesh lies at rest_positions or positions; this one carries {', '.join(state)}.")
    return state["rest_positions" if "rest_positions" in state else "positions"]


def _insides(places: Tensor, cells: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return [c]: lengths, signed areas (unsigned in space) or signed volumes of cells, and which are folded."""
    corners = places[cells]
    sides = corners[:, 1:] - corners[:, :1]
    whole = torch.zeros(len(cells), dtype=torch.bool)
    if kind == "line":
        return sides[:, 0].norm(dim=1), whole
    if kind == "tetra":
        return torch.linalg.det(sides) / 6, whole
    if kind == "hexahedron":
        at = corners[:, torch.tensor(HEXAHEDRON)] - corners[:, :, None]
        volumes = torch.linalg.det(at)
        return volumes.mean(1), (volumes.amin(1) < 0) & (volumes.amax(1) > 0)
    if places.shape[1] == 3:
        return 0.5 * torch.linalg.cross(corners, corners.roll(-1, 1)).sum(1).norm(dim=1), whole
    before, after = corners.roll(1, 1) - corners, corners.roll(-1, 1) - corners
    turns = after[..., 0] * before[..., 1] - after[..., 1] * before[..., 0]
    crossed = ((turns < 0).sum(1) == 2) & ((turns > 0).sum(1) == 2)  # three to one is a dent
    after = corners.roll(-1, 1)
    return 0.5 * (corners[..., 0] * after[..., 1] - corners[..., 1] * after[..., 0]).sum(1), crossed


def _said(which: Tensor, one: str, several: str, more: str) -> str:
    rows = which.nonzero()[:, 0].tolist()
    listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"{len(rows)} {one if len(rows) == 1 else several} ({listed}): {more}."
