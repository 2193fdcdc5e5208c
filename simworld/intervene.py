"""Interventions: functions `(state, step) -> state` that hold a world to something else."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simworld.expressions import Expression
from simworld.fields import check_values
from simworld.simulate import Edit
from simworld.state import State

When = int | range | str | Expression | Callable[[State, int], bool]
Entities = Tensor | Sequence[int] | int | str | Expression
Value = Tensor | float | bool | Sequence[Any]
Change = Value | Callable[[Tensor], Tensor]
FUNCTION = "function"  # how records say of a change or an event that it was one of Python, before its name
LEAST_OVERLAP = 1e-4  # of a radius, above what positions are rounded to
DISTANCES_AT_ONCE = 2**22  # 32 MiB in double precision


@dataclass(frozen=True)
class Rule:
    """A change of rows that can be written down: `verb` is set, scale, shift, negate, rotate or hold."""

    verb: str
    amount: Any = None

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the changed rows."""
        if self.verb == "hold":
            return rows
        if self.verb == "set":
            return _fitting(self.verb, self.amount, rows)
        if rows.dtype == torch.bool:
            raise ValueError(f"{self.verb} is for numbers; set a flag to true or false.")
        if self.verb == "scale":
            return rows * _fitting(self.verb, self.amount, rows)
        if self.verb == "shift":
            return rows + _fitting(self.verb, self.amount, rows)
        if self.verb == "negate":
            return -rows
        if isinstance(self.amount, bool) or not isinstance(self.amount, int | float):
            raise ValueError(f"rotate takes a number of degrees; got {self.amount!r}.")
        return _turned(rows, float(self.amount))


def scale(factor: Value) -> Rule:
    """Return the change that multiplies rows by a number, or by one for each component."""
    return Rule("scale", factor)


def shift(by: Value) -> Rule:
    """Return the change that adds to rows a number, or one to each component."""
    return Rule("shift", by)


def negate() -> Rule:
    """Return the change of sign."""
    return Rule("negate")


def rotate(degrees: float) -> Rule:
    """Return the change that turns vectors anticlockwise in the plane, or about the third axis in space."""
    return Rule("rotate", float(degrees))


def hold() -> Rule:
    """Return the change that keeps rows as they were at its first step."""
    return Rule("hold")


