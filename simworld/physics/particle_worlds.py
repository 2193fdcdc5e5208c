"""Worlds of water, sand and goop after those of Sanchez-Gonzalez et al. 2020 (GNS, arXiv 2002.09405).

The paper gives sizes, steps and radii of its sets but not their engine's settings; here the ground truth is
`MPMEngine`, two particles to a cell along each axis. Lengths in m, time in s, masses in kg; the second axis points up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from simworld.kinds import GOOP, KINEMATIC, SAND, WATER, ParticleState
from simworld.physics.mpm import Goop, MaterialState, MPMEngine, Sand, Water, material_state
from simworld.physics.planar import Array
from simworld.physics.replay import SceneByScene, heeded, through
from simworld.physics.sph import SPHEngine
from simworld.simulate import Intervention, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

Seed = Sequence[int]
GRAVITY = 9.8  # m/s^2
SQUARE = ((0.1, 0.1), (0.9, 0.9))
TOWER = ((0.2, 0.1, 0.2), (0.8, 0.9, 0.8))
SCENES_AT_ONCE = 10
TRIES = 10_000
JITTER = 0.25  # of the spacing
FASTEST = 4.0  # m/s, a fall through the box
CELLS_PER_SUB_STEP = 0.4
MOVING = ("positions", "velocities")
KEPT = ("particle_types", "kinematic", "boundaries", "gravity")


def water_drop(
    seeds: Sequence[Seed],
    *,
    num_steps: int = 1000,
    num_cells: int = 56,
    min_particles: int = 400,
    max_particles: int = 1000,
    max_blocks: int = 2,
    max_speed: float = 1.0,
    history_length: int = 5,
    dt: float = 2.5e-3,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded episodes of blocks of water that fall in a square box, `num_steps` + 1 frames of float32.

    `num_cells` of the grid lie side by side in the box, particles at half their distance. Velocities at the
    start are U[-max_speed, max_speed] along each axis, one for each block. Interventions act on the frames that are
    returned, on each episode by itself; what becomes of the particles' material is said at `MPMEngine.rebuilt`.

    Raises:
        ValueError: a number is outside its range, or no blocks were found for so many particles.
    """
    box = _Box(SQUARE, num_cells, dt)
    starts = box.drops(seeds, (min_particles, max_particles), max_blocks, WATER, Water(), max_speed)
    return box.episodes(starts, Water(), num_steps, history_length, interventions)


