"""Flows round a cylinder in a channel, after the CylinderFlow of MeshGraphNets (Pfaff et al. 2021), by `ChannelFlow`.

The paper gives sizes and steps of its set but not geometry and inflow; here both vary from episode to episode, at
Reynolds numbers (mean speed times diameter over viscosity) at which vortices are shed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld import kinds
from simworld.kinds import MeshState
from simworld.physics import flow
from simworld.physics.flow import Channel, ChannelFlow, parabola
from simworld.physics.replay import Remembering, heeded
from simworld.simulate import Intervention, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

Seed = Sequence[int]
VISCOSITY = 1e-3  # m^2/s
HEIGHT = 0.41  # m
LOWEST, HIGHEST = (
    (0.04, 0.2, -0.04, 0.8),
    (0.06, 0.3, 0.04, 1.2),
)  # radius, centre (y from the middle) [m], inflow [m/s]
REMEMBERED = 8  # developed flows: what is asked of one of them begins from it, again and again
READS = ("velocities",)
FlowState = MeshState.with_units(pressures="m^2/s^2")
TYPES = {
    flow.INFLOW: kinds.INFLOW,
    flow.OUTFLOW: kinds.OUTFLOW,
    flow.WALL: kinds.WALL,
    flow.OBSTACLE: kinds.OBSTACLE,
}


def cylinder_flow(
    seed: Seed,
    *,
    num_steps: int = 600,
    length: float = 1.6,
    size: float = 0.03,
    obstacle_size: float = 0.01,
    warm_up: float = 4.0,
    num_sub_steps: int = 2,
    dt: float = 0.01,
    shift: tuple[float, float] = (0.0, 0.0),
    radius_scale: float = 1.0,
    inflow_scale: float = 1.0,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return a seeded episode of `num_steps` + 1 frames of velocities and pressures at the nodes of a mesh.

    The channel is `length` by 0.41 m; the cylinder has a radius of 0.04 to 0.06 m, its centre at 0.2 to 0.3 m and up to
    0.04 m off the middle, the inflow a mean speed of 0.8 to 1.2 m/s. Frame 0 is `warm_up` seconds after the start from
    rest. `size` and `obstacle_size` are lengths of edges as in `Channel`. Pressures are over the density.

    Another cylinder needs another mesh, so it is no change of a state: with `shift` [m], `radius_scale` or
    `inflow_scale` the seed's channel has its cylinder elsewhere, of another size, or another inflow from the start at
    rest on. `interventions` change velocities of frames, as `ChannelFlow.changed` does: the inflow, say, at once.

    Raises:
        ValueError: a number is outside its range, the cylinder is moved out of the channel or into a wall, or an
            intervention changes something else.
        ImportError: scikit-fem or gmsh is missing.
    """
    if num_steps < 1 or num_sub_steps < 1 or warm_up < 0 or length < 1:
        raise ValueError(
            "cylinder_flow needs num_steps >= 1, num_sub_steps >= 1, warm_up >= 0 s, length >= 1 m; "
            f"got {num_steps}, {num_sub_steps}, {warm_up}, {length}."
        )
    how = (length, size, obstacle_size, dt / num_sub_steps, tuple(shift), radius_scale, inflow_scale)
    solver = copy.copy(_developed(tuple(seed), warm_up, how))  # no step writes into an array
    start = flow_state(solver)
    path = rollout(
        start,
        simulator=Remembering(start, [_Session(solver, num_sub_steps)], dt=dt),
        num_steps=num_steps,
        interventions=heeded(interventions, "ChannelFlow", READS),
    )
    path.check_finite()
    return path


@lru_cache(maxsize=REMEMBERED)
def _developed(seed: tuple[int, ...], warm_up: float, how: tuple[Any, ...]) -> ChannelFlow:
    """Return the flow of a seed as it is `warm_up` seconds after the start; `how` are arguments of `random_flow`."""
    solver = random_flow(np.random.default_rng(list(seed)), *how)
    solver.advance(round(warm_up / solver.dt))
    return solver