@dataclass(frozen=True, kw_only=True)
class Do(Edit):
    """What `do` returns: changes of fields, of which entities and when."""

    at: int | range | Expression | Callable[[State, int], bool]
    entities: Tensor | Expression | None
    changes: Mapping[str, Change]
    event: str = ""
    once: bool = False
    mask_size: int | None = field(default=None, repr=False)
    holds: bool = field(default=False, repr=False)  # where bodies were before: nothing new to overlap

    @property
    def changes_past(self) -> bool:  # type: ignore[override]
        """Whether it may move slots, and their history with them, after frame 0."""
        return "slots" in self.changes and self.at != 0

    @property
    def first(self) -> int:  # type: ignore[override]
        """The first step at which it may act."""
        if isinstance(self.at, range):
            return self.at.start
        return self.at if isinstance(self.at, int) else 0

    def applies(self, state: State, step: int) -> bool:
        """Return whether it acts at a step."""
        if isinstance(self.at, int):
            return step == self.at
        if isinstance(self.at, range):
            return step in self.at
        return self.at.holds(state, step) if isinstance(self.at, Expression) else bool(self.at(state, step))

    def begun(self, state: State, step: int) -> Do:
        """Return what it goes on as from its first step: what is to be held is held to what it is here."""
        held = [name for name, change in self.changes.items() if isinstance(change, Rule) and change.verb == "hold"]
        if not held:
            return self
        chosen, now = self._rows(state, step), {}
        for name in held:
            _check_known(state, name)
            now[name] = Rule("set", _picked(name, current_rows(state, name), chosen, self.mask_size))
        return replace(self, entities=chosen, mask_size=None, changes={**self.changes, **now}, holds=True)

    def idle(self, state: State, step: int) -> str:
        """Return that there is no entity to act on, where there is none."""
        rows = self._rows(state, step)
        if rows is None or rows.numel():
            return ""
        return (
            f"{self.entities.text!r} holds of no entity" if isinstance(self.entities, Expression) else "none is named"
        )

    def __call__(self, state: State, step: int) -> State:
        """Return the state with its fields changed; the state itself where it does not act.

        Raises:
            ValueError: an unknown field or entity, rows of another shape, values that are not finite or not
                allowed, or bodies that lie in each other after it.
        """
        changes = {name: change for name, change in self.changes.items() if name != "actions"}
        if not changes or not self.applies(state, step):
            return state
        rows = self._rows(state, step)
        made = {name: self._changed(state, name, change, rows) for name, change in changes.items()}
        if "slots" in made and "history" in state and not self._goes_on(step):
            made["history"] = state["history"] + (made["slots"] - state["slots"])[:, None]
        after = state.replace(**made)
        if made.keys() & {"positions", "radii", "active"} and not self.holds:
            _check_overlaps(state, after)
        return after

    def act(self, action: Tensor | None, state: State, step: int) -> Tensor | None:
        """Return the action of a step, changed; the action itself where it is left alone."""
        if "actions" not in self.changes or not self.applies(state, step):
            return action
        if action is None:
            raise ValueError(
                "do(actions=...) needs actions to change; give them to the rollout, zeros if there are none."
            )
        rows = self._rows(state, step)
        return _put("actions", self.changes["actions"], action, rows, self.mask_size)

    def to_json(self) -> dict[str, Any]:
        """Return what it does as plain values: a table that `intervention_tables` reads."""
        said: dict[str, Any] = {"at": _said_when(self.at)}
        if self.once:
            said["once"] = True
        if self.entities is not None:
            said["entities"] = self.entities.text if isinstance(self.entities, Expression) else self.entities.tolist()
        for name, change in self.changes.items():
            rule = change if isinstance(change, Rule) else Rule("set", _said_value(change))
            if rule.amount is None:
                said.setdefault(rule.verb, []).append(name)
            else:
                said.setdefault(rule.verb, {})[name] = _said_value(rule.amount)
        return said

    def _rows(self, state: State, step: int) -> Tensor | None:
        if not isinstance(self.entities, Expression):
            return self.entities
        return self.entities.entities(state, step)

    def _goes_on(self, step: int) -> bool:
        """Return whether it acted at the step before, so that what came of it is history already."""
        return self.holds or (isinstance(self.at, range) and step - 1 in self.at)

    def _changed(self, state: State, name: str, change: Change, rows: Tensor | None) -> Tensor:
        """Return a field with changed rows."""
        _check_known(state, name)
        made = _put(name, change, current_rows(state, name), rows, self.mask_size)
        if name != "active":
            check_values(state.fields[name], name, made)
            _check_sense(state, name, made, change)
        if name == "radii" and bool((made < 0).any()):
            raise ValueError(f"radii must be 0 or more; got {float(made.min()):.4g}. Remove bodies by active=False.")
        return made


def do(*, at: When = 0, entities: Entities | None = None, once: bool = False, **changes: Change) -> Do:
    """Return the intervention that sets fields of some entities at some steps.

    `at` is a step, a range of steps, or an event: a condition as text ("gap(3, 5) <= 0", see
    `simworld.expressions`) or a function `(state, step) -> bool`; with `once`, an event's first step alone.
    `entities` are entity numbers, a mask of entities, or a condition on each as text ("object_types == 1"); all if
    None; for a field whose rows are not entities, they are its rows. `changes` maps fields, `active` or `actions` to a
    value, to a rule (`scale`, `shift`, `negate`, `rotate`, `hold`) or to a function of the current rows.
    `do(active=False, entities=[3])` removes body 3. A step at which `at` does not hold returns the state itself.

    Changed `slots` are put elsewhere, not pushed: their history moves by the same change, so that a model that tells
    speed from it finds what it was. Over a range that is so at its first step; from then on what was made is history.
    To give entities slots, and speed, of others, see `replace_slots`.

    Raises:
        ValueError: nothing is to be changed, or a condition cannot be read; when applied, an unknown field or
            entity, rows of another shape, values that are not allowed, or bodies that lie in each other after it.
    """
    if not changes:
        raise ValueError("do() changes nothing; name a field and its value, as in do(at=0, velocities=v).")
    actions = changes.get("actions")
    if isinstance(actions, Rule) and actions.verb == "hold":
        raise ValueError("hold() is for fields; give actions the values that they are to have.")
    when = _when(at)
    awaited = not isinstance(when, int | range)
    if once and not awaited:
        raise ValueError("once=True is for events; give `at` as a condition, or as the step itself.")
    rows, mask_size = chosen_rows(entities, "do")
    return Do(
        at=when,
        entities=rows,
        changes=dict(changes),
        event=str(_said_when(when)) if awaited else "",
        once=once,
        mask_size=mask_size,
    )


def remove(entities: Entities, *, at: When = 0) -> Do:
    """Return the intervention that takes entities away: they neither act nor move from then on."""
    return do(at=at, entities=entities, active=False)


