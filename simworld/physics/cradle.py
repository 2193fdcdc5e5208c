"""Newton's cradle, as Propagation Networks recorded it (Li et al. 2019, arXiv 1809.11169).

Balls that just touch hang from fixed anchors by rigid rods; the leftmost is raised and let go. Lengths are
pixels, masses in units of which a ball has 10.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simworld.kinds import ObjectState
from simworld.physics.planar import PlanarEngine, run
from simworld.simulate import Intervention
from simworld.state import State
from simworld.trajectory import Trajectory

CradleState = ObjectState.with_units(
    positions="px",
    velocities="px/s",
    masses="1",
    radii="px",
    spring_lengths="px",
    gravity="px/s^2",
)
BALL, ANCHOR = 0, 1
RADIUS, MASS, ROD_LENGTH, GRAVITY, RESTITUTION = 25.0, 10.0, 250.0, -4000.0, 0.9999999
HEIGHT = 125.0  # of the anchors; the origin is half way down the middle rod
LONGEST = 1000  # frames among which an excerpt is chosen


def cradle_engine(dt: float = 1e-3) -> PlanarEngine:
    """Return the engine of the cradle: free bodies keep 0.999 of their velocity in a second."""
    return PlanarEngine(dt=dt, damping=0.999)


def cradle_episode(
    seed: Sequence[int],
    *,
    num_steps: int = 999,
    num_balls: int = 5,
    max_angle: float = 90.0,
    excerpts: bool = False,
    dt: float = 1e-3,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode, `num_steps` + 1 frames of float64: the leftmost ball raised by U(0, max_angle).

    With `excerpts` it is a piece of an episode of 1000 frames: every other one begins at a random frame, the
    rest at most `num_steps` frames before two balls first touch, since so little else happens in between.
    Interventions act on the frames that are returned, as in `PlanarEngine.replay`.

    Raises:
        ValueError: a count or the angle is outside its range.
        ImportError: pymunk is missing.
    """
    if num_balls < 2 or num_steps < 0 or not 0 <= max_angle <= 90 or (excerpts and num_steps >= LONGEST):
        raise ValueError(
            "A cradle needs 2 or more balls, num_steps >= 0 (below 1000 for excerpts) and max_angle from 0 to 90; got "
            f"{num_balls=}, {num_steps=}, {max_angle=}."
        )
    rng = np.random.default_rng(list(seed))
    start = cradle_start(rng.uniform(0, np.radians(max_angle)), num_balls)
    if not excerpts:
        return run(start, cradle_engine(dt), num_steps=num_steps, interventions=interventions)
    whole = run(start, cradle_engine(dt), num_steps=LONGEST + num_steps)
    balls = whole["positions"][:, :num_balls]
    touching = ((balls[:, 1:] - balls[:, :-1]).norm(dim=2) < 2 * RADIUS).any(1).nonzero()
    first = int(rng.integers(LONGEST))
    if rng.uniform() < 0.5 and len(touching):
        first = max(0, int(touching[0]) - int(rng.integers(num_steps + 1)))
    if not interventions:
        return whole.window(first, first + num_steps + 1)
    return run(start, cradle_engine(dt), num_steps=num_steps, warm_up_steps=first + 1, interventions=interventions)


def cradle_start(angle: float, num_balls: int = 5) -> State:
    """Return a cradle at rest, its leftmost ball raised by `angle` [rad] along its rod's circle."""
    across = 2 * RADIUS * (torch.arange(num_balls).double() - (num_balls - 1) / 2)
    anchors = torch.stack([across, torch.full_like(across, HEIGHT)], 1)
    balls = anchors - torch.tensor([0.0, ROD_LENGTH]).double()
    balls[0] = anchors[0] - ROD_LENGTH * torch.tensor([np.sin(angle), np.cos(angle)])
    positions = torch.cat([balls, anchors])
    return cradle_state(positions, torch.zeros_like(positions))


def cradle_state(positions: Tensor, velocities: Tensor) -> State:
    """Return the state of balls followed by as many anchors, a rod of length 250 px from each ball to its anchor."""
    num_balls = len(positions) // 2
    anchors = torch.arange(len(positions)) >= num_balls
    numbers = torch.arange(num_balls)
    return CradleState(
        positions=positions,
        velocities=velocities,
        masses=torch.full_like(positions[:, 0], MASS),
        radii=torch.where(anchors, 0.0, torch.full_like(positions[:, 0], RADIUS)),  # an anchor touches nothing
        restitutions=torch.full_like(positions[:, 0], RESTITUTION),
        fixed=anchors,
        object_types=torch.where(anchors, ANCHOR, BALL),
        springs=torch.stack([numbers, numbers + num_balls], 1),
        spring_lengths=torch.full((num_balls,), ROD_LENGTH).to(positions),
        gravity=torch.tensor([[0.0, GRAVITY]]).to(positions),
    )
