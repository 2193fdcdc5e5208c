"""Boxes and balls on a table, pushed: rigid bodies in space, on the engine MuJoCo.

Lengths in metres, masses in kilograms, time in seconds; the table is the plane z = 0. Quaternions are
(w, x, y, z), angular velocities in the world's axes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.extras import needed
from simworld.kinds import ObjectState
from simworld.physics.replay import Remembering, heeded
from simworld.simulate import Intervention, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

BOX, BALL = 0, 1
ACTION_UNIT = "N"
GRAVITY = 9.81
DT, TIME_STEP = 0.02, 0.001
DEEP = 1.0  # overlap, in smallest half extents, that not even the fastest hit explains
ATTEMPTS = 2_000
Array = NDArray[np.float64]
SUNK = 0.1  # overlap, in smallest half extents, that an intervention may not add
MOVING = ("positions", "quats", "velocities", "angular_velocities")
STATIC = ("masses", "half_extents", "radii", "object_types", "frictions", "fixed", "gravity", "batch", "active")
READS = (*MOVING, *("masses", "half_extents", "object_types", "frictions", "fixed", "gravity", "active"))


class PushEngine:
    """Steps boxes and balls that rest, slide, roll and tip on the table z = 0 and hit each other.

    An action [n, 3] is a force [N] on each body's centre of mass, held for the step. Velocities are the
    engine's own at the frame, so that nothing but its solver's first guess is lost by restarting it there.
    Contacts are MuJoCo's own (soft, time constant 20 ms, critically damped: hardly any bounce) with Coulomb
    friction in an elliptic cone; the coefficient of two bodies is the larger of theirs, on the table the
    body's own. There is no rolling friction. `time_step` [s] is the engine's, within `dt`.
    """

    def __init__(self, dt: float = DT, *, time_step: float = TIME_STEP) -> None:
        self._sub_steps = round(dt / time_step) if 0 < time_step <= dt < np.inf else 0
        if not self._sub_steps or abs(self._sub_steps * time_step - dt) > 1e-9 * dt:
            raise ValueError(f"dt must be a positive whole multiple of time_step; got dt={dt} and {time_step=}.")
        self._dt, self._time_step = dt, time_step

    @property
    def dt(self) -> float:
        """Seconds that one step covers."""
        return self._dt

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the next state; `action` [n, 3] holds forces [N].

        Raises:
            ValueError: the state lacks a field, bodies overlap or are in the table, or `action` has another shape.
            ImportError: mujoco is missing.
        """
        _check(state, action)
        worlds = state.derived(f"push.{self._time_step}", STATIC, lambda s: _worlds(s, self._time_step))
        values = _pack(state)
        after, met = [], []
        for number, world in enumerate(worlds):
            here = (state.batch == number).numpy(force=True)
            forces = np.zeros((len(world), 3)) if action is None else action[here].double().numpy(force=True)
            run = _Run(world, values[here], _columns(state))
            run.check()
            run.advance(forces, self._sub_steps)
            after.append(run.values())
            met.append(run.touched)
        return _unpack(state, np.concatenate(after), np.concatenate(met))

    def replay(
        self,
        state: State,
        actions: Tensor | None = None,
        *,
        num_steps: int | None = None,
        interventions: Sequence[Intervention] = (),
        restarts: Collection[int] = (0,),
    ) -> Trajectory:
        """Return an uninterrupted run from `state`, of a fresh engine from each frame on that an intervention changed.

        Arguments, and what `restarts` are for, are those of `PlanarEngine.replay`.

        Raises:
            ValueError: as `rollout` and `step` do, or an intervention changes a field that the engine does not read,
                or leaves bodies deeper in each other or in the table than they were.
            ImportError: mujoco is missing.
        """
        _check(state, None if actions is None or not len(actions) else actions[0])
        sessions = [_Session(self._time_step, self._sub_steps) for _ in range(state.num_scenes)]
        simulator = Remembering(state, sessions, dt=self.dt, restarts={0, *restarts})
        changes = heeded(interventions, "PushEngine", READS)
        return rollout(state, actions, simulator=simulator, num_steps=num_steps, interventions=changes)


