"""A flag in the wind and a ball that meets a cloth, after FlagSimple and SphereDynamic of MeshGraphNets, by `Cloth`.

The paper gives sizes and steps of its sets but not fabric and wind; here both vary from episode to episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simworld.kinds import HANDLE, NORMAL, OBSTACLE, MeshState
from simworld.physics.cloth import Ball, Cloth, Fabric, Floats, Ints
from simworld.trajectory import Trajectory

Seed = Sequence[int]
WindState = MeshState.with_units(parameters="m/s")


def flag_simple(
    seed: Seed,
    *,
    num_steps: int = 400,
    size: float = 0.05,
    warm_up: float = 1.0,
    num_sub_steps: int = 4,
    dt: float = 0.02,
) -> Trajectory:
    """Return a seeded episode of `num_steps` + 1 frames of a flag, held at two corners, in a steady wind.

    The flag is 0.9 to 1.2 m by 0.6 to 0.8 m, of triangles of edges about `size` [m]; the wind, `parameters` [1, 3], has
    3 to 6 m/s in any horizontal direction. Frame 0 is `warm_up` + `dt` seconds after the flag was let go. Velocities
    are those of the interval that ended.

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
    cloth = Cloth(nodes, triangles, held, fabric=Fabric(), dt=dt / num_sub_steps)
    cloth.advance(round(warm_up / dt) * num_sub_steps, wind=wind)
    places = []
    for _ in range(num_steps + 2):
        places.append(cloth.positions)
        cloth.advance(num_sub_steps, wind=wind)
    return _recorded(np.stack(places), rest, triangles, np.where(held, HANDLE, NORMAL), dt, wind)


def sphere_cloth(
    seed: Seed,
    *,
    num_steps: int = 250,
    size: float = 0.05,
    num_sub_steps: int = 4,
    dt: float = 0.02,
) -> Trajectory:
    """Return a seeded episode of `num_steps` + 1 frames of a hanging cloth, held at its upper corners, and a ball.

    The cloth is 0.8 to 1 m wide and high; a ball of a radius of 0.12 to 0.2 m comes at 0.5 to 1.2 m/s, along the second
    axis and a little aslant, and goes through where the cloth hangs. The ball is a kinematic mesh of its own.

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
    cloth = Cloth(
        nodes,
        triangles,
        held,
        fabric=Fabric(),
        dt=dt / num_sub_steps,
        ball=Ball(radius=radius, centre=(float(start[0]), float(start[1]), float(start[2]))),
    )
    shell = trimesh.creation.icosphere(subdivisions=1, radius=radius)
    places = []
    for _ in range(num_steps + 2):
        places.append(np.concatenate([cloth.positions, shell.vertices + cloth.centre]))
        cloth.advance(num_sub_steps, ball_velocity=velocity)
    both = np.concatenate([np.pad(rest, ((0, 0), (0, 1))), shell.vertices])
    types = np.concatenate([np.where(held, HANDLE, NORMAL), np.full(len(shell.vertices), OBSTACLE)])
    cells = np.concatenate([triangles, np.asarray(shell.faces) + len(rest)])
    return _recorded(np.stack(places), both, cells, types, dt, None)


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
    places: Floats, rest: Floats, cells: Ints, types: NDArray[np.int64], dt: float, wind: Floats | None
) -> Trajectory:
    """Return the trajectory from the second frame on, whose velocities are known."""
    positions = torch.from_numpy(places)
    frames = {"positions": positions[1:], "velocities": positions.diff(dim=0) / dt}
    known: dict[str, Any] = {name: value[0] for name, value in frames.items()}
    if wind is not None:
        known["parameters"] = torch.from_numpy(wind)[None]
    state = (MeshState if wind is None else WindState)(
        rest_positions=torch.from_numpy(rest),
        cells=torch.from_numpy(cells),
        node_types=torch.from_numpy(types),
        kinematic=torch.from_numpy(types != NORMAL),
        **known,
    )
    there = torch.ones(frames["positions"].shape[:2], dtype=torch.bool)
    path = Trajectory(initial=state, frames=frames, active=there, dt=dt)
    path.check_finite()
    return path
