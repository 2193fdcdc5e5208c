"""What can be asked of two worlds, one without interventions and one with them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from simworld.expressions import Expression, Names
from simworld.fields import time_unit
from simworld.intervene import Do, Rule
from simworld.state import State
from simworld.trajectory import Trajectory
from simworld.worlds import Counterfactual

NUM_DOSES = 9  # looked at before the interval in which the outcome changes is halved
LISTED = 6  # entities that a text names
Said = str | int | Sequence[int]


class Teller(Protocol):
    """Whatever tells what would have happened: a simulator, an engine, or who says that nothing changes."""

    def under(self, edits: Sequence[Do]) -> Counterfactual:
        """Return the worlds without and with interventions."""
        ...

    def without(self, groups: Sequence[Sequence[int]]) -> list[Counterfactual]:
        """Return the worlds with and without each group of entities, removed from the start."""
        ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked about: interventions, names of entities, who tells, and the worlds with and without them."""

    edits: tuple[Do, ...]
    names: Names
    teller: Teller
    worlds: Counterfactual

    def text(self, entity: int) -> str:
        """Return the name of an entity, its number if it has none of its own."""
        return next((name for name, rows in self.names.items() if list(rows) == [entity]), str(entity))

    def listed(self, entities: Sequence[int]) -> str:
        """Return the first few of some entities by name."""
        few = ", ".join(map(self.text, entities[:LISTED]))
        return f"{few}, ..." if len(entities) > LISTED else few


@dataclass(frozen=True)
class Finding:
    """An answer as plain values and as text."""

    values: Mapping[str, Any]
    text: str


class Question(ABC):
    """Something that can be found of a case."""

    @abstractmethod
    def find(self, case: Case) -> Finding:
        """Return what is found.

        Raises:
            ValueError: the worlds have no such entity, field, frame or number.
        """

    @property
    @abstractmethod
    def text(self) -> str:
        """The question in words."""


@dataclass(frozen=True, kw_only=True)
class Effect(Question):
    """How far, and which way, the interventions move a field of some entities; at a step, the "end" or its "max"."""

    entities: Said | None = None
    field: str = "positions"
    at: int | str = "end"

    @property
    def text(self) -> str:
        """The question in words."""
        return f"effect on {self.field} of {_whom(self.entities)} at {self.at}"

    def find(self, case: Case) -> Finding:
        """Return the mean size of the effect over the entities, and the mean effect as its direction."""
        worlds, unit = case.worlds, _unit(case.worlds.factual, self.field)
        vectors, rows = _effect(worlds, self.field), entities_of(self.entities, worlds.factual.initial, case.names)
        sizes = vectors[:, rows].norm(dim=2).mean(1)
        step = int(sizes.argmax()) if self.at == "max" else _frame(self.at, len(sizes))
        size, direction = float(sizes[step]), vectors[step, rows].mean(0).tolist()
        values = {"size": size, "direction": direction, "unit": unit, "step": step, "entities": rows.tolist()}
        way = ", ".join(f"{part / size if size else 0.0:+.2f}" for part in direction)
        return Finding(values, f"{size:.3g} {unit} toward ({way}) at step {step}" if size else "none")


@dataclass(frozen=True, kw_only=True)
class Event(Question):
    """Whether a condition ever holds in either world, and when first."""

    of: str

    @property
    def text(self) -> str:
        """The question in words."""
        return f"does {self.of} come to hold"

    def find(self, case: Case) -> Finding:
        """Return the first steps at which the condition holds, None where it never does."""
        condition = Expression(self.of, case.names)
        worlds = {"factual": case.worlds.factual, "counterfactual": case.worlds.counterfactual}
        found = {name: _first(condition, world) for name, world in worlds.items()}
        said = [_when(found[name], world) for name, world in worlds.items()]
        return Finding(found, f"{said[1]}; factual: {said[0]}")


@dataclass(frozen=True, kw_only=True)
class Value(Question):
    """The number that an expression comes to in both worlds; at a step, the "end", its "max" or its "min"."""

    of: str
    at: int | str = "end"

    @property
    def text(self) -> str:
        """The question in words."""
        return f"{self.of} at {self.at}"

    def find(self, case: Case) -> Finding:
        """Return the two numbers."""
        expression = Expression(self.of, case.names)
        factual = _number(expression, case.worlds.factual, self.at)
        asked = _number(expression, case.worlds.counterfactual, self.at)
        values = {"factual": factual, "counterfactual": asked, "difference": asked - factual}
        return Finding(values, f"{asked:.4g} ({asked - factual:+.3g}); factual: {factual:.4g}")


@dataclass(frozen=True, kw_only=True)
class Affected(Question):
    """Which entities the interventions change in a field by more than `eps`, in its unit, at some frame."""

    eps: float
    field: str = "positions"

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps must be 0 or more; got {self.eps}.")

    @property
    def text(self) -> str:
        """The question in words."""
        return f"who is changed in {self.field} by more than {self.eps:g}"

    def find(self, case: Case) -> Finding:
        """Return the entities; those that are gone in either world count at the frames before alone."""
        changed = (_effect(case.worlds, self.field).norm(dim=2) > self.eps).any(0)
        rows = changed.nonzero()[:, 0].tolist()
        listed = f": {case.listed(rows)}" if rows else ""
        return Finding({"count": len(rows), "entities": rows}, f"{len(rows)} of {len(changed)}{listed}")