def goop(
    seeds: Sequence[Seed],
    *,
    num_steps: int = 400,
    num_cells: int = 28,
    min_particles: int = 200,
    max_particles: int = 350,
    max_blocks: int = 2,
    max_speed: float = 1.0,
    history_length: int = 5,
    dt: float = 2.5e-3,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded episodes of blocks of goop that fall in a square box, as `water_drop` does."""
    box = _Box(SQUARE, num_cells, dt)
    starts = box.drops(seeds, (min_particles, max_particles), max_blocks, GOOP, Goop(), max_speed)
    return box.episodes(starts, Goop(), num_steps, history_length, interventions)


def water_3d(
    seeds: Sequence[Seed],
    *,
    num_steps: int = 250,
    num_cells: int = 12,
    min_particles: int = 1000,
    max_particles: int = 2000,
    max_blocks: int = 2,
    max_speed: float = 1.0,
    history_length: int = 5,
    dt: float = 5e-3,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded episodes of blocks of water that fall in a box in space, as `water_drop` does."""
    box = _Box(TOWER, num_cells, dt)
    starts = box.drops(seeds, (min_particles, max_particles), max_blocks, WATER, Water(), max_speed)
    return box.episodes(starts, Water(), num_steps, history_length, interventions)


def sand_ramps(
    seeds: Sequence[Seed],
    *,
    num_steps: int = 400,
    num_cells: int = 28,
    min_particles: int = 200,
    max_particles: int = 350,
    max_ramps: int = 3,
    max_speed: float = 1.0,
    history_length: int = 5,
    dt: float = 2.5e-3,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded episodes of a block of sand that falls on 1 to `max_ramps` ramps, otherwise as `water_drop`.

    Ramps are rows of kinematic particles.
    """
    if max_ramps < 1:
        raise ValueError(f"sand_ramps needs max_ramps of 1 or more; got {max_ramps}.")
    box = _Box(SQUARE, num_cells, dt)
    starts = []
    for rng in map(_generator, seeds):
        block = box.blocks(rng, (min_particles, max_particles), 1, lowest=0.6)
        ramps = _ramps(rng, int(rng.integers(1, max_ramps + 1)), box.cell)
        starts.append(box.start(block, rng, SAND, Sand(), max_speed, ramps))
    return box.episodes(starts, Sand(), num_steps, history_length, interventions)


def water_ramps(
    seeds: Sequence[Seed],
    *,
    num_steps: int = 400,
    num_cells: int = 28,
    min_particles: int = 200,
    max_particles: int = 300,
    max_ramps: int = 2,
    max_speed: float = 1.0,
    max_tilt: float = 0.0,
    gravity_range: tuple[float, float] = (1.0, 1.0),
    history_length: int = 5,
    dt: float = 2.5e-3,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded episodes of a block of water that falls on none to `max_ramps` ramps, otherwise as `sand_ramps`.

    Gravity is tilted by U[-max_tilt, max_tilt] degrees and scaled by U[gravity_range], anew for each episode: an
    intervention on the world that a model is then trained to answer.
    """
    low, high = gravity_range
    if max_ramps < 0 or not (0 <= max_tilt < 90 and 0 <= low <= high < math.inf):
        raise ValueError(
            "water_ramps needs max_ramps >= 0, max_tilt from 0 to 90 degrees and a gravity_range that rises from 0 or "
            f"more; got {max_ramps}, {max_tilt} and {gravity_range}."
        )
    box = _Box(SQUARE, num_cells, dt)
    starts = []
    for rng in map(_generator, seeds):
        block = box.blocks(rng, (min_particles, max_particles), 1, lowest=0.6)
        count = int(rng.integers(0, max_ramps + 1))
        start = box.start(block, rng, WATER, Water(), max_speed, _ramps(rng, count, box.cell))
        angle, size = math.radians(rng.uniform(-max_tilt, max_tilt)), GRAVITY * rng.uniform(low, high)
        pull = torch.tensor([[size * math.sin(angle), -size * math.cos(angle)]])
        starts.append(start.replace(gravity=pull))
    return box.episodes(starts, Water(), num_steps, history_length, interventions)


def _generator(seed: Seed) -> np.random.Generator:
    return np.random.default_rng(list(seed))


def _ramps(rng: np.random.Generator, count: int, cell: float) -> Array:
    """Return both ends of ramps [count, 2, 2] in the middle of the square, three cells or more apart."""
    found: list[Array] = []
    if not count:
        return np.empty((0, 2, 2))
    for _ in range(TRIES):
        if len(found) == count:
            break
        middle, length = rng.uniform((0.25, 0.2), (0.75, 0.5)), rng.uniform(0.2, 0.35)
        angle = math.radians(rng.uniform(15, 45)) * rng.choice([-1, 1])
        half = 0.5 * length * np.array([math.cos(angle), math.sin(angle)])
        ramp = np.stack([middle - half, middle + half])
        inside = (ramp > 0.1 + 2 * cell).all() and (ramp < 0.9 - 2 * cell).all() and ramp[:, 1].max() < 0.56
        points = _points(ramp, cell)
        if inside and all(_least_distance(points, _points(other, cell)) > 3 * cell for other in found):
            found.append(ramp)
    return np.stack(found)


def _points(ramp: Array, spacing: float) -> Array:
    """Return places from one end of a ramp to the other, at most `spacing` apart."""
    count = math.ceil(float(np.linalg.norm(ramp[1] - ramp[0])) / spacing) + 1
    return np.linspace(ramp[0], ramp[1], count)


def _least_distance(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a[:, None] - b, axis=2).min())


class _Box:
    """A box and its grid: fills blocks with particles and lets the engine run."""

    def __init__(self, corners: tuple[tuple[float, ...], tuple[float, ...]], num_cells: int, dt: float) -> None:
        if num_cells < 8:
            raise ValueError(f"num_cells must be 8 or more, to hold blocks of a few cells; got {num_cells}.")
        self.lower, self.upper = (np.array(corner) for corner in corners)
        self.cell = (corners[1][0] - corners[0][0]) / num_cells
        self.spacing, self.dim, self.dt = self.cell / 2, len(corners[0]), dt

    def drops(
        self,
        seeds: Sequence[Seed],
        particles: tuple[int, int],
        most: int,
        kind: int,
        material: Water | Goop,
        max_speed: float,
    ) -> list[ParticleState]:
        """Return, for each seed, blocks of a material in the air."""
        return [
            self.start(self.blocks(rng, particles, most), rng, kind, material, max_speed)
            for rng in map(_generator, seeds)
        ]

    def blocks(
        self, rng: np.random.Generator, particles: tuple[int, int], most: int, lowest: float = 0.1
    ) -> list[Array]:
        """Return the particles of 1 to `most` blocks, which lie above `lowest` and a cell or more apart."""
        least_count, most_count = particles
        if not 0 < least_count <= most_count or most < 1:
            raise ValueError(f"Blocks need 0 < min_particles <= max_particles; got {least_count} and {most_count}.")
        count = int(rng.integers(1, most + 1))
        side = self.spacing * (most_count / count) ** (1 / self.dim)
        floor = np.maximum(self.lower, np.where(np.arange(self.dim) == 1, lowest, -np.inf)) + self.cell
        for _ in range(TRIES):
            numbers = (rng.uniform(0.5, 1.4, (count, self.dim)) * side / self.spacing).astype(int)
            sizes = numbers * self.spacing
            room = self.upper - self.cell - sizes - floor
            corners = floor + rng.uniform(0, 1, (count, self.dim)) * room
            fits = least_count <= numbers.prod(1).sum() <= most_count and (room > 0).all() and (numbers > 0).all()
            if fits and self._apart(corners, sizes):
                return [self._filled(rng, *block) for block in zip(corners, numbers, strict=True)]
        raise ValueError(f"{count} blocks of {least_count} to {most_count} particles found no room; ask for fewer.")

    def _apart(self, corners: Array, sizes: Array) -> bool:
        gaps = np.maximum(corners[:, None] - corners - sizes, corners - corners[:, None] - sizes[:, None]).max(2)
        return bool((gaps + np.eye(len(gaps)) * 1e9 > self.cell).all())

    def _filled(self, rng: np.random.Generator, corner: Array, numbers: Array) -> Array:
        grid = np.stack(np.meshgrid(*map(np.arange, numbers), indexing="ij"), -1).reshape(-1, self.dim)
        return corner + self.spacing * (grid + 0.5 + rng.uniform(-JITTER, JITTER, grid.shape))

    def start(
        self,
        blocks: list[Array],
        rng: np.random.Generator,
        kind: int,
        material: Water | Sand | Goop,
        max_speed: float,
        ramps: Array | None = None,
    ) -> ParticleState:
        """Return blocks of a material, each at a random velocity, and ramps."""
        speeds = [np.broadcast_to(rng.uniform(-max_speed, max_speed, self.dim), block.shape) for block in blocks]
        rows = [] if ramps is None else [_points(ramp, self.spacing) for ramp in ramps]
        positions = np.concatenate(blocks + rows)
        count, free = len(positions), sum(map(len, blocks))
        kinematic = torch.arange(count) >= free
        firsts = free + np.cumsum([0, *map(len, rows)])
        ends = torch.tensor(np.stack([firsts[:-1], firsts[1:] - 1], 1))
        obstacles = {} if ramps is None else {"obstacles": ends, "obstacle_radii": _full(len(ends), self.spacing)}
        down = torch.zeros(1, self.dim)
        down[:, 1] = -GRAVITY
        velocities = _floats(np.concatenate([*speeds, *(0 * row for row in rows)]))
        return material_state(
            positions=_floats(positions),
            velocities=velocities,
            particle_types=torch.where(kinematic, KINEMATIC, kind),
            boundaries=_floats(np.stack([self.lower, self.upper])[None]),
            gravity=down,
            kinematic=kinematic,
            masses=_full(count, material.density * self.spacing**self.dim),
            **obstacles,
        )

    def episodes(
        self,
        starts: Sequence[ParticleState],
        material: Water | Sand | Goop,
        num_steps: int,
        history_length: int,
        interventions: Sequence[Intervention],
    ) -> list[Trajectory]:
        """Return what becomes of every start, from the first frame on that has a whole history of its own."""
        if num_steps < 1 or history_length < 0:
            raise ValueError(
                f"An episode needs num_steps >= 1, history_length >= 0; got {num_steps}, {history_length}."
            )
        crossed = self.dt * (material.sound_speed + FASTEST) / self.cell
        named: dict[str, Any] = {type(material).__name__.lower(): material}
        engine = MPMEngine(
            dt=self.dt, cell_size=self.cell, num_sub_steps=math.ceil(crossed / CELLS_PER_SUB_STEP), **named
        )
        found: list[Trajectory] = []
        for number in range(0, len(starts), SCENES_AT_ONCE):
            some = MaterialState.cat(starts[number : number + SCENES_AT_ONCE])
            found += recorded(some, engine, num_steps, history_length, KEPT, interventions)
        return found


def recorded(
    state: State,
    engine: MPMEngine | SPHEngine,
    num_steps: int,
    history_length: int,
    kept: Sequence[str],
    interventions: Sequence[Intervention],
) -> list[Trajectory]:
    """Return what an engine makes of each scene, from the first frame on that has a whole history of its own.

    Frames hold positions and velocities; the first state holds the fields that are `kept`. Interventions act on what
    is recorded of each scene, and the full state follows by `engine.rebuilt`.
    """

    def seen(full: State) -> State:
        known: dict[str, Any] = {name: full[name] for name in (*MOVING, "history", *kept)}
        return ParticleState(batch=full.batch, active=full.active, **known)

    state = state.replace(history=state.velocities[:, None].repeat(1, history_length, 1))
    for _ in range(history_length + 1):
        state = engine.step(state)
    heeds = heeded(interventions, type(engine).__name__, engine.READS)
    changes = SceneByScene(heeds, state.num_scenes)
    path = rollout(
        state,
        simulator=engine,
        num_steps=num_steps,
        interventions=[through(changes, seen, engine.rebuilt)] if heeds else (),
        observe=lambda s: {k: s[k] for k in MOVING},
    )
    whole = Trajectory(initial=seen(path.initial), frames=path.frames, active=path.active, dt=engine.dt)
    whole.check_finite()
    return changes.told(whole)


def _floats(values: Array) -> torch.Tensor:
    return torch.from_numpy(values).float()


def _full(count: int, value: float) -> torch.Tensor:
    return torch.full((count,), value)