def pin(entities: Entities, *, at: int = 0, until: int = sys.maxsize) -> Do:
    """Return the intervention that holds entities where they are at step `at`, at rest, until a step."""
    return do(at=range(at, until), entities=entities, positions=hold(), velocities=0.0)


def reserve(state: State, count: int = 1, *, like: int = 0) -> State:
    """Return the state with `count` inactive entities more in each scene, copies of its entity `like`.

    They neither act nor move until an intervention makes them active: `do(entities=n, active=True, positions=...)`.
    """
    if count < 1:
        raise ValueError(f"reserve() adds 1 or more entities to a scene; got {count}.")
    scenes = [_with_copies(state.scene(number), count, like) for number in range(state.num_scenes)]
    return type(state).cat(scenes).using(state.simulator)


def _with_copies(scene: State, count: int, like: int) -> State:
    if not 0 <= like < len(scene):
        raise ValueError(f"reserve() copies one of entities 0 to {len(scene) - 1} of a scene; got {like}.")
    values: dict[str, Any] = {}
    for name in scene:
        rows = scene[name]
        per_entity = scene.fields[name].per == "entity"
        values[name] = torch.cat([rows, rows[like : like + 1].expand(count, *rows.shape[1:])]) if per_entity else rows
    active = torch.cat([scene.active, scene.active.new_zeros(count)])
    return type(scene)(active=active, **values)


def _when(at: When) -> int | range | Expression | Callable[[State, int], bool]:
    if isinstance(at, str):
        return Expression(at)
    if isinstance(at, range) and not at:
        raise ValueError(f"`at` is a range without a step, {at}; let it end after it begins.")
    if callable(at) or isinstance(at, range | Expression):
        return at
    try:
        step = -1 if isinstance(at, bool) else operator.index(at)
    except TypeError:
        step = -1
    if step < 0:
        raise ValueError(f"`at` is a step, 0 or more, a range of them or an event; got {at!r}.")
    return step


def _said_when(at: object) -> Any:
    if isinstance(at, range):
        ends = [at.start] if at.stop == sys.maxsize else [at.start, at.stop]
        return ends if at.step == 1 else [at.start, at.stop, at.step]
    if isinstance(at, int):
        return at
    return at.text if isinstance(at, Expression) else _said_value(at)


def _said_value(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_said_value(one) for one in value]
    return f"{FUNCTION} {getattr(value, '__name__', type(value).__name__)}" if callable(value) else value


def chosen_rows(entities: Entities | None, verb: str) -> tuple[Tensor | Expression | None, int | None]:
    """Return rows, or a condition that tells them, and the length of the mask that they came from."""
    if entities is None or isinstance(entities, Expression):
        return entities, None
    if isinstance(entities, str):
        return Expression(entities), None
    try:
        chosen = torch.as_tensor(entities)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{verb}() takes entity numbers or a mask of entities; got {entities!r}.") from error
    if chosen.dtype == torch.bool and chosen.ndim == 1:
        return chosen.nonzero()[:, 0], len(chosen)
    if chosen.dtype == torch.bool or (chosen.is_floating_point() and chosen.numel()):
        raise ValueError(
            f"{verb}() takes entity numbers or a mask of entities [n]; got {list(chosen.shape)} of {chosen.dtype}."
        )
    return chosen.long().reshape(-1), None


def _check_known(state: State, name: str) -> None:
    if name != "active" and name not in state.fields:
        raise ValueError(
            f"do() cannot change '{name}': {type(state).__name__} has {', '.join(state.fields)}, active and actions."
        )
    if name in state.past_fields:
        source = state.fields[name].past_of
        both = ", or take both from others by replace_slots" if source == "slots" else ""
        raise ValueError(f"do() cannot change '{name}', which follows from {source}; change that{both}.")
    if name != "active" and name not in state:
        raise ValueError(f"do() cannot change '{name}', which this {type(state).__name__} does not carry.")


def _put(name: str, change: Change, current: Tensor, rows: Tensor | None, mask_size: int | None) -> Tensor:
    """Return a field with changed rows; where these came from a mask, the field has as many."""
    value = _value(name, change, _picked(name, current, rows, mask_size))
    return value.clone() if rows is None else current.index_put((rows.to(current.device),), value)


