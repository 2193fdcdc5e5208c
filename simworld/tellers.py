"""Who tells what would have happened: a simulator, a world's engine from its start on, or a recorded branch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from simworld.data.ephemeris import BODIES, GM
from simworld.data.generate import GENERATORS, SPLITS
from simworld.data.toml import check_arguments, check_keys
from simworld.intervene import Do, remove
from simworld.models import ForceNetwork
from simworld.physics import PlanarEngine, PushEngine, balls_engine, string_engine
from simworld.physics.force_worlds import CHARGE_ENGINE, PLANET_ENGINE, SPRING_ENGINE
from simworld.physics.forces import ForceEngine, gravity
from simworld.simulate import Simulator
from simworld.state import State
from simworld.trajectory import Trajectory
from simworld.worlds import Counterfactual, branches, continued, first_change

CHECKED, MISSED = 5, 0.1  # steps in which the engine of a recorded world may miss so much of how far bodies move


def newton(dt: float = 1.0, *, num_sub_steps: int = 24) -> Simulator:
    """Return Newton's law between the bodies of the solar system, in astronomical units, days and solar masses."""
    return ForceEngine(dt=dt, law=gravity(constant=GM[0]), num_sub_steps=num_sub_steps, rule="velocity_verlet")


def rope_engine(dt: float = 1 / 50) -> Simulator:
    """Return the engine of ropes among cylinders."""
    return PlanarEngine(dt=dt)


def springs_engine(dt: float = SPRING_ENGINE.dt) -> Simulator:
    """Return the engine of bodies on springs."""
    return replace(SPRING_ENGINE, dt=dt)


def charges_engine(dt: float = CHARGE_ENGINE.dt) -> Simulator:
    """Return the engine of charged bodies."""
    return replace(CHARGE_ENGINE, dt=dt)


def planets_engine(dt: float = PLANET_ENGINE.dt) -> Simulator:
    """Return the engine of planets in the plane."""
    return replace(PLANET_ENGINE, dt=dt)


ENGINES: Mapping[str, Callable[..., Simulator]] = {
    "newton": newton,
    "rope": rope_engine,
    "balls": balls_engine,
    "string": string_engine,
    "springs": springs_engine,
    "charges": charges_engine,
    "planets": planets_engine,
    "push": PushEngine,
}
"""Known engines that queries may name; a table's further keys are their arguments."""


def engine_from(said: Mapping[str, Any], where: str, dt: float | None) -> Simulator:
    """Return the engine that a table names, for steps of `dt` if the table says none.

    Raises:
        ValueError: there is no such engine, or it has no such argument.
    """
    name = str(said.get("engine"))
    if name not in ENGINES:
        raise ValueError(f"{where}: engine must be one of {', '.join(ENGINES)}; got '{name}'.")
    given = {key: value for key, value in said.items() if key != "engine"}
    made: Callable[..., Any] = ENGINES[name]
    check_arguments(f"{where}, engine {name}", given, made)
    return ENGINES[name](**({} if dt is None else {"dt": dt}) | given)


def check_tells(simulator: Simulator, observed: Trajectory, where: str) -> None:
    """Raise a ValueError if what should know the truth does not go on as was observed, even for a few steps."""
    steps = min(CHECKED, observed.num_steps)
    if not steps or "positions" not in observed.initial:
        return
    start, there = observed.frame(0), observed["positions"]
    made = continued(observed, 0, simulator, observed.actions, steps, ())["positions"]
    free = start.free
    missed, moved = ((one - there[steps])[free].norm() for one in (made[steps], there[0]))
    if float(missed) > MISSED * float(moved):
        share = float(missed / moved.clamp(min=1e-300))
        raise ValueError(
            f"{where} misses what was recorded by {share:.2g} of how far bodies move in {steps} steps; it is not the "
            "engine of this world. Name that one, or leave truth out."
        )


def with_masses(observed: Trajectory, simulator: Simulator) -> tuple[Trajectory, Simulator]:
    """Return a trajectory and a simulator that agree on masses, so that one can ask of others.

    Where the state has none, a model that learned them gives its own; the bodies of the solar system have the known.
    """
    state = observed.initial
    learned = isinstance(simulator, ForceNetwork) and simulator.masses == "learned"
    if learned and "object_types" in state:
        assert isinstance(simulator, ForceNetwork)
        masses = simulator.masses_found[state["object_types"]]
        return _weighed(observed, masses), simulator.with_masses_given()
    if are_planets(state):
        return _weighed(observed, state["positions"].new_tensor(GM) / GM[0]), simulator
    return observed, simulator


def are_planets(state: State) -> bool:
    """Return whether a state is one of the solar system: its bodies, in astronomical units."""
    return "positions" in state and state.num_entities == len(BODIES) and state.fields["positions"].unit == "au"


