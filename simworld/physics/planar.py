"""Discs, springs, rods and walls in the plane, on the rigid-body engine Chipmunk through pymunk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.extras import needed
from simworld.physics.replay import Remembering, heeded
from simworld.simulate import Intervention, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

if TYPE_CHECKING:
    from pymunk import Arbiter, Body

AIMS = 30  # how often a restart corrects its aim at the frame to arrive at
CHIPMUNK_SLOP = float(np.float32(0.1))  # its own value, written there in single precision
READS = (
    *("positions", "velocities", "masses", "radii", "restitutions", "fixed", "springs", "spring_lengths"),
    *("spring_stiffnesses", "spring_dampings", "gravity", "boundaries", "active"),
)
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PlanarEngine:
    """Steps discs in the plane, fixed or free; an action is an impulse per disc.

    All else it reads from the state: `springs` with stiffnesses are damped springs, with lengths alone rigid
    rods; `gravity` pulls; `boundaries` are walls; `restitutions` (0 if not given) of two bodies that touch are
    multiplied, as Chipmunk does, and walls have 1. Nothing rubs. A disc of radius 0 touches nothing.

    Chipmunk runs `sub_steps` times per step of `dt` [s]. `damping` is the share of its velocity that a body
    keeps in a second; overlaps smaller than `collision_slop` [unit of positions] are left as they are.

    A recorded velocity is that of the step that led to the frame, (x_t - x_{t-1}) / dt, from before the engine
    solved contacts and springs at x_t. A step therefore goes back by one drift, lets the engine arrive and
    solve, applies the impulses and goes on. With several sub-steps it aims so that it arrives where the state
    says. What the engine remembers between steps beyond positions and velocities is lost by restarting it so
    from each frame: impulses of lasting contacts, and the speed with which an overlap was being pushed apart.

    With `instant` velocities the recorded one is that of the last sub-step alone. A hit on the way to a frame, which a
    mean hides, is then behind: a step goes back by one sub-step only, and goes on nearly as if it had never stopped.
    """

    dt: float
    sub_steps: int = 1
    instant: bool = False
    damping: float = 1.0
    collision_slop: float = CHIPMUNK_SLOP

    def __post_init__(self) -> None:
        if not (isinstance(self.dt, int | float) and 0 < self.dt < float("inf")):
            raise ValueError(f"dt must be a positive number of seconds; got {self.dt!r}.")
        if self.sub_steps < 1 or not 0 < self.damping <= 1 or self.collision_slop < 0:
            raise ValueError(
                "A PlanarEngine needs 1 or more sub_steps, damping above 0 and up to 1, and a collision_slop that is "
                f"not negative; got {self.sub_steps}, {self.damping} and {self.collision_slop}."
            )

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the next state; `action` [n, 2] holds impulses [mass * velocity].

        Raises:
            ValueError: the state is not two-dimensional or lacks what the engine needs, a body lies
                wholly within another or its centre outside the walls, or `action` has another shape.
            ImportError: pymunk is missing.
        """
        _check_planar(state, None if action is None else action.shape)
        after = [self._advance(state, scene, action) for scene in range(state.num_scenes)]
        positions = torch.from_numpy(np.concatenate([space.positions() for space in after])).to(state.positions)
        velocities = (positions - state.positions) / self.dt
        if self.instant:
            velocities = torch.from_numpy(np.concatenate([space.speeds() for space in after])).to(positions)
        made = state.replace(positions=positions, velocities=velocities)
        met = [space.touched for space in after if space.touched is not None]
        return made.replace(influences=torch.from_numpy(np.concatenate(met))) if met else made

    def replay(
        self,
        state: State,
        actions: Tensor | None = None,
        *,
        num_steps: int | None = None,
        interventions: Sequence[Intervention] = (),
        restarts: Collection[int] = (0,),
    ) -> Trajectory:
        """Return an uninterrupted run from `state`, in a fresh space from each frame on that an intervention changed.

        Arguments are those of `rollout`. In an uninterrupted run the engine keeps what `step` loses. A fresh space
        is begun at the frames `restarts`, too, and always at frame 0: what a change at frame t does is the difference
        to a run without it that was restarted there.

        Raises:
            ValueError: as `rollout` and `step` do, or an intervention changes a field that the engine does not read,
                or leaves a body deeper in a wall than it was.
            ImportError: pymunk is missing.
        """
        _check_planar(state, None if actions is None else actions.shape[1:])
        sessions = [_Session(self) for _ in range(state.num_scenes)]
        return _played(self, state, sessions, actions, num_steps, interventions, {0, *restarts})

    def _advance(self, state: State, number: int, action: Tensor | None) -> PlanarSpace:
        scene = state.scene(number).to(torch.float64)
        check_places(scene, running=True)
        space = self._arrive(scene)
        space.step(None if action is None else action[state.batch == number].double().cpu().numpy())
        return space

    def _arrive(self, scene: State) -> PlanarSpace:
        """Return a space that comes from where the bodies were a step ago to where they are."""
        moves = scene.free
        velocities = torch.where(moves[:, None], scene.velocities, 0.0)
        back = 1 if self.instant else self.sub_steps
        span = self.dt * back / self.sub_steps
        before, wanted = scene.positions - span * velocities, scene.positions.cpu().numpy()
        tries: list[tuple[float, PlanarSpace]] = []
        for _ in range(AIMS if back > 1 else 1):
            space = PlanarSpace(scene.replace(positions=before, velocities=velocities), self)
            space.step(num_sub_steps=back)
            miss = wanted - space.positions()
            tries.append((float(np.abs(miss).max()), space))
            if tries[-1][0] <= 1e-13 * np.abs(wanted).max():
                break
            aim = velocities + torch.from_numpy(miss).to(velocities) / span
            velocities = torch.where(moves[:, None], aim, 0.0)
        return min(tries, key=lambda found: found[0])[1]