def _check_sense(state: State, name: str, made: Tensor, change: Change) -> None:
    """Raise a ValueError where a table names entities that there are not, types are negative, or a box is none."""
    if state.fields[name].per == "index":
        if isinstance(change, Rule) and change.verb not in ("set", "hold"):
            raise ValueError(f"'{name}' names entities by number, which nothing can {change.verb}; set its rows.")
        twice = made.sort(1).values.diff(dim=1).eq(0).any() if made.ndim == 2 else False
        if made.numel() and (int(made.min()) < 0 or int(made.max()) >= len(state) or bool(twice)):
            raise ValueError(f"Each row of '{name}' names different entities from 0 to {len(state) - 1}; set others.")
    if name.endswith("_types") and bool((made < 0).any()):
        raise ValueError(f"{name} are 0 or more; got {int(made.min())}.")
    if name == "boundaries" and bool((made[:, 0] >= made[:, 1]).any()):
        raise ValueError(f"boundaries are a lower and a higher upper corner; got {made.tolist()}.")


def _picked(name: str, current: Tensor, rows: Tensor | None, mask_size: int | None) -> Tensor:
    """Return rows of a field, all where none are named."""
    if rows is None:
        return current
    if mask_size not in (None, len(current)):
        raise ValueError(f"do() got a mask of {mask_size} entities; '{name}' has {len(current)} rows.")
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= len(current)):
        raise ValueError(f"do() got entities {rows.tolist()}; '{name}' has rows 0 to {len(current) - 1}.")
    return current[rows.to(current.device)]


def current_rows(state: State, name: str) -> Tensor:
    """Return a field, or which entities there are."""
    return state.active if name == "active" else state[name]


def _turned(rows: Tensor, degrees: float) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] not in (2, 3):
        raise ValueError(f"rotate is for vectors [n, 2] or [n, 3]; got {list(rows.shape)}.")
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x, y = rows[:, 0], rows[:, 1]
    return torch.cat([torch.stack([cosine * x - sine * y, sine * x + cosine * y], 1), rows[:, 2:]], 1)


def _value(name: str, change: Change, current: Tensor) -> Tensor:
    """Return what rows are changed to, of their shape and dtype."""
    try:
        value = _fitting("do", change(current) if callable(change) else change, current)
    except ValueError as error:
        raise ValueError(f"do() cannot change '{name}' so: {error}") from error
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"do() must give '{name}' finite values; got NaN or infinity.")
    return value


def _fitting(verb: str, value: Any, rows: Tensor) -> Tensor:
    """Return a value as a tensor of the shape and dtype of rows; whole numbers and flags stay what they are."""
    try:
        given = torch.as_tensor(value, device=rows.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{verb} takes a number, true or false, or rows of them; got {value!r}.") from error
    made = given.to(rows.dtype)
    if not rows.is_floating_point() and bool((made != given).any()):
        kind = "true or false" if rows.dtype == torch.bool else "whole numbers"
        raise ValueError(f"these rows are {kind}; got {given.tolist()}.")
    try:
        return made.expand_as(rows)
    except RuntimeError as error:
        raise ValueError(f"{verb} takes one value or {list(rows.shape)} of them; got {list(given.shape)}.") from error


def _check_overlaps(before: State, after: State) -> None:
    """Raise a ValueError if bodies lie deeper in each other than before, those joined or both fixed left aside."""
    if "radii" not in after or "positions" not in after:
        return
    moved = (
        (after.positions != before.positions).any(1) | (after.radii != before.radii) | (after.active & ~before.active)
    )
    moved = (moved & after.active & (after.radii > 0)).nonzero()[:, 0]
    for rows in torch.split(moved, max(1, DISTANCES_AT_ONCE // len(after))):
        _check_depths(before, after, rows)


def _check_depths(before: State, after: State, rows: Tensor) -> None:
    depth, depth_before = (_depths(state, rows) for state in (after, before))
    old = before.active[rows][:, None] & before.active
    least = LEAST_OVERLAP * after.radii[rows][:, None]
    wrong = (depth > least) & ((depth > depth_before + least) | ~old)
    wrong &= after.active & (after.radii > 0) & (after.batch[rows][:, None] == after.batch)
    wrong[torch.arange(len(rows), device=rows.device), rows] = False
    if "fixed" in after:
        wrong &= ~(after.fixed[rows][:, None] & after.fixed)
    if bool(wrong.any()):
        first = wrong.nonzero()[0]
        a, b = int(rows[first[0]]), int(first[1])
        raise ValueError(
            f"This intervention leaves bodies {a} and {b} overlapping by {float(depth[first[0], first[1]]):.4g}: radii "
            f"{float(after.radii[a]):.4g} and {float(after.radii[b]):.4g}. Move them apart or make one smaller."
        )


def _depths(state: State, rows: Tensor) -> Tensor:
    apart = torch.cdist(state.positions[rows], state.positions, compute_mode="donot_use_mm_for_euclid_dist")
    return state.radii[rows][:, None] + state.radii - apart
