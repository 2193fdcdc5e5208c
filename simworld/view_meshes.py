"""How meshes are drawn: their cells, or the faces one sees of them, in the colour of a field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simworld.kinds import MeshState
from simworld.state import State
from simworld.trajectory import Trajectory

COLOURED = ("stresses", "temperatures", "velocities", "pressures")
"""Fields that give meshes their colour, the first that is there; of vectors and tensors their length."""
COLOURS = "viridis"
UPWARDS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
"""Turns the third axis of meshes in space up, the second away from who looks."""
TETRAHEDRON = ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3))
HEXAHEDRON = ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7))


@dataclass(frozen=True, kw_only=True)
class Shade:
    """A field's values as colours: its name and unit, and the ends of the scale."""

    field: str
    unit: str
    low: float
    high: float

    @staticmethod
    def of(trajectory: Trajectory) -> Shade:
        """Return a scale from the least to the greatest value of a field in a trajectory."""
        state = trajectory.initial
        found = [name for name in COLOURED if name in state]
        if not found:
            raise ValueError(
                f"A film of a mesh shows one of {', '.join(COLOURED)}; the states have {', '.join(state)}."
            )
        values = _lengths(trajectory[found[0]].flatten(0, 1))
        return Shade(
            field=found[0], unit=state.fields[found[0]].unit, low=float(values.min()), high=float(values.max())
        )

    @property
    def label(self) -> str:
        """The name and unit of what is shown."""
        return f"{self.field} [{self.unit}]"

    def scale(self) -> Any:
        """Return matplotlib's mapping of values to colours."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        return ScalarMappable(Normalize(self.low, self.high), COLOURS)

    def palette(self) -> Any:
        """Return an image whose palette is the scale's colours, and greys."""
        from PIL import Image

        greys = torch.arange(32).mul(255).div(31, rounding_mode="floor")[:, None].expand(32, 3)
        span = torch.linspace(self.low, self.high, 224, dtype=torch.float64)
        colours = torch.as_tensor(self.scale().to_rgba(span.numpy(), bytes=True)[:, :3].astype("int64"))
        image = Image.new("P", (1, 1))
        image.putpalette(torch.cat([greys, colours]).flatten().tolist())
        return image


def node_places(state: State) -> Tensor:
    """Return where nodes are drawn from, [n, 2 or 3]: where they are now, or in the mesh if they never move."""
    found = state["positions" if "positions" in state else "rest_positions"].detach().double().cpu()
    return (
        found @ UPWARDS.to(found).T if found.shape[1] == 3 else torch.nn.functional.pad(found, (0, 2 - found.shape[1]))
    )


def draw_mesh(axes: Any, state: State, on_paper: Tensor, shade: Shade) -> None:
    """Draw a mesh whose nodes lie at `on_paper` [n, 2], what lies in front last."""
    from matplotlib.collections import LineCollection, PolyCollection

    faces = state.derived("faces", ("cells",), _faces)
    depth = node_places(state)
    if depth.shape[1] == 3:
        faces = faces[depth[faces, 2].mean(1).argsort()]
    values = _lengths(state[shade.field])[faces].mean(1)
    shapes, colours = on_paper[faces].tolist(), shade.scale().to_rgba(values.numpy())
    if faces.shape[1] == 2:
        axes.add_collection(LineCollection(shapes, colors=colours, linewidths=3))
    else:
        axes.add_collection(PolyCollection(shapes, facecolors=colours, edgecolors=colours, linewidths=0.3))


def are_meshes(trajectories: Sequence[Trajectory]) -> bool:
    """Return whether all are trajectories of meshes."""
    return all(isinstance(one.initial, MeshState) for one in trajectories)


def _lengths(values: Tensor) -> Tensor:
    """Return values [n, ...] of a field as one number each: a scalar itself, of others the root of summed squares."""
    rows = values.detach().double().cpu().reshape(len(values), -1)
    return rows[:, 0] if rows.shape[1] == 1 else rows.norm(dim=1)


def _faces(state: State) -> Tensor:
    """Return the nodes [f, k] of lines and faces that are seen: of solids those that no two cells share."""
    cells = state["cells"].cpu()
    size, dim = cells.shape[1], state["rest_positions" if "rest_positions" in state else "positions"].shape[1]
    if size < 4 or dim < 3:
        return cells
    faces = cells[:, torch.tensor(HEXAHEDRON if size == 8 else TETRAHEDRON)].flatten(0, 1)
    _, which, counts = torch.unique(faces.sort(1).values, dim=0, return_inverse=True, return_counts=True)
    return faces[counts[which] == 1]
