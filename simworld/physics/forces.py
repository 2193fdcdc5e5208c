"""Bodies that act on each other at a distance: gravity, springs, charges. Batched over scenes, on torch.

A law gives the force between the two bodies of a pair; forces are equal and opposite, so momentum is kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from simworld.simulate import BrokeDown
from simworld.state import State

Rule = Literal["symplectic_euler", "velocity_verlet", "fourth_order"]
Force = Callable[[Tensor], Tensor]
"""From the separations of pairs [p, d], second body minus first, to the forces on the first bodies [p, d]."""

Law = Callable[[State, "Pairs"], Force]
Graph = Literal["full", "springs"]
XI, LAMBDA, CHI = 0.1786178958448091, -0.2123418310626054, -0.06626458266981849
DRIFTS, KICKS = (XI, CHI, 1 - 2 * (CHI + XI), CHI), ((1 - 2 * LAMBDA) / 2, LAMBDA, LAMBDA, (1 - 2 * LAMBDA) / 2)
"""Shares of a sub-step by which "fourth_order" drifts, each before a kick, and one more drift as the first."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Unordered pairs of bodies: `first` [p] and `second` [p].

    `incident` [k, n] lists what acts on each body: pair q where it is first, p + q where it is second, and
    2 p for nothing.
    """

    first: Tensor
    second: Tensor
    incident: Tensor

    def separations(self, positions: Tensor) -> Tensor:
        """Return [p, d]: where the second bodies are, seen from the first."""
        return positions.index_select(0, self.second) - positions.index_select(0, self.first)

    def totals(self, forces: Tensor) -> Tensor:
        """Return the sum of forces on each body [n, d], from those on the first of each pair [p, d]."""
        signed = torch.cat([forces, -forces, forces.new_zeros(1, forces.shape[1])])
        # One gather for each of a body's pairs: four times as fast as embedding bags of so short rows.
        return functools.reduce(torch.add, (signed.index_select(0, pair) for pair in self.incident))


def pairs(state: State, graph: Graph = "full") -> Pairs:
    """Return all pairs of active bodies within a scene, or those that a spring joins; kept with the state."""
    make = _spring_pairs if graph == "springs" else _all_pairs
    return state.derived(f"pairs.{graph}", ("springs", "batch", "active"), make)


def _all_pairs(state: State) -> Pairs:
    counts = torch.bincount(state.batch, minlength=state.num_scenes).tolist()
    first = 0
    found = []
    known: dict[int, Tensor] = {}
    for count in counts:
        if count not in known:
            known[count] = torch.triu_indices(count, count, 1, device=state.device)
        found.append(known[count] + first)
        first += count
    return _paired(torch.cat(found, 1), state)


def _spring_pairs(state: State) -> Pairs:
    return _paired(state.springs.T if "springs" in state else state.batch.new_zeros(2, 0), state)


def _paired(ends: Tensor, state: State) -> Pairs:
    ends = ends[:, state.active[ends].all(0)]
    count = ends.shape[1]
    bodies, order = torch.sort(ends.flatten(), stable=True)
    degrees = torch.bincount(bodies, minlength=state.num_entities)
    starts = degrees.cumsum(0) - degrees
    width = int(degrees.max()) if count else 1
    incident = torch.full((width, state.num_entities), 2 * count, device=state.device)
    incident[torch.arange(2 * count, device=state.device) - starts[bodies], bodies] = order
    return Pairs(first=ends[0], second=ends[1], incident=incident)


def gravity(*, constant: float = 6.6743e-11, min_distance: float = 0.0) -> Law:
    """Return Newton's law, F = G m1 m2 r / max(|r|, min_distance)^3.

    `constant` is G [m^3 / (kg s^2)], in SI units unless the state's are others.
    """
    if not (math.isfinite(constant) and 0 <= min_distance < math.inf):
        raise ValueError(
            f"gravity needs a finite constant and a min_distance of 0 or more; got {constant}, {min_distance}."
        )

    def law(state: State, among: Pairs) -> Force:
        _check_apart(state, among, min_distance)
        strengths = (constant * state.masses[among.first] * state.masses[among.second])[:, None]
        return lambda r: strengths * r / _lengths(r, min_distance) ** 3

    return law


def charges(*, strength: float = 1.0) -> Law:
    """Return Coulomb's law, F = -strength q1 q2 r / |r|^3: like charges repel."""

    def law(state: State, among: Pairs) -> Force:
        _check_apart(state, among, 0.0)
        strengths = (-strength * state.charges[among.first] * state.charges[among.second])[:, None]
        return lambda r: strengths * r / _lengths(r, 0.0) ** 3

    return law


def springs(state: State, among: Pairs) -> Force:
    """Return Hooke's law along the state's springs, F = k (|r| - l) r / |r|; l = 0 without `spring_lengths`."""
    kept = state.active[state.springs].all(1)
    if not torch.equal(torch.stack([among.first, among.second], 1), state.springs[kept]):
        raise ValueError("springs() acts along springs and nowhere else; make the engine with graph='springs'.")
    stiffnesses = state.spring_stiffnesses[kept][:, None]
    if "spring_lengths" not in state:
        return lambda r: stiffnesses * r
    lengths = state.spring_lengths[kept][:, None]
    return lambda r: stiffnesses * (1 - lengths / _lengths(r, 1e-12)) * r


def _lengths(r: Tensor, least: float) -> Tensor:
    squares = r.square() @ r.new_ones(r.shape[1], 1)
    return (squares.clamp(min=least**2) if least else squares).sqrt()