class _Session:
    """The engine at work on one scene; without a `run` one that is yet to be begun."""

    def __init__(self, time_step: float, sub_steps: int, run: _Run | None = None) -> None:
        self.time_step, self.sub_steps, self.run = time_step, sub_steps, run

    def again(self, before: State, changed: State) -> _Session:
        _check(changed, None)
        run = _Run(_world(changed, self.time_step), _pack(changed), _columns(changed))
        run.check()
        if not changed.identical(before):
            run.check_apart(_Run(_world(before, self.time_step), _pack(before)).depths())
        return _Session(self.time_step, self.sub_steps, run)

    def advance(self, scene: State, action: Tensor | None) -> State:
        assert self.run is not None
        forces = np.zeros((len(scene), 3)) if action is None else action.double().numpy(force=True)
        self.run.advance(forces, self.sub_steps)
        return _unpack(scene, self.run.values(), self.run.touched)


def push_episode(
    seed: Sequence[int],
    *,
    num_steps: int = 100,
    num_bodies: int | None = None,
    dt: float = DT,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of the table, `num_steps` + 1 frames of float64; 3 to 6 bodies if not said.

    The same seed with `interventions` has the same start and pushes, changed as in `PushEngine.replay`; pushes aim at
    where bodies are as they begin, so they are those of the episode itself.

    Raises:
        ValueError: a count is negative or too large for the table, or an intervention cannot be heeded.
        ImportError: mujoco is missing.
    """
    if num_steps < 0 or (num_bodies is not None and num_bodies < 1):
        raise ValueError(f"An episode needs 1 or more bodies and no negative steps; got {num_bodies=}, {num_steps=}.")
    engine, rng = PushEngine(dt), np.random.default_rng(list(seed))
    start = _start(rng, num_bodies or int(rng.integers(3, 7)))
    path = _record(engine, start, num_steps, _Pusher(rng, start, dt))
    return (
        engine.replay(start, path.actions, num_steps=num_steps, interventions=interventions) if interventions else path
    )


def push_state(
    positions: Tensor,
    *,
    half_extents: Tensor,
    masses: Tensor,
    frictions: Tensor,
    object_types: Tensor,
    quats: Tensor | None = None,
    velocities: Tensor | None = None,
    angular_velocities: Tensor | None = None,
    gravity: float = GRAVITY,
) -> State:
    """Return one scene of the table: n bodies, upright and at rest unless told otherwise.

    A ball's half extents [n, 3] are its radius, three times; `radii` become those of the smallest ball
    round each body. `object_types` are 0 for boxes and 1 for balls.
    """
    upright = torch.zeros_like(positions[:, :1]).expand(-1, 4).clone()
    upright[:, 0] = 1
    balls = object_types == BALL
    return ObjectState(
        positions=positions,
        velocities=torch.zeros_like(positions) if velocities is None else velocities,
        quats=upright if quats is None else quats,
        angular_velocities=torch.zeros_like(positions) if angular_velocities is None else angular_velocities,
        masses=masses,
        half_extents=half_extents,
        radii=torch.where(balls, half_extents[:, 0], half_extents.norm(dim=1)),
        frictions=frictions,
        object_types=object_types,
        gravity=positions.new_tensor([[0.0, 0.0, -gravity]]),
    )


def rotation_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the angles [...] in degrees, 0 to 180, between orientations given as unit quaternions [..., 4]."""
    p, t = predicted.double(), target.double()
    # The sine of half the angle from the difference: the cosine alone would lose small angles.
    opposite = (p * t).sum(-1, keepdim=True) < 0
    t = torch.where(opposite, -t, t)
    return 4 * torch.atan2((p - t).norm(dim=-1), (p + t).norm(dim=-1)).rad2deg()


def _check(state: State, action: Tensor | None) -> None:
    needed = ("quats", "angular_velocities", "masses", "half_extents", "frictions", "object_types", "gravity")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"PushEngine steps rigid bodies and needs {', '.join(missing)}; make states with push_state.")
    if state.positions.shape[1] != 3:
        raise ValueError(f"PushEngine works in space, on positions [n, 3]; got {list(state.positions.shape)}.")
    if not bool(((state.object_types == BOX) | (state.object_types == BALL)).all()):
        raise ValueError("PushEngine knows object_types 0 (box) and 1 (ball); the state has others.")
    if action is not None and action.shape != state.positions.shape:
        raise ValueError(
            f"PushEngine takes forces {list(state.positions.shape)}, a row per body; got {list(action.shape)}."
        )


