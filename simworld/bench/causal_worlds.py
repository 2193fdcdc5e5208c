"""The worlds of `simworld bench counterfactual`: what is asked of each, and whose answer is the truth."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from simworld.bench.rows import checkpoints_of
from simworld.data.generate import GENERATORS, SPLITS
from simworld.expressions import Expression
from simworld.graph import object_edges, particle_edges
from simworld.intervene import Do, Rule, do, negate, rotate, scale
from simworld.kinds import INFLOW, OBSTACLE
from simworld.models import LearnedSimulator
from simworld.models.force_network import ForceNetwork
from simworld.models.gns import GNS
from simworld.models.interaction_network import InteractionNetwork
from simworld.physics.flow_worlds import HEIGHT, HIGHEST, LOWEST
from simworld.physics.force_worlds import CHARGE_ENGINE, SPRING_ENGINE
from simworld.physics.interaction_worlds import balls_engine
from simworld.physics.planar import PlanarEngine
from simworld.simulate import BrokeDown, Intervention, Simulator
from simworld.state import State
from simworld.trajectory import Trajectory
from simworld.worlds import branches

Edits = Sequence[Intervention]
ALWAYS = range(0, sys.maxsize)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of intervention and its doses.

    `edits` makes the interventions of a dose. Where it is no change of a state, a mesh being another say, `elsewhere`
    makes arguments of the generator in its place: the world is another from its start on. `inside` are the doses such
    as training knew, or whether it knew worlds that begin so; None where training never saw the like. Where doses are
    factors, 1 is nothing, and they are measured by their binary logarithms.
    """

    name: str
    doses: tuple[float, ...]
    edits: Callable[[float], tuple[Do, ...]] = lambda dose: ()
    elsewhere: Callable[[float], Mapping[str, Any]] | None = None
    inside: tuple[float, float] | Callable[[State], bool] | None = None
    factors: bool = False

    def size(self, dose: float) -> float:
        """Return how large a dose is, 0 for nothing."""
        return math.log2(dose) if self.factors else dose

    def seen(self, dose: float, start: State) -> bool:
        """Return whether training saw worlds like the one that a dose makes, which begins from `start`."""
        if callable(self.inside):
            return self.inside(start)
        return self.inside is not None and self.inside[0] <= dose <= self.inside[1]


def _near(state: State, simulator: Simulator) -> Tensor | None:
    """Return who acts on whom in one round of a model, [2, e]: its own graph."""
    if isinstance(simulator, InteractionNetwork):
        edges = object_edges(state, margin=simulator.margin)
        return torch.stack([edges.senders, edges.receivers])
    if isinstance(simulator, GNS):
        near = particle_edges(state, simulator.connectivity_radius)
        return torch.stack([near.senders, near.receivers])
    if isinstance(simulator, ForceNetwork) and simulator.graph == "springs":
        joined: Tensor = state.springs.T
        return joined
    return None


