"""A flag in the wind and a ball that meets a cloth, after FlagSimple and SphereDynamic of MeshGraphNets, by `Cloth`.

The paper gives sizes and steps of its sets but not fabric and wind; here both vary from episode to episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.kinds import HANDLE, NORMAL, OBSTACLE, MeshState
from simworld.physics.cloth import Ball, Cloth, Fabric, Floats, Ints
from simworld.physics.replay import Remembering, alike, heeded
from simworld.simulate import Intervention, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

Seed = Sequence[int]
WindState = MeshState.with_units(parameters="m/s")
READS = ("positions", "velocities", "kinematic", "parameters", "active")


def flag_simple(
    seed: Seed,
    *,
    num_steps: int = 400,
    size: float = 0.05,
    warm_up: float = 1.0,
    num_sub_steps: int = 4,
    dt: float = 0.02,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return a seeded episode of `num_steps` + 1 frames of a flag, held at two corners, in a steady wind.

    The flag is 0.9 to 1.2 m by 0.6 to 0.8 m, of triangles of edges about `size` [m]; the wind, `parameters` [1, 3], has
    3 to 6 m/s in any horizontal direction. Frame 0 is `warm_up` + `dt` seconds after the flag was let go. Velocities
    are those of the interval that ended. Interventions may change positions and velocities, at frame 0 the wind and
    which nodes are held (`kinematic`); the solver's velocities change by as much as those of the interval.

    Raises:
        ValueError: a number is outside its range.
        ImportError: newton is missing.
    """
    _check("flag_simple", num_steps, num_sub_steps, size, warm_up)
    rng = np.random.default_rng(list(seed))
    rest, triangles = sheet(rng.uniform((0.9, 0.6), (1.2, 0.8)), size)
    held = (rest[:, 0] == 0) & ((rest[:, 1] == 0) | (rest[:, 1] == rest[:, 1].max()))
    nodes = np.stack([rest[:, 0], np.zeros(len(rest)), rest[:, 1]], 1)
    speed, angle = rng.uniform((3.0, 0.0), (6.0, 2 * np.pi))
    wind = speed * np.array([np.cos(angle), np.sin(angle), 0.0])
    cloth = partial(Cloth, nodes, triangles, fabric=Fabric(), dt=dt / num_sub_steps)
    session = _Session(cloth, cloth(held), num_sub_steps, dt=dt, wind=wind)
    session.cloth.advance(round(warm_up / dt) * num_sub_steps, wind=wind)
    return _recorded(session, rest, triangles, np.where(held, HANDLE, NORMAL), num_steps, interventions)


