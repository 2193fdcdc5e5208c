"""Worlds to be filmed: discs in a square that is one unit wide, seen from the front, with who acted on whom.

Lengths are in widths of the film's frame, dt is 0.1 s. Every disc has a colour of its own; springs and forces do not
show. `influences` of a frame tell which bodies acted on which since the frame before. With `fixed_colors` body k has
the k-th of HUES in every episode, so that a film alone says which body is which; everything else stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from simworld.kinds import ObjectState
from simworld.physics.forces import ForceEngine, gravity, springs
from simworld.physics.planar import Array, PlanarEngine, run
from simworld.physics.replay import SceneByScene, heeded
from simworld.simulate import Intervention, Simulator, rollout
from simworld.state import State
from simworld.trajectory import Trajectory

DT = 0.1  # s between frames
MOST = 6  # bodies in a scene: columns of `influences`
RADII, MASS_OF = (0.07, 0.1), 0.085  # of discs; the radius whose disc weighs 1
STIFFNESS, LENGTH = 2.0, 0.35  # of springs
PULL, NEAREST = 0.004, 0.12  # constant of gravity, and the distance at which it stops growing
TRIES = 1000
MOTION = ("positions", "velocities", "masses", "fixed", "boundaries", "active", "radii")
HUES = ((0.85, 0.20, 0.18), (0.18, 0.42, 0.85), (0.20, 0.65, 0.30), (0.93, 0.76, 0.13),
        (0.58, 0.30, 0.72), (0.15, 0.70, 0.72), (0.92, 0.50, 0.15), (0.92, 0.45, 0.68))  # fmt: skip
"""Colours of bodies, of which a scene's are drawn without repetition."""

FramedState = ObjectState.with_units(
    positions="frame widths",
    velocities="frame widths/s",
    masses="1",
    radii="frame widths",
    outlines="frame widths",
    spring_lengths="frame widths",
    spring_stiffnesses="1/s^2",
    spring_dampings="1/s",
    boundaries="frame widths",
)
"""Bodies measured by the width of the film's frame, their masses by that of one body."""

BILLIARDS = PlanarEngine(dt=DT, sub_steps=10, collision_slop=1e-4, instant=True)
SPRINGS = ForceEngine(dt=DT, law=springs, graph="springs", num_sub_steps=20)
GRAVITY = ForceEngine(dt=DT, law=gravity(constant=PULL, min_distance=NEAREST), num_sub_steps=20)
DRIFT = ForceEngine(dt=DT, law=lambda state, among: torch.zeros_like, num_sub_steps=1)