def _weighed(observed: Trajectory, masses: Tensor) -> Trajectory:
    state = observed.initial
    if "masses" in state:
        return observed
    values: dict[str, Any] = {name: state[name] for name in state}
    return replace(observed, initial=type(state)(batch=state.batch, active=state.active, masses=masses, **values))


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Tells by a simulator what becomes of an observed trajectory, from the frame `seen` on at the latest."""

    observed: Trajectory
    simulator: Simulator
    num_steps: int
    seen: int

    _factual: dict[int, Trajectory] = field(default_factory=dict, init=False, repr=False, compare=False)

    def under(self, edits: Sequence[Do]) -> Counterfactual:
        """Return the worlds without and with interventions, as `counterfactual` does."""
        step = min(first_change(self.observed, edits), self.seen, self.num_steps)
        asked = self._continued(step, edits)
        factual = self._without(step)
        return Counterfactual(observed=self.observed, factual=factual, counterfactual=asked, step=step)

    def without(self, groups: Sequence[Sequence[int]]) -> list[Counterfactual]:
        """Return the worlds with and without each group, all told in one rollout."""
        asked = [(), *([remove(list(rows))] for rows in groups)]
        # The world as it is, is scene 0: so all are rounded alike.
        factual, *others = branches(
            [self.observed] * len(asked), asked, simulator=self.simulator, num_steps=self.num_steps
        )
        return [Counterfactual(observed=self.observed, factual=factual, counterfactual=one, step=0) for one in others]

    def _without(self, step: int) -> Trajectory:
        if step not in self._factual:
            self._factual[step] = self._continued(step, ())
        return self._factual[step]

    def _continued(self, step: int, edits: Sequence[Do]) -> Trajectory:
        return continued(self.observed, step, self.simulator, self.observed.actions, self.num_steps, edits)


@dataclass(frozen=True, kw_only=True)
class Unchanged:
    """Says that nothing changes: the answer to be better than."""

    worlds: Counterfactual

    def under(self, edits: Sequence[Do]) -> Counterfactual:
        """Return the factual world, twice."""
        return replace(self.worlds, counterfactual=self.worlds.factual)

    def without(self, groups: Sequence[Sequence[int]]) -> list[Counterfactual]:
        """Return the factual world, twice, for each group."""
        return [self.under(())] * len(groups)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Tells by the engine of a world, which begins anew from its start."""

    world: Mapping[str, Any]
    observed: Trajectory
    num_steps: int

    def under(self, edits: Sequence[Do]) -> Counterfactual:
        """Return the recorded world, and the engine's under interventions."""
        factual = self.observed.window(0, self.num_steps + 1)
        other = episode_of(self.world, edits).window(0, self.num_steps + 1).to(factual.initial.dtype)
        return Counterfactual(observed=factual, factual=factual, counterfactual=other, step=0)

    def without(self, groups: Sequence[Sequence[int]]) -> list[Counterfactual]:
        """Return the worlds with and without each group."""
        return [self.under([remove(list(rows))]) for rows in groups]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Tells what a file recorded of the interventions of a query, and of no others."""

    observed: Trajectory
    branch: Trajectory
    edits: tuple[Do, ...]

    def under(self, edits: Sequence[Do]) -> Counterfactual:
        """Return the recorded worlds.

        Raises:
            LookupError: other interventions were not recorded.
        """
        if tuple(edits) != self.edits:
            raise LookupError("Only one branch was recorded.")
        length = min(len(self.observed), len(self.branch))
        factual, other = (path.window(0, length) for path in (self.observed, self.branch))
        return Counterfactual(observed=factual, factual=factual, counterfactual=other, step=0)

    def without(self, groups: Sequence[Sequence[int]]) -> list[Counterfactual]:
        """Raise a LookupError: no such branch was recorded."""
        return [self.under([remove(list(rows))]) for rows in groups]


def check_world(world: object, where: str) -> None:
    """Raise a ValueError unless a table says which episode of which world is meant."""
    check_keys(where, world, ("dataset", "seed", "split", "number", "episode"), required=("dataset", "seed"))
    assert isinstance(world, Mapping)
    if world["dataset"] not in list(GENERATORS):
        raise ValueError(f"{where}: dataset must be one of {', '.join(GENERATORS)}; got {world['dataset']!r}.")
    if world.get("split", "test") not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}; got {world['split']!r}.")
    for key in ("seed", "number"):
        value = world.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{where}: {key} must be a whole number, 0 or more; got {value!r}.")
    leave = ("seed", "seeds", "question", "interventions")
    check_arguments(f"{where}.episode", world.get("episode", {}), GENERATORS[world["dataset"]].episode, leave=leave)


def answers_interventions(world: Mapping[str, Any]) -> bool:
    """Return whether the engine of a world answers interventions."""
    return "interventions" in inspect.signature(GENERATORS[world["dataset"]].episode).parameters


def episode_of(world: Mapping[str, Any], edits: Sequence[Do] = ()) -> Trajectory:
    """Return the episode that a table names, made by the engine of its world under interventions."""
    seed = [world["seed"], SPLITS.index(world.get("split", "test")), world.get("number", 0)]
    asked: dict[str, Any] = {"interventions": tuple(edits)} if edits else {}
    made = GENERATORS[world["dataset"]].make([seed], **world.get("episode", {}), **asked)
    return made[0]