class _Session:
    """A flow in its channel, `num_sub_steps` of which are a step."""

    def __init__(self, solver: ChannelFlow, num_sub_steps: int) -> None:
        self.solver, self.num_sub_steps = solver, num_sub_steps

    def again(self, before: State, changed: State) -> _Session:
        return _Session(self.solver.changed((changed.velocities - before.velocities).numpy()), self.num_sub_steps)

    def advance(self, scene: State, action: Tensor | None) -> State:
        self.solver.advance(self.num_sub_steps)
        return scene.replace(**{name: torch.from_numpy(values) for name, values in _now(self.solver).items()})


def random_flow(
    rng: np.random.Generator,
    length: float,
    size: float,
    obstacle_size: float,
    dt: float,
    shift: tuple[float, float] = (0.0, 0.0),
    radius_scale: float = 1.0,
    inflow_scale: float = 1.0,
) -> ChannelFlow:
    """Return a flow at rest in a channel with a cylinder of random place and size, and a random inflow.

    What is drawn is then changed as the last three arguments say.
    """
    radius, x, off, mean = rng.uniform(LOWEST, HIGHEST).tolist()
    channel = Channel(
        length=length,
        height=HEIGHT,
        centre=(x + shift[0], HEIGHT / 2 + off + shift[1]),
        radius=radius * radius_scale,
        size=size,
        obstacle_size=obstacle_size,
    )
    return ChannelFlow(channel, viscosity=VISCOSITY, inflow=parabola(HEIGHT, mean * inflow_scale), dt=dt)


def flow_state(solver: ChannelFlow) -> MeshState:
    """Return the present state of a solver. Nodes of known velocity (inflow, walls, cylinder) are kinematic."""
    node_types = np.full(len(solver.nodes), kinds.NORMAL)
    for part, where in solver.parts.items():
        node_types[where] = TYPES[part]
    known: dict[str, Any] = {name: torch.from_numpy(values) for name, values in _now(solver).items()}
    return FlowState(
        rest_positions=torch.from_numpy(solver.nodes),
        node_types=torch.from_numpy(node_types),
        kinematic=torch.from_numpy(np.isin(node_types, (kinds.INFLOW, kinds.WALL, kinds.OBSTACLE))),
        cells=torch.from_numpy(solver.triangles),
        **known,
    )


def _now(solver: ChannelFlow) -> dict[str, NDArray[np.float64]]:
    return {"velocities": solver.velocities.copy(), "pressures": solver.pressures.copy()}


def force_on_obstacle(path: Trajectory, viscosity: float = VISCOSITY) -> Tensor:
    """Return [T, 2]: the force of a flow on its obstacle in every frame, over density and depth [m^3/s^2].

    From pressures and velocities at the nodes, linear in each triangle, along the edges between nodes of type obstacle:
    the same sum for recorded and for predicted frames. Coarser than `ChannelFlow.force`, which knows the residual.
    """
    state = path.initial
    inner, ends, normals = _obstacle_edges(state)
    corners = state.rest_positions[inner]
    # Slopes of the three linear functions of a triangle: rows of the inverse of (1, x, y) at its corners.
    slopes = torch.linalg.inv(torch.cat([torch.ones_like(corners[..., :1]), corners], 2))[:, 1:]
    gradients = torch.einsum("eak,tekc->teac", slopes, path["velocities"][:, inner])
    stresses = viscosity * (gradients + gradients.transpose(2, 3))
    pressures = path["pressures"][:, ends].mean(2)
    return torch.einsum("teac,ea->tc", stresses, normals) - torch.einsum("te,ec->tc", pressures, normals)


def _obstacle_edges(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return triangles [e, 3] at the obstacle, their edge's ends [e, 2] and its normal [e, 2] into the flow.

    A normal is as long as its edge.
    """
    at = (state.node_types == kinds.OBSTACLE)[state.cells]
    rows = (at.sum(1) == 2).nonzero()[:, 0]
    triangles, touching = state.cells[rows], at[rows]
    ends = triangles[touching].reshape(-1, 2)
    third = state.rest_positions[triangles[~touching]]
    first, second = state.rest_positions[ends].unbind(1)
    way = second - first
    normals = torch.stack([way[:, 1], -way[:, 0]], 1)
    inwards = ((third - first) * normals).sum(1, keepdim=True)
    return triangles, ends, torch.where(inwards > 0, normals, -normals)
