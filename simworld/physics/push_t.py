"""A block in the shape of a T that a disc pushes about, on the rigid-body engine Chipmunk through pymunk.

The constants are those of gym-pusht 0.1.8 (https://github.com/huggingface/gym-pusht), the task of Chi et al. 2023
(arXiv 2303.04137), where a frame is 512 pixels wide. Here lengths are in widths of the frame, y goes up; times in s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.extras import needed
from simworld.physics.replay import Remembering, heeded
from simworld.physics.video_worlds import HUES, FramedState
from simworld.simulate import Intervention, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

if TYPE_CHECKING:
    from pymunk import Arbiter, Body

BLOCK, DISC = 0, 1  # object types
ACTION_UNIT = "frame widths"
WIDTH = 512.0  # pixels of a frame, in which the engine reckons
DT, SUB_STEPS = 0.1, 10  # s between actions, and the engine's steps in that time
PULL, BRAKE = 100.0, 20.0  # 1/s² and 1/s: how the disc is drawn to its target
RADIUS, WALLS = 15.0, (7.0, 504.0)  # pixels
BAR, STEM = (0.0, 15.0, 60.0, 15.0), (0.0, 75.0, 15.0, 45.0)  # pixels: centre and half sides, from the bar's edge
CENTRE = 45.0  # pixels from there to the centre of mass, which is put midway between those of bar and stem
MOMENT = 3000.0  # pixels²: moment of inertia per mass
MIDDLE, ASIDE, THROUGH, REACH = 256.0, 105.0, (0.0, 60.0), 160.0  # pixels: of the script's targets, as `_Script` says
ASTRAY = 40.0  # pixels by which pushes miss, standard deviation, so that they turn the T
ROOM, PUSHING = (30.0, 482.0), (110.0, 402.0)  # pixels: where targets lie, and those of pushes, which crush nothing
ROUND, ABOUT = math.radians(50), math.radians(25)  # by which the disc goes round the T at once; near enough
HELD, STARTS = {False: (3, 4), True: (4, 9)}, 1000
Array = NDArray[np.float64]
MOVING = ("positions", "velocities", "quats", "angular_velocities")
READS = (*MOVING, "masses", "radii", "outlines", "object_types", "boundaries", "active")


class PushTEngine:
    """Steps a disc that goes to its targets, and blocks that it pushes.

    An action [b, 2] is the target of each scene's disc, which nothing holds up: it is accelerated by
    100 (target - place) - 20 velocity and pushes what is in its way. Without an action it is drawn to where it is.
    Blocks are bodies of the boxes in `outlines`, without friction or bounce, that stand still as soon as nothing pushes
    them; `boundaries` are walls to them. Their moment of inertia is that of the T per mass. Velocities are those with
    which the engine goes on. What it remembers from step to step beyond states is how fast it was parting bodies that
    overlapped.
    """

    dt = DT

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the next state; `action` [b, 2] holds targets [frame widths].

        Raises:
            ValueError: the state lacks a field, a scene has not one disc, or `action` has another shape.
            ImportError: pymunk is missing.
        """
        _check(state, action)
        sessions = [_Session(_Space(state.scene(k))) for k in range(state.num_scenes)]
        return Remembering(state, sessions, dt=self.dt).step(state, action)

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

        Arguments are those of `rollout`. A fresh space is begun at the frames `restarts`, too, and always at frame 0.

        Raises:
            ValueError: as `rollout` and `step` do, or an intervention changes a field that the engine does not read.
            ImportError: pymunk is missing.
        """
        _check(state, None if actions is None or not len(actions) else actions[0])
        sessions = [_Session(None) for _ in range(state.num_scenes)]
        return rollout(
            state,
            actions,
            simulator=Remembering(state, sessions, dt=self.dt, restarts={0, *restarts}),
            num_steps=num_steps,
            interventions=heeded(interventions, "PushTEngine", READS),
        )


class _Session:
    """The engine at work on one scene; without a `space` one that is yet to be begun."""

    def __init__(self, space: _Space | None) -> None:
        self.space = space

    def again(self, before: State, changed: State) -> _Session:
        _check(changed, None)
        return _Session(_Space(changed))

    def advance(self, scene: State, action: Tensor | None) -> State:
        assert self.space is not None
        self.space.step(None if action is None else action[0].double().numpy(force=True) * WIDTH)
        found = {name: torch.from_numpy(value).to(scene.positions) for name, value in self.space.values().items()}
        # What is not there keeps its values.
        there = scene.active[:, None]
        changes = {name: torch.where(there, value, scene[name]) for name, value in found.items()}
        if "influences" in scene:
            changes["influences"] = torch.from_numpy(self.space.pushed[:, : scene.influences.shape[1]].copy())
        return scene.replace(**changes)


class _Space:
    """A pymunk space built from one scene, in pixels."""

    def __init__(self, scene: State) -> None:
        self.pymunk = needed("pymunk", "The engine of the pushed T", "physics")
        self.space = self.pymunk.Space()
        self.space.damping = 0.0
        self.bodies: list[Body] = []
        columns = max(len(scene), int(scene.influences.shape[1]) if "influences" in scene else 0)
        self.pushed = np.zeros((len(scene), columns), dtype=bool)
        self._add_walls(scene)
        self.discs = (scene.object_types == DISC).tolist()
        for number, active in enumerate(scene.active.tolist()):
            body, shapes = self._disc(scene, number) if self.discs[number] else self._block(scene, number)
            self.bodies.append(body)
            if active:
                self.space.add(body, *shapes)

    def _disc(self, scene: State, number: int) -> tuple[Body, list[Any]]:
        body = self.pymunk.Body(body_type=self.pymunk.Body.KINEMATIC)
        body.position = tuple((scene.positions[number].double() * WIDTH).tolist())
        body.velocity = tuple((scene.velocities[number].double() * WIDTH).tolist())
        return body, [self.pymunk.Circle(body, float(scene.radii[number]) * WIDTH)]

    def _block(self, scene: State, number: int) -> tuple[Body, list[Any]]:
        mass = float(scene.masses[number])
        body = self.pymunk.Body(mass, mass * MOMENT)
        body.position = tuple((scene.positions[number].double() * WIDTH).tolist())
        body.velocity = tuple((scene.velocities[number].double() * WIDTH).tolist())
        w, _, _, z = scene.quats[number].double().tolist()
        body.angle, body.angular_velocity = 2 * math.atan2(z, w), float(scene.angular_velocities[number, 2])
        boxes = (scene.outlines[number].double() * WIDTH).tolist()
        return body, [self.pymunk.Poly(body, _corners(*box)) for box in boxes if min(box[2:]) > 0]

    def _add_walls(self, scene: State) -> None:
        """Put four walls round the box, thick enough that no block comes out on their other side."""
        if "boundaries" not in scene:
            return
        (left, bottom), (right, top) = (scene.boundaries[0].double() * WIDTH).tolist()
        thick = WIDTH / 4
        low, high = (left - thick, bottom - thick), (right + thick, top + thick)
        corners = [low, (high[0], low[1]), high, (low[0], high[1])]
        for k, corner in enumerate(corners):
            self.space.add(self.pymunk.Segment(self.space.static_body, corner, corners[(k + 1) % 4], thick))

    def step(self, target: Array | None) -> None:
        """Go on by one action: draw discs to the target [2] (pixels) in each of the engine's steps."""
        self.pushed[:] = False
        goals = [body.position if target is None else self.pymunk.Vec2d(*target.tolist()) for body in self.bodies]
        step = DT / SUB_STEPS
        for _ in range(SUB_STEPS):
            for body, goal, disc in zip(self.bodies, goals, self.discs, strict=True):
                if disc:
                    body.velocity += (PULL * (goal - body.position) - BRAKE * body.velocity) * step
            self.space.step(step)
            self._notice()

    def _notice(self) -> None:
        """Note who pushes whom: nothing pushes discs, which go where they are drawn."""
        numbers = {body.id: number for number, body in enumerate(self.bodies)}

        def met(arbiter: Arbiter, pushed: NDArray[np.bool_]) -> None:
            pair = [numbers.get(shape.body.id) if shape.body else None for shape in arbiter.shapes]
            if arbiter.total_impulse.length > 0:
                for one, other in (pair, pair[::-1]):
                    if one is not None and other is not None and not self.discs[one]:
                        pushed[one, other] = True

        for body in self.bodies:
            if body.space:
                body.each_arbiter(met, self.pushed)

    def values(self) -> dict[str, Array]:
        """Return what moves, in frame widths, a row per body."""
        half = np.array([body.angle for body in self.bodies]) / 2
        zeros = np.zeros(len(half))
        turning = np.array(
            [0.0 if disc else b.angular_velocity for b, disc in zip(self.bodies, self.discs, strict=True)]
        )
        return {
            "positions": np.array([tuple(body.position) for body in self.bodies]) / WIDTH,
            "velocities": np.array([tuple(body.velocity) for body in self.bodies]) / WIDTH,
            "quats": np.stack([np.cos(half), zeros, zeros, np.sin(half)], 1),
            "angular_velocities": np.stack([zeros, zeros, turning], 1),
        }


