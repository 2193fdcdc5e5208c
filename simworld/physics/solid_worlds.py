"""Plates that a ball is pressed into, after the DeformingPlate of MeshGraphNets (Pfaff et al. 2021), by `Solid`.

The paper gives sizes of its set but not geometry and material; here the plate, the ball and its way vary from episode
to episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.kinds import HANDLE, NORMAL, OBSTACLE, MeshState
from simworld.physics.replay import Remembering, alike, heeded
from simworld.physics.solid import Elastic, Floats, Ints, Solid
from simworld.simulate import Intervention, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

Seed = Sequence[int]
MATERIAL = Elastic(young=1e5, poisson=0.3)
READS = ("positions", "velocities", "kinematic", "active")
SIX = ((0, 4, 6, 7), (0, 6, 2, 7), (0, 2, 3, 7), (0, 3, 1, 7), (0, 1, 5, 7), (0, 5, 4, 7))
"""Tetrahedra of a cube round its diagonal; bits of a corner's number are its x, y and z."""


def deforming_plate(
    seed: Seed,
    *,
    num_steps: int = 100,
    size: float = 0.015,
    depth: float = 0.05,
    dt: float = 0.02,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return a seeded episode of `num_steps` + 1 frames of float64 of a plate and a ball that sinks into it.

    The plate is 0.25 to 0.35 m long, 0.15 to 0.25 m wide and 0.02 to 0.04 m thick, of edges about `size` [m], and held
    at both ends. A ball of a radius of 0.03 to 0.05 m sinks by 0.6 to 1 of `depth` [m] from where it touches, at
    constant speed and aslant. In every frame all forces cancel (quasi-static). Stresses are von Mises', at the plate's
    nodes. Interventions may move the ball, change its velocity from then on or remove it, move held nodes and, at
    frame 0, change who is held (`kinematic`); the plate comes to rest anew in the next frame.

    Raises:
        ValueError: a number is outside its range, or an intervention changes something else or too much at once.
    """
    if num_steps < 1 or not 0 < size <= 0.05 or not 0 < depth <= 0.08:
        raise ValueError(
            f"deforming_plate needs num_steps >= 1, size to 0.05 m, depth to 0.08 m; got {num_steps}, {size}, {depth}."
        )
    rng = np.random.default_rng(list(seed))
    length, width, thickness = rng.uniform((0.25, 0.15, 0.02), (0.35, 0.25, 0.04))
    nodes, tetrahedra = block((length, width, thickness), size)
    held = (nodes[:, 0] < 1e-9) | (nodes[:, 0] > length - 1e-9)
    radius = rng.uniform(0.03, 0.05)
    start = np.array([*rng.uniform(0.3, 0.7, 2) * (length, width), thickness + radius])
    way = np.array([*rng.uniform(-0.3, 0.3, 2), -1.0]) * depth * rng.uniform(0.6, 1.0)
    ball, filled = ball_mesh(radius)
    shares = np.linspace(0, 1, num_steps + 1)
    session = _Session(Solid(nodes, tetrahedra, held, MATERIAL), ball, radius, dt)
    session.centre, session.velocity = lambda frame: start + shares[frame] * way, way / (num_steps * dt)
    state = _start(session, np.concatenate([tetrahedra, filled + len(nodes)]), held)
    path = rollout(
        state,
        simulator=Remembering(state, [session], dt=dt),
        num_steps=num_steps,
        interventions=heeded(interventions, "Solid", READS),
    )
    path.check_finite()
    return path


class _Session:
    """A plate and the ball that is pressed into it: its nodes about its `centre` in each frame, and its velocity."""

    centre: Callable[[int], Floats]
    velocity: Floats

    def __init__(self, solid: Solid, ball: Floats, radius: float, dt: float) -> None:
        self.solid, self.ball, self.radius, self.dt, self.frame = solid, ball, radius, dt, 0

    def rest(self) -> tuple[Tensor, Tensor]:
        """Return where the nodes of plate and ball are in this frame, [n, 3], and the stresses there, [n, 1]."""
        centre = self.centre(self.frame)
        try:
            self.solid.press(centre, self.radius)
        except ArithmeticError as error:
            raise ValueError(f"In frame {self.frame}: {error}") from error
        stresses = np.pad(self.solid.stresses(), (0, len(self.ball)))
        places = np.concatenate([self.solid.positions, self.ball + centre])
        return torch.from_numpy(places), torch.from_numpy(stresses[:, None])

    def again(self, before: State, changed: State) -> _Session:
        old, count = self.solid, len(self.solid.nodes)
        there = changed.active[count:]
        if not bool(changed.active[:count].all()) or bool(there.any()) != bool(there.all()):
            raise ValueError(
                "A plate keeps its nodes and a ball is there or not; remove all nodes of the ball, or none."
            )
        if not bool(changed.kinematic[count:].all()):
            raise ValueError("The ball goes its way, whatever it meets; let its nodes be kinematic.")
        held = changed.kinematic[:count]
        moves, speeds = (changed[name] - before[name] for name in ("positions", "velocities"))
        if bool(moves[:count][~held].any()) or bool(speeds[:count].any()):
            raise ValueError("A plate is at rest where its forces cancel; move its held nodes or the ball instead.")
        plate = changed.positions[:count].numpy()
        made = _Session(
            Solid(old.nodes, old.tetrahedra, held.numpy(), MATERIAL, plate), self.ball, self.radius, self.dt
        )
        made.frame, made.centre, made.velocity = self.frame, self.centre, self.velocity
        made.radius = self.radius if bool(there.all()) else 0.0
        shift, faster = alike(moves[count:]), alike(speeds[count:])
        if shift.any() or faster.any():
            first, here, made.velocity = self.frame, self.centre(self.frame) + shift, self.velocity + faster
            made.centre = lambda frame: here + (frame - first) * made.dt * made.velocity
        return made

    def advance(self, scene: State, action: Tensor | None) -> State:
        self.frame += 1
        positions, stresses = self.rest()
        velocities = (positions - scene.positions) / self.dt
        velocities[len(self.solid.nodes) :] = torch.from_numpy(self.velocity)
        found = {"positions": positions, "velocities": velocities, "stresses": stresses}
        return scene.replace(**{k: torch.where(scene.active[:, None], v, scene[k]) for k, v in found.items()})


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


def _start(session: _Session, cells: Ints, held: NDArray[np.bool_]) -> MeshState:
    """Return the first frame: the plate is at rest, the ball has the velocity at which it sinks."""
    positions, stresses = session.rest()
    velocities = torch.zeros_like(positions)
    velocities[len(held) :] = torch.from_numpy(session.velocity)
    types = torch.full((len(positions),), OBSTACLE)
    types[: len(held)] = torch.where(torch.from_numpy(held), HANDLE, NORMAL)
    return MeshState(
        rest_positions=positions,
        positions=positions,
        velocities=velocities,
        stresses=stresses,
        cells=torch.from_numpy(cells),
        node_types=types,
        kinematic=types != NORMAL,
    )