def video_billiards(
    seed: Sequence[int],
    *,
    num_steps: int = 49,
    num_bodies: int | None = None,
    fixed_colors: bool = False,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of discs that hit each other and the walls without loss; 3 to 6 if not said.

    Masses go with areas. Velocities are the engine's own at the frame. Interventions act as in `PlanarEngine.replay`.

    Raises:
        ValueError: a count is outside its range.
        ImportError: pymunk is missing.
    """
    start = _start(seed, num_bodies, fixed_colors, speed=(0.15, 0.35), apart=True)
    return run(start, BILLIARDS, num_steps=num_steps, interventions=interventions)


def video_springs(
    seed: Sequence[int],
    *,
    num_steps: int = 49,
    num_bodies: int | None = None,
    fixed_colors: bool = False,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of discs that pass each other, of which each pair is joined by a spring half the time.

    Springs are 0.35 long at rest. Walls reflect. Interventions act on the frames.

    Raises:
        ValueError: a count is outside its range.
    """

    def joined(start: State, rng: np.random.Generator) -> State:
        ends = torch.combinations(torch.arange(len(start)))
        ends = ends[torch.from_numpy(rng.uniform(size=len(ends)) < 0.5)]
        stiffnesses, lengths = (torch.full((len(ends),), x, dtype=torch.float64) for x in (STIFFNESS, LENGTH))
        return start.replace(springs=ends, spring_stiffnesses=stiffnesses, spring_lengths=lengths)

    reads = (*MOTION, "springs", "spring_stiffnesses", "spring_lengths")
    return _passing(seed, num_bodies, fixed_colors, joined, SPRINGS, reads, (0.05, 0.2), num_steps, interventions)


def video_gravity(
    seed: Sequence[int],
    *,
    num_steps: int = 49,
    num_bodies: int | None = None,
    fixed_colors: bool = False,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of discs that pull each other, and pass; otherwise as `video_springs`."""
    return _passing(seed, num_bodies, fixed_colors, _as_is, GRAVITY, MOTION, (0.05, 0.2), num_steps, interventions)


def video_drift(
    seed: Sequence[int],
    *,
    num_steps: int = 49,
    num_bodies: int | None = None,
    fixed_colors: bool = False,
    interventions: Sequence[Intervention] = (),
) -> Trajectory:
    """Return one seeded episode of discs that nothing acts on but the walls; otherwise as `video_springs`."""
    return _passing(seed, num_bodies, fixed_colors, _as_is, DRIFT, MOTION, (0.1, 0.35), num_steps, interventions)


def _passing(
    seed: Sequence[int],
    num_bodies: int | None,
    fixed_colors: bool,
    finish: Callable[[State, np.random.Generator], State],
    engine: ForceEngine,
    reads: Sequence[str],
    speed: tuple[float, float],
    num_steps: int,
    interventions: Sequence[Intervention],
) -> Trajectory:
    """Return an episode of bodies between which forces act, and which walls hold wholly in the picture."""
    start = _start(seed, num_bodies, fixed_colors, speed=speed, apart=False)
    start = finish(start, np.random.default_rng([*seed, 1]))
    changes = SceneByScene(heeded(interventions, "the engine of this world", reads), 1)
    simulator = _Noting(engine)
    path = rollout(
        simulator.noted(start),
        simulator=simulator,
        num_steps=num_steps,
        interventions=[changes] if interventions else (),
    )
    path.check_finite()
    return changes.told(path)[0]


def _as_is(start: State, rng: np.random.Generator) -> State:
    return start


class _Noting:
    """An engine of forces that notes which bodies they join."""

    def __init__(self, engine: ForceEngine) -> None:
        self.engine: Simulator = engine

    @property
    def dt(self) -> float:
        """Seconds between frames."""
        return self.engine.dt

    def step(self, state: State, action: torch.Tensor | None = None) -> State:
        """Return the state of the next frame."""
        return self.noted(self.engine.step(state, action))

    def noted(self, state: State) -> State:
        """Return a scene with the influences that its forces have."""
        count = len(state)
        joined = torch.zeros(count, MOST, dtype=torch.bool)
        if self.engine is SPRINGS:
            one, other = state.springs.unbind(1)
            joined[one, other] = joined[other, one] = True
        elif self.engine is GRAVITY:
            joined[:, :count] = ~torch.eye(count, dtype=torch.bool)
        both = torch.zeros_like(joined)
        both[:, :count] = state.active[:, None] & state.active
        return state.replace(influences=joined & both)


def _start(
    seed: Sequence[int], num_bodies: int | None, fixed_colors: bool, *, speed: tuple[float, float], apart: bool
) -> State:
    """Return discs at random places in the square; `apart` from each other, if they are not to overlap."""
    rng = np.random.default_rng(list(seed))
    count = int(rng.integers(3, MOST + 1)) if num_bodies is None else num_bodies
    if not 1 <= count <= MOST:
        raise ValueError(f"These worlds have 1 to {MOST} bodies; got num_bodies={num_bodies}.")
    radii = rng.uniform(*RADII, count)
    places = _places(rng, radii, apart)
    speeds, angles = rng.uniform(*speed, count), rng.uniform(0, 2 * np.pi, count)
    velocities = speeds[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    drawn = rng.permutation(len(HUES))[:count]
    hues = np.array(HUES)[range(count) if fixed_colors else drawn]
    margin = 0.0 if apart else RADII[1]
    return FramedState(
        positions=torch.from_numpy(places),
        velocities=torch.from_numpy(velocities),
        masses=torch.from_numpy((radii / MASS_OF) ** 2),
        radii=torch.from_numpy(radii),
        restitutions=torch.ones(count, dtype=torch.float64),
        colors=torch.from_numpy(hues),
        influences=torch.zeros(count, MOST, dtype=torch.bool),
        boundaries=torch.tensor([[[margin] * 2, [1 - margin] * 2]], dtype=torch.float64),
    )


def _places(rng: np.random.Generator, radii: Array, apart: bool) -> Array:
    """Return places [n, 2] within the square; drawn anew, one and all, until no two discs overlap if `apart`."""
    low = radii if apart else np.full(len(radii), RADII[1])
    for _ in range(TRIES):
        places = rng.uniform(low[:, None], 1 - low[:, None], (len(radii), 2))
        gaps = np.linalg.norm(places[:, None] - places, axis=2) - radii[:, None] - radii
        if not apart or bool((gaps[np.triu_indices(len(radii), 1)] > 0).all()):
            return places
    raise ValueError(f"{len(radii)} discs found no room in {TRIES} tries; ask for fewer.")