def _pack(state: State) -> Array:
    """Return positions, quats, velocities and angular velocities as rows of 13 numbers."""
    parts = (state.positions, state.quats, state.velocities, state.angular_velocities)
    return torch.cat([part.detach().double() for part in parts], 1).numpy(force=True)


def _columns(state: State) -> int:
    """Return how many columns `influences` have, none where the state has no such field."""
    return int(state["influences"].shape[1]) if "influences" in state else 0


def _unpack(state: State, values: Array, touched: NDArray[np.bool_]) -> State:
    changes = _named(torch.from_numpy(values).to(state.positions))
    if "influences" in state:
        changes["influences"] = torch.from_numpy(touched.copy()).to(state.device)
    return state.replace(**changes)


def _named(rows: Tensor) -> dict[str, Tensor]:
    return dict(zip(MOVING, torch.split(rows, [3, 4, 3, 3], dim=-1), strict=True))


@dataclass(frozen=True)
class _World:
    """One scene as the engine knows it: its model, and which entity each of its moving bodies is."""

    model: Any
    movers: NDArray[np.int64]
    bodies: NDArray[np.int64]
    smallest: Array

    def __len__(self) -> int:
        return len(self.smallest)


def _worlds(state: State, time_step: float) -> list[_World]:
    return [_world(state.scene(number), time_step) for number in range(state.num_scenes)]


def _world(scene: State, time_step: float) -> _World:
    mujoco = needed("mujoco", "The push engine", "physics")
    fixed = scene.fixed if "fixed" in scene else torch.zeros_like(scene.active)
    if bool((fixed & scene.active).any()):
        raise ValueError("PushEngine moves every body; remove fixed ones (active=False) or make them very heavy.")
    extents = scene.half_extents.double().numpy(force=True)
    movers = scene.active.nonzero()[:, 0].numpy(force=True)
    bodies = []
    for k in movers.tolist():
        box = int(scene.object_types[k]) == BOX
        mass, friction = float(scene.masses[k]), float(scene.frictions[k])
        size = " ".join(map(repr, extents[k].tolist())) if box else repr(float(extents[k, 0]))
        bodies.append(
            f'<body name="b{k}"><freejoint/><geom type="{"box" if box else "sphere"}" size="{size}" '
            f'mass="{mass!r}" friction="{friction!r} 0 0"/></body>'
        )
    gravity = " ".join(map(repr, scene.gravity[0].double().tolist()))
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><option timestep="{time_step!r}" gravity="{gravity}" cone="elliptic" impratio="10"/><worldbody>'
        f'<geom type="plane" size="1 1 1" friction="0 0 0"/>{"".join(bodies)}</worldbody></mujoco>'
    )
    # Body 0 is the world; the others follow in the order in which they were written.
    return _World(model, movers, np.arange(1, len(movers) + 1), extents.min(1))