@dataclass(frozen=True, kw_only=True)
class Dose(Question):
    """The smallest dose of an intervention with which a condition comes to hold, or no longer does.

    `vary` names the intervention by its number and what of it is the dose: {intervention = 0, scale = "velocities"}.
    A dose stands in place of the number there, or multiplies the rows there. `doses` are tried in order; of a `range`
    [from, to] some that lie evenly, and the interval in which the outcome changes is halved until it is shorter than
    the range by `digits` powers of ten.
    """

    event: str
    vary: Mapping[str, int | str]
    range: Sequence[float] = ()
    doses: Sequence[float] = ()
    digits: int = 3

    def __post_init__(self) -> None:
        self._varied()
        self._tried()

    @property
    def text(self) -> str:
        """The question in words."""
        verb, name = self._varied()
        return f"smallest {verb} of {name} that changes whether {self.event}"

    def find(self, case: Case) -> Finding:
        """Return the smallest dose that was found to change the outcome, and the largest below that does not."""
        condition = Expression(self.event, case.names)
        tried = self._tried()

        def outcome(dose: float) -> bool:
            return _first(condition, case.teller.under(self._dosed(case.edits, dose)).counterfactual) is not None

        usual = _first(condition, case.worlds.factual) is not None
        below, dose = None, None
        for one in tried:
            if outcome(one) != usual:
                dose = one
                break
            below = one
        if dose is None:
            none = {"dose": None, "unchanged_at": below, "outcome": usual}
            return Finding(none, f"no dose from {tried[0]:g} to {tried[-1]:g} changes it")
        least = (tried[-1] - tried[0]) * 10.0**-self.digits
        while self.range and below is not None and dose - below > least:
            middle = (below + dose) / 2
            if middle in (below, dose):  # numbers are no finer
                break
            below, dose = (below, middle) if outcome(middle) != usual else (middle, dose)
        beside = f"{below:.{self.digits + 1}g} does not" if below is not None else "the least that was tried"
        values = {"dose": dose, "unchanged_at": below, "outcome": not usual}
        return Finding(values, f"{dose:.{self.digits + 1}g} ({beside})")

    def _varied(self) -> tuple[str, str]:
        verbs = [key for key in self.vary if key in ("set", "scale", "shift", "rotate")]
        number = self.vary.get("intervention", 0)
        if len(verbs) != 1 or set(self.vary) - {*verbs, "intervention"} or not isinstance(number, int):
            raise ValueError(
                "vary must name an intervention and what of it is the dose, as in {intervention = 0, scale = "
                f'"velocities"}}; got {dict(self.vary)}.'
            )
        return verbs[0], str(self.vary[verbs[0]])

    def _tried(self) -> list[float]:
        if bool(self.range) == bool(self.doses) or not 1 <= self.digits <= 12:
            raise ValueError("A dose is looked for in a range = [from, to] or among doses, to 1 to 12 digits.")
        if self.doses:
            return sorted(self.doses)
        if len(self.range) != 2 or not self.range[0] < self.range[1]:
            raise ValueError(f"range must be [from, to] with from below to; got {list(self.range)}.")
        first, last = self.range
        return [first + (last - first) * k / (NUM_DOSES - 1) for k in range(NUM_DOSES)]

    def _dosed(self, edits: Sequence[Do], dose: float) -> tuple[Do, ...]:
        verb, name = self._varied()
        number = int(self.vary.get("intervention", 0))
        change = edits[number].changes.get(name) if 0 <= number < len(edits) else None
        if not isinstance(change, Rule) or change.verb != verb:
            raise ValueError(
                f"vary names intervention {number}, {verb} = {name}, and there is no such; the query has "
                f"{len(edits)} interventions, numbered from 0."
            )
        amount = (dose * torch.as_tensor(change.amount)).tolist() if isinstance(change.amount, list) else dose
        changed = replace(edits[number], changes={**edits[number].changes, name: Rule(verb, amount)})
        return (*edits[:number], changed, *edits[number + 1 :])


