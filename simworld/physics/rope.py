"""A rope of balls among fixed cylinders, on the rigid-body engine Chipmunk through pymunk.

The world of Propagation Networks (Li et al. 2019, arXiv 1809.11169): balls joined by damped springs, pushed
by impulses, on a plane without gravity or friction. Lengths in pixels, masses in units of one ball.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.state import ObjectState, State
from simworld.trajectory import Trajectory

if TYPE_CHECKING:
    from pymunk import Body

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
Array = NDArray[np.float64]


class RopeEngine:
    """Steps discs, fixed or free, joined by damped springs; an action is an impulse per disc.

    A recorded velocity is that of the step that led to the frame, (x_t - x_{t-1}) / dt, from before the
    engine solved contacts and springs at x_t. A step therefore goes back by one drift, lets the engine
    arrive and solve, applies the impulses and drifts on. Only contact impulses that the engine caches
    between steps are lost by restarting it so from each frame.
    """

    def __init__(self, dt: float = 1 / 50) -> None:
        self._dt = dt

    @property
    def dt(self) -> float:
        """Seconds that one step covers."""
        return self._dt

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the next state; `action` [n, 2] holds impulses [mass px/s].

        Raises:
            ValueError: the state is not two-dimensional or `action` has another shape.
            ImportError: pymunk is missing.
        """
        if state.positions.shape[1] != 2:
            raise ValueError(f"RopeEngine works in the plane, on positions [n, 2]; got {list(state.positions.shape)}.")
        if action is not None and action.shape != state.positions.shape:
            raise ValueError(f"RopeEngine takes impulses {list(state.positions.shape)}; got {list(action.shape)}.")
        after = [self._advance(state, scene, action) for scene in range(state.num_scenes)]
        positions = torch.from_numpy(np.concatenate(after)).to(state.positions)
        return state.replace(positions=positions, velocities=(positions - state.positions) / self.dt)

    def _advance(self, state: State, number: int, action: Tensor | None) -> Array:
        scene = state.scene(number)
        velocities = torch.where(scene.fixed[:, None], 0.0, scene.velocities.double())
        before = scene.to(torch.float64).replace(positions=scene.positions.double() - self.dt * velocities)
        space = _Space(before)
        space.step(np.zeros((len(scene), 2)), self.dt)
        impulses = np.zeros((len(scene), 2)) if action is None else action[state.batch == number].double().cpu().numpy()
        space.step(impulses, self.dt)
        return space.positions()


class _Space:
    """A pymunk space built from one scene: engine caches and all."""

    def __init__(self, scene: State) -> None:
        pymunk = _pymunk()
        self.space = pymunk.Space()
        self.bodies: list[Body] = []
        self.free = (scene.active & ~scene.fixed).tolist()
        rows = zip(*(scene[k].tolist() for k in ("positions", "velocities", "masses", "radii", "fixed")), strict=True)
        for active, (position, velocity, mass, radius, fixed) in zip(scene.active.tolist(), rows, strict=True):
            moment = pymunk.moment_for_circle(mass, 0, radius)
            body = pymunk.Body(body_type=pymunk.Body.STATIC) if fixed else pymunk.Body(mass, moment)
            body.position = tuple(position)
            if not fixed:
                body.velocity = tuple(velocity)
            self.bodies.append(body)
            if active:
                self.space.add(body, pymunk.Circle(body, radius))
        # The order in which joints are added is the order in which the engine solves them.
        springs = (scene[k].tolist() for k in ("springs", "spring_lengths", "spring_stiffnesses", "spring_dampings"))
        for (a, b), length, stiffness, damping in zip(*springs, strict=True):
            if self.bodies[a].space and self.bodies[b].space:
                ends = self.bodies[a], self.bodies[b]
                self.space.add(pymunk.DampedSpring(*ends, (0, 0), (0, 0), length, stiffness, damping))

    def step(self, impulses: Array, dt: float) -> None:
        for body, free, impulse in zip(self.bodies, self.free, impulses.tolist(), strict=True):
            if free:
                body.velocity = body.velocity + (impulse[0] / body.mass, impulse[1] / body.mass)
        self.space.step(dt)

    def remove(self, entity: int) -> None:
        body = self.bodies[entity]
        self.space.remove(*body.shapes, *body.constraints, body)
        self.free[entity] = False

    def positions(self) -> Array:
        return np.array([tuple(body.position) for body in self.bodies])


@dataclass(frozen=True, kw_only=True)
class RopeQuestion:
    """A "what if" that the engine answers: some bodies removed at frame 0, impulses scaled."""

    removed: tuple[int, ...] = ()
    impulse_scale: float = 1.0


def rope_episode(
    seed: Sequence[int],
    *,
    num_steps: int = 99,
    num_balls: int = 15,
    num_cylinders: int = 2,
    warm_up_steps: int = 50,
    dt: float = 1 / 50,
    question: RopeQuestion | None = None,
) -> Trajectory:
    """Return one seeded episode of the rope world, `num_steps` + 1 frames of float64.

    The same seed with a `question` answers it: the same world, warm-up and engine caches, but with bodies
    removed or impulses scaled from frame 0 on.

    Raises:
        ValueError: a count is too small, or a removed entity does not exist.
        ImportError: pymunk is missing.
    """
    if min(num_steps, num_cylinders, warm_up_steps) < 0 or num_balls < 2 or warm_up_steps < 1:
        raise ValueError(
            "A rope needs 2 or more balls, 1 or more warm-up steps and no negative counts; got "
            f"{num_balls=}, {warm_up_steps=}, {num_steps=}, {num_cylinders=}."
        )
    if not 0 < dt < np.inf or (question and not np.isfinite(question.impulse_scale)):
        raise ValueError(f"A rope needs a positive dt and a finite impulse_scale; got dt={dt} and {question}.")
    rng = np.random.default_rng(list(seed))
    start = _start(rng, num_balls, num_cylinders)
    space, before = _Space(start), start.positions.numpy()
    for _ in range(warm_up_steps):
        before = space.positions()
        space.step(rng.normal(0, 20, before.shape), dt)
    pushes = np.zeros((num_steps, len(start), 2))
    pushes[:, :num_balls] = rng.uniform(-15, 15, (num_steps, num_balls, 2)).cumsum(axis=1)
    pushes[:, 0] = 0  # the first ball is fixed: the impulse meant for it does nothing
    return _record(start, space, before, pushes, dt, question or RopeQuestion())


def _record(start: State, space: _Space, before: Array, pushes: Array, dt: float, question: RopeQuestion) -> Trajectory:
    active = start.active.clone()
    for entity in dict.fromkeys(question.removed):
        if not 0 <= entity < len(start):
            raise ValueError(f"There are bodies 0 to {len(start) - 1} to remove; got {entity}.")
        space.remove(entity)
        active[entity] = False
    pushes = pushes * question.impulse_scale
    path = [before, space.positions()]
    for push in pushes:
        space.step(push, dt)
        path.append(space.positions())
    positions = torch.from_numpy(np.stack(path))
    velocities = (positions[1:] - positions[:-1]) / dt
    return Trajectory(
        initial=start.replace(positions=positions[1], velocities=velocities[0], active=active),
        frames={"positions": positions[1:], "velocities": velocities},
        active=active.expand(len(positions) - 1, -1).clone(),
        dt=dt,
        actions=torch.from_numpy(pushes),
    )


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


def _pymunk() -> Any:
    try:
        import pymunk
    except ImportError as error:
        raise ImportError("The rope engine needs pymunk; install it with: pip install 'simworld[physics]'") from error
    return pymunk