class PlanarSpace:
    """A pymunk space built from one scene, with all that the engine remembers from step to step."""

    def __init__(self, scene: State, engine: PlanarEngine) -> None:
        self.pymunk = needed("pymunk", "The planar engine", "physics")
        self.engine = engine
        self.space = self.pymunk.Space()
        self.space.damping = engine.damping
        self.space.collision_slop = engine.collision_slop
        if "gravity" in scene:
            self.space.gravity = tuple(scene.gravity[0].tolist())
        self.bodies: list[Body] = []
        self._before: Array = np.zeros((len(scene), 2))
        self.touched: NDArray[np.bool_] | None = None  # [n, m]: who met whom in the last step, where states tell it
        if "influences" in scene:
            self.touched = np.zeros(tuple(scene.influences.shape), dtype=bool)
        fixed = scene.fixed if "fixed" in scene else torch.zeros_like(scene.active)
        self.free = (scene.active & ~fixed).tolist()
        self._add_discs(scene, fixed)
        self._add_walls(scene)
        self._add_springs(scene)

    def _add_discs(self, scene: State, fixed: Tensor) -> None:
        bounce = scene.restitutions if "restitutions" in scene else torch.zeros_like(scene.radii)
        columns = scene.positions, scene.velocities, scene.masses, scene.radii, bounce, fixed, scene.active
        for position, velocity, mass, radius, restitution, stays, active in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            moment = self.pymunk.moment_for_circle(mass, 0, radius) or mass
            body = self.pymunk.Body(body_type=self.pymunk.Body.STATIC) if stays else self.pymunk.Body(mass, moment)
            body.position = tuple(position)
            if not stays:
                body.velocity = tuple(velocity)
            self.bodies.append(body)
            if active:
                self.space.add(body)
                if radius > 0:
                    disc = self.pymunk.Circle(body, radius)
                    disc.elasticity = restitution
                    self.space.add(disc)

    def _add_walls(self, scene: State) -> None:
        """Put four walls round the box, thick enough that no body comes out on their other side."""
        if "boundaries" not in scene:
            return
        (left, bottom), (right, top) = scene.boundaries[0].tolist()
        thick = max(right - left, top - bottom)
        low, high = (left - thick, bottom - thick), (right + thick, top + thick)
        corners = [low, (high[0], low[1]), high, (low[0], high[1]), low]
        for start, end in pairwise(corners):
            wall = self.pymunk.Segment(self.space.static_body, start, end, thick)
            wall.elasticity = 1.0
            self.space.add(wall)

    def _add_springs(self, scene: State) -> None:
        """Join bodies; the order in which joints are added is the order in which the engine solves them."""
        if "springs" not in scene:
            return
        lengths = scene.spring_lengths
        rigid = "spring_stiffnesses" not in scene
        stiffnesses = torch.zeros_like(lengths) if rigid else scene.spring_stiffnesses
        dampings = scene.spring_dampings if "spring_dampings" in scene else torch.zeros_like(lengths)
        columns = scene.springs, lengths, stiffnesses, dampings
        for (a, b), length, stiffness, damping in zip(*(column.tolist() for column in columns), strict=True):
            ends = self.bodies[a], self.bodies[b]
            if not (ends[0].space and ends[1].space):
                continue
            if rigid:
                joint = self.pymunk.PinJoint(*ends, (0, 0), (0, 0))
                joint.distance = length
            else:
                joint = self.pymunk.DampedSpring(*ends, (0, 0), (0, 0), length, stiffness, damping)
            self.space.add(joint)

    def step(self, impulses: Array | None = None, *, num_sub_steps: int | None = None) -> None:
        """Apply impulses [n, 2] to the free bodies, then go on by the engine's `dt`, or fewer of its sub-steps."""
        if impulses is not None:
            for body, free, impulse in zip(self.bodies, self.free, impulses.tolist(), strict=True):
                if free:
                    body.velocity = body.velocity + (impulse[0] / body.mass, impulse[1] / body.mass)
        if self.touched is not None:
            self.touched[:] = False
        for _ in range(num_sub_steps or self.engine.sub_steps):
            self._before = self.positions()
            self.space.step(self.engine.dt / self.engine.sub_steps)
            self._notice()

    def _notice(self) -> None:
        """Note which bodies exert an impulse on each other, through contacts or joints."""
        if self.touched is None:
            return
        numbers = {body.id: number for number, body in enumerate(self.bodies)}

        def met(arbiter: Arbiter, touched: NDArray[np.bool_]) -> None:
            one, other = (numbers.get(shape.body.id) if shape.body else None for shape in arbiter.shapes)
            if one is not None and other is not None and arbiter.total_impulse.length > 0:
                touched[one, other] = touched[other, one] = True

        for body in self.bodies:
            if body.space:
                body.each_arbiter(met, self.touched)
        for joint in self.space.constraints:
            one, other = numbers[joint.a.id], numbers[joint.b.id]
            self.touched[one, other] = self.touched[other, one] = True

    def positions(self) -> Array:
        """Return where the bodies are, [n, 2]."""
        return np.array([tuple(body.position) for body in self.bodies])

    def speeds(self) -> Array:
        """Return the velocities [n, 2] of the last sub-step."""
        return (self.positions() - self._before) / (self.engine.dt / self.engine.sub_steps)


