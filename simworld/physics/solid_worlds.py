"""Plates that a ball is pressed into, after the DeformingPlate of MeshGraphNets (Pfaff et al. 2021), by `Solid`.

The paper gives sizes of its set but not geometry and material; here the plate, the ball and its way vary from episode
to episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from simworld.kinds import HANDLE, NORMAL, OBSTACLE, MeshState
from simworld.physics.solid import Elastic, Floats, Ints, Solid
from simworld.trajectory import Trajectory

Seed = Sequence[int]
MATERIAL = Elastic(young=1e5, poisson=0.3)
SIX = ((0, 4, 6, 7), (0, 6, 2, 7), (0, 2, 3, 7), (0, 3, 1, 7), (0, 1, 5, 7), (0, 5, 4, 7))
"""Tetrahedra of a cube round its diagonal; bits of a corner's number are its x, y and z."""


def deforming_plate(
    seed: Seed,
    *,
    num_steps: int = 100,
    size: float = 0.015,
    depth: float = 0.05,
    dt: float = 0.02,
) -> Trajectory:
    """Return a seeded episode of `num_steps` + 1 frames of float64 of a plate and a ball that sinks into it.

    The plate is 0.25 to 0.35 m long, 0.15 to 0.25 m wide and 0.02 to 0.04 m thick, of edges about `size` [m], and held
    at both ends. A ball of a radius of 0.03 to 0.05 m sinks by 0.6 to 1 of `depth` [m] from where it touches, at
    constant speed and aslant. In every frame all forces cancel (quasi-static). Stresses are von Mises', at the plate's
    nodes.

    Raises:
        ValueError: a number is outside its range.
    """
    if num_steps < 1 or not 0 < size <= 0.05 or not 0 < depth <= 0.08:
        raise ValueError(
            f"deforming_plate needs num_steps >= 1, size to 0.05 m, depth to 0.08 m; got {num_steps}, {size}, {depth}."
        )
    rng = np.random.default_rng(list(seed))
    length, width, thickness = rng.uniform((0.25, 0.15, 0.02), (0.35, 0.25, 0.04))
    nodes, tetrahedra = block((length, width, thickness), size)
    held = (nodes[:, 0] < 1e-9) | (nodes[:, 0] > length - 1e-9)
    solid = Solid(nodes, tetrahedra, held, MATERIAL)
    radius = rng.uniform(0.03, 0.05)
    start = np.array([*rng.uniform(0.3, 0.7, 2) * (length, width), thickness + radius])
    way = np.array([*rng.uniform(-0.3, 0.3, 2), -1.0]) * depth * rng.uniform(0.6, 1.0)
    ball, filled = ball_mesh(radius)
    places, stresses = [], []
    for share in np.linspace(0, 1, num_steps + 1):
        centre = start + share * way
        solid.press(centre, radius)
        places.append(np.concatenate([solid.positions, ball + centre]))
        stresses.append(np.pad(solid.stresses(), (0, len(ball))))
    cells = np.concatenate([tetrahedra, filled + len(nodes)])
    return _recorded(np.stack(places), np.stack(stresses)[..., None], cells, held, way / (num_steps * dt), dt)


def block(sizes: Sequence[float], edge: float) -> tuple[Floats, Ints]:
    """Return nodes [n, 3] and tetrahedra [t, 4] of a block with a corner at the origin, of edges about `edge` long."""
    counts = [max(1, round(size / edge)) for size in sizes]
    axes = [np.linspace(0, size, count + 1) for size, count in zip(sizes, counts, strict=True)]
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    rows = np.arange(len(nodes)).reshape([count + 1 for count in counts])
    nx, ny, nz = counts
    corners = [rows[i : i + nx, j : j + ny, k : k + nz].ravel() for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    cells = np.concatenate([np.stack([corners[corner] for corner in tetrahedron], 1) for tetrahedron in SIX])
    return nodes, _turned(nodes, cells)


def ball_mesh(radius: float) -> tuple[Floats, Ints]:
    """Return nodes [43, 3] and tetrahedra [80, 4] of a ball about the origin: its centre and its surface."""
    import trimesh

    surface = trimesh.creation.icosphere(subdivisions=1, radius=radius)
    nodes = np.concatenate([np.zeros((1, 3)), surface.vertices])
    cells = np.concatenate([np.zeros((len(surface.faces), 1), dtype=np.int64), surface.faces + 1], 1)
    return nodes, _turned(nodes, cells)


def _turned(nodes: Floats, cells: Ints) -> Ints:
    """Return tetrahedra of positive volume."""
    edges = nodes[cells[:, 1:]] - nodes[cells[:, :1]]
    inverted = np.linalg.det(edges) < 0
    cells[inverted] = cells[inverted][:, [0, 2, 1, 3]]
    return cells


def _recorded(places: Floats, stresses: Floats, cells: Ints, held: np.ndarray, speed: Floats, dt: float) -> Trajectory:
    """Return the trajectory of plate and ball, whose velocity is the one at which it sinks, from the first frame on."""
    positions = torch.from_numpy(places)
    velocities = torch.cat([torch.zeros_like(positions[:1]), positions.diff(dim=0) / dt])
    velocities[:, len(held) :] = torch.from_numpy(speed)
    frames = {"positions": positions, "velocities": velocities, "stresses": torch.from_numpy(stresses)}
    types = torch.full((positions.shape[1],), OBSTACLE)
    types[: len(held)] = torch.where(torch.from_numpy(held), HANDLE, NORMAL)
    known: dict[str, Any] = {name: value[0] for name, value in frames.items()}
    state = MeshState(
        rest_positions=positions[0],
        cells=torch.from_numpy(cells),
        node_types=types,
        kinematic=types != NORMAL,
        **known,
    )
    there = torch.ones(positions.shape[:2], dtype=torch.bool)
    path = Trajectory(initial=state, frames=frames, active=there, dt=dt)
    path.check_finite()
    return path