@dataclass(frozen=True, kw_only=True)
class World:
    """A world whose engine answers interventions at the first frame of its episodes, and what is asked of it.

    `episode` are the arguments of its generator, `checkpoint` the shipped models' name, `quantity` what is compared.
    `engine` steps the recorded states themselves; without one the truth is made by the generator, from its seeds.
    `given` are fields that starts are given besides, `sizes` arguments for other numbers of entities, `wrong` what an
    engine of wrong parameters believes, `hidden` a field that an engine can infer from the factual episode,
    `irrelevant` what changes nothing, `edges` who acts on whom in one step, and `contacts` tells whether touching is
    an event.
    """

    dataset: str
    seed: int
    checkpoint: str
    num_steps: int
    kinds: tuple[Kind, ...]
    count: int = 24
    episode: Mapping[str, Any] = field(default_factory=dict)
    quantity: str = "positions"
    engine: Simulator | None = None
    given: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    wrong: tuple[Do, ...] = ()
    hidden: str = ""
    irrelevant: tuple[Do, ...] = ()
    edges: Callable[[State, Simulator], Tensor | None] = _near
    contacts: bool = False
    max_scenes: int = 256

    def checkpoints(self) -> list[str]:
        """Return the names of the shipped models."""
        return ["rope"] if self.checkpoint == "rope" else checkpoints_of(self.checkpoint)

    def episodes(self, count: int) -> list[Trajectory]:
        """Return episodes of the test split, as long as questions are, in double precision."""
        made = GENERATORS[self.dataset].make(self._seeds(count), **self.episode)
        found = []
        for path in made:
            kept = path.window(0, self.num_steps + 1).to(torch.float64)
            if self.given:
                more = {k: torch.full((len(kept.initial),), v, dtype=torch.float64) for k, v in self.given.items()}
                kept = replace(kept, initial=kept.initial.replace(**more))
            found.append(kept)
        return found

    def truth(self, episodes: Sequence[Trajectory], asked: Sequence[Edits]) -> list[list[Trajectory]]:
        """Return what the engine answers to each set of interventions: each world rebuilt from its start."""
        if self.engine is not None:
            return answers(self.engine, episodes, asked, num_steps=self.num_steps)
        return [self.made(len(episodes), edits) for edits in asked]

    def made(self, count: int, edits: Edits, **arguments: Any) -> list[Trajectory]:
        """Return what the generator makes of the first `count` seeds, of other `arguments` than `episode` too."""
        generator, asked = GENERATORS[self.dataset], {**self.episode, **arguments}
        made = generator.make(self._seeds(count), **asked, interventions=_lasting(edits))
        return [path.window(0, self.num_steps + 1).to(torch.float64) for path in made]

    def _seeds(self, count: int) -> list[list[int]]:
        return [[self.seed, SPLITS.index("test"), number] for number in range(count)]


def _lasting(edits: Edits) -> list[Intervention]:
    """Return interventions for an engine, in which what is changed stays so: once what models are told at all steps."""
    return [replace(edit, at=0) if isinstance(edit, Do) and edit.at == ALWAYS else edit for edit in edits]


def answers(
    simulator: Simulator,
    episodes: Sequence[Trajectory],
    asked: Sequence[Edits],
    *,
    num_steps: int,
    max_scenes: int = 256,
) -> list[list[Trajectory]]:
    """Return, for each of several sets of interventions, what a simulator makes of each episode's first state.

    All are the scenes of rollouts of `max_scenes` at a time; a rollout that breaks down is infinitely far away.
    """
    cases = [(path, edits) for edits in asked for path in episodes]
    found = _tried(simulator, cases, num_steps, max_scenes)
    return [found[k * len(episodes) : (k + 1) * len(episodes)] for k in range(len(asked))]


def _tried(
    simulator: Simulator, cases: Sequence[tuple[Trajectory, Edits]], num_steps: int, max_scenes: int
) -> list[Trajectory]:
    """Return the answers to all cases, those that break down one by one."""
    dtype = _dtype_of(simulator)
    try:
        return branches(
            [path.to(dtype) for path, _ in cases],
            [edits for _, edits in cases],
            simulator=simulator,
            num_steps=num_steps,
            max_scenes=max_scenes,
        )
    except BrokeDown:
        pass
    if len(cases) > 1:
        some = (cases[first : first + max_scenes] for first in range(0, len(cases), max_scenes))
        parts = list(some) if len(cases) > max_scenes else [[case] for case in cases]
        return [path for part in parts for path in _tried(simulator, part, num_steps, max_scenes)]
    path = cases[0][0].window(0, num_steps + 1)
    return [replace(path, frames={name: torch.full_like(rows, torch.inf) for name, rows in path.frames.items()})]


def started(path: Trajectory, edits: Edits) -> State:
    """Return the first state of an episode as interventions at step 0 make it."""
    state = path.initial
    for edit in edits:
        state = edit(state, 0) if not isinstance(edit, Do) or edit.at == 0 else state
    return state


def _dtype_of(simulator: Simulator) -> torch.dtype:
    if isinstance(simulator, LearnedSimulator):
        return next(simulator.parameters()).dtype
    return torch.float64


def _one(name: str, change: Rule) -> dict[str, Any]:
    return {name: change}