class _Session:
    """The engine at work on one scene; without a `space` one that is yet to be begun."""

    def __init__(self, engine: PlanarEngine, space: PlanarSpace | None = None) -> None:
        self.engine, self.space = engine, space

    def again(self, before: State, changed: State) -> _Session:
        scene = changed.to(torch.float64)
        _check_walls(before.to(torch.float64), scene, self.engine.collision_slop)
        check_places(scene, running=True)
        return _Session(self.engine, self.engine._arrive(scene))

    def advance(self, scene: State, action: Tensor | None) -> State:
        assert self.space is not None
        self.space.step(None if action is None else action.double().numpy(force=True))
        positions = torch.from_numpy(self.space.positions()).to(scene.positions)
        velocities = (positions - scene.positions) / self.engine.dt
        if self.engine.instant:
            velocities = torch.from_numpy(self.space.speeds()).to(positions)
        changes = {
            "positions": positions,
            "velocities": torch.where(scene.active[:, None], velocities, scene.velocities),
        }
        if self.space.touched is not None:
            changes["influences"] = torch.from_numpy(self.space.touched.copy())
        return scene.replace(**changes)


def _played(
    engine: PlanarEngine,
    start: State,
    sessions: Sequence[_Session],
    actions: Tensor | None,
    num_steps: int | None,
    interventions: Sequence[Intervention],
    restarts: Collection[int] = (),
) -> Trajectory:
    return rollout(
        start,
        actions,
        simulator=Remembering(start, sessions, dt=engine.dt, restarts=restarts),
        num_steps=num_steps,
        interventions=heeded(interventions, "PlanarEngine", READS),
    )