def push_t(seed: Sequence[int], *, num_steps: int = 49, interventions: Sequence[Intervention] = ()) -> Trajectory:
    """Return one seeded episode: entity 0 is the disc, 1 the T; actions [num_steps, 1, 2] are the disc's targets.

    Places are drawn as gym-pusht draws them, until nothing overlaps. Targets come from a script, by which the disc goes
    round the T to a side of it and pushes it from there, over and over. The same seed with `interventions` has the same
    start and targets, changed as in `PushTEngine.replay`.

    Raises:
        ValueError: a count is negative, or an intervention cannot be heeded.
        ImportError: pymunk is missing.
    """
    if num_steps < 0:
        raise ValueError(f"An episode has no negative number of steps; got {num_steps=}.")
    script, start = _Script(np.random.default_rng([*seed, 0])), _start(np.random.default_rng([*seed, 1]))
    space, targets = _Space(start), np.zeros((num_steps, 1, 2))
    for t in range(num_steps):
        disc, block = (np.array(tuple(body.position)) for body in space.bodies)
        target = script(disc, block)
        targets[t, 0] = target / WIDTH
        space.step(target)
    actions = torch.from_numpy(targets)
    return PushTEngine().replay(start, actions, num_steps=num_steps, interventions=interventions)


def push_t_state(disc: Tensor, block: Tensor, angle: float) -> State:
    """Return a scene at rest: places [2] of the disc and of the T's centre of mass [frame widths], and the T's turn.

    At `angle` 0 [rad] the bar is below and the stem points up. gym-pusht gives the place of the middle of the bar's
    lower edge instead, 45 pixels from the centre of mass.
    """
    positions = torch.stack([disc, block]).double()
    outlines = torch.tensor([[BAR, STEM], [(0.0,) * 4] * 2], dtype=torch.float64).flip(0)
    outlines[1, :, 1] -= CENTRE
    reach = math.hypot(BAR[2], CENTRE)
    turned = [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)]
    return FramedState(
        positions=positions,
        velocities=torch.zeros_like(positions),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0], turned], dtype=torch.float64),
        angular_velocities=torch.zeros(2, 3, dtype=torch.float64),
        masses=torch.ones(2, dtype=torch.float64),
        radii=torch.tensor([RADIUS, max(reach, 120.0 - CENTRE)], dtype=torch.float64) / WIDTH,
        outlines=outlines / WIDTH,
        object_types=torch.tensor([DISC, BLOCK]),
        colors=torch.tensor([HUES[3], HUES[5]], dtype=torch.float64),
        influences=torch.zeros(2, 2, dtype=torch.bool),
        boundaries=torch.tensor([[[low] * 2 for low in WALLS]], dtype=torch.float64) / WIDTH,
    )