def _scaled(name: str, *, entities: Any = 0, at: Any = 0) -> Callable[[float], tuple[Do, ...]]:
    return lambda factor: (do(at=at, entities=entities, **_one(name, scale(factor))),)


def _changed(entities: Any = 0, **changes: Any) -> Callable[[float], tuple[Do, ...]]:
    return lambda dose: (do(entities=entities, **changes),)


def _removed(*entities: int) -> Callable[[float], tuple[Do, ...]]:
    return lambda dose: (do(entities=list(entities[: int(dose)]), active=False),)


def _rotated(name: str, entities: Any = 0) -> Callable[[float], tuple[Do, ...]]:
    return lambda degrees: (do(entities=entities, **_one(name, rotate(degrees))),)


_MASSES = (0.25, 0.5, 2.0, 4.0)
_INLET, _BEYOND = (Expression(f"node_types {sign} {INFLOW}") for sign in ("==", "!="))


def _usual_cylinder(state: State) -> bool:
    """Return whether a cylinder is of a size and at a place as in training: within what `cylinder_flow` draws from."""
    there = state.rest_positions[state.node_types == OBSTACLE]
    low, high = there.amin(0), there.amax(0)
    (x, y), radius = ((low + high) / 2).tolist(), float((high - low).max()) / 2
    near = 1e-3  # m: a circle's nodes do not lie at its very edges
    found = zip(LOWEST, (radius, x, y - HEIGHT / 2), HIGHEST, strict=False)
    return all(least - near <= one <= most + near for least, one, most in found)


def _inflow(factor: float) -> tuple[Do, ...]:
    return (do(at=ALWAYS, entities=_INLET, velocities=scale(factor)),)


