"""What was, seen from the nodes of another mesh: for questions that no change of a state on its own mesh can ask."""

from __future__ import annotations

import torch
from torch import Tensor

from simworld.state import State
from simworld.trajectory import Trajectory

WITHIN = 1e-9  # of a triangle: a node on its edge is in it


def same_nodes(a: State, b: State) -> bool:
    """Return whether the entities of two states are the same: those of a mesh lie at the same places at rest."""
    if "rest_positions" not in a or "rest_positions" not in b:
        return True
    return torch.equal(a.rest_positions.double(), b.rest_positions.double())


def seen_at(path: Trajectory, nodes: State, name: str) -> Tensor:
    """Return [T, n, ...]: a field of a trajectory at the nodes [n] of a state; itself where these are its own.

    Linear in each triangle of the trajectory's mesh, and zero where it has none: nothing flows in a cylinder.
    """
    if same_nodes(path.initial, nodes):
        return path[name]
    corners, shares = located(path.initial, nodes.rest_positions)
    values = path[name][:, corners]  # [T, n, 3, ...]
    return (values * shares.to(values).view(1, *shares.shape, *[1] * (values.ndim - 3))).sum(2)


def located(mesh: State, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the corners [n, 3] of the triangle round each of some places [n, 2], and their shares [n, 3] in it.

    Shares add up to 1, and are 0 where no triangle lies round a place.
    """
    cells, rest = mesh.cells, mesh.rest_positions.double()
    ones = torch.ones(len(cells), 3, 1, dtype=torch.float64)
    slopes = torch.linalg.inv(torch.cat([ones, rest[cells]], 2))  # columns: the linear functions of the corners
    at = torch.cat([torch.ones(len(places), 1, dtype=torch.float64), places.double()], 1)
    shares = torch.einsum("ni,tik->ntk", at, slopes)
    least, chosen = shares.amin(2).max(1)
    found = shares[torch.arange(len(places)), chosen]
    return cells[chosen], torch.where((least >= -WITHIN)[:, None], found, 0.0)
