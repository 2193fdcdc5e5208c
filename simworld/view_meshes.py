"""How meshes are drawn: their cells, or the faces one sees of them, in the colour of a field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simworld.kinds import MeshState
from simworld.render.faces import seen_faces
from simworld.render.shade import Shade, lengths
from simworld.state import State
from simworld.trajectory import Trajectory

UPWARDS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
"""Turns the third axis of meshes in space up, the second away from who looks."""


def node_places(state: State) -> Tensor:
    """Return where nodes are drawn from, [n, 2 or 3]: where they are now, or in the mesh if they never move."""
    found = state["positions" if "positions" in state else "rest_positions"].detach().double().cpu()
    return (
        found @ UPWARDS.to(found).T if found.shape[1] == 3 else torch.nn.functional.pad(found, (0, 2 - found.shape[1]))
    )


def draw_mesh(axes: Any, state: State, on_paper: Tensor, shade: Shade) -> None:
    """Draw a mesh whose nodes lie at `on_paper` [n, 2], what lies in front last."""
    from matplotlib.collections import LineCollection, PolyCollection

    faces = seen_faces(state)
    depth = node_places(state)
    if depth.shape[1] == 3:
        faces = faces[depth[faces, 2].mean(1).argsort()]
    values = lengths(state[shade.field])[faces].mean(1)
    shapes, colours = on_paper[faces].tolist(), shade.scale().to_rgba(values.numpy())
    if faces.shape[1] == 2:
        axes.add_collection(LineCollection(shapes, colors=colours, linewidths=3))
    else:
        axes.add_collection(PolyCollection(shapes, facecolors=colours, edgecolors=colours, linewidths=0.3))


def are_meshes(trajectories: Sequence[Trajectory]) -> bool:
    """Return whether all are trajectories of meshes."""
    return all(isinstance(one.initial, MeshState) for one in trajectories)