WORLDS: Mapping[str, World] = MappingProxyType(
    {
        "rope": World(
            dataset="rope",
            seed=2026,
            checkpoint="rope",
            num_steps=50,
            engine=PlanarEngine(dt=0.02),
            kinds=(
                Kind(name="remove cylinders", doses=(1.0, 2.0), edits=_removed(15, 16)),
                Kind(
                    name="scale impulses",
                    factors=True,
                    doses=(0.25, 0.5, 1.5, 2.0, 3.0),
                    edits=_scaled("actions", entities=None, at=ALWAYS),
                    inside=(0.0, 1.5),
                ),
                Kind(name="pin the end", doses=(1.0,), edits=_changed(14, fixed=True, velocities=0.0)),
            ),
            wrong=(do(entities=None, spring_stiffnesses=scale(1.5)),),
            irrelevant=(do(entities=[15, 16], masses=scale(4.0)),),
            contacts=True,
        ),
        "springs": World(
            dataset="springs_nri",
            seed=42,
            checkpoint="springs_nri",
            num_steps=49,
            count=50,
            engine=SPRING_ENGINE,
            given={"masses": 1.0},
            sizes={"3 bodies": {"num_bodies": 3}, "10 bodies": {"num_bodies": 10}},
            kinds=(
                Kind(name="mass", factors=True, doses=_MASSES, edits=_scaled("masses"), inside=(1.0, 1.0)),
                Kind(name="remove", doses=(1.0,), edits=_removed(0)),
                Kind(
                    name="stiffness",
                    factors=True,
                    doses=(0.5, 2.0, 4.0),
                    edits=_scaled("spring_stiffnesses", entities=None),
                    inside=(1.0, 1.0),
                ),
            ),
            wrong=(do(entities=None, spring_stiffnesses=scale(1.2)),),
            hidden="spring_stiffnesses",
        ),
        "charged": World(
            dataset="charged_nri",
            seed=42,
            checkpoint="charged_nri",
            num_steps=49,
            count=50,
            engine=CHARGE_ENGINE,
            given={"masses": 1.0},
            sizes={"3 bodies": {"num_bodies": 3}, "10 bodies": {"num_bodies": 10}},
            kinds=(
                Kind(name="mass", factors=True, doses=_MASSES, edits=_scaled("masses"), inside=(1.0, 1.0)),
                Kind(name="flip the sign", doses=(1.0,), edits=_changed(0, charges=negate()), inside=(0.0, 1.0)),
                Kind(name="charge", factors=True, doses=(0.5, 2.0, 4.0), edits=_scaled("charges"), inside=(1.0, 1.0)),
                Kind(name="remove", doses=(1.0,), edits=_removed(0)),
            ),
            wrong=(do(entities=None, charges=scale(1.2)),),
            hidden="charges",
        ),
        "balls": World(
            dataset="balls_in",
            seed=2028,
            checkpoint="balls_varied",
            num_steps=100,
            count=30,
            engine=balls_engine(),
            kinds=(
                Kind(
                    name="mass",
                    factors=True,
                    doses=(0.25, 0.5, 0.8, 1.25, 2.0, 4.0),
                    edits=_scaled("masses"),
                    inside=(0.8, 1.25),
                ),
                Kind(
                    name="turn the velocity",
                    doses=(15.0, 45.0, 90.0, 180.0),
                    edits=_rotated("velocities"),
                    inside=(-180.0, 180.0),
                ),
                Kind(name="remove", doses=(1.0, 2.0), edits=_removed(0, 1)),
                Kind(
                    name="restitution",
                    factors=True,
                    doses=(0.5, 0.75),
                    edits=_scaled("restitutions", entities=None),
                    inside=(0.75, 1.0),
                ),
            ),
            sizes={"3 balls": {"num_balls": 3}, "9 balls": {"num_balls": 9}},
            wrong=(do(entities=None, restitutions=scale(0.8)),),
            contacts=True,
        ),
        "water": World(
            dataset="water_ramps",
            seed=2051,
            checkpoint="water_ramps_grid",
            num_steps=200,
            count=10,
            episode={"num_steps": 200},
            kinds=(
                Kind(
                    name="tilt gravity",
                    doses=(-45.0, -30.0, -15.0, 15.0, 30.0, 45.0),
                    edits=_rotated("gravity", None),
                    inside=(-30.0, 30.0),
                ),
                Kind(
                    name="scale gravity",
                    factors=True,
                    doses=(0.5, 0.75, 1.25, 1.5),
                    edits=_scaled("gravity", entities=None),
                    inside=(0.7, 1.3),
                ),
                Kind(
                    name="remove the obstacles",
                    doses=(1.0,),
                    edits=_changed("kinematic", active=False),
                    inside=(0.0, 1.0),
                ),
            ),
            wrong=(do(entities=None, gravity=scale(0.8)),),
            max_scenes=10,
        ),
        "flow": World(
            dataset="cylinder_flow_small",
            seed=2051,
            checkpoint="cylinder_flow_small",
            num_steps=60,
            count=6,
            episode={
                "num_steps": 60,
                "length": 1.6,
                "size": 0.06,
                "obstacle_size": 0.015,
                "warm_up": 2.5,
                "num_sub_steps": 2,
                "dt": 0.01,
            },
            quantity="velocities",
            kinds=(
                Kind(name="inflow speed", doses=(0.85, 1.3), edits=_inflow, inside=(0.8, 1.2), factors=True),
                Kind(
                    name="speed of the whole flow",
                    doses=(0.85, 1.3),
                    edits=lambda factor: (do(entities=_BEYOND, velocities=scale(factor)), *_inflow(factor)),
                    inside=(0.8, 1.2),
                    factors=True,
                ),
                Kind(
                    name="move the cylinder",
                    doses=(-0.03, 0.03),
                    elsewhere=lambda metres: {"shift": (0.0, metres)},
                    inside=_usual_cylinder,
                ),
                Kind(
                    name="size of the cylinder",
                    doses=(0.8, 1.25),
                    elsewhere=lambda factor: {"radius_scale": factor},
                    inside=_usual_cylinder,
                    factors=True,
                ),
            ),
            max_scenes=6,
        ),
    }
)


def world_named(name: str) -> World:
    """Return one of WORLDS.

    Raises:
        ValueError: there is no such world.
    """
    if name not in WORLDS:
        raise ValueError(f"There is no world '{name}' to ask about; the known ones are {', '.join(WORLDS)}.")
    return WORLDS[name]
