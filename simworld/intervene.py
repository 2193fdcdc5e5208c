"""Interventions: functions `(state, step) -> state` that hold a world to something else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from simworld.simulate import Intervention
from simworld.state import State
from simworld.trajectory import Trajectory

When = int | range | Callable[[State, int], bool]
Change = Tensor | float | bool | Callable[[Tensor], Tensor]
Entities = Tensor | list[int] | int


def do(*, at: When = 0, entities: Entities | None = None, **changes: Change) -> Intervention:
    """Return the intervention that sets fields of some entities at some steps.

    `at` is a step, a range of steps, or an event `(state, step) -> bool`. `entities` are entity numbers or a
    mask of entities, all if None; for a field whose rows are not entities, they are its rows. `changes` maps
    fields, or `active`, to a value or to a function of the current rows. `do(active=False, entities=[3])`
    removes body 3. A step at which `at` does not hold returns the state itself.

    Raises:
        ValueError: nothing is to be changed; when applied, an unknown field or rows of another shape.
    """
    if not changes:
        raise ValueError("do() changes nothing; name a field and its value, as in do(at=0, velocities=v).")
    chosen = None if entities is None else torch.as_tensor(entities)
    rows = None if chosen is None else _rows(chosen)
    mask = len(chosen) if chosen is not None and chosen.dtype == torch.bool else None
    at = at if callable(at) or isinstance(at, range) else operator.index(at)

    def intervention(state: State, step: int) -> State:
        if not _applies(at, state, step):
            return state
        made = {name: _changed(state, name, change, rows, mask) for name, change in changes.items()}
        return state.replace(**made)

    return intervention


def prescribe(target: Trajectory, entities: Entities, *names: str) -> Intervention:
    """Return the intervention that moves some entities as a trajectory has it: at step t as in its frame t.

    `entities` are entity numbers or a mask of entities, the same in the state and in `target`; `names` are fields
    of the trajectory's frames, or `active`: positions and velocities, if none are named. Everything else is left
    to the simulator. After the last frame of `target`, and for no entities, the state itself is returned: what
    was prescribed is then moved as the simulator moves it, which is on at their velocity for kinematic particles.

    Raises:
        ValueError: `target` has no such quantity per entity, or no such entity; when applied, the state has
            other entities than `target`.
    """
    chosen, start = torch.as_tensor(entities), target.initial
    rows = _rows(chosen, "prescribe")
    if chosen.dtype == torch.bool and len(chosen) != start.num_entities:
        raise ValueError(f"prescribe() got a mask of {len(chosen)} entities; the trajectory has {start.num_entities}.")
    names = names or ("positions", "velocities")
    known = ("active", *(name for name in start.moving_fields if name in target.frames))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"prescribe() takes what the trajectory has of each entity, {', '.join(known)}; got {unknown}."
        )
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < start.num_entities:
        raise ValueError(f"prescribe() got entities {rows.tolist()}; there are 0 to {start.num_entities - 1}.")

    def intervention(state: State, step: int) -> State:
        if step >= len(target) or not rows.numel():
            return state
        if state.num_entities != start.num_entities:
            raise ValueError(
                f"prescribe() follows a trajectory of {start.num_entities} entities; the state has "
                f"{state.num_entities}. Start from a frame of that trajectory."
            )
        made = {}
        for name in names:
            current, wanted = _current(state, name), (target.active if name == "active" else target[name])[step]
            here = rows.to(current.device)
            made[name] = current.index_copy(0, here, wanted.to(current)[here])
        return state.replace(**made)

    return intervention


def script(target: Trajectory, but: Collection[str] = ()) -> tuple[Intervention, ...]:
    """Return what holds the kinematic entities of a trajectory to what it has of them; nothing where it has none.

    All their fields are given `but` those that a simulator predicts of them, too: pressure at a wall, for example.
    """
    start = target.initial
    names = [name for name in start.moving_fields if name in target.frames and name not in but]
    if not names or "kinematic" not in start or not bool(start.kinematic.any()):
        return ()
    return (prescribe(target, start.kinematic, *names),)


def _rows(entities: Tensor, verb: str = "do") -> Tensor:
    if entities.dtype == torch.bool:
        return entities.nonzero()[:, 0]
    if entities.is_floating_point() and len(entities.reshape(-1)):
        raise ValueError(f"{verb}() takes entity numbers or a mask of entities; got {entities.dtype}.")
    return entities.long().reshape(-1)


def _applies(at: When, state: State, step: int) -> bool:
    if isinstance(at, int):
        return step == at
    return step in at if isinstance(at, range) else bool(at(state, step))


def _changed(state: State, name: str, change: Change, rows: Tensor | None, mask: int | None) -> Tensor:
    """Return a field with changed rows; where these came from a mask of `mask` entries, the field has as many."""
    if name != "active" and name not in state.fields:
        raise ValueError(
            f"do() cannot change '{name}': {type(state).__name__} has {', '.join(state.fields)} and active."
        )
    if name in state.past_fields:
        raise ValueError(f"do() cannot change '{name}', which follows from {state.fields[name].past_of}; change that.")
    if name != "active" and name not in state:
        raise ValueError(f"do() cannot change '{name}', which this {type(state).__name__} does not carry.")
    current = _current(state, name)
    if rows is None:
        return _value(name, change, current).clone()
    if mask not in (None, len(current)):
        raise ValueError(f"do() got a mask of {mask} entities; '{name}' has {len(current)} rows.")
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= len(current)):
        raise ValueError(f"do() got entities {rows.tolist()}; '{name}' has rows 0 to {len(current) - 1}.")
    rows = rows.to(current.device)
    return current.index_put((rows,), _value(name, change, current[rows]))


def _current(state: State, name: str) -> Tensor:
    return state.active if name == "active" else state[name]


def _value(name: str, change: Change, current: Tensor) -> Tensor:
    """Return what rows are changed to, of their shape and dtype."""
    value = change(current) if callable(change) else torch.as_tensor(change)
    value = value.to(dtype=current.dtype, device=current.device)
    try:
        value = value.expand_as(current)
    except RuntimeError as error:
        raise ValueError(
            f"do() must give '{name}' one value or {list(current.shape)} of them; got {list(value.shape)}."
        ) from error
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"do() must give '{name}' finite values; got NaN or infinity.")
    return value
