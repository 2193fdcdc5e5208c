"""The triangles that are seen of a mesh."""

from __future__ import annotations

import torch
from torch import Tensor

from simworld.state import State

TETRAHEDRON = ((0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3))
HEXAHEDRON = ((0, 3, 2, 1), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7))
"""Faces of cells, each round as one sees it from outside."""


def seen_faces(state: State) -> Tensor:
    """Return the nodes [f, k] of a mesh's lines and faces that are seen: of solids those that no two cells share."""
    return state.derived("faces", ("cells",), _seen_faces)


def _seen_faces(state: State) -> Tensor:
    cells = state["cells"].cpu()
    size, dim = cells.shape[1], state["rest_positions" if "rest_positions" in state else "positions"].shape[1]
    if size < 4 or dim < 3:
        return cells
    faces = cells[:, torch.tensor(HEXAHEDRON if size == 8 else TETRAHEDRON)].flatten(0, 1)
    _, which, counts = torch.unique(faces.sort(1).values, dim=0, return_inverse=True, return_counts=True)
    return faces[counts[which] == 1]


def seen_triangles(state: State) -> tuple[Tensor, Tensor]:
    """Return the nodes [f, 3] of the triangles that are seen of a mesh, and the face [f] that each is part of.

    Raises:
        ValueError: the mesh consists of lines.
    """
    faces = seen_faces(state)
    if faces.shape[1] < 3:
        raise ValueError("The mesh consists of lines, which have no surface; use splats of its nodes.")
    number = torch.arange(len(faces))
    if faces.shape[1] == 3:
        return faces, number
    return torch.cat([faces[:, [0, 1, 2]], faces[:, [0, 2, 3]]]), number.repeat(2)