class _Run:
    """The engine at work on one scene, from given rows of 13 numbers on.

    `touched` [n, columns] tells which bodies pressed on which in the last `advance`; without columns it is not told.
    """

    def __init__(self, world: _World, values: Array, columns: int = 0) -> None:
        mujoco = needed("mujoco", "The push engine", "physics")
        self.world, self.start = world, values
        self.touched = np.zeros((len(values), columns), dtype=bool)
        self.data = mujoco.MjData(world.model)
        moving = values[world.movers]
        self.data.qpos[:] = moving[:, :7].reshape(-1)
        spin = _turn(moving[:, 3:7], moving[:, 10:], back=True)
        self.data.qvel[:] = np.concatenate([moving[:, 7:10], spin], 1).reshape(-1)

    def depths(self) -> dict[tuple[int, ...], float]:
        """Return by how much two bodies overlap, or one is below the table, by their numbers."""
        mujoco = needed("mujoco", "The push engine", "physics")
        mujoco.mj_fwdPosition(self.world.model, self.data)
        found: dict[tuple[int, ...], float] = {}
        for contact in self.data.contact:
            names = tuple(int(self.world.movers[int(g) - 1]) for g in contact.geom if g > 0)
            found[names] = max(found.get(names, 0.0), float(-contact.dist))
        return found

    def check(self) -> None:
        """Raise a ValueError if bodies overlap, or are in the table, deeper than contacts go."""
        self._check_depths({}, DEEP)

    def check_apart(self, before: Mapping[tuple[int, ...], float]) -> None:
        """Raise a ValueError if bodies overlap, or are in the table, by more than `before`."""
        self._check_depths(before, SUNK)

    def _check_depths(self, before: Mapping[tuple[int, ...], float], share: float) -> None:
        for names, depth in self.depths().items():
            if depth - before.get(names, 0.0) > share * min(self.world.smallest[k] for k in names):
                what = f"Bodies {names[0]} and {names[1]} overlap" if len(names) == 2 else f"Body {names[0]} is"
                way = "" if len(names) == 2 else " below the table z = 0"
                raise ValueError(f"{what}{way} by {depth:.3g} m; move them apart before the first step.")

    def advance(self, forces: Array, sub_steps: int) -> None:
        self.data.xfrc_applied[self.world.bodies, :3] = forces[self.world.movers]
        mj_step = needed("mujoco", "The push engine", "physics").mj_step
        if not self.touched.shape[1]:
            mj_step(self.world.model, self.data, sub_steps)
            return
        self.touched[:] = False
        for _ in range(sub_steps):
            mj_step(self.world.model, self.data)
            self._notice()

    def _notice(self) -> None:
        """Note which bodies pressed on each other in the engine's last step."""
        contact = self.data.contact
        geoms, rows = contact.geom, contact.efc_address
        between = (geoms > 0).all(1) & (rows >= 0)
        between[between] = self.data.efc_force[rows[between]] > 0
        one, other = self.world.movers[geoms[between] - 1].T
        self.touched[one, other] = self.touched[other, one] = True

    def values(self) -> Array:
        """Return the rows of all entities, moved or not."""
        rows = self.start.copy()
        places = self.data.qpos.reshape(-1, 7)
        speeds = self.data.qvel.reshape(-1, 6)
        quats = places[:, 3:] / np.linalg.norm(places[:, 3:], axis=1, keepdims=True)
        spin = _turn(quats, speeds[:, 3:])
        rows[self.world.movers] = np.concatenate([places[:, :3], quats, speeds[:, :3], spin], 1)
        return rows


def _turn(quats: Array, vectors: Array, *, back: bool = False) -> Array:
    """Return vectors [n, 3] in body axes turned into the world's, or back."""
    real, imaginary = quats[:, :1], quats[:, 1:] * (-1 if back else 1)
    once = 2 * np.cross(imaginary, vectors)
    return np.asarray(vectors + real * once + np.cross(imaginary, once))