@dataclass(frozen=True, kw_only=True)
class Causes(Question):
    """Candidates in the order of how much would be different without each: but-for causes of an outcome.

    The outcome is an expression, `of`, or where some `entities` are; at a step or the "end". Of a condition it is
    whether it ever holds. Candidates are removed from the factual world, interventions of the query left out.
    """

    candidates: str | Sequence[int | str | Sequence[int]]
    of: str | None = None
    entities: Said | None = None
    at: int | str = "end"

    def __post_init__(self) -> None:
        if self.of is not None and self.entities is not None:
            raise ValueError("causes are of an expression `of` or of the places of `entities`; give one of them.")

    @property
    def text(self) -> str:
        """The question in words."""
        return f"whose removal matters to {self.of or f'positions of {_whom(self.entities)} at {self.at}'}"

    def find(self, case: Case) -> Finding:
        """Return the candidates with what is different without each, the largest first."""
        start = case.worlds.factual.initial
        groups = self._groups(start, case.names)
        told = case.teller.without(list(groups.values()))
        sizes = [self._outcome(case, worlds, rows) for worlds, rows in zip(told, groups.values(), strict=True)]
        order = sorted(range(len(sizes)), key=lambda k: -abs(sizes[k]))
        names = list(groups)
        found = [{"cause": names[k], "entities": list(groups[names[k]]), "effect": sizes[k]} for k in order]
        best = ", ".join(f"{names[k]} ({sizes[k]:.3g})" for k in order[:LISTED] if sizes[k])
        return Finding({"ranking": found}, best or "none of them")

    def _groups(self, start: State, names: Names) -> dict[str, list[int]]:
        if isinstance(self.candidates, str):
            each: Sequence[int | str | Sequence[int]] = entities_of(self.candidates, start, names).tolist()
        else:
            each = self.candidates
        if not each:
            raise ValueError("Causes need a candidate or more; got none.")
        called = {tuple(rows): name for name, rows in names.items()}
        groups = [entities_of(one, start, names).tolist() for one in each]
        return {called.get(tuple(g), str(one)): g for one, g in zip(each, groups, strict=True)}

    def _outcome(self, case: Case, worlds: Counterfactual, gone: Sequence[int]) -> float:
        if self.of is None:
            rows = entities_of(self.entities, worlds.factual.initial, case.names)
            rows = rows[~torch.isin(rows, rows.new_tensor(gone))]
            sizes = _effect(worlds, "positions")[:, rows].norm(dim=2).mean(1)
            return float(sizes[_frame(self.at, len(sizes))]) if len(rows) else 0.0
        expression = Expression(self.of, case.names)
        if expression.value(worlds.factual.frame(0)).dtype == torch.bool:
            here, there = (_first(expression, w) is not None for w in (worlds.factual, worlds.counterfactual))
            return float(there) - float(here)
        return _number(expression, worlds.counterfactual, self.at) - _number(expression, worlds.factual, self.at)


QUESTIONS: Mapping[str, type[Question]] = {
    "effect": Effect,
    "event": Event,
    "value": Value,
    "affected": Affected,
    "dose": Dose,
    "causes": Causes,
}
"""What can be asked, by the kind that a query file says."""


def entities_of(said: Said | None, state: State, names: Names) -> Tensor:
    """Return the numbers [k] of entities said as numbers, a name or a condition; all for None.

    Raises:
        ValueError: there are no such entities.
    """
    if said is None:
        return torch.arange(state.num_entities)
    if isinstance(said, str):
        rows = Expression(said, names).entities(state).cpu()
    else:
        rows = torch.as_tensor(said, dtype=torch.int64).reshape(-1)
    if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= state.num_entities:
        raise ValueError(
            f"Entities must be one or more of 0 to {state.num_entities - 1}; '{said}' is {rows.tolist() or 'none'}."
        )
    return rows


def _whom(said: Said | None) -> str:
    return "all" if said is None else said if isinstance(said, str) else f"entity {said}"


def _unit(world: Trajectory, name: str) -> str:
    moving = [k for k in world.initial.moving_fields if k in world.frames]
    if name not in moving:
        raise ValueError(f"Effects are on fields that change in time, {', '.join(moving)}; got '{name}'.")
    return world.initial.fields[name].unit


def _effect(worlds: Counterfactual, name: str) -> Tensor:
    """Return [T, n, k]: the effect on a field, nothing for entities that are gone in either world."""
    _unit(worlds.factual, name)
    effect = worlds.effect(name)
    there = (worlds.factual.active & worlds.counterfactual.active)[..., None]
    return torch.where(there, effect.reshape(*effect.shape[:2], math.prod(effect.shape[2:])), 0.0)


def _frame(at: int | str, length: int) -> int:
    if at == "end":
        return length - 1
    if not isinstance(at, int) or not 0 <= at < length:
        raise ValueError(f'at must be a step from 0 to {length - 1}, "end" or "max"; got {at!r}.')
    return at


def _first(condition: Expression, world: Trajectory) -> int | None:
    """Return the first step at which a condition holds, or None."""
    return next((t for t in range(len(world)) if condition.holds(world.frame(t), t)), None)


def _number(expression: Expression, world: Trajectory, at: int | str) -> float:
    if at in ("max", "min"):
        values = [expression.number(world.frame(t), t) for t in range(len(world))]
        return max(values) if at == "max" else min(values)
    step = _frame(at, len(world))
    return expression.number(world.frame(step), step)


def _when(step: int | None, world: Trajectory) -> str:
    if step is None:
        return "never"
    unit = time_unit({name: one.unit for name, one in world.initial.fields.items()})
    return f"at step {step} ({step * world.dt:.3g} {unit})"
