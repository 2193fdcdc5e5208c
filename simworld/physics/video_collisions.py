"""A world to be filmed: boxes and balls on a table, some at rest, others launched at them, on the engine MuJoCo.

Lengths in metres, masses in kilograms, time in seconds; as `simworld.physics.push`, with little friction. After CLEVRER
(Yi et al. 2020, arXiv 1910.01442), whose bodies enter a table and collide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from simworld.physics.push import BALL, BOX, Array, PushEngine, push_state
from simworld.physics.video_worlds import HUES, MOST
from simworld.simulate import Intervention
from simworld.state import State
from simworld.trajectory import Trajectory

DT, TIME_STEP = 0.05, 0.0025  # s between frames, and of the engine
SIDE = 0.6  # m from the middle of the table to the edge of what is filmed
RIM, MIDDLE = 0.46, 0.3  # m from the middle: where launched bodies begin; where others rest, along each axis
SIZES, FRICTION, DENSITY = (0.06, 0.09), 0.01, 500.0
SLIDING, ROLLING = (0.5, 0.9), (0.4, 0.7)  # m/s of launched boxes, which friction slows, and of balls
LAUNCHED = 0.5  # chance of each body but the first, which always is
FAR, AIM = 0.35, 0.05  # m to the bodies that launched ones aim at, or more, and by which they miss (deviation)
GAP, PLACINGS, TRIES = 0.01, 200, 300


def video_collisions(
    seed: Sequence[int],
    *,
    num_steps: int = 49,
    num_bodies: int | None = None,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of bodies that slide, roll and collide on a table, 3 to 6 if not said.

    Body 0 is launched from the rim towards a distant one, each other with chance 1/2, the rest lie still. Starts are
    drawn until no body leaves the square that is filmed; under `interventions`, which act as in `PushEngine.replay` on
    the same start, bodies may.

    Raises:
        ValueError: a count is outside its range, or an intervention cannot be heeded.
        ImportError: mujoco is missing.
    """
    if num_steps < 0 or not (num_bodies is None or 1 <= num_bodies <= MOST):
        raise ValueError(f"This world has 1 to {MOST} bodies and no negative steps; got {num_bodies=}, {num_steps=}.")
    rng, engine = np.random.default_rng(list(seed)), PushEngine(DT, time_step=TIME_STEP)
    count = int(rng.integers(3, MOST + 1)) if num_bodies is None else num_bodies
    for _ in range(TRIES):
        start = _start(rng, count)
        path = engine.replay(start, num_steps=num_steps)
        if not bool(outside(path).any()):
            break
    else:
        raise ValueError(f"In {TRIES} starts, {count} bodies never stayed on the table; ask for fewer bodies or steps.")
    return engine.replay(start, num_steps=num_steps, interventions=interventions) if interventions else path


def outside(path: Trajectory) -> torch.Tensor:
    """Return which bodies reach out of the square that is filmed, [T, n]."""
    reach = path["positions"][..., :2].abs() + path.initial.radii[:, None]
    return (reach > SIDE).any(-1) & path.active


def _start(rng: np.random.Generator, count: int) -> State:
    """Return bodies on the table that do not touch, the first and some others on their way."""
    types = rng.choice([BOX, BALL], count)
    extents = rng.uniform(*SIZES, (count, 3))
    extents[types == BALL] = extents[types == BALL, :1]
    balls = types == BALL
    launched = rng.uniform(size=count) < LAUNCHED
    launched[0] = True
    places = _places(rng, np.where(balls, extents[:, 0], np.linalg.norm(extents[:, :2], axis=1)), launched)
    velocities = np.zeros((count, 3))
    for k in np.nonzero(launched)[0].tolist():
        goals = np.nonzero(np.linalg.norm(places - places[k], axis=1) >= FAR)[0]
        ahead = (places[rng.choice(goals)] if len(goals) else np.zeros(2)) + rng.normal(0, AIM, 2) - places[k]
        pace = rng.uniform(*(ROLLING if balls[k] else SLIDING))
        velocities[k, :2] = pace * ahead / np.linalg.norm(ahead)
    rolling = np.cross([0.0, 0.0, 1.0], velocities) / extents[:, 2:] * balls[:, None]
    angles, zeros = rng.uniform(-np.pi, np.pi, count) / 2, np.zeros(count)
    volumes = np.where(balls, 4 / 3 * np.pi * extents[:, 0] ** 3, 8 * extents.prod(1))
    state = push_state(
        torch.from_numpy(np.column_stack([places, extents[:, 2]])),
        half_extents=torch.from_numpy(extents),
        masses=torch.from_numpy(DENSITY * volumes),
        frictions=torch.full((count,), FRICTION, dtype=torch.float64),
        object_types=torch.from_numpy(types),
        quats=torch.from_numpy(np.column_stack([np.cos(angles), zeros, zeros, np.sin(angles)])),
        velocities=torch.from_numpy(velocities),
        angular_velocities=torch.from_numpy(rolling),
    )
    return state.replace(
        colors=torch.from_numpy(np.array(HUES)[rng.permutation(len(HUES))[:count]]),
        influences=torch.zeros(count, MOST, dtype=torch.bool),
    )


def _places(rng: np.random.Generator, reach: Array, launched: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Array:
    """Return places [n, 2], those of launched bodies on a circle, one and all drawn anew until no two touch."""
    for _ in range(PLACINGS):
        angles = rng.uniform(-np.pi, np.pi, len(reach))
        rim = RIM * np.column_stack([np.cos(angles), np.sin(angles)])
        places = np.where(launched[:, None], rim, rng.uniform(-MIDDLE, MIDDLE, (len(reach), 2)))
        gaps = np.linalg.norm(places[:, None] - places, axis=-1) - reach - reach[:, None]
        if (gaps[np.triu_indices(len(reach), 1)] > GAP).all():
            return places
    raise ValueError(f"{len(reach)} bodies found no room on the table in {PLACINGS} tries; ask for fewer.")
