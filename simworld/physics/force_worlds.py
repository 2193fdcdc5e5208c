"""The worlds of published tables in which bodies act at a distance, generated as their authors did.

Springs and charges: Neural Relational Inference (Kipf et al. 2018, arXiv 1802.04687); charges in space:
Satorras et al. 2021, arXiv 2102.09844; planets: Battaglia et al. 2016, arXiv 1612.00222.

The first three draw from numpy's legacy generator, in the order of the published programs: simulation k of a
split is the same one as in the authors' files. A seed is (seed, split, number), splits being train,
valid and test. All units are arbitrary ("1") but those of the planets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simworld.kinds import ObjectState
from simworld.physics.forces import ForceEngine, charges, gravity, springs
from simworld.physics.replay import SceneByScene, heeded
from simworld.simulate import Intervention, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

Array = NDArray[np.float64]
Seed = Sequence[int]

UNITS = dict.fromkeys(("positions", "velocities", "charges", "spring_stiffnesses", "boundaries"), "1")
FreeState = ObjectState.with_units(**UNITS)
TABLE_DT, SUB_STEPS = 0.1, 100  # the programs step by 0.001 and keep every hundredth step
BOX = 5.0
NRI_SIMULATIONS, NRI_FRAMES = (50_000, 10_000, 10_000), (49, 49, 99)
EGNN_SIMULATIONS, EGNN_FRAMES = (10_000, 2_000, 2_000), (49, 49, 49)
SCENES_AT_ONCE = 1000

SPRING_ENGINE = ForceEngine(dt=TABLE_DT, law=springs, graph="springs", num_sub_steps=SUB_STEPS, max_force=100.0)
CHARGE_ENGINE = ForceEngine(dt=TABLE_DT, law=charges(), num_sub_steps=SUB_STEPS, max_force=100.0)
PLANET_ENGINE = ForceEngine(dt=1e-3, law=gravity(constant=1e5, min_distance=1.0))
MOTION = ("positions", "velocities", "masses", "fixed", "boundaries", "active")
READS = {
    SPRING_ENGINE: (*MOTION, "springs", "spring_stiffnesses", "spring_lengths"),
    CHARGE_ENGINE: (*MOTION, "charges"),
    PLANET_ENGINE: MOTION,
}


def springs_nri(
    seeds: Sequence[Seed],
    *,
    num_frames: int | None = None,
    first_frame: int = 0,
    num_bodies: int = 5,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded simulations of balls of which each pair is joined by a spring with probability 1/2.

    In a box of half width 5; stiffness 0.1, rest length 0. `num_frames` (as published: 49, in the test
    split 99) are kept, 0.1 time units apart, from `first_frame` on. Interventions act on the frames that are kept, on
    each simulation by itself.
    """

    def state(drawn: _Draw) -> ObjectState:
        joined = np.tril(drawn.choice((num_bodies, num_bodies)) > 0, -1)
        ends = torch.from_numpy(np.argwhere(joined))
        return FreeState(
            positions=_body_rows(0.5 * drawn.locations),
            velocities=_body_rows(0.5 * drawn.directions),
            springs=ends,
            spring_stiffnesses=torch.full((len(ends),), 0.1, dtype=torch.float64),
            boundaries=_walls(2),
        )

    draws = _Draws(num_bodies, 2, num_bodies**2, NRI_SIMULATIONS, NRI_FRAMES)
    return draws.episodes(seeds, state, SPRING_ENGINE, first_frame, num_frames, 1, interventions)


