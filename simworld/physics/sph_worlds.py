"""The Taylor-Green vortex of LagrangeBench (Toshev et al. 2023, arXiv 2309.16342), by `SPHEngine`.

Four vortices in a periodic square of side 1 that turn and fade: u = -exp(-8 pi^2 nu t) cos(2 pi x) sin(2 pi y),
v = exp(-8 pi^2 nu t) sin(2 pi x) cos(2 pi y) solve the incompressible Navier-Stokes equations with viscosity nu.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from simworld.kinds import WATER, ParticleState
from simworld.physics.particle_worlds import recorded
from simworld.physics.sph import LiquidState, SPHEngine
from simworld.simulate import Intervention
from simworld.state import State
from simworld.trajectory import Trajectory

Seed = Sequence[int]
VISCOSITY = 0.01  # m^2/s: Reynolds number 100
KEPT = ("masses", "particle_types", "boundaries", "periodic")


def vortex_velocities(positions: Tensor, time: float = 0.0) -> Tensor:
    """Return the exact velocities [..., 2] of the vortex at positions [..., 2] and a time after its start."""
    x, y = (2 * math.pi * positions).unbind(-1)
    left = math.exp(-8 * math.pi**2 * VISCOSITY * time)
    return left * torch.stack([-x.cos() * y.sin(), x.sin() * y.cos()], -1)


def tgv_2d(
    seeds: Sequence[Seed],
    *,
    num_steps: int = 119,
    num_per_side: int = 50,
    num_sub_steps: int = 100,
    num_relax_steps: int = 50,
    noise: float = 0.25,
    transport: float = 1.0,
    history_length: int = 5,
    dt: float = 0.04,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded episodes of a Taylor-Green vortex, `num_steps` + 1 frames of float64.

    A lattice of `num_per_side`^2 particles is disturbed by normal noise of `noise` spacings, relaxed from rest for
    `num_relax_steps` steps of `dt`, and given the exact velocities at time 0. Frame 0 is the first with a whole history
    of its own, at time (`history_length` + 1) `dt`. Interventions act on the frames from there on, on each episode by
    itself, as `SPHEngine.rebuilt` says.

    Raises:
        ValueError: a number is outside its range.
    """
    for name, value, least in (
        ("num_steps", num_steps, 1),
        ("num_relax_steps", num_relax_steps, 0),
        ("noise", noise, 0),
        ("history_length", history_length, 0),
    ):
        if value < least:
            raise ValueError(f"tgv_2d needs {name} >= {least}; got {value}.")
    relaxing = SPHEngine(dt=dt, num_sub_steps=num_sub_steps, spacing=1 / num_per_side, viscosity=VISCOSITY)
    engine = replace(relaxing, transport=transport)
    state: State = LiquidState.cat([_at_rest(seed, num_per_side, noise) for seed in seeds])
    for _ in range(num_relax_steps):
        state = relaxing.step(state)
    moving = vortex_velocities(state.positions)
    state = state.replace(velocities=moving, fluid_velocities=moving, transport_velocities=moving)
    return recorded(state, engine, num_steps, history_length, KEPT, interventions)


def _at_rest(seed: Seed, num_per_side: int, noise: float) -> ParticleState:
    """Return a disturbed lattice of particles that fills the square."""
    rng = np.random.default_rng(list(seed))
    spacing = 1 / num_per_side
    axis = spacing * (np.arange(num_per_side) + 0.5)
    lattice = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    positions = torch.from_numpy((lattice + noise * spacing * rng.standard_normal(lattice.shape)) % 1.0)
    still = torch.zeros_like(positions)
    return LiquidState(
        positions=positions,
        velocities=still,
        fluid_velocities=still,
        transport_velocities=still,
        masses=torch.full_like(still[:, 0], spacing**2),
        particle_types=torch.full((len(still),), WATER),
        boundaries=torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], dtype=still.dtype),
        periodic=torch.ones(1, 2, dtype=torch.bool),
    )
