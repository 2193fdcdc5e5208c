"""A rope of balls among fixed cylinders, on the rigid-body engine Chipmunk through pymunk.

The world of Propagation Networks (Li et al. 2019, arXiv 1809.11169): balls joined by damped springs, pushed
by impulses, on a plane without gravity or friction. Lengths in pixels, masses in units of one ball.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simworld.kinds import ObjectState
from simworld.physics.planar import Array, PlanarEngine, PlanarSpace, record
from simworld.simulate import Intervention
from simworld.state import State
from simworld.trajectory import Trajectory

RopeState = ObjectState.with_units(
    positions="px",
    velocities="px/s",
    masses="1",
    radii="px",
    spring_lengths="px",
    spring_stiffnesses="1/s^2",
    spring_dampings="1/s",
)
ACTION_UNIT = "px/s"
BALL, CYLINDER = 0, 1
ATTEMPTS = 10_000


def rope_episode(
    seed: Sequence[int],
    *,
    num_steps: int = 99,
    num_balls: int = 15,
    num_cylinders: int = 2,
    warm_up_steps: int = 50,
    dt: float = 1 / 50,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of the rope world, `num_steps` + 1 frames of float64.

    The same seed with `interventions` is the same world with the same warm-up and impulses, changed at the frames at
    which they apply, as in `PlanarEngine.replay`.

    Raises:
        ValueError: a count is too small, or an intervention cannot be heeded.
        ImportError: pymunk is missing.
    """
    if min(num_steps, num_cylinders, warm_up_steps) < 0 or num_balls < 2 or warm_up_steps < 1:
        raise ValueError(
            "A rope needs 2 or more balls, 1 or more warm-up steps and no negative counts; got "
            f"{num_balls=}, {warm_up_steps=}, {num_steps=}, {num_cylinders=}."
        )
    if not 0 < dt < np.inf:
        raise ValueError(f"A rope needs a positive dt; got {dt}.")
    rng = np.random.default_rng(list(seed))
    start = _start(rng, num_balls, num_cylinders)
    space, before = PlanarSpace(start, PlanarEngine(dt=dt)), start.positions.numpy()
    for _ in range(warm_up_steps):
        before = space.positions()
        space.step(rng.normal(0, 20, before.shape))
    pushes = np.zeros((num_steps, len(start), 2))
    pushes[:, :num_balls] = rng.uniform(-15, 15, (num_steps, num_balls, 2)).cumsum(axis=1)
    pushes[:, 0] = 0  # the first ball is fixed: the impulse meant for it does nothing
    return record(start, space, before, pushes, num_steps=num_steps, interventions=interventions)


def rope_state(positions: Tensor, velocities: Tensor, radii: Tensor, num_balls: int) -> State:
    """Return the state of a rope of `num_balls` balls, the first fixed, followed by fixed cylinders.

    Springs join neighbours (rest length 10), then next neighbours (20): stiffness 100, damping 50.
    """
    types = torch.full(radii.shape, CYLINDER)
    types[:num_balls] = BALL
    fixed = types == CYLINDER
    fixed[0] = True
    near = [(i, i + 1) for i in range(num_balls - 1)]
    far = [(i, i + 2) for i in range(num_balls - 2)]
    rests = [10.0 for _ in near] + [20.0 for _ in far]
    lengths = torch.tensor(rests, dtype=positions.dtype)
    return RopeState(
        positions=positions,
        velocities=velocities,
        masses=torch.ones_like(radii),
        radii=radii,
        fixed=fixed,
        object_types=types,
        springs=torch.tensor(near + far),
        spring_lengths=lengths,
        spring_stiffnesses=torch.full_like(lengths, 100.0),
        spring_dampings=torch.full_like(lengths, 50.0),
    )


def _start(rng: np.random.Generator, num_balls: int, num_cylinders: int) -> State:
    """Lay the rope in a row and put cylinders where they touch neither it nor each other."""
    first = 300 + rng.uniform(-25, 25, 2)
    rope = first + np.arange(num_balls)[:, None] * np.array([10.0, 0.0])
    for _ in range(ATTEMPTS):
        centres = rng.uniform(150, 450, (num_cylinders, 2))
        radii = _room(rng, centres)
        if radii is None:
            continue
        gaps = np.linalg.norm(rope[:, None] - centres, axis=-1) - radii - 5
        if (gaps > 0).all():
            break
    else:
        raise ValueError(f"{num_cylinders} cylinders and {num_balls} balls found no room; ask for fewer.")
    positions = torch.from_numpy(np.concatenate([rope, centres]))
    return rope_state(
        positions,
        torch.zeros_like(positions),
        torch.from_numpy(np.concatenate([np.full(num_balls, 5.0), radii])),
        num_balls,
    )


def _room(rng: np.random.Generator, centres: Array) -> Array | None:
    """Return radii from 30 to 60 that leave 3 px between cylinders; None where there is no room."""
    radii = np.full(len(centres), 30.0)
    for i in range(len(centres)):
        gaps = np.linalg.norm(centres - centres[i], axis=-1) - radii - 3
        gaps[i] = np.inf
        if gaps.min(initial=np.inf) <= 30:
            return None
        radii[i] = rng.uniform(30, min(60, gaps.min(initial=np.inf)))
    return radii