def sphere_cloth(
    seed: Seed,
    *,
    num_steps: int = 250,
    size: float = 0.05,
    num_sub_steps: int = 4,
    dt: float = 0.02,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return a seeded episode of `num_steps` + 1 frames of a hanging cloth, held at its upper corners, and a ball.

    The cloth is 0.8 to 1 m wide and high; a ball of a radius of 0.12 to 0.2 m comes at 0.5 to 1.2 m/s, along the second
    axis and a little aslant, and goes through where the cloth hangs. The ball is a kinematic mesh of its own, which
    interventions move or speed up as a whole, or remove; otherwise they are those of `flag_simple`.

    Raises:
        ValueError: a number is outside its range.
        ImportError: newton is missing.
    """
    import trimesh

    _check("sphere_cloth", num_steps, num_sub_steps, size, 0.0)
    rng = np.random.default_rng(list(seed))
    rest, triangles = sheet(rng.uniform(0.8, 1.0, 2), size)
    width, height = rest.max(0)
    held = (rest[:, 1] == height) & ((rest[:, 0] == 0) | (rest[:, 0] == width))
    nodes = np.stack([rest[:, 0], np.zeros(len(rest)), rest[:, 1]], 1)
    radius, speed, side, rise = rng.uniform((0.12, 0.5, -0.15, -0.1), (0.2, 1.2, 0.15, 0.1)).tolist()
    velocity = speed * np.array([side, 1.0, rise])
    start = np.array([rng.uniform(0.3, 0.7) * width, -radius - 0.1, rng.uniform(0.25, 0.6) * height])
    ball = Ball(radius=radius, centre=(float(start[0]), float(start[1]), float(start[2])))
    shell = trimesh.creation.icosphere(subdivisions=1, radius=radius)
    cloth = partial(Cloth, nodes, triangles, fabric=Fabric(), dt=dt / num_sub_steps)
    session = _Session(
        cloth, cloth(held, ball=ball), num_sub_steps, dt=dt, shell=shell.vertices, ball=ball, ball_velocity=velocity
    )
    both = np.concatenate([np.pad(rest, ((0, 0), (0, 1))), shell.vertices])
    types = np.concatenate([np.where(held, HANDLE, NORMAL), np.full(len(shell.vertices), OBSTACLE)])
    cells = np.concatenate([triangles, np.asarray(shell.faces) + len(rest)])
    return _recorded(session, both, cells, types, num_steps, interventions)


class _Session:
    """A cloth, in the wind or with a ball, whose surface is the `shell`; `make` makes one from who is held."""

    def __init__(
        self,
        make: Callable[..., Cloth],
        cloth: Cloth,
        num_sub_steps: int,
        *,
        dt: float,
        wind: Floats | None = None,
        shell: Floats | None = None,
        ball: Ball | None = None,
        ball_velocity: Floats | None = None,
    ) -> None:
        self.make, self.cloth, self.num_sub_steps, self.wind = make, cloth, num_sub_steps, wind
        self.shell = np.empty((0, 3)) if shell is None else shell
        self.ball, self.ball_velocity, self.dt = ball, ball_velocity, dt

    def step(self) -> None:
        self.cloth.advance(self.num_sub_steps, wind=self.wind, ball_velocity=self.ball_velocity)

    def places(self) -> Tensor:
        """Return where nodes are, those of the ball last."""
        shell = self.shell if self.ball is None else self.shell + self.cloth.centre
        return torch.from_numpy(np.concatenate([self.cloth.positions, shell]))

    def again(self, before: State, changed: State) -> _Session:
        count = len(self.cloth.positions)
        ball, moves = self._ball(before, changed, count), ~changed.kinematic
        velocities = self.cloth.velocities + (changed.velocities - before.velocities)[:count].numpy()
        if bool((~moves & (changed.velocities != before.velocities).any(1))[:count].any()):
            raise ValueError("Held nodes of a cloth stay where they are; change their positions, or let them go.")
        speed = self.ball_velocity
        if ball is not None and speed is not None:
            speed = speed + alike(changed.velocities[count:] - before.velocities[count:])
        return _Session(
            self.make,
            self.make(
                changed.kinematic[:count].numpy(), ball=ball, now=(changed.positions[:count].numpy(), velocities)
            ),
            self.num_sub_steps,
            dt=self.dt,
            wind=changed.parameters[0].numpy() if "parameters" in changed else None,
            shell=self.shell,
            ball=ball,
            ball_velocity=speed,
        )

    def _ball(self, before: State, changed: State, count: int) -> Ball | None:
        there = changed.active[count:]
        if not bool(changed.active[:count].all()) or (len(there) and bool(there.any()) != bool(there.all())):
            raise ValueError(
                "A cloth keeps its nodes and a ball is there or not; remove all nodes of the ball, or none."
            )
        if not bool(changed.kinematic[count:].all()):
            raise ValueError("The ball goes its way, whatever it meets; let its nodes be kinematic.")
        if self.ball is None or not bool(there.any()):
            if bool(there.any()):
                raise ValueError("The ball was removed before; leave its nodes inactive.")
            return None
        x, y, z = (self.cloth.centre + alike(changed.positions[count:] - before.positions[count:])).tolist()
        return Ball(radius=self.ball.radius, centre=(x, y, z))

    def advance(self, scene: State, action: Tensor | None) -> State:
        self.step()
        there = scene.active[:, None]
        positions = torch.where(there, self.places(), scene.positions)
        velocities = (positions - scene.positions) / self.dt
        return scene.replace(positions=positions, velocities=torch.where(there, velocities, scene.velocities))


def sheet(sizes: Sequence[float] | Floats, edge: float) -> tuple[Floats, Ints]:
    """Return nodes [n, 2] and triangles [t, 3] of a rectangle, its diagonals turned from square to square."""
    nx, ny = (max(1, round(float(size) / edge)) for size in sizes)
    across, up = (np.linspace(0, float(size), count + 1) for size, count in zip(sizes, (nx, ny), strict=True))
    nodes = np.stack(np.meshgrid(across, up, indexing="ij"), -1).reshape(-1, 2)
    i, j = (part.ravel() for part in np.meshgrid(np.arange(nx), np.arange(ny), indexing="ij"))
    a = i * (ny + 1) + j
    b, c, d = a + ny + 1, a + ny + 2, a + 1
    even = (i + j) % 2 == 0
    first = np.stack([a, b, np.where(even, c, d)], 1)
    second = np.stack([np.where(even, a, b), c, d], 1)
    return nodes, np.concatenate([first, second])


def _check(world: str, num_steps: int, num_sub_steps: int, size: float, warm_up: float) -> None:
    if num_steps < 1 or num_sub_steps < 1 or not 0 < size <= 0.3 or warm_up < 0:
        raise ValueError(
            f"{world} needs num_steps >= 1, num_sub_steps >= 1, size to 0.3 m, warm_up >= 0 s; "
            f"got {num_steps}, {num_sub_steps}, {size}, {warm_up}."
        )


def _recorded(
    session: _Session,
    rest: Floats,
    cells: Ints,
    types: NDArray[np.int64],
    num_steps: int,
    interventions: Sequence[Intervention],
) -> Trajectory:
    """Return the trajectory from one step on, when velocities are known."""
    before = session.places()
    session.step()
    positions = session.places()
    known: dict[str, Any] = {"positions": positions, "velocities": (positions - before) / session.dt}
    if session.wind is not None:
        known["parameters"] = torch.from_numpy(session.wind)[None]
    state = (MeshState if session.wind is None else WindState)(
        rest_positions=torch.from_numpy(rest),
        cells=torch.from_numpy(cells),
        node_types=torch.from_numpy(types),
        kinematic=torch.from_numpy(types != NORMAL),
        **known,
    )
    path = rollout(
        state,
        simulator=Remembering(state, [session], dt=session.dt),
        num_steps=num_steps,
        interventions=heeded(interventions, "Cloth", READS),
    )
    path.check_finite()
    return path