def _record(engine: PushEngine, start: State, num_steps: int, pusher: _Pusher) -> Trajectory:
    """Return the episode whose pushes are drawn as it goes on."""
    run = _Run(_world(start, engine._time_step), _pack(start))
    path, actions = [_pack(start)], np.zeros((num_steps, len(start), 3))
    for t in range(num_steps):
        actions[t] = pusher(t, path[-1])
        run.advance(actions[t], engine._sub_steps)
        path.append(run.values())
    return Trajectory(
        initial=start,
        frames=_named(torch.from_numpy(np.stack(path))),
        active=start.active.expand(num_steps + 1, -1).clone(),
        dt=engine.dt,
        actions=torch.from_numpy(actions),
    )


class _Pusher:
    """Pushes along the table, each swelling and fading as half a sine, towards others or the middle."""

    def __init__(self, rng: np.random.Generator, start: State, dt: float) -> None:
        self.rng, self.dt = rng, dt
        self.masses, self.balls = start.masses.numpy(), (start.object_types == BALL).numpy()
        count = len(start)
        self.begins, self.lasts = rng.uniform(0, 0.2, count), np.zeros(count)
        self.pushes = np.zeros((count, 3))

    def __call__(self, t: int, rows: Array) -> Array:
        """Return the forces [n, 3] of the step from frame t, where bodies stand as in `rows`."""
        now = (t + 0.5) * self.dt
        for k in np.nonzero(now > self.begins + self.lasts)[0].tolist():
            if self.lasts[k] > 0:
                self.begins[k], self.lasts[k] = now + self.rng.exponential(0.15), 0.0
            if now >= self.begins[k]:
                self.begins[k], self.lasts[k] = now, self.rng.uniform(0.15, 0.5)
                self.pushes[k] = self._draw(k, rows)
        phase = (now - self.begins) / np.maximum(self.lasts, 1e-9)
        running = (phase >= 0) & (phase < 1) & (self.lasts > 0)
        return np.asarray(self.pushes * np.where(running, np.sin(np.pi * phase), 0.0)[:, None])

    def _draw(self, k: int, rows: Array) -> Array:
        others = [j for j in range(len(rows)) if j != k]
        aimed = self.rng.random() < 0.7
        place = rows[self.rng.choice(others), :2] if others and aimed else np.zeros(2)
        place = place + self.rng.normal(0, 0.05 if aimed else 0.15, 2)
        ahead = place - rows[k, :2] - (0.3 * rows[k, 7:9] if self.balls[k] else 0.0)
        strength = self.rng.uniform(1, 4) if self.balls[k] else self.rng.uniform(4, 14)
        direction = ahead / max(float(np.linalg.norm(ahead)), 1e-9)
        return np.array([*direction * strength * self.masses[k], 0.0])


def _start(rng: np.random.Generator, count: int) -> State:
    """Stand boxes and balls on the table, in a square of 0.5 m, where they do not touch."""
    types = rng.choice([BOX, BALL], count, p=[0.65, 0.35])
    extents = rng.uniform(0.03, 0.07, (count, 3))
    extents[types == BALL] = rng.uniform(0.03, 0.06, (int((types == BALL).sum()), 1))
    reach = np.where(types == BALL, extents[:, 0], np.linalg.norm(extents[:, :2], axis=1))
    for _ in range(ATTEMPTS):
        places = rng.uniform(-0.25, 0.25, (count, 2))
        gaps = np.linalg.norm(places[:, None] - places, axis=-1) - reach - reach[:, None]
        if (gaps[np.triu_indices(count, 1)] > 0.005).all():
            break
    else:
        raise ValueError(f"{count} bodies found no room on the table; ask for fewer.")
    angles = rng.uniform(-np.pi, np.pi, count) / 2
    zeros = np.zeros(count)
    return push_state(
        torch.from_numpy(np.column_stack([places, extents[:, 2]])),
        half_extents=torch.from_numpy(extents),
        masses=torch.from_numpy(rng.uniform(0.2, 1.0, count)),
        frictions=torch.from_numpy(rng.uniform(0.2, 0.8, count)),
        object_types=torch.from_numpy(types),
        quats=torch.from_numpy(np.column_stack([np.cos(angles), zeros, zeros, np.sin(angles)])),
    )