def _start(rng: np.random.Generator) -> State:
    """Return disc and T at random, until they touch neither each other nor the walls."""
    for _ in range(STARTS):
        disc, edge = rng.uniform(50, 450, 2), rng.uniform(100, 400, 2)
        angle = float(rng.uniform(-np.pi, np.pi))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        away = (disc - edge) @ turn
        gaps = [np.linalg.norm(np.maximum(np.abs(away - box[:2]) - box[2:], 0)) for box in (BAR, STEM)]
        corners = np.array([corner for box in (BAR, STEM) for corner in _corners(*box)]) @ turn.T + edge
        if min(gaps) > RADIUS and corners.min() > WALLS[0] and corners.max() < WALLS[1]:
            centre = edge + turn @ [0.0, CENTRE]
            return push_t_state(torch.from_numpy(disc / WIDTH), torch.from_numpy(centre / WIDTH), angle)
    raise ValueError(f"Disc and T found no room in {STARTS} tries; give another seed.")


class _Script:
    """Targets of the disc, in pixels: round the T to a side of it, rather its outer one, and from there through it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.target, self.left = rng, np.zeros(2), 0
        self.side: float | None = None

    def __call__(self, disc: Array, block: Array) -> Array:
        """Return the target [2] of the next step, from where the disc is and where the T."""
        if not self.left:
            pushes, self.target = self._draw(disc, block)
            self.left = int(self.rng.integers(*HELD[pushes]))
        self.left -= 1
        return self.target

    def _draw(self, disc: Array, block: Array) -> tuple[bool, Array]:
        if self.side is None:
            outer = (block - MIDDLE) / (MIDDLE / 3) + self.rng.normal(0, 1, 2)
            self.side = math.atan2(outer[1], outer[0])
        here = math.atan2(*(disc - block)[::-1])
        missing = math.remainder(self.side - here, 2 * math.pi)
        pushes = abs(missing) < ABOUT
        turn = here + (0.0 if pushes else math.copysign(min(abs(missing), ROUND), missing))
        far = -self.rng.uniform(*THROUGH) if pushes else ASIDE
        ahead = block + far * np.array([math.cos(turn), math.sin(turn)]) - disc
        if pushes:
            self.side, ahead = None, ahead + self.rng.normal(0, ASTRAY, 2)
        aimed = disc + ahead * min(1.0, REACH / max(float(np.linalg.norm(ahead)), 1e-9))
        return pushes, np.asarray(aimed.clip(*(PUSHING if pushes else ROOM)))


def _corners(x: float, y: float, across: float, up: float) -> list[tuple[float, float]]:
    return [(x - across, y - up), (x + across, y - up), (x + across, y + up), (x - across, y + up)]


def _check(state: State, action: Tensor | None) -> None:
    wanted = ("quats", "angular_velocities", "masses", "radii", "outlines", "object_types")
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"PushTEngine needs {', '.join(missing)} of the bodies; make states with push_t_state.")
    if state.positions.shape[1] != 2:
        raise ValueError(f"PushTEngine works in the plane, on positions [n, 2]; got {list(state.positions.shape)}.")
    if bool((state.quats[state.active, 1:3].abs() > 1e-6).any()):
        raise ValueError("PushTEngine turns bodies in the plane: quats must be (w, 0, 0, z); the state has others.")
    discs = torch.bincount(state.batch[state.object_types == DISC], minlength=state.num_scenes)
    if bool((discs != 1).any()):
        raise ValueError(f"PushTEngine steers one disc (object_types 1) in each scene; got {discs.tolist()}.")
    if bool(((state.object_types == BLOCK) & ~(state.outlines[..., 2:] > 0).all(-1).any(1)).any()):
        raise ValueError("PushTEngine pushes blocks made of boxes; give each block outlines with half sides above 0.")
    if action is not None and tuple(action.shape) != (state.num_scenes, 2):
        raise ValueError(
            f"PushTEngine takes targets [{state.num_scenes}, 2], one for each scene's disc; got {list(action.shape)}."
        )