def _check_apart(state: State, among: Pairs, min_distance: float) -> None:
    met = (among.separations(state.positions) == 0).all(1)
    if min_distance == 0 and bool(met.any()):
        pair = int(met.nonzero()[0, 0])
        raise ValueError(
            f"Bodies {int(among.first[pair])} and {int(among.second[pair])} are at the same place, where this law has "
            "no value; move one, or give the law a min_distance."
        )


def advance(
    state: State,
    among: Pairs,
    force: Force,
    *,
    dt: float,
    num_sub_steps: int,
    rule: Rule,
    max_force: float | None,
    action: Tensor | None,
    masses: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return positions and velocities [n, d] after `num_sub_steps` steps that together cover `dt` seconds.

    The total force on a body is cut off at `max_force`, `action` is added, and `masses`, if not all 1, divide it.
    "symplectic_euler" kicks, then drifts: first order; "velocity_verlet" is second order; "fourth_order" is the
    optimized Forest-Ruth-like one of Omelyan et al. 2002 (Computer Physics Communications 146, 188), which asks four
    times per sub-step for forces. Walls round the scene (`boundaries`) reflect after every drift. Fixed and inactive
    bodies stay.
    """
    h = dt / num_sub_steps
    moves = state.free
    free = None if bool(moves.all()) else moves[:, None]
    walls = state.boundaries[state.batch].unbind(1) if "boundaries" in state else None
    per_mass = None if masses is None else 1 / masses[:, None]

    def kick(x: Tensor, v: Tensor, time: float) -> Tensor:
        total = among.totals(force(among.separations(x)))
        total = total if max_force is None else total.clamp(-max_force, max_force)
        total = total if action is None else total + action
        total = total if per_mass is None else total * per_mass
        return v + time * (total if free is None else torch.where(free, total, 0.0))

    def drift(x: Tensor, v: Tensor, time: float = h) -> tuple[Tensor, Tensor]:
        x = x + time * (v if free is None else torch.where(free, v, 0.0))
        return (x, v) if walls is None else _reflect(x, v, *walls)

    x, v = state.positions, state.velocities
    if rule == "symplectic_euler":
        for _ in range(num_sub_steps):
            x, v = drift(x, kick(x, v, h))
        return x, v
    if rule == "fourth_order":
        for _ in range(num_sub_steps):
            for way, push in zip(DRIFTS, KICKS, strict=True):
                x, v = drift(x, v, h * way)
                v = kick(x, v, h * push)
            x, v = drift(x, v, h * XI)
        return x, v
    v = kick(x, v, h / 2)
    for number in range(num_sub_steps):
        x, v = drift(x, v)
        v = kick(x, v, h if number < num_sub_steps - 1 else h / 2)
    return x, v


def _reflect(x: Tensor, v: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    over, under = x > upper, x < lower
    # Whoever would fly through the whole box in one sub-step ends at the wall.
    x = torch.where(over, (2 * upper - x).maximum(lower), torch.where(under, (2 * lower - x).minimum(upper), x))
    return x, torch.where(over, -v.abs(), torch.where(under, v.abs(), v))


@dataclass(frozen=True, kw_only=True)
class ForceEngine:
    """Steps bodies under a law of force, F / m = a, in `num_sub_steps` sub-steps of `rule` per `dt` seconds.

    An action is a force [n, d] on every body, held for the step. Every component of the law's total force
    on a body is cut off at `max_force`. Without `masses` bodies have unit mass.
    """

    dt: float
    law: Law
    graph: Graph = "full"
    num_sub_steps: int = 1
    rule: Rule = "symplectic_euler"
    max_force: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.dt < math.inf and isinstance(self.num_sub_steps, int) and self.num_sub_steps >= 1):
            raise ValueError(
                f"A ForceEngine needs dt > 0 and a whole num_sub_steps >= 1; got {self.dt} and {self.num_sub_steps}."
            )
        if self.rule not in get_args(Rule) or self.graph not in get_args(Graph):
            raise ValueError(
                f"A ForceEngine needs a rule out of {', '.join(get_args(Rule))} and a graph out of "
                f"{', '.join(get_args(Graph))}; got {self.rule!r} and {self.graph!r}."
            )
        if not callable(self.law) or (self.max_force is not None and not self.max_force > 0):
            raise ValueError(f"A ForceEngine needs a law, as gravity() makes, and max_force > 0; got {self.max_force}.")

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the state `dt` later.

        Raises:
            ValueError: bodies start outside the walls, or `action` has another shape.
        """
        if action is not None and action.shape != state.positions.shape:
            raise ValueError(f"This engine takes forces {list(state.positions.shape)}; got {list(action.shape)}.")
        check_inside(state)
        among = pairs(state, self.graph)
        x, v = advance(
            state,
            among,
            self.law(state, among),
            dt=self.dt,
            num_sub_steps=self.num_sub_steps,
            rule=self.rule,
            max_force=self.max_force,
            action=action,
            masses=state.masses if "masses" in state else None,
        )
        return state.replace(positions=x, velocities=v)


def check_inside(state: State) -> None:
    """Raise a ValueError if an active body is outside the state's walls."""
    if "boundaries" not in state:
        return
    lower, upper = state.boundaries[state.batch].unbind(1)
    outside = ((state.positions < lower) | (state.positions > upper)).any(1) & state.active
    if bool(outside.any()):
        body = int(outside.nonzero()[0, 0])
        raise BrokeDown(
            f"Bodies must be inside the walls, from {lower[body].tolist()} to {upper[body].tolist()}; body {body} is "
            f"at {state.positions[body].tolist()}. Move it inside or widen the boundaries."
        )