def charged_nri(
    seeds: Sequence[Seed],
    *,
    num_frames: int | None = None,
    first_frame: int = 0,
    num_bodies: int = 5,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded simulations of charges +1 or -1 in a box of half width 5; otherwise as `springs_nri`."""

    def state(drawn: _Draw) -> ObjectState:
        return FreeState(
            positions=_body_rows(drawn.locations),
            velocities=_body_rows(0.5 * drawn.directions),
            charges=torch.from_numpy(drawn.choice((num_bodies,))),
            boundaries=_walls(2),
        )

    draws = _Draws(num_bodies, 2, num_bodies, NRI_SIMULATIONS, NRI_FRAMES)
    return draws.episodes(seeds, state, CHARGE_ENGINE, first_frame, num_frames, 1, interventions)


def nbody_egnn(
    seeds: Sequence[Seed],
    *,
    num_frames: int = 49,
    first_frame: int = 0,
    every: int = 1,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded simulations of five charges in space without walls; every `every`-th frame is kept.

    The published task sees frame 30 and asks for the positions in frame 40. Interventions are those of `springs_nri`.
    """

    def state(drawn: _Draw) -> ObjectState:
        return FreeState(
            positions=_body_rows(drawn.locations),
            velocities=_body_rows(0.5 * drawn.directions),
            charges=torch.from_numpy(drawn.choice((5,))),
        )

    draws = _Draws(5, 3, 5, EGNN_SIMULATIONS, EGNN_FRAMES)
    return draws.episodes(seeds, state, CHARGE_ENGINE, first_frame, num_frames, every, interventions)


def nbody_in(
    seeds: Sequence[Seed],
    *,
    num_steps: int = 999,
    num_bodies: int = 6,
    interventions: Sequence[Intervention] = (),
) -> list[Trajectory]:
    """Return seeded simulations of bodies [m, kg] under gravity in the plane, dt 1 ms.

    In half of the scenes body 0 is a star of 100 kg at the origin and the others set out on circular orbits;
    in the others all set out with velocities U[-3, 3]^2. Masses U[0.02, 9], distances from the origin
    U[10, 100]. The paper leaves G open; G = 1e5 and a distance of at least 1 in the law move bodies by
    several hundred metres in 1000 steps, as it says. Interventions are those of `springs_nri`.
    """
    if num_bodies < 2 or num_steps < 1:
        raise ValueError(f"nbody_in needs 2 or more bodies and 1 or more steps; got {num_bodies} and {num_steps}.")
    starts = [_planets(np.random.default_rng(list(seed)), num_bodies) for seed in seeds]
    return _run(starts, PLANET_ENGINE, 0, num_steps + 1, 1, interventions)


def _planets(rng: np.random.Generator, count: int) -> ObjectState:
    masses = rng.uniform(0.02, 9, count)
    radii, angles = rng.uniform(10, 100, count), rng.uniform(0, 2 * np.pi, count)
    outward = np.stack([np.cos(angles), np.sin(angles)], 1)
    velocities = rng.uniform(-3, 3, (count, 2))
    turns = rng.choice([-1.0, 1.0], count)
    if rng.random() < 0.5:
        masses[0], radii[0] = 100.0, 0.0
        speeds = np.sqrt(1e5 * 100 / np.where(radii > 0, radii, np.inf))
        velocities = (turns * speeds)[:, None] * np.stack([-outward[:, 1], outward[:, 0]], 1)
    return ObjectState(
        positions=torch.from_numpy(radii[:, None] * outward),
        velocities=torch.from_numpy(velocities),
        masses=torch.from_numpy(masses),
    )


class _Draw:
    """What the published programs draw for one simulation."""

    def __init__(self, uniform: Array, normal: Array) -> None:
        self._uniform = uniform
        self.locations, self.directions = normal
        self.directions = self.directions / np.sqrt((self.directions**2).sum(0))

    def choice(self, shape: tuple[int, ...]) -> Array:
        """Return -1 or 1, each with probability 1/2, as a choice of the lower or the upper of two values."""
        return np.where(self._uniform < 0.5, -1.0, 1.0).reshape(shape)


class _Draws:
    """The stream of draws of a published program: uniform numbers, normal ones, and unused noise."""

    def __init__(
        self, bodies: int, dimensions: int, uniform: int, simulations: Sequence[int], frames: Sequence[int]
    ) -> None:
        self.shape, self.uniform = (2, dimensions, bodies), uniform
        self.simulations, self.frames = simulations, frames

    def of(self, seed: int, split: int, numbers: Sequence[int]) -> list[_Draw]:
        """Return the draws of some simulations of a split, in the order of their numbers."""
        if not (0 <= split < len(self.simulations) and 0 <= max(numbers) < self.simulations[split]):
            raise ValueError(
                f"The published splits train, valid and test hold {self.simulations} simulations; "
                f"got number {max(numbers)} of split {split}."
            )
        stream, found, wanted = np.random.RandomState(seed), [], set(numbers)
        for part in range(split + 1):
            last = max(numbers) + 1 if part == split else self.simulations[part]
            for number in range(last):
                uniform, normal = stream.random_sample(self.uniform), stream.standard_normal(self.shape)
                stream.standard_normal((2, self.frames[part], *self.shape[1:]))
                if part == split and number in wanted:
                    found.append(_Draw(uniform, normal))
        return found

    def episodes(
        self,
        seeds: Sequence[Seed],
        state: Callable[[_Draw], ObjectState],
        engine: ForceEngine,
        first_frame: int,
        num_frames: int | None,
        every: int,
        interventions: Sequence[Intervention],
    ) -> list[Trajectory]:
        if not all(len(seed) == 3 and seed[1] in range(len(self.simulations)) and seed[2] >= 0 for seed in seeds):
            raise ValueError("A seed here is (seed, split, number) with split 0, 1 or 2 and number >= 0; got others.")
        made: dict[tuple[int, ...], Trajectory] = {}
        for (seed, split), group in groupby(sorted({tuple(s) for s in seeds}), key=lambda s: s[:2]):
            numbers = [number for _, _, number in group]
            count = self.frames[split] - first_frame if num_frames is None else num_frames
            if first_frame < 0 or count < 1 or every < 1:
                raise ValueError(f"Frames must be 1 or more from frame 0 on; got {count} from {first_frame}.")
            starts = [state(drawn) for drawn in self.of(seed, split, numbers)]
            # The programs keep no frame of the start: frame 0 is that after the first hundred steps.
            paths = _run(starts, engine, first_frame + 1, count, every, interventions)
            made |= {(seed, split, number): path for number, path in zip(numbers, paths, strict=True)}
        return [made[tuple(seed)] for seed in seeds]


def _run(
    starts: Sequence[ObjectState],
    engine: ForceEngine,
    first_frame: int,
    num_frames: int,
    every: int,
    interventions: Sequence[Intervention],
) -> list[Trajectory]:
    """Return what becomes of every start: `num_frames` frames, `every` apart, from `first_frame` on."""
    found: list[Trajectory] = []
    heeds = heeded(interventions, "the engine of this world", READS[engine])
    for number in range(0, len(starts), SCENES_AT_ONCE):
        state: State = ObjectState.cat(starts[number : number + SCENES_AT_ONCE])
        if first_frame:
            state = rollout(state, simulator=engine, num_steps=first_frame, every=first_frame).frame(-1)
        changes, frames = SceneByScene(heeds, state.num_scenes), _Frames(engine, every)
        path = rollout(state, simulator=frames, num_steps=num_frames - 1, interventions=[changes] if heeds else ())
        path.check_finite()
        found += changes.told(path)
    return found


@dataclass(frozen=True)
class _Frames:
    """Steps an engine from one kept frame to the next."""

    engine: ForceEngine
    every: int

    @property
    def dt(self) -> float:
        """Time units between frames."""
        return self.engine.dt * self.every

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the state of the next frame."""
        return rollout(state, simulator=self.engine, num_steps=self.every, every=self.every).frame(-1)


def _body_rows(values: Array) -> Tensor:
    """Return [n, d] from the programs' [d, n]."""
    return torch.from_numpy(np.ascontiguousarray(values.T))


def _walls(dimensions: int) -> Tensor:
    corner = torch.full((dimensions,), BOX, dtype=torch.float64)
    return torch.stack([-corner, corner])[None]