def record(
    start: State,
    space: PlanarSpace,
    before: Array,
    impulses: Array | None = None,
    *,
    num_steps: int,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return `num_steps` further steps of a space: frame 0 is as it stands, `before` [n, 2] a step earlier.

    `impulses` is [num_steps, n, 2]. What does not change in time is that of `start`. From a frame on that an
    intervention changes they are those of a fresh space, as in `PlanarEngine.replay`.
    """
    positions, engine = torch.from_numpy(space.positions()), space.engine
    velocities = (
        torch.from_numpy(space.speeds()) if engine.instant else (positions - torch.from_numpy(before)) / engine.dt
    )
    first = start.replace(positions=positions, velocities=velocities)
    if space.touched is not None:
        first = first.replace(influences=torch.from_numpy(space.touched.copy()))
    actions = None if impulses is None else torch.from_numpy(impulses)
    return _played(engine, first, [_Session(engine, space)], actions, num_steps, interventions)


def run(
    start: State,
    engine: PlanarEngine,
    *,
    num_steps: int,
    warm_up_steps: int = 1,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return an uninterrupted run of the engine from one scene, all its memory kept.

    The velocities of `start` are the engine's; frame 0 comes `warm_up_steps` steps later, so that its velocity
    is a position difference like all others. Interventions are those of `record`.

    Raises:
        ValueError: bodies overlap or lie outside the walls, or a count is too small.
        ImportError: pymunk is missing.
    """
    if num_steps < 0 or warm_up_steps < 1:
        raise ValueError(f"A run needs num_steps >= 0 and warm_up_steps >= 1; got {num_steps} and {warm_up_steps}.")
    check_places(start)
    space = PlanarSpace(start, engine)
    for _ in range(warm_up_steps):
        before = space.positions()
        space.step()
    return record(start, space, before, num_steps=num_steps, interventions=interventions)


def _check_planar(state: State, rows: Sequence[int] | None) -> None:
    """Raise a ValueError if positions or actions, of which a step's are of shape `rows`, are not in the plane."""
    if state.positions.shape[1] != 2:
        raise ValueError(f"PlanarEngine works in the plane, on positions [n, 2]; got {list(state.positions.shape)}.")
    if rows is not None and list(rows) != list(state.positions.shape):
        raise ValueError(f"PlanarEngine takes impulses {list(state.positions.shape)}; got {list(rows)}.")


def check_places(scene: State, *, running: bool = False) -> None:
    """Raise a ValueError that names bodies which overlap or lie outside the walls, and what the engine misses.

    A running engine lets bodies overlap: then only a body wholly within another, or a centre outside, is refused.
    """
    for name in ("masses", "radii"):
        if name not in scene:
            raise ValueError(f"PlanarEngine needs {name} of the bodies; give them with state.replace({name}=...).")
    if "springs" in scene and "spring_lengths" not in scene:
        raise ValueError("PlanarEngine needs spring_lengths with springs; give them with state.replace(...).")
    radii = scene.radii
    solid = scene.active & (radii > 0)
    gaps = torch.cdist(scene.positions, scene.positions, compute_mode="donot_use_mm_for_euclid_dist")
    tolerance = 1e-6 * float(radii.max())
    least = (radii[:, None] - radii).abs() + tolerance if running else radii[:, None] + radii - tolerance
    wrong = (gaps < least) & solid[:, None] & solid
    wrong &= ~torch.eye(len(scene), dtype=torch.bool, device=scene.device)
    if "fixed" in scene:
        wrong &= ~(scene.fixed[:, None] & scene.fixed)
    if bool(wrong.any()):
        a, b = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"Bodies {a} and {b} overlap: their centres are {float(gaps[a, b]):.4g} apart, their radii "
            f"{float(radii[a]):.4g} and {float(radii[b]):.4g}. Move them apart or make them smaller."
        )
    if "boundaries" not in scene:
        return
    lower, upper = scene.boundaries[0]
    room = 0.0 if running else (radii - tolerance)[:, None]
    outside = ((scene.positions < lower + room) | (scene.positions > upper - room)).any(1) & scene.active
    if bool(outside.any()):
        body = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"Body {body} of radius {float(radii[body]):.4g} at {scene.positions[body].tolist()} is not inside the "
            f"walls, {lower.tolist()} to {upper.tolist()}. Move it inside or widen the boundaries."
        )


def _check_walls(before: State, changed: State, slop: float) -> None:
    """Raise a ValueError that says how deep a change put a body into a wall."""
    if "boundaries" not in changed or "boundaries" not in before:
        return
    depths = [torch.where(scene.active, _sunk(scene), 0.0).clamp(min=0) for scene in (before, changed)]
    if bool((depths[1] - depths[0] > slop).any()):
        body = int((depths[1] - depths[0]).argmax())
        raise ValueError(
            f"An intervention leaves body {body} {float(depths[1][body]):.4g} deep in a wall; move it off."
        )


def _sunk(scene: State) -> Tensor:
    """Return how deep bodies [n] are in a wall, negative where they are off it."""
    lower, upper = scene.boundaries[0]
    return torch.maximum(lower - scene.positions, scene.positions - upper).amax(1) + scene.radii
