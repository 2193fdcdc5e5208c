"""Two worlds of Interaction Networks (Battaglia et al. 2016, arXiv 1612.00222): balls in a box, and a string.

The paper gives the ranges of constants, but neither time step nor engine; lengths in m, masses in kg.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from simworld.kinds import ObjectState
from simworld.physics.planar import Array, PlanarEngine, run
from simworld.simulate import Intervention
from simworld.state import State
from simworld.trajectory import Trajectory

SLOP = 1e-3  # m of overlap that the engine leaves alone
TRIES_PER_BALL, BOXES = 100, 300
MASS, CIRCLE = 0, 1
REST_LENGTH, STIFFNESS, DAMPING, MASS_RADIUS, UNEVENNESS = 0.2, 100.0, 0.001, 0.02, 0.01


def balls_engine(dt: float = 0.01) -> PlanarEngine:
    """Return the engine of the box, which looks for collisions once per step."""
    return PlanarEngine(dt=dt, collision_slop=SLOP)


def balls_episode(
    seed: Sequence[int],
    *,
    num_steps: int = 199,
    num_balls: int = 6,
    dt: float = 0.01,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of balls that bounce in a box, `num_steps` + 1 frames of float64.

    Interventions act as in `PlanarEngine.replay`.

    Raises:
        ValueError: a count is too small, or there is no box for so many balls.
        ImportError: pymunk is missing.
    """
    if num_balls < 1:
        raise ValueError(f"A box needs 1 or more balls; got num_balls={num_balls}.")
    rng = np.random.default_rng(list(seed))
    return run(balls_start(rng, num_balls), balls_engine(dt), num_steps=num_steps, interventions=interventions)


def balls_start(rng: np.random.Generator, num_balls: int) -> State:
    """Return balls at random in a box: drawn anew, box, radii and all, until nothing overlaps."""
    for _ in range(BOXES):
        sides = rng.uniform(1, 3, 2)
        radii = rng.uniform(0.1, 0.3, num_balls)
        places = _places(rng, sides, radii)
        if places is not None:
            break
    else:
        raise ValueError(f"{num_balls} balls found no room in {BOXES} boxes; ask for fewer.")
    masses, restitutions = rng.uniform(0.75, 1.25, num_balls), rng.uniform(0.4, 1, num_balls)
    speeds, angles = rng.uniform(0, 5, num_balls), rng.uniform(0, 2 * np.pi, num_balls)
    velocities = speeds[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    return ObjectState(
        positions=torch.from_numpy(places),
        velocities=torch.from_numpy(velocities),
        masses=torch.from_numpy(masses),
        radii=torch.from_numpy(radii),
        restitutions=torch.from_numpy(restitutions),
        boundaries=torch.from_numpy(np.stack([np.zeros(2), sides])[None]),
    )


def _places(rng: np.random.Generator, sides: Array, radii: Array) -> Array | None:
    """Return a place for one ball after the other, or None where one finds none."""
    places = np.empty((len(radii), 2))
    for i, radius in enumerate(radii):
        for _ in range(TRIES_PER_BALL):
            places[i] = rng.uniform(radius, sides - radius)
            if (np.linalg.norm(places[:i] - places[i], axis=1) > radii[:i] + radius).all():
                break
        else:
            return None
    return places


def string_engine(dt: float = 0.01, *, sub_steps: int = 10) -> PlanarEngine:
    """Return the engine of the string."""
    return PlanarEngine(dt=dt, sub_steps=sub_steps, collision_slop=SLOP)


def string_episode(
    seed: Sequence[int],
    *,
    num_steps: int = 199,
    num_masses: int = 15,
    num_pinned: int = 1,
    dt: float = 0.01,
    sub_steps: int = 10,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of a string of masses that falls on a circle, `num_steps` + 1 frames of float64.

    `num_pinned` ends are held: none, the one at the origin, or both. Interventions act as in `PlanarEngine.replay`.

    Raises:
        ValueError: a count is outside its range.
        ImportError: pymunk is missing.
    """
    if num_masses < 2 or num_pinned not in (0, 1, 2):
        raise ValueError(
            f"A string needs 2 or more masses and 0, 1 or 2 pinned ends; got {num_masses=} and {num_pinned=}."
        )
    rng = np.random.default_rng(list(seed))
    start = string_start(rng, num_masses, num_pinned)
    return run(start, string_engine(dt, sub_steps=sub_steps), num_steps=num_steps, interventions=interventions)


def string_start(rng: np.random.Generator, num_masses: int, num_pinned: int) -> State:
    """Return a string at rest, laid out from the origin to the left or right, a little uneven, and the circle."""
    along = REST_LENGTH * np.arange(num_masses) * rng.choice([-1, 1])
    string = np.stack([along, np.zeros(num_masses)], 1)
    string[1:] += rng.uniform(-UNEVENNESS, UNEVENNESS, (num_masses - 1, 2))
    circle = np.array([[rng.uniform(-0.5, 0.5), rng.uniform(-1, -0.5)]])
    radii = np.append(np.full(num_masses, MASS_RADIUS), rng.uniform(0.2, 0.4))
    masses = np.append(rng.uniform(0.05, 0.15, num_masses), 1.0)  # the circle stays: its mass means nothing
    fixed = torch.zeros(num_masses + 1, dtype=torch.bool)
    fixed[[0, num_masses - 1][:num_pinned]] = True
    fixed[-1] = True
    types = torch.full((num_masses + 1,), MASS)
    types[-1] = CIRCLE
    numbers = torch.arange(num_masses - 1)
    return ObjectState(
        positions=torch.from_numpy(np.concatenate([string, circle])),
        velocities=torch.zeros(num_masses + 1, 2).double(),
        masses=torch.from_numpy(masses),
        radii=torch.from_numpy(radii),
        fixed=fixed,
        object_types=types,
        springs=torch.stack([numbers, numbers + 1], 1),
        spring_lengths=torch.full((num_masses - 1,), REST_LENGTH).double(),
        spring_stiffnesses=torch.full((num_masses - 1,), STIFFNESS).double(),
        spring_dampings=torch.full((num_masses - 1,), DAMPING).double(),
        gravity=torch.tensor([[0.0, rng.uniform(-30, -5)]]).double(),
    )
